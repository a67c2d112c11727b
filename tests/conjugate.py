"""Conjugate pairs with their exact posteriors and evidences, in closed forms that SciPy knows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from scipy import special, stats
from torch import Tensor

SIZE = 3


@dataclass(frozen=True)
class Pair:
    """Three copies of y ~ likelihood(z), z ~ prior: their posteriors and log evidences, batch shape (3)."""

    prior: Any
    likelihood: Callable[[Tensor], Any]
    data: Tensor
    posterior: Any
    evidence: np.ndarray

    def plate_model(self, subsample_size: int | None = None) -> Callable:
        """The copies in a plate."""

        def model() -> None:
            with pyro.plate("rows", SIZE, subsample_size=subsample_size) as index:
                z = pyro.sample("z", expanded(self.prior, len(index)))
                pyro.sample("y", self.likelihood(z), obs=self.data[index])

        return model

    def event_model(self) -> Callable:
        """The copies in an event dimension."""

        def model() -> None:
            z = pyro.sample("z", expanded(self.prior, SIZE).to_event(1))
            pyro.sample("y", self.likelihood(z).to_event(1), obs=self.data)

        return model


def expanded(distribution: Any, size: int) -> Any:
    return distribution.expand([size])


def normal() -> Pair:
    y = torch.tensor([0.3, -1.0, 2.5])
    precision = 1 / 4 + 1 / 0.25
    posterior = dist.Normal((0.5 / 4 + y / 0.25) / precision, precision**-0.5)
    evidence = stats.norm(0.5, np.sqrt(4.25)).logpdf(y)
    return Pair(dist.Normal(0.5, 2.0), lambda z: dist.Normal(z, 0.5), y, posterior, evidence)


def log_normal() -> Pair:
    y = torch.tensor([0.3, -1.0, 1.5])
    posterior = dist.LogNormal((0.2 / 1 + y / 0.25) / 5, 5**-0.5)
    evidence = stats.norm(0.2, np.sqrt(1.25)).logpdf(y)
    return Pair(dist.LogNormal(0.2, 1.0), lambda z: dist.Normal(z.log(), 0.5), y, posterior, evidence)


def logit_normal() -> Pair:
    """A prior of no family: a Normal pushed onto (0, 1)."""
    y = torch.tensor([0.3, -1.0, 1.5])
    sigmoid = [torch.distributions.SigmoidTransform()]
    prior = dist.TransformedDistribution(dist.Normal(0.2, 1.0), sigmoid)
    posterior = dist.TransformedDistribution(dist.Normal((0.2 + y / 0.25) / 5, 5**-0.5), sigmoid)
    evidence = stats.norm(0.2, np.sqrt(1.25)).logpdf(y)
    return Pair(prior, lambda z: dist.Normal(z.logit(), 0.5), y, posterior, evidence)


def multivariate_normal() -> Pair:
    y = torch.tensor([[0.3, 1.0], [-1.0, 0.5], [2.0, 0.1]])
    prior_precision = torch.tensor([[2.0, 0.5], [0.5, 1.0]])
    noise = torch.tensor([[3.0, -1.0], [-1.0, 2.0]])
    precision = prior_precision + noise
    mean = torch.linalg.solve(precision, (y @ noise).mT).mT
    covariance = torch.linalg.inv(prior_precision) + torch.linalg.inv(noise)
    return Pair(
        dist.MultivariateNormal(torch.zeros(2), precision_matrix=prior_precision),
        lambda z: dist.MultivariateNormal(z, precision_matrix=noise),
        y,
        dist.MultivariateNormal(mean, precision_matrix=precision),
        stats.multivariate_normal(np.zeros(2), covariance.numpy()).logpdf(y.numpy()),
    )


def gamma() -> Pair:
    y = torch.tensor([0.0, 3.0, 7.0])
    evidence = stats.nbinom(2.5, 1.5 / 2.5).logpmf(y)
    return Pair(dist.Gamma(2.5, 1.5), dist.Poisson, y, dist.Gamma(2.5 + y, torch.tensor(2.5)), evidence)


def exponential() -> Pair:
    y = torch.tensor([0.1, 1.0, 4.0])
    evidence = stats.lomax(1.0, scale=1.5).logpdf(y)
    return Pair(dist.Exponential(1.5), dist.Exponential, y, dist.Gamma(2.0 + 0 * y, 1.5 + y), evidence)


def inverse_gamma() -> Pair:
    y = torch.tensor([0.1, -1.0, 4.0])
    evidence = stats.t(6.0, scale=np.sqrt(2.0 / 3.0)).logpdf(y)
    posterior = dist.InverseGamma(3.5 + 0 * y, 2.0 + y**2 / 2)
    return Pair(dist.InverseGamma(3.0, 2.0), lambda z: dist.Normal(0.0, z.sqrt()), y, posterior, evidence)


def beta() -> Pair:
    y = torch.tensor([0.0, 2.0, 5.0])
    evidence = stats.betabinom(5, 1.5, 2.5).logpmf(y)
    return Pair(dist.Beta(1.5, 2.5), lambda z: dist.Binomial(5, z), y, dist.Beta(1.5 + y, 7.5 - y), evidence)


def uniform() -> Pair:
    y = torch.tensor([0.0, 1.0, 1.0])
    evidence = np.log([0.5, 0.5, 0.5])
    return Pair(dist.Uniform(0.0, 1.0), dist.Bernoulli, y, dist.Beta(1 + y, 2 - y), evidence)


def dirichlet() -> Pair:
    y = torch.tensor([0, 2, 1])
    alpha = torch.tensor([0.5, 1.0, 3.0])
    counts = torch.nn.functional.one_hot(y, 3)
    evidence = (alpha[y] / alpha.sum()).log().numpy()
    return Pair(dist.Dirichlet(alpha), dist.Categorical, y, dist.Dirichlet(alpha + counts), evidence)


def wishart() -> Pair:
    y = torch.tensor([[0.3, 1.0], [-1.0, 0.5], [2.0, 0.1]])
    scale = torch.tensor([[1.0, 0.3], [0.3, 0.5]])
    inverse = torch.linalg.inv(scale) + y.unsqueeze(-1) * y.unsqueeze(-2)
    shape = torch.linalg.inv(scale) / 3.0
    return Pair(
        dist.Wishart(torch.tensor(4.0), covariance_matrix=scale),
        lambda z: dist.MultivariateNormal(torch.zeros(2), precision_matrix=z),
        y,
        dist.Wishart(torch.full((3,), 5.0), precision_matrix=inverse),
        stats.multivariate_t(np.zeros(2), shape.numpy(), 3.0).logpdf(y.numpy()),
    )


def _mixture(prior: Any, states: Tensor, weights: Tensor, make: Callable[[Tensor], Any]) -> Pair:
    """z in finitely many states, y ~ N(mean of the state, 1)."""
    y = torch.tensor([-1.0, 0.2, 2.0])
    log_joint = weights.log() + dist.Normal(states, 1.0).log_prob(y.unsqueeze(-1))
    return Pair(prior, make, y, log_joint, special.logsumexp(log_joint.numpy(), -1))


def bernoulli() -> Pair:
    weights = torch.tensor([0.7, 0.3])
    pair = _mixture(dist.Bernoulli(0.3), torch.tensor([0.0, 1.0]), weights, lambda z: dist.Normal(z, 1.0))
    odds = pair.posterior[:, 1] - pair.posterior[:, 0]
    return Pair(pair.prior, pair.likelihood, pair.data, dist.Bernoulli(logits=odds), pair.evidence)


def categorical() -> Pair:
    means, weights = torch.tensor([-1.0, 0.0, 2.0]), torch.tensor([0.2, 0.5, 0.3])
    pair = _mixture(dist.Categorical(weights), means, weights, lambda z: dist.Normal(means[z], 1.0))
    posterior = dist.Categorical(logits=pair.posterior)
    return Pair(pair.prior, pair.likelihood, pair.data, posterior, pair.evidence)


def one_hot() -> Pair:
    means, weights = torch.tensor([-1.0, 0.0, 2.0]), torch.tensor([0.2, 0.5, 0.3])
    pair = _mixture(dist.OneHotCategorical(weights), means, weights, lambda z: dist.Normal(z @ means, 1.0))
    posterior = dist.OneHotCategorical(logits=pair.posterior)
    return Pair(pair.prior, pair.likelihood, pair.data, posterior, pair.evidence)


def binomial() -> Pair:
    """Finitely many states that are no indices of a Categorical."""
    weights = torch.as_tensor(stats.binom(3, 0.4).pmf(np.arange(4)))
    pair = _mixture(dist.Binomial(3, 0.4), torch.arange(4.0), weights, lambda z: dist.Normal(z, 1.0))
    posterior = dist.Categorical(logits=pair.posterior)
    return Pair(pair.prior, pair.likelihood, pair.data, posterior, pair.evidence)


PAIRS = {
    pair.__name__: pair
    for pair in (
        normal,
        log_normal,
        logit_normal,
        multivariate_normal,
        gamma,
        exponential,
        inverse_gamma,
        beta,
        uniform,
        dirichlet,
        wishart,
        bernoulli,
        categorical,
        one_hot,
        binomial,
    )
}
