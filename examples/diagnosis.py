"""Should this posterior be trusted?  The eight schools, centred and not (Rubin 1981).

The spread tau of the schools' effects and the effects themselves form a funnel that no Gaussian has.  `summary` says so; drawn
otherwise the model is nearly Gaussian, and weighing the draws of q corrects the rest.  `python examples/diagnosis.py funnel.png`
draws both.
"""

import sys

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer.reparam import LocScaleReparam

from pyro_blr import BLRInference

EFFECTS = [28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]
ERRORS = [15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]


def centred(errors, effects):
    """effect ~ Normal(theta, error), theta ~ Normal(mu, tau)."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(errors)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("effect", dist.Normal(theta, errors), obs=effects)


decentred = pyro.poutine.reparam(centred, config={"theta": LocScaleReparam(0.0)})


def theta_of(draws):
    """The first school's effect, from its own site or from the standard normal that stands for it."""
    return draws["theta"][:, 0] if "theta" in draws else draws["mu"] + draws["tau"] * draws["theta_decentered"][:, 0]


def plot(weighed, path):
    """Draws of q, and the same resampled by their weights."""
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained", sharex=True, sharey=True)
    for panel, (title, found) in zip(axes, weighed.items(), strict=True):
        for draws, label, color in [(found.draws, "q", "lightgrey"), (found.resample(1000), "weighed", "C0")]:
            panel.scatter(theta_of(draws), draws["tau"].log(), s=4, color=color, label=label)
        panel.set(title=f"{title}: k-hat {found.khat:.2f}", xlabel="theta of the first school", xlim=(-25, 45))
    axes[0].set_ylabel("log tau")
    axes[0].legend()
    figure.savefig(path, dpi=130)


def main(picture=None):
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(0)
    errors, effects = torch.tensor(ERRORS), torch.tensor(EFFECTS)
    weighed = {}
    for model, title, blocks in [(centred, "centred, sites", "sites"), (decentred, "decentred, one Gaussian", "auto")]:
        engine = BLRInference(model, blocks=blocks)
        posterior = engine.run(errors, effects, progress=False)
        print(f"--- {title}; every message exact: {engine.explain(errors, effects).exact}")
        print(posterior.summary(sites=["mu", "tau"]))
        weighed[title] = posterior.psis(4000)
    if picture is not None:
        plot(weighed, picture)
        print(f"The draws are in {picture}.")


if __name__ == "__main__":
    main(*sys.argv[1:])
