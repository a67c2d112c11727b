"""The Wishart distribution."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyro.distributions as distributions
import torch
from torch import Tensor

from . import _gaussian, _quantiles, _special
from ._base import ExponentialFamily, bend_positive, gradient_of
from ._registry import register_family


class BartlettWishart(distributions.Wishart):
    """Wishart(ν, L Lᵀ) drawn as (L B)(L B)ᵀ, B_ii² ~ χ²(ν − i), B_ij ~ N(0, 1) below (Bartlett 1933).

    torch's own `rsample` takes regular draws for singular ones: it redraws them, and warns.
    """

    def __init__(self, df: Tensor, scale_tril: Tensor, validate_args: bool | None = None) -> None:
        batch_shape = torch.broadcast_shapes(df.shape, scale_tril.shape[:-2])
        self.df = df.expand(batch_shape)
        self.scale_tril = scale_tril.expand(*batch_shape, -1, -1)
        self._unbroadcasted_scale_tril = scale_tril
        self._batch_dims = list(range(-1, -1 - len(batch_shape), -1))
        torch.distributions.Distribution.__init__(self, batch_shape, scale_tril.shape[-2:], validate_args)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> "BartlettWishart":
        new = self._get_checked_instance(BartlettWishart, _instance)
        batch_shape = torch.Size(batch_shape)
        scale_tril = self.scale_tril.expand(*batch_shape, -1, -1)
        BartlettWishart.__init__(new, self.df.expand(batch_shape), scale_tril, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def rsample(self, sample_shape: Any = (), max_try_correction: int | None = None) -> Tensor:
        dimension = self.event_shape[-1]
        shape = self._extended_shape(sample_shape)
        halves = torch.arange(dimension, dtype=self.df.dtype, device=self.df.device) / 2
        concentration = (self.df.unsqueeze(-1) / 2 - halves).expand(shape[:-1])
        chi2 = 2 * torch.distributions.Gamma(concentration, 1.0, validate_args=False).rsample()
        below = torch.randn(shape, dtype=chi2.dtype, device=chi2.device).tril(-1)
        root = self._unbroadcasted_scale_tril @ (below + chi2.sqrt().diag_embed())
        return root @ root.mT


@register_family(distributions.Wishart)
@dataclass(frozen=True)
class Wishart(ExponentialFamily):
    """Wishart(ν, W), a = ν/2, R = W⁻¹/2: T(X) = (log|X|, vech X),
    λ = (a − (d+1)/2, vech(−R) with off-diagonals doubled), A(λ) = log Γ_d(a) − a log|R|,
    μ = (ψ_d(a) − log|R|, vech(a R⁻¹)).

    vech is row-major over the lower triangle. λ -> μ holds to rounding times κ(R). μ -> λ (Newton on
    d log a − ψ_d(a)) holds for a − (d−1)/2 in [1e-3, 1e6] to 1e-12 + 32 ε κ relative in float64,
    κ = κ(R) + (1 + a)(1 + |μ₁| + |log|E X||) being the condition number; in float32 the same with its ε, so
    use a below 1e4 there. A draw with ν near d − 1 may be singular to rounding, and its log|X| with it.
    """

    dimension: int

    @property
    def event_shape(self) -> torch.Size:
        return torch.Size([self.dimension, self.dimension])

    @property
    def num_parameters(self) -> int:
        return 1 + self.dimension * (self.dimension + 1) // 2

    @property
    def num_levels(self) -> int:
        return self.dimension * (self.dimension + 1) // 2

    def _arguments(self, natural: Tensor) -> tuple[Tensor, Tensor]:
        """a = ν/2 and the rate R = W⁻¹/2."""
        precision = _gaussian.precision_of(natural[..., 1:], self.dimension)
        return natural[..., 0] + (self.dimension + 1) / 2, 0.5 * precision

    def _natural(self, half_df: Tensor, rate: Tensor) -> Tensor:
        first = (half_df - (self.dimension + 1) / 2).unsqueeze(-1)
        return torch.cat([first, _gaussian.pack_precision(2 * rate)], -1)

    def _logdet_mean(self, natural: Tensor) -> tuple[Tensor, Tensor]:
        half_df, rate = self._arguments(natural)
        factor = _gaussian.cholesky(rate)
        digamma = _special.multivariate_digamma(half_df, self.dimension)
        mean = half_df[..., None, None] * _gaussian.inverse(factor)
        return digamma - 2 * _gaussian.half_logdet(factor), mean

    def sufficient_statistics(self, value: Tensor) -> Tensor:
        logdet = torch.linalg.slogdet(value).logabsdet  # finite on draws that rounding made indefinite
        return torch.cat([logdet.unsqueeze(-1), _gaussian.vech(value)], -1)

    def log_partition(self, natural: Tensor) -> Tensor:
        half_df, rate = self._arguments(natural)
        logdet = 2 * _gaussian.half_logdet(_gaussian.cholesky(rate))
        return _special.multivariate_lgamma(half_df, self.dimension) - half_df * logdet

    def to_expectation(self, natural: Tensor) -> Tensor:
        logdet, mean = self._logdet_mean(natural)
        return torch.cat([logdet.unsqueeze(-1), _gaussian.vech(mean)], -1)

    def to_natural(self, expectation: Tensor) -> Tensor:
        wide = expectation.detach().double()
        factor = _gaussian.cholesky(_gaussian.unvech(wide[..., 1:], self.dimension))
        gap = 2 * _gaussian.half_logdet(factor) - wide[..., 0]
        half_df = _special.inverse_multivariate_digamma_gap(gap, self.dimension)
        natural = self._natural(half_df, half_df[..., None, None] * _gaussian.inverse(factor))
        return self._differentiable(natural.to(expectation.dtype), expectation)

    def contains(self, natural: Tensor) -> Tensor:
        half_df, rate = self._arguments(natural)
        regular = half_df > (self.dimension - 1) / 2
        return natural.isfinite().all(-1) & regular & _gaussian.is_positive_definite(rate)

    def _bend(self, natural: Tensor, direction: Tensor) -> Tensor:
        """a − (d−1)/2 as a positive number, R by the improved rule's retraction."""
        half_df, rate = self._arguments(natural)
        change = 0.5 * _gaussian.precision_of(direction[..., 1:], self.dimension)
        lower = (self.dimension - 1) / 2
        bent, fraction = _gaussian.bend_precision(rate, change)
        half_df = bend_positive(half_df - lower, fraction.squeeze(-1) * direction[..., 0]) + lower
        return self._natural(half_df, bent)

    def moments(self, natural: Tensor) -> dict[str, Tensor]:
        logdet, mean = self._logdet_mean(natural)
        return {"logdet": logdet, "mean": mean}

    def message(self, natural: Tensor, gradients: Mapping[str, Tensor]) -> Tensor:
        """(∇_{E log|X|} f, vech ∇_{E X} f with off-diagonals summed)."""
        logdet = gradient_of(gradients, "logdet", natural[..., 0])
        mean = gradients.get("mean")
        packed = torch.zeros_like(natural[..., 1:]) if mean is None else _gaussian.pack_dual(mean)
        return torch.cat([logdet.unsqueeze(-1), packed], -1)

    def to_distribution(self, natural: Tensor) -> Any:
        half_df, rate = self._arguments(natural)
        precision = 2 * rate
        distribution = BartlettWishart(2 * half_df, _gaussian.scale_tril_of_precision(precision), validate_args=False)
        distribution.precision_matrix = precision  # the lazy property's value, known here to full accuracy
        return distribution

    def at_levels(self, natural: Tensor, levels: Tensor) -> Tensor:
        """(L B)(L B)ᵀ by Bartlett's decomposition, the diagonal of B first."""
        half_df, rate = self._arguments(natural)
        halves = torch.arange(self.dimension, dtype=natural.dtype, device=natural.device) / 2
        square = 2 * _quantiles.standard_gamma(half_df.unsqueeze(-1) - halves, levels[..., : self.dimension])
        row, column = torch.tril_indices(self.dimension, self.dimension, -1, device=natural.device)
        root = square.sqrt().diag_embed()
        root[..., row, column] = torch.special.ndtri(levels[..., self.dimension :]).to(natural.dtype)
        root = _gaussian.scale_tril_of_precision(2 * rate) @ root
        return root @ root.mT

    def from_distribution(self, distribution: Any) -> Tensor:
        return self._natural(distribution.df / 2, 0.5 * distribution.precision_matrix)

    @classmethod
    def of(cls, distribution: Any) -> "Wishart":
        return cls(distribution.event_shape[-1])

    def entropy(self, natural: Tensor) -> Tensor:
        """log Γ_d(a) − (a − (d+1)/2) ψ_d(a) + a d − (d+1)/2 log|R|, summed in float64."""
        half_df, rate = self._arguments(natural.double())
        shape = natural[..., 0] * _special.multivariate_digamma(half_df, self.dimension)
        log_gamma = _special.multivariate_lgamma(half_df, self.dimension) - shape
        volume = (self.dimension + 1) * _gaussian.half_logdet(_gaussian.cholesky(rate))
        return (log_gamma + half_df * self.dimension - volume).to(natural.dtype)

    def fisher(self, natural: Tensor) -> Tensor:
        """dμ₁ = ψ_d′(a) da − tr(R⁻¹ dR), dE X = R⁻¹ da − a R⁻¹ dR R⁻¹ along each basis vector of λ."""
        half_df, rate = self._arguments(natural)
        scale = _gaussian.inverse(_gaussian.cholesky(rate)).unsqueeze(-3)
        half_df = half_df.unsqueeze(-1)
        basis = torch.eye(self.num_parameters, dtype=natural.dtype, device=natural.device)
        step, change = basis[:, 0], 0.5 * _gaussian.precision_of(basis[:, 1:], self.dimension)
        slope = _special.multivariate_trigamma_gap(half_df, self.dimension) + self.dimension / half_df
        logdet = slope * step - (scale * change).sum((-2, -1))
        mean = step[:, None, None] * scale - half_df[..., None, None] * (scale @ change @ scale)
        return torch.cat([logdet.unsqueeze(-1), _gaussian.vech(mean)], -1)

    def natural_gradient(self, natural: Tensor, gradient: Tensor) -> Tensor:
        """da = (g₁ − tr(R G)/a) / (ψ_d′(a) − d/a), dR = (R da − R G R)/a, for dμ = (g₁, vech G)."""
        half_df, rate = self._arguments(natural)
        change = rate @ _gaussian.unvech(gradient[..., 1:], self.dimension)
        trace = change.diagonal(dim1=-2, dim2=-1).sum(-1)
        slope = _special.multivariate_trigamma_gap(half_df, self.dimension)
        step = (gradient[..., 0] - trace / half_df) / slope
        rate_step = (step[..., None, None] * rate - change @ rate) / half_df[..., None, None]
        return torch.cat([step.unsqueeze(-1), _gaussian.pack_precision(2 * rate_step)], -1)
