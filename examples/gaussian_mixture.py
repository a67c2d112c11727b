"""Do flowers fall into their species by themselves?  A Gaussian mixture, its labels enumerated.

Every message is exact: Dirichlet, Normal, Gamma, Categorical, in turn (variational message passing).
Data: four lengths of 150 irises (Fisher 1936); the species are used only to look at the result.
"""

import pyro
import pyro.distributions as dist
import torch
from sklearn.datasets import load_iris

from pyro_blr import BLRInference

NUM_COMPONENTS = 3


def model(x):
    """x[n] ~ Normal(mean[z[n]], 1 / precision[z[n]]), each length with its own mean and precision."""
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(NUM_COMPONENTS)))
    with pyro.plate("components", NUM_COMPONENTS):
        mean = pyro.sample("mean", dist.Normal(torch.zeros(4), 3.0).to_event(1))
        precision = pyro.sample("precision", dist.Gamma(torch.full((4,), 2.0), 0.5).to_event(1))
    with pyro.plate("flowers", x.shape[0]):
        z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(mean[z], precision[z].rsqrt()).to_event(1), obs=x)


def main():
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(0)
    data = load_iris()
    x = torch.tensor(data.data)
    x = (x - x.mean(0)) / x.std(0)

    engine = BLRInference(model)
    posterior = engine.run(x, num_restarts=5, progress=False)
    print(engine.explain(x))
    print(f"ELBO of the best of five starts: {posterior.elbo}")
    print("weights:", [round(p, 3) for p in posterior["weights"].mean.tolist()])

    component = posterior["z"].probs.argmax(-1)
    for species, name in enumerate(data.target_names):
        inside = component[torch.tensor(data.target == species)]
        print(f"{name:>10}: {torch.bincount(inside, minlength=NUM_COMPONENTS).tolist()} flowers by component")


if __name__ == "__main__":
    main()
