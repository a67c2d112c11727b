"""The multivariate Normal distribution whose precision is sparse: Gaussian Markov random fields."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyro.distributions as distributions
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from ._base import ExponentialFamily
from ._elimination import Elimination, Factor
from ._pattern import Pattern

__all__ = ["GaussianField", "SparseNormal"]

_HALVINGS = 40
_DENSE = 5000  # dimensions of a covariance matrix that is asked for whole


class GaussianField(TorchDistribution):
    """N(m, P⁻¹) with sparse P, by its factor: draws, density and variances at the cost of the pattern."""

    arg_constraints = {"loc": constraints.real_vector}
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, loc: Tensor, values: Tensor, elimination: Elimination, dtype: torch.dtype | None = None) -> None:
        self.loc, self.values, self.elimination = loc, values, elimination
        self.dtype = loc.dtype if dtype is None else dtype
        self._factor = elimination.factor(values)
        super().__init__(loc.shape[:-1], loc.shape[-1:], validate_args=False)

    def in_precision(self, dtype: torch.dtype) -> "GaussianField":
        """The same law, its draws and densities rounded."""
        return GaussianField(self.loc, self.values, self.elimination, dtype)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "GaussianField":
        shape = torch.Size(batch_shape)
        loc, values = self.loc.expand(*shape, -1), self.values.expand(*shape, -1)
        return GaussianField(loc, values, self.elimination, self.dtype)

    @property
    def mean(self) -> Tensor:
        return self.loc.to(self.dtype)

    @property
    def mode(self) -> Tensor:
        return self.mean

    @property
    def variance(self) -> Tensor:
        return self.elimination.inverse(self._factor)[..., : self.elimination.dimension].to(self.dtype)

    @property
    def covariance_matrix(self) -> Tensor:
        return self.covariance(torch.arange(self.elimination.dimension, device=self.loc.device)).to(self.dtype)

    def covariance(self, index: Tensor) -> Tensor:
        """The covariance matrix of some of the variables."""
        if len(index) > _DENSE:
            raise ValueError(
                f"found {len(index):,} variables, expected at most {_DENSE:,} for a covariance matrix held whole; use `variance`, or draws"
            )
        units = torch.zeros(len(index), self.elimination.dimension, dtype=self.loc.dtype, device=self.loc.device)
        units[torch.arange(len(index)), index] = 1.0
        units = units.reshape(len(index), *[1] * (self.loc.dim() - 1), -1).expand(len(index), *self.loc.shape)
        return self.elimination.solve(self._factor, units)[..., index].movedim(0, -2)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        noise = torch.randn(self._extended_shape(sample_shape), dtype=self.dtype, device=self.loc.device)
        return (self.loc + self.elimination.colour(self._factor, noise.to(self.loc))).to(self.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        """½ log|P| − ½ (x − m)ᵀP(x − m) − ½ d log 2π."""
        centred = value.to(self.loc) - self.loc
        quadratic = (centred * self.elimination.times(self.values, centred)).sum(-1)
        constant = 0.5 * self.elimination.dimension * math.log(2 * math.pi)
        return (self.elimination.half_logdet(self._factor) - 0.5 * quadratic - constant).to(self.dtype)

    def entropy(self) -> Tensor:
        """½ d log 2πe − ½ log|P|."""
        constant = 0.5 * self.elimination.dimension * (1 + math.log(2 * math.pi))
        return (constant - self.elimination.half_logdet(self._factor)).to(self.dtype)


@dataclass(frozen=True)
class SparseNormal(ExponentialFamily):
    """N(m, V) with P = V⁻¹ zero but on a pattern: T(x) = (x, x_i², x_i x_j), λ = (P m, −½ P_ii, −P_ij), over the pairs i > j that
    the pattern holds or that fill in when it is eliminated; A(λ) = ½ mᵀPm − ½ log|P| + ½ d log 2π, μ = (m, V_ij + m_i m_j).

    The covariances that T needs are those that elimination gives back (Rue and Held 2005), so that all maps cost what the factor does.
    Error of μ -> λ as of `MultivariateNormal`.
    """

    pattern: Pattern

    @property
    def dimension(self) -> int:
        """Length of a value."""
        return self.pattern.dimension

    @property
    def elimination(self) -> Elimination:
        """The algebra of the pattern."""
        found = self.pattern.elimination
        if found is None:
            raise ValueError("found a pattern that fills in too much for a sparse Gaussian; use MultivariateNormal")
        return found

    @property
    def event_shape(self) -> torch.Size:
        return torch.Size([self.pattern.dimension])

    @property
    def num_parameters(self) -> int:
        return self.dimension + self.elimination.size

    def places(self, i: Tensor, j: Tensor) -> Tensor:
        """Where the covariances of these pairs stand in the concatenation of the moments "variance" and "entries"."""
        return self.elimination.places(i, j).to(i.device)

    def _split(self, natural: Tensor) -> tuple[Tensor, Tensor]:
        """P m and the values of P."""
        d = self.dimension
        return natural[..., :d], torch.cat([-2 * natural[..., d : 2 * d], -natural[..., 2 * d :]], -1)

    def _packed(self, vector: Tensor, values: Tensor) -> Tensor:
        d = self.dimension
        return torch.cat([vector, -0.5 * values[..., :d], -values[..., d:]], -1)

    def _factored(self, natural: Tensor) -> tuple[Tensor, Tensor, Factor]:
        """m, the values of P, and its factor."""
        vector, values = self._split(natural)
        factor = self.elimination.factor(values)
        return self.elimination.solve(factor, vector), values, factor

    def _products(self, value: Tensor) -> Tensor:
        """x_i x_j at the entries."""
        i, j = (end.to(value.device) for end in self.elimination.ends)
        return value[..., i] * value[..., j]

    def sufficient_statistics(self, value: Tensor) -> Tensor:
        return torch.cat([value, self._products(value)], -1)

    def log_partition(self, natural: Tensor) -> Tensor:
        mean, _, factor = self._factored(natural)
        constant = 0.5 * self.dimension * math.log(2 * math.pi)
        return 0.5 * (mean * natural[..., : self.dimension]).sum(-1) - self.elimination.half_logdet(factor) + constant

    def to_expectation(self, natural: Tensor) -> Tensor:
        mean, _, factor = self._factored(natural)
        return torch.cat([mean, self.elimination.inverse(factor) + self._products(mean)], -1)

    def to_natural(self, expectation: Tensor) -> Tensor:
        mean = expectation[..., : self.dimension]
        return self.natural_of(
            mean, self.elimination.precision(expectation[..., self.dimension :] - self._products(mean))
        )

    def natural_of(self, mean: Tensor, values: Tensor) -> Tensor:
        """λ of a mean and the values of a precision."""
        return self._packed(self.elimination.times(values, mean), values)

    def with_mean(self, natural: Tensor, mean: Tensor) -> Tensor:
        """λ with another mean and the same covariance."""
        return self.natural_of(mean, self._split(natural)[1])

    def independent(self, mean: Tensor, variance: Tensor) -> Tensor:
        """λ of independent variables."""
        rest = mean.new_zeros(*mean.shape[:-1], self.elimination.size - self.dimension)
        return self.natural_of(mean, torch.cat([variance.reciprocal(), rest], -1))

    def contains(self, natural: Tensor) -> Tensor:
        return natural.isfinite().all(-1) & ~self.elimination.factor(self._split(natural)[1]).failed

    def _bend(self, natural: Tensor, direction: Tensor) -> Tensor:
        """λ + d, or λ + ½ t d with the first t of ½, ¼, … that is inside: dP P⁻¹ dP, by which dense precisions bend, is not sparse."""
        fraction = torch.ones_like(natural[..., :1])
        for _ in range(_HALVINGS):
            outside = ~self.contains(natural + fraction * direction).unsqueeze(-1)
            if not bool(outside.any()):
                break
            fraction = torch.where(outside, 0.5 * fraction, fraction)
        return natural + torch.where(fraction < 1, 0.5 * fraction, fraction) * direction

    def moments(self, natural: Tensor) -> dict[str, Tensor]:
        """Mean, variances, and the covariances of the other entries."""
        mean, _, factor = self._factored(natural)
        covariance = self.elimination.inverse(factor)
        return {
            "mean": mean,
            "variance": covariance[..., : self.dimension],
            "entries": covariance[..., self.dimension :],
        }

    def message(self, natural: Tensor, gradients: Mapping[str, Tensor]) -> Tensor:
        """(∇_m f − G m, ∇_V f at the entries), G_ii = 2 ∂f/∂V_ii and G_ij = ∂f/∂V_ij."""
        d = self.dimension
        first = gradients.get("mean", torch.zeros_like(natural[..., :d]))
        if "variance" not in gradients and "entries" not in gradients:
            return torch.nn.functional.pad(first, (0, self.num_parameters - d))
        diagonal = gradients.get("variance", torch.zeros_like(first))
        rest = gradients.get("entries", natural.new_zeros(*natural.shape[:-1], self.elimination.size - d))
        mean = self._factored(natural)[0]
        first = first - self.elimination.times(torch.cat([2 * diagonal, rest], -1), mean)
        return torch.cat([first, diagonal, rest], -1)

    def to_distribution(self, natural: Tensor) -> Any:
        mean, values, _ = self._factored(natural)
        return GaussianField(mean, values, self.elimination)

    def from_distribution(self, distribution: Any) -> Tensor:
        if isinstance(distribution, GaussianField):
            return self.natural_of(distribution.loc, distribution.values)
        if isinstance(distribution, distributions.MultivariateNormal):
            precision = distribution.precision_matrix
            i, j = (end.to(precision.device) for end in self.elimination.ends)
            values = precision[..., i, j]
            outside = precision.clone()
            outside[..., i, j] = outside[..., j, i] = 0.0
            if not bool((outside.abs() > 1e-9 * precision.abs().max()).any()):
                return self.natural_of(distribution.loc, values)
        raise self._refuse(distribution)

    @classmethod
    def of(cls, distribution: Any) -> "SparseNormal | None":
        return None  # no distribution of a model has a pattern

    def entropy(self, natural: Tensor) -> Tensor:
        """½ d log 2πe − ½ log|P|."""
        factor = self.elimination.factor(self._split(natural)[1])
        return 0.5 * self.dimension * (1 + math.log(2 * math.pi)) - self.elimination.half_logdet(factor)

    def log_prob(self, natural: Tensor, value: Tensor) -> Tensor:
        return self.to_distribution(natural).log_prob(value)

    def kl(self, natural_q: Tensor, natural_p: Tensor) -> Tensor:
        """½ (tr(P_p V_q) − d − log|P_p V_q| + (m_q − m_p)ᵀ P_p (m_q − m_p))."""
        (mean_q, _, factor_q), (mean_p, values, factor_p) = self._factored(natural_q), self._factored(natural_p)
        d, covariance = self.dimension, self.elimination.inverse(factor_q)
        trace = (values * covariance).sum(-1) + (values * covariance)[..., d:].sum(-1)
        shift = mean_q - mean_p
        distance = (shift * self.elimination.times(values, shift)).sum(-1)
        logdet = self.elimination.half_logdet(factor_q) - self.elimination.half_logdet(factor_p)
        return 0.5 * (trace - d + distance) + logdet
