"""The multivariate Normal distribution."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyro.distributions as distributions
import torch
from torch import Tensor

from . import _gaussian
from ._base import ExponentialFamily
from ._registry import register_family


@register_family(distributions.MultivariateNormal, distributions.LowRankMultivariateNormal)
@dataclass(frozen=True)
class MultivariateNormal(ExponentialFamily):
    """N(m, V), P = V⁻¹: T(x) = (x, vech x xᵀ), λ = (P m, vech(−½ P) with off-diagonals doubled),
    A(λ) = ½ mᵀPm − ½ log|P| + ½ d log 2π, μ = (m, vech(V + m mᵀ)).

    vech is row-major over the lower triangle (`torch.tril_indices`). Relative error of μ -> λ: about
    d ε κ(V) (1 + mᵀP m), since V is a difference there; of `moments`: d ε κ(P).
    """

    dimension: int

    @property
    def event_shape(self) -> torch.Size:
        return torch.Size([self.dimension])

    @property
    def num_parameters(self) -> int:
        return self.dimension + self.dimension * (self.dimension + 1) // 2

    def _split(self, natural: Tensor) -> tuple[Tensor, Tensor]:
        """P m and P."""
        vector = natural[..., : self.dimension]
        return vector, _gaussian.precision_of(natural[..., self.dimension :], self.dimension)

    def _mean_covariance(self, natural: Tensor) -> tuple[Tensor, Tensor]:
        vector, precision = self._split(natural)
        factor = _gaussian.cholesky(precision)
        return _gaussian.solve(factor, vector), _gaussian.inverse(factor)

    def sufficient_statistics(self, value: Tensor) -> Tensor:
        return torch.cat([value, _gaussian.vech(value.unsqueeze(-1) * value.unsqueeze(-2))], -1)

    def log_partition(self, natural: Tensor) -> Tensor:
        vector, precision = self._split(natural)
        factor = _gaussian.cholesky(precision)
        white = torch.linalg.solve_triangular(factor, vector.unsqueeze(-1), upper=False).squeeze(-1)
        constant = 0.5 * self.dimension * math.log(2 * math.pi)
        return 0.5 * white.square().sum(-1) - _gaussian.half_logdet(factor) + constant

    def to_expectation(self, natural: Tensor) -> Tensor:
        mean, covariance = self._mean_covariance(natural)
        second = covariance + mean.unsqueeze(-1) * mean.unsqueeze(-2)
        return torch.cat([mean, _gaussian.vech(second)], -1)

    def to_natural(self, expectation: Tensor) -> Tensor:
        mean = expectation[..., : self.dimension]
        second = _gaussian.unvech(expectation[..., self.dimension :], self.dimension)
        covariance = second - mean.unsqueeze(-1) * mean.unsqueeze(-2)
        return self._natural(mean, _gaussian.inverse(_gaussian.cholesky(covariance)))

    def _natural(self, mean: Tensor, precision: Tensor) -> Tensor:
        return torch.cat([_gaussian.matvec(precision, mean), _gaussian.pack_precision(precision)], -1)

    def contains(self, natural: Tensor) -> Tensor:
        return natural.isfinite().all(-1) & _gaussian.is_positive_definite(self._split(natural)[1])

    def _bend(self, natural: Tensor, direction: Tensor) -> Tensor:
        """m ← m + S⁻¹(dη − dS m), S ← S + dS + ½ dS S⁻¹ dS on the precision S."""
        vector, precision = self._split(natural)
        step, change = self._split(direction)
        bent, fraction = _gaussian.bend_precision(precision, change)
        factor = _gaussian.cholesky(precision)
        mean = _gaussian.solve(factor, vector)
        moved = mean + fraction * _gaussian.solve(factor, step - _gaussian.matvec(change, mean))
        return self._natural(moved, bent)

    def moments(self, natural: Tensor) -> dict[str, Tensor]:
        mean, covariance = self._mean_covariance(natural)
        return {"mean": mean, "covariance": covariance}

    def message(self, natural: Tensor, gradients: Mapping[str, Tensor]) -> Tensor:
        """(∇_m f − (∇_V f + ∇_V fᵀ) m, vech ∇_V f with off-diagonals summed)."""
        in_mean, in_covariance = gradients.get("mean"), gradients.get("covariance")
        if in_covariance is None:
            in_mean = torch.zeros_like(natural[..., : self.dimension]) if in_mean is None else in_mean
            return torch.nn.functional.pad(in_mean, (0, self.num_parameters - self.dimension))
        vector, precision = self._split(natural)
        mean = _gaussian.solve(_gaussian.cholesky(precision), vector)
        first = -_gaussian.matvec(in_covariance + in_covariance.mT, mean)
        first = first if in_mean is None else in_mean + first
        return torch.cat([first, _gaussian.pack_dual(in_covariance)], -1)

    def to_distribution(self, natural: Tensor) -> Any:
        vector, precision = self._split(natural)
        scale_tril = _gaussian.scale_tril_of_precision(precision)
        mean = _gaussian.matvec(scale_tril, _gaussian.matvec(scale_tril.mT, vector))
        distribution = distributions.MultivariateNormal(mean, scale_tril=scale_tril, validate_args=False)
        distribution.precision_matrix = precision  # the lazy property's value, known here to full accuracy
        return distribution

    def from_distribution(self, distribution: Any) -> Tensor:
        return self._natural(distribution.loc, distribution.precision_matrix)

    @classmethod
    def of(cls, distribution: Any) -> "MultivariateNormal":
        return cls(distribution.event_shape[-1])

    def log_prob(self, natural: Tensor, value: Tensor) -> Tensor:
        """½ log|P| − ½ (x − m)ᵀP(x − m) − ½ d log 2π."""
        vector, precision = self._split(natural)
        factor = _gaussian.cholesky(precision)
        centred = value - _gaussian.solve(factor, vector)
        white = _gaussian.matvec(factor.mT, centred)
        constant = 0.5 * self.dimension * math.log(2 * math.pi)
        return _gaussian.half_logdet(factor) - 0.5 * white.square().sum(-1) - constant

    def entropy(self, natural: Tensor) -> Tensor:
        """½ d log 2πe − ½ log|P|."""
        factor = _gaussian.cholesky(self._split(natural)[1])
        return 0.5 * self.dimension * (1 + math.log(2 * math.pi)) - _gaussian.half_logdet(factor)

    def kl(self, natural_q: Tensor, natural_p: Tensor) -> Tensor:
        """½ (tr(P_p V_q) − d − log|P_p V_q| + (m_q − m_p)ᵀ P_p (m_q − m_p))."""
        (vector_q, precision_q), (vector_p, precision_p) = self._split(natural_q), self._split(natural_p)
        factor_q, factor_p = _gaussian.cholesky(precision_q), _gaussian.cholesky(precision_p)
        ratio = torch.linalg.solve_triangular(factor_q, factor_p, upper=False)
        trace = ratio.square().sum((-2, -1))
        shift = _gaussian.solve(factor_q, vector_q) - _gaussian.solve(factor_p, vector_p)
        distance = _gaussian.matvec(factor_p.mT, shift).square().sum(-1)
        logdet = _gaussian.half_logdet(factor_q) - _gaussian.half_logdet(factor_p)
        return 0.5 * (trace - self.dimension + distance) + logdet

    def fisher(self, natural: Tensor) -> Tensor:
        """dm = V(dη − dP m), dV = −V dP V, dE x xᵀ = dV + dm mᵀ + m dmᵀ along each basis vector of λ."""
        mean, covariance = self._mean_covariance(natural)
        mean, covariance = mean.unsqueeze(-2), covariance.unsqueeze(-3)
        basis = torch.eye(self.num_parameters, dtype=natural.dtype, device=natural.device)
        step, change = self._split(basis)
        shift = _gaussian.matvec(covariance, step - _gaussian.matvec(change, mean))
        outer = shift.unsqueeze(-1) * mean.unsqueeze(-2)
        second = outer + outer.mT - covariance @ change @ covariance
        return torch.cat([shift, _gaussian.vech(second)], -1)

    def natural_gradient(self, natural: Tensor, gradient: Tensor) -> Tensor:
        """dm = g₁, dV = g₂ − dm mᵀ − m dmᵀ, dP = −P dV P, dη = dP m + P dm."""
        vector, precision = self._split(natural)
        mean = _gaussian.solve(_gaussian.cholesky(precision), vector)
        step = gradient[..., : self.dimension]
        outer = step.unsqueeze(-1) * mean.unsqueeze(-2)
        second = _gaussian.unvech(gradient[..., self.dimension :], self.dimension)
        change = -precision @ (second - outer - outer.mT) @ precision
        vector = _gaussian.matvec(change, mean) + _gaussian.matvec(precision, step)
        return torch.cat([vector, _gaussian.pack_precision(change)], -1)
