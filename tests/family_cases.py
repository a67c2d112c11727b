"""One row a way of writing a distribution, one row a support: what the tests of families run over."""

import warnings
from collections.abc import Callable
from unittest import mock

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

from pyro_blr.families import ExponentialFamily, Pattern, SparseNormal, family_of, pushforward_family

F64 = torch.float64
BATCHES = [(), (3,), (2, 3)]


def uniform(*shape: int, low: float = 0.5, high: float = 3.0) -> Tensor:
    return low + (high - low) * torch.rand(shape, dtype=F64)


def tril(*shape: int) -> Tensor:
    """Random Cholesky factors (*batch, d, d)."""
    return torch.randn(shape, dtype=F64).tril(-1) * 0.5 + torch.diag_embed(uniform(*shape[:-1]))


def spd(*shape: int) -> Tensor:
    factor = tril(*shape)
    return factor @ factor.mT


def mean(*shape: int) -> Tensor:
    return 2 * torch.randn(shape, dtype=F64)


def probs(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=F64).softmax(-1)


normal = dist.MultivariateNormal


def pattern(dimension: int, pairs: list[tuple[int, int]]) -> Pattern:
    """A small pattern that is eliminated as a large one would be."""
    found = Pattern.of(dimension, *torch.tensor(pairs).unbind(-1))
    with mock.patch.multiple("pyro_blr.families._pattern", _SMALL=1, _HUB=(3, 2), _DENSE=2.0):
        assert found.elimination is not None and found.elimination.levels(torch.device("cpu"))
    return found


CHAIN = pattern(5, [(1, 0), (2, 1), (3, 2), (4, 3)])
ARROW = pattern(6, [(0, 5), (1, 5), (2, 5), (3, 5), (4, 5), (1, 0)])
PATTERNS = {"SparseNormal chain": CHAIN, "SparseNormal arrow": ARROW}


def field(pattern: Pattern, *b: int) -> dist.MultivariateNormal:
    """A Gaussian whose precision has this pattern."""
    d, (i, j) = pattern.dimension, (pattern.rows, pattern.columns)
    precision = torch.zeros(*b, d, d, dtype=F64)
    precision[..., i, j] = torch.randn(*b, len(i), dtype=F64)
    precision = precision + precision.mT
    return normal(mean(*b, d), precision_matrix=precision + torch.diag_embed(precision.abs().sum(-1) + uniform(*b, d)))


def low_rank(*b: int) -> dist.LowRankMultivariateNormal:
    return dist.LowRankMultivariateNormal(mean(*b, 3), mean(*b, 3, 1), uniform(*b, 3))


DISTRIBUTIONS: dict[str, Callable] = {
    "Normal": lambda *b: dist.Normal(mean(*b), uniform(*b)),
    "MultivariateNormal": lambda *b: normal(mean(*b, 3), scale_tril=tril(*b, 3, 3)),
    "MultivariateNormal covariance": lambda *b: normal(mean(*b, 2), spd(*b, 2, 2)),
    "MultivariateNormal precision": lambda *b: normal(mean(*b, 2), precision_matrix=spd(*b, 2, 2)),
    "MultivariateNormal shared": lambda *b: normal(mean(*b, 2), spd(2, 2)),
    "LowRankMultivariateNormal": low_rank,
    "SparseNormal chain": lambda *b: field(CHAIN, *b),
    "SparseNormal arrow": lambda *b: field(ARROW, *b),
    "LogNormal": lambda *b: dist.LogNormal(mean(*b), uniform(*b, high=1.0)),
    "Gamma": lambda *b: dist.Gamma(uniform(*b), uniform(*b)),
    "Exponential": lambda *b: dist.Exponential(uniform(*b)),
    "Chi2": lambda *b: dist.Chi2(uniform(*b)),
    "InverseGamma": lambda *b: dist.InverseGamma(uniform(*b), uniform(*b)),
    "Beta": lambda *b: dist.Beta(uniform(*b), uniform(*b)),
    "Uniform": lambda *b: dist.Uniform(torch.zeros(b, dtype=F64), torch.ones(b, dtype=F64)),
    "Dirichlet": lambda *b: dist.Dirichlet(uniform(*b, 4)),
    "Bernoulli": lambda *b: dist.Bernoulli(uniform(*b, low=0.1, high=0.9)),
    "Bernoulli logits": lambda *b: dist.Bernoulli(logits=mean(*b)),
    "Binomial": lambda *b: dist.Binomial(1, uniform(*b, low=0.1, high=0.9)),
    "Categorical": lambda *b: dist.Categorical(probs(*b, 4)),
    "Categorical logits": lambda *b: dist.Categorical(logits=mean(*b, 4)),
    "OneHotCategorical": lambda *b: dist.OneHotCategorical(probs(*b, 3)),
    "OneHotCategorical logits": lambda *b: dist.OneHotCategorical(logits=mean(*b, 3)),
    "Multinomial": lambda *b: dist.Multinomial(1, probs(*b, 3)),
    "Wishart covariance": lambda *b: dist.Wishart(uniform(*b, low=2.7), spd(*b, 3, 3)),
    "Wishart precision": lambda *b: dist.Wishart(uniform(*b, low=2.7), precision_matrix=spd(*b, 3, 3)),
    "Wishart": lambda *b: dist.Wishart(uniform(*b, low=1.7), scale_tril=tril(*b, 2, 2)),
}
SUPPORTS = {
    "positive": (constraints.positive, ()),
    "unit_interval": (constraints.unit_interval, ()),
    "interval": (constraints.interval(-2.0, 5.0), ()),
    "half_open_interval": (constraints.half_open_interval(0.0, 3.0), ()),
    "greater_than": (constraints.greater_than(3.0), ()),
    "less_than": (constraints.less_than(-1.0), ()),
    "positive vector": (constraints.positive, (3,)),
    "positive matrix": (constraints.independent(constraints.positive, 2), (2, 2)),
    "real matrix": (constraints.independent(constraints.real, 2), (2, 2)),
    "simplex": (constraints.simplex, (4,)),
    "two simplices": (constraints.independent(constraints.simplex, 1), (2, 3)),
    "ordered_vector": (constraints.ordered_vector, (3,)),
    "lower_cholesky": (constraints.lower_cholesky, (2, 2)),
    "positive_definite": (constraints.positive_definite, (2, 2)),
    "corr_cholesky": (constraints.corr_cholesky, (3, 3)),
    "corr_matrix": (constraints.corr_matrix, (3, 3)),
}
DIAGONAL = {  # the same with independent elements of u
    "diagonal simplex": (constraints.simplex, (4,)),
    "diagonal two simplices": (constraints.independent(constraints.simplex, 1), (2, 3)),
    "diagonal corr_cholesky": (constraints.corr_cholesky, (3, 3)),
    "diagonal positive vector": (constraints.positive, (3,)),
    "diagonal real vector": (constraints.real_vector, (3,)),
}
NAMES = [*DISTRIBUTIONS, *SUPPORTS, *DIAGONAL]


def make(name: str, batch: tuple[int, ...] = ()) -> tuple[ExponentialFamily, Tensor, dist.Distribution]:
    """(family, λ, the distribution that λ was read from)."""
    if name in SUPPORTS or name in DIAGONAL:
        family = pushforward_family(*{**SUPPORTS, **DIAGONAL}[name], diagonal=name in DIAGONAL)
        d = family.base.event_shape
        if name in DIAGONAL:
            base = dist.Normal(mean(*batch, *d) / 2, uniform(*batch, *d, high=1.0)).to_event(1)
        elif d:
            base = dist.MultivariateNormal(mean(*batch, *d) / 2, spd(*batch, *d, *d) / 4)
        else:
            base = dist.Normal(mean(*batch) / 2, uniform(*batch, high=1.0))
        natural = family.base.from_distribution(base)
        return family, natural, family.to_distribution(natural)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Low df values")  # torch's word on ν < d, which is well defined
        distribution = DISTRIBUTIONS[name](*batch)
    family = SparseNormal(PATTERNS[name]) if name in PATTERNS else family_of(distribution)
    return family, family.from_distribution(distribution), distribution


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
