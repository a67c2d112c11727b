"""The Dirichlet distribution."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyro.distributions as distributions
import torch
from torch import Tensor

from . import _quantiles, _special
from ._base import ExponentialFamily, bend_positive, gradient_of
from ._registry import register_family


@register_family(distributions.Dirichlet)
@dataclass(frozen=True)
class Dirichlet(ExponentialFamily):
    """Dirichlet(α): T(x) = log x, λ = α − 1, A(λ) = Σ log Γ(α_k) − log Γ(Σα), μ_k = ψ(α_k) − ψ(Σα).

    λ -> μ holds to rounding, where λ holds α to ε/α relative. μ -> λ (Newton on Σα, then jointly) holds for
    α in [1e-3, 1e6] to 1e-12 + 32 ε κ relative in float64, κ = (1 + Σα)(1 + max|μ|) being the condition
    number; in float32 the same with its ε, so use Σα below 1e4 there.
    """

    num_categories: int

    @property
    def event_shape(self) -> torch.Size:
        return torch.Size([self.num_categories])

    @property
    def num_parameters(self) -> int:
        return self.num_categories

    @property
    def num_levels(self) -> int:
        return self.num_categories

    def sufficient_statistics(self, value: Tensor) -> Tensor:
        return value.log()

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
        return {"log": self.to_expectation(natural)}

    def message(self, natural: Tensor, gradients: Mapping[str, Tensor]) -> Tensor:
        """∇_{E log x} f."""
        return gradient_of(gradients, "log", natural)

    def to_distribution(self, natural: Tensor) -> Any:
        return distributions.Dirichlet(natural + 1, validate_args=False)

    def at_levels(self, natural: Tensor, levels: Tensor) -> Tensor:
        """g_k / Σ g of as many Gammas."""
        logs = _quantiles.log_standard_gamma(natural + 1, levels).to(natural.dtype)
        return logs.softmax(-1).clamp(torch.finfo(natural.dtype).tiny)

    def from_distribution(self, distribution: Any) -> Tensor:
        return distribution.concentration - 1

    @classmethod
    def of(cls, distribution: Any) -> "Dirichlet":
        return cls(distribution.event_shape[-1])

    def fisher(self, natural: Tensor) -> Tensor:
        """diag ψ′(α) − ψ′(Σα) 11ᵀ."""
        concentration = natural + 1
        shared = _special.trigamma(concentration.sum(-1))[..., None, None]
        return _special.trigamma(concentration).diag_embed() - shared

    def natural_gradient(self, natural: Tensor, gradient: Tensor) -> Tensor:
        return _special.dirichlet_solve(natural + 1, gradient)
