"""E_q[log f] is an integral over independent arguments: by quadrature, for matrices by an average."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from test_likelihoods import definite, vector
from torch import Tensor

from pyro_blr.likelihoods import (
    Constant,
    Expectation,
    Likelihood,
    Linear,
    Matrix,
    Positive,
    Probability,
    Simplex,
    Vector,
    likelihood_of,
)

LOG = Callable[..., Tensor]


def template(distribution: Any) -> Likelihood:
    likelihood = likelihood_of(distribution)
    assert likelihood is not None
    return likelihood


@dataclass(frozen=True)
class Random:
    """q(a): nodes and weights on the real line, and the expectations in closed form."""

    nodes: Tensor
    weights: Tensor
    expectation: Expectation


def grid(log_density: Callable[[Tensor], Tensor], low: float, high: float, step: float) -> tuple[Tensor, Tensor]:
    nodes = torch.arange(low, high, step)
    return nodes, torch.softmax(log_density(nodes), 0)


def gaussian(mean: float, sd: float) -> Random:
    nodes, weights = grid(lambda u: -0.5 * u**2, -9.0, 9.0, 0.4)
    return Random(mean + sd * nodes, weights, Linear(torch.tensor(mean), torch.tensor(sd**2)))


def gamma(a: float, b: float) -> Random:
    nodes, weights = grid(lambda u: a * u - b * u.exp(), -14.0, 5.0, 0.15)
    log = torch.digamma(torch.tensor(a)) - math.log(b)
    return Random(nodes.exp(), weights, Positive(torch.tensor(a / b), log))


def beta(a: float, b: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    nodes, weights = grid(lambda u: -a * torch.log1p((-u).exp()) - b * torch.log1p(u.exp()), -14.0, 14.0, 0.15)
    a_, b_ = torch.tensor(a), torch.tensor(b)
    total = torch.digamma(a_ + b_)
    return torch.sigmoid(nodes), weights, torch.digamma(a_) - total, torch.digamma(b_) - total


def probability(a: float, b: float) -> Random:
    nodes, weights, log, log_complement = beta(a, b)
    return Random(nodes, weights, Probability(log, log_complement))


def pair(a: float, b: float) -> Random:
    nodes, weights, log, log_complement = beta(a, b)
    logs = torch.stack([log, log_complement])
    return Random(torch.stack([nodes, 1 - nodes], -1), weights, Simplex(logs))


def constant(value: Any) -> Random:
    point = torch.as_tensor(value)
    return Random(point[None], torch.ones(1), Constant(point))


def passing(distribution: Any, *names: str) -> Callable[..., Tensor]:
    """log f as a function of the value and of constructor arguments of these names."""
    return lambda x, *a: distribution(**dict(zip(names, a, strict=True)), validate_args=False).log_prob(x)


def integrals() -> dict[Any, tuple[dict[str, Random], LOG]]:
    """distribution -> canonical arguments under q, log f as a function of these."""
    loc, precision, rate, probs = gaussian(0.7, 0.6), gamma(4.0, 3.0), gamma(5.0, 2.0), probability(4.0, 3.5)
    simplex, alpha, beta_ = pair(4.0, 5.0), constant(1.7), constant(2.4)
    count = constant(3.0)
    return {
        dist.Normal: (
            {"value": gaussian(-0.4, 0.8), "loc": loc, "precision": precision},
            lambda x, m, tau: dist.Normal(m, tau.rsqrt()).log_prob(x),
        ),
        dist.LogNormal: (
            {"log_value": gaussian(-0.4, 0.8), "loc": loc, "precision": precision},
            lambda u, m, tau: dist.LogNormal(m, tau.rsqrt()).log_prob(u.exp()),
        ),
        dist.Gamma: (
            {"value": precision, "concentration": alpha, "rate": rate},
            passing(dist.Gamma, "concentration", "rate"),
        ),
        dist.InverseGamma: (
            {"inverse": precision, "concentration": alpha, "rate": rate},
            lambda u, a, b: dist.InverseGamma(a, b).log_prob(1 / u),
        ),
        dist.Exponential: ({"value": precision, "rate": rate}, passing(dist.Exponential, "rate")),
        dist.Poisson: ({"value": count, "rate": rate}, passing(dist.Poisson, "rate")),
        dist.Bernoulli: ({"value": constant(1.0), "probs": probs}, passing(dist.Bernoulli, "probs")),
        dist.Binomial: (
            {"value": count, "total_count": constant(9.0), "probs": probs},
            passing(dist.Binomial, "total_count", "probs"),
        ),
        dist.Geometric: ({"value": count, "probs": probs}, passing(dist.Geometric, "probs")),
        dist.NegativeBinomial: (
            {"value": count, "total_count": beta_, "probs": probs},
            passing(dist.NegativeBinomial, "total_count", "probs"),
        ),
        dist.Categorical: ({"value": constant(1), "probs": simplex}, passing(dist.Categorical, "probs")),
        dist.OneHotCategorical: (
            {"value": constant([0.0, 1.0]), "probs": simplex},
            passing(dist.OneHotCategorical, "probs"),
        ),
        dist.Multinomial: (
            {"value": constant([2.0, 5.0]), "probs": simplex},
            lambda x, p: dist.Multinomial(7, p).log_prob(x),
        ),
        dist.Beta: (
            {"value": probs, "concentration1": alpha, "concentration0": beta_},
            passing(dist.Beta, "concentration1", "concentration0"),
        ),
        dist.Dirichlet: (
            {"value": simplex, "concentration": constant([1.7, 2.4])},
            passing(dist.Dirichlet, "concentration"),
        ),
    }


SCALAR = "Normal LogNormal Gamma InverseGamma Exponential Poisson Bernoulli Binomial Geometric NegativeBinomial "
SCALAR += "Categorical OneHotCategorical Multinomial Beta Dirichlet"


@pytest.mark.parametrize("name", SCALAR.split())
def test_is_an_integral(name: str) -> None:
    arguments, log_f = integrals()[getattr(dist, name)]
    indices = torch.meshgrid(*(torch.arange(len(q.weights)) for q in arguments.values()), indexing="ij")
    columns = list(zip(arguments.values(), indices, strict=True))
    weights = torch.ones(())
    for q, i in columns:
        weights = weights * q.weights[i]
    expected = (weights * log_f(*(q.nodes[i] for q, i in columns))).sum()
    expectations = {name: q.expectation for name, q in arguments.items()}
    actual = template(getattr(dist, name)).expected_log_prob(expectations)
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)


def wishart(df: float, scale: Tensor) -> Matrix:
    d = scale.size(-1)
    digammas = torch.digamma((df - torch.arange(d)) / 2).sum()
    return Matrix(df * scale, digammas + d * math.log(2) + torch.logdet(scale))


N_DRAWS = 100_000


def draw_wishart(df: int, scale: Tensor) -> Tensor:
    """Sums of outer products: torch's sampler warns of singular draws where there are none."""
    factor = torch.linalg.cholesky(scale) @ torch.randn(N_DRAWS, scale.size(-1), df)
    return factor @ factor.mT


def assert_mean(draws: Tensor, expected: Tensor) -> None:
    error = draws.std() / len(draws) ** 0.5
    assert abs(draws.mean() - expected) < 5 * error, (draws.mean(), expected, error)


def test_multivariate_normal_is_an_average() -> None:
    q_value, q_loc = (dist.MultivariateNormal(vector(()), definite(())) for _ in range(2))
    scale = definite(())
    value, loc = (q.sample((N_DRAWS,)) for q in (q_value, q_loc))
    precision = draw_wishart(7, scale)
    x, m = (Vector(q.mean, q.covariance_matrix) for q in (q_value, q_loc))
    expected = template(dist.MultivariateNormal).expected_log_prob(
        {"value": x, "loc": m, "precision": wishart(7.0, scale)}
    )
    assert_mean(dist.MultivariateNormal(loc, precision_matrix=precision).log_prob(value), expected)


def test_wishart_is_an_average() -> None:
    value_scale, inverse_scale = definite(()), definite(())
    value = draw_wishart(6, value_scale)
    inverse = draw_wishart(8, inverse_scale)
    arguments = {
        "value": wishart(6.0, value_scale),
        "df": Constant(torch.tensor(5.5)),
        "inverse_scale": wishart(8.0, inverse_scale),
    }
    draws = dist.Wishart(torch.tensor(5.5), precision_matrix=inverse).log_prob(value)
    assert_mean(draws, template(dist.Wishart).expected_log_prob(arguments))


@pytest.mark.parametrize(
    "distribution, value",
    [
        (dist.Categorical, torch.tensor(2)),
        (dist.OneHotCategorical, torch.tensor([0.0, 0.0, 1.0])),
        (dist.Multinomial, torch.tensor([1.0, 0.0, 6.0])),
        (dist.Dirichlet, None),
    ],
)
def test_simplex_is_an_average(distribution: Any, value: Tensor | None) -> None:
    concentration = torch.tensor([1.5, 4.0, 2.0])
    probs = dist.Dirichlet(concentration).sample((N_DRAWS,))
    q = Simplex(torch.digamma(concentration) - torch.digamma(concentration.sum()))
    if value is None:
        arguments: dict[str, Expectation] = {
            "value": q,
            "concentration": Constant(torch.tensor([3.0, 2.0, 1.2])),
        }
        draws = dist.Dirichlet(torch.tensor([3.0, 2.0, 1.2])).log_prob(probs)
    else:
        extra = {"total_count": 7} if distribution is dist.Multinomial else {}
        arguments = {"value": Constant(value), "probs": q}
        draws = distribution(probs=probs, **extra).log_prob(value)
    assert_mean(draws, template(distribution).expected_log_prob(arguments))
