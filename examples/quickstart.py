"""What predicts the course of diabetes?  A linear regression with unknown noise and shrinkage.

Data: 442 patients, ten standardised measurements, disease progression a year later (Efron et al. 2004).
"""

import sys

import arviz
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from sklearn.datasets import load_diabetes

from pyro_blr import BLRInference

NAMES = ["age", "sex", "body mass", "blood pressure", "cholesterol", "LDL", "HDL"]
NAMES += ["cholesterol / HDL", "log triglycerides", "glucose"]


def model(x, y=None):
    """y = b + x w + noise, with a precision of the noise and one of the weights, both to be learnt."""
    noise_precision = pyro.sample("noise_precision", dist.Gamma(1.0, 1.0))
    weight_precision = pyro.sample("weight_precision", dist.Gamma(1.0, 1.0))
    with pyro.plate("measurements", x.shape[-1]):
        w = pyro.sample("w", dist.Normal(0.0, weight_precision.rsqrt()))
    b = pyro.sample("b", dist.Normal(0.0, 10.0))
    with pyro.plate("patients", x.shape[0]):
        pyro.sample("y", dist.Normal(b + x @ w, noise_precision.rsqrt()), obs=y)


def load():
    """Standardised measurements and progression."""
    data = load_diabetes(scaled=False)
    x, y = torch.tensor(data.data), torch.tensor(data.target)
    return (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()


def plot(w, path):
    """Every weight's posterior mean with its central 95 % interval."""
    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    axes.errorbar(w.mean.tolist(), NAMES, xerr=(1.96 * w.stddev).tolist(), fmt="o", capsize=3)
    axes.axvline(0.0, color="grey", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel("sd of progression per sd of the measurement")
    figure.savefig(path, dpi=150)


def main(picture="quickstart.png"):
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(0)
    x, y = load()

    engine = BLRInference(model)
    posterior = engine.run(x, y)
    print(engine.explain(x, y))
    print(f"ELBO: {posterior.elbo}")

    data = posterior.to_arviz()
    print(arviz.summary(data, kind="stats"))
    plot(posterior["w"], picture)
    print(f"The weights are drawn in {picture}.")


if __name__ == "__main__":
    main(*sys.argv[1:])
