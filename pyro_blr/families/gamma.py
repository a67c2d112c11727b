"""The Gamma distribution, with Exponential and Chi2."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyro.distributions as distributions
import torch
from torch import Tensor

from . import _quantiles, _special
from ._base import ExponentialFamily, bend_positive, gradient_of
from ._registry import register_family


@register_family(distributions.Gamma, distributions.Exponential, distributions.Chi2)
@dataclass(frozen=True)
class Gamma(ExponentialFamily):
    """Gamma(α, β): T(x) = (log x, x), λ = (α − 1, −β), A(λ) = log Γ(α) − α log β, μ = (ψ(α) − log β, α/β).

    λ -> μ holds to rounding, where λ holds α to ε/α relative. μ -> λ (Newton on log α − ψ(α), Minka 2002)
    holds for α in [1e-3, 1e6] to 1e-12 + 32 ε κ relative in float64, κ = (1 + α)(1 + |μ₁| + |log μ₂|) being
    the condition number; in float32 the same with its ε, so use α below 1e4 there.
    """

    event_shape = torch.Size()
    num_parameters = 2
    num_levels = 1

    def _arguments(self, natural: Tensor) -> tuple[Tensor, Tensor]:
        """α and β."""
        return natural[..., 0] + 1, -natural[..., 1]

    def sufficient_statistics(self, value: Tensor) -> Tensor:
        return torch.stack([value.log(), value], -1)

    def log_partition(self, natural: Tensor) -> Tensor:
        concentration, rate = self._arguments(natural)
        return concentration.lgamma() - concentration * rate.log()

    def to_expectation(self, natural: Tensor) -> Tensor:
        concentration, rate = self._arguments(natural)
        return torch.stack([concentration.digamma() - rate.log(), concentration / rate], -1)

    def to_natural(self, expectation: Tensor) -> Tensor:
        log, mean = expectation.detach().double().unbind(-1)
        concentration = _special.inverse_multivariate_digamma_gap(mean.log() - log)
        natural = torch.stack([concentration - 1, -concentration / mean], -1)
        return self._differentiable(natural.to(expectation.dtype), expectation)

    def contains(self, natural: Tensor) -> Tensor:
        return natural.isfinite().all(-1) & (natural[..., 0] > -1) & (natural[..., 1] < 0)

    def _bend(self, natural: Tensor, direction: Tensor) -> Tensor:
        concentration, rate = self._arguments(natural)
        concentration = bend_positive(concentration, direction[..., 0])
        return torch.stack([concentration - 1, -bend_positive(rate, -direction[..., 1])], -1)

    def moments(self, natural: Tensor) -> dict[str, Tensor]:
        concentration, rate = self._arguments(natural)
        return {"log": concentration.digamma() - rate.log(), "mean": concentration / rate}

    def message(self, natural: Tensor, gradients: Mapping[str, Tensor]) -> Tensor:
        """(∇_{E log x} f, ∇_{E x} f)."""
        like = natural[..., 0]
        return torch.stack([gradient_of(gradients, "log", like), gradient_of(gradients, "mean", like)], -1)

    def to_distribution(self, natural: Tensor) -> Any:
        return distributions.Gamma(*self._arguments(natural), validate_args=False)

    def at_levels(self, natural: Tensor, levels: Tensor) -> Tensor:
        concentration, rate = self._arguments(natural)
        return _quantiles.standard_gamma(concentration, levels[..., 0]) / rate

    def from_distribution(self, distribution: Any) -> Tensor:
        if isinstance(distribution, torch.distributions.Exponential):
            return torch.stack([torch.zeros_like(distribution.rate), -distribution.rate], -1)
        return torch.stack([distribution.concentration - 1, -distribution.rate], -1)

    @classmethod
    def of(cls, distribution: Any) -> "Gamma":
        return cls()

    def entropy(self, natural: Tensor) -> Tensor:
        """α − log β + log Γ(α) + (1 − α) ψ(α), summed in float64."""
        concentration, rate = self._arguments(natural.double())
        log_gamma = concentration.lgamma() + (1 - concentration) * concentration.digamma()
        return (concentration - rate.log() + log_gamma).to(natural.dtype)

    def fisher(self, natural: Tensor) -> Tensor:
        """[[ψ′(α), 1/β], [1/β, α/β²]]."""
        concentration, rate = self._arguments(natural)
        scale = rate.reciprocal()
        rows = [_special.trigamma(concentration), scale, scale, concentration * scale.square()]
        return torch.stack(rows, -1).unflatten(-1, (2, 2))

    def natural_gradient(self, natural: Tensor, gradient: Tensor) -> Tensor:
        """dα = (α g₁ − β g₂) / τ(α), dβ = β (dα − β g₂) / α, dλ = (dα, −dβ), with τ(α) = α ψ′(α) − 1."""
        concentration, rate = self._arguments(natural)
        scaled = rate * gradient[..., 1]
        step = (concentration * gradient[..., 0] - scaled) / _special.trigamma_gap(concentration)
        return torch.stack([step, rate * (scaled - step) / concentration], -1)
