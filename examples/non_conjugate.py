"""Is a tumour malignant?  Logistic regression: not conjugate, yet without Monte-Carlo noise.

The likelihood acts on the weights through one affine predictor a row, so its expectation is a one-dimensional
Gauss-Hermite quadrature (Khan and Lin 2017).  The messages of the priors stay exact.
Data: thirty measurements of 569 cell nuclei, Wisconsin (Street, Wolberg and Mangasarian 1993).
"""

import pyro
import pyro.distributions as dist
import torch
from sklearn.datasets import load_breast_cancer

from pyro_blr import BLRInference


def model(x, malignant=None):
    """malignant ~ Bernoulli(logits = b + x w), the precision of the weights to be learnt."""
    precision = pyro.sample("precision", dist.Gamma(1.0, 1.0))
    with pyro.plate("measurements", x.shape[-1]):
        w = pyro.sample("w", dist.Normal(0.0, precision.rsqrt()))
    b = pyro.sample("b", dist.Normal(0.0, 10.0))
    with pyro.plate("tumours", x.shape[0]):
        pyro.sample("malignant", dist.Bernoulli(logits=b + x @ w), obs=malignant)


def main():
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(0)
    data = load_breast_cancer()
    x, malignant = torch.tensor(data.data), torch.tensor(data.target == 0).double()
    order = torch.randperm(len(x))
    train, test = order[:400], order[400:]
    x = (x - x[train].mean(0)) / x[train].std(0)

    engine = BLRInference(model)
    posterior = engine.run(x[train], malignant[train], progress=False)
    print(engine.explain(x[train], malignant[train]))
    print(f"ELBO: {posterior.elbo}")

    draws = posterior.sample((2000,))
    probability = (draws["b"][:, None] + draws["w"] @ x[test].T).sigmoid().mean(0)
    correct = (probability > 0.5) == malignant[test].bool()
    log_loss = -dist.Bernoulli(probability).log_prob(malignant[test]).mean()
    print(f"of {len(test)} tumours left out, {int(correct.sum())} are told right; log loss {log_loss:.3f}")


if __name__ == "__main__":
    main()
