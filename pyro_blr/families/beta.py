"""The Beta distribution, with Uniform(0, 1)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyro.distributions as distributions
import torch
from torch import Tensor

from . import _quantiles, _special
from ._base import ExponentialFamily, bend_positive, gradient_of
from ._registry import register_family


@register_family(distributions.Beta, distributions.Uniform)
@dataclass(frozen=True)
class Beta(ExponentialFamily):
    """Beta(α, β), s = α + β: T(x) = (log x, log(1 − x)), λ = (α − 1, β − 1),
    A(λ) = log Γ(α) + log Γ(β) − log Γ(s), μ = (ψ(α) − ψ(s), ψ(β) − ψ(s)).

    λ -> μ holds to rounding, where λ holds α to ε/α relative. μ -> λ (Newton on s, then jointly) holds for
    α, β in [1e-3, 1e6] to 1e-12 + 32 ε κ relative in float64, κ = (1 + s)(1 + max|μ|) being the condition
    number; in float32 the same with its ε, so use s below 1e4 there. Uniform(0, 1) is Beta(1, 1).
    """

    event_shape = torch.Size()
    num_parameters = 2
    num_levels = 2

    def sufficient_statistics(self, value: Tensor) -> Tensor:
        return torch.stack([value.log(), (-value).log1p()], -1)

    def log_partition(self, natural: Tensor) -> Tensor:
        concentration = natural + 1
        return concentration.lgamma().sum(-1) - concentration.sum(-1).lgamma()

    def to_expectation(self, natural: Tensor) -> Tensor:
        concentration = natural + 1
        return concentration.digamma() - concentration.sum(-1, keepdim=True).digamma()

    def to_natural(self, expectation: Tensor) -> Tensor:
        natural = _special.inverse_dirichlet_mean_log(expectation.detach().double()) - 1
        return self._differentiable(natural.to(expectation.dtype), expectation)

    def contains(self, natural: Tensor) -> Tensor:
        return (natural.isfinite() & (natural > -1)).all(-1)

    def _bend(self, natural: Tensor, direction: Tensor) -> Tensor:
        return bend_positive(natural + 1, direction) - 1

    def moments(self, natural: Tensor) -> dict[str, Tensor]:
        log, log_complement = self.to_expectation(natural).unbind(-1)
        return {"log": log, "log_complement": log_complement}

    def message(self, natural: Tensor, gradients: Mapping[str, Tensor]) -> Tensor:
        """(∇_{E log x} f, ∇_{E log(1−x)} f)."""
        like = natural[..., 0]
        return torch.stack([gradient_of(gradients, name, like) for name in ("log", "log_complement")], -1)

    def to_distribution(self, natural: Tensor) -> Any:
        concentration = natural + 1
        return distributions.Beta(concentration[..., 0], concentration[..., 1], validate_args=False)

    def at_levels(self, natural: Tensor, levels: Tensor) -> Tensor:
        """g₁ / (g₁ + g₀) of two Gammas, inside (0, 1) in floating point."""
        first, second = _quantiles.log_standard_gamma(natural + 1, levels).unbind(-1)
        limits = torch.finfo(natural.dtype)
        return (first - second).to(natural.dtype).sigmoid().clamp(limits.tiny, 1 - limits.eps)

    def from_distribution(self, distribution: Any) -> Tensor:
        if isinstance(distribution, torch.distributions.Uniform):
            if self.of(distribution) is None:
                raise self._refuse(distribution)
            return torch.stack([torch.zeros_like(distribution.low)] * 2, -1)
        return torch.stack([distribution.concentration1 - 1, distribution.concentration0 - 1], -1)

    @classmethod
    def of(cls, distribution: Any) -> "Beta | None":
        if isinstance(distribution, torch.distributions.Uniform):
            unit = bool((distribution.low == 0).all()) and bool((distribution.high == 1).all())
            return cls() if unit else None
        return cls()

    def fisher(self, natural: Tensor) -> Tensor:
        """diag(ψ′(α), ψ′(β)) − ψ′(s) 11ᵀ."""
        concentration = natural + 1
        shared = _special.trigamma(concentration.sum(-1))[..., None, None]
        return _special.trigamma(concentration).diag_embed() - shared

    def natural_gradient(self, natural: Tensor, gradient: Tensor) -> Tensor:
        return _special.dirichlet_solve(natural + 1, gradient)
