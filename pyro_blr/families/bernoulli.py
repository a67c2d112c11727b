"""The Bernoulli distribution."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyro.distributions as distributions
import torch
from torch import Tensor

from ._base import ExponentialFamily, gradient_of
from ._registry import register_family


@register_family(distributions.Bernoulli, distributions.Binomial)
@dataclass(frozen=True)
class Bernoulli(ExponentialFamily):
    """Bernoulli(p): T(x) = x, λ = log p/(1 − p), A(λ) = log(1 + e^λ), μ = p.

    λ -> μ holds to rounding; μ -> λ to ε/(1 − p) + ε relative in p/(1 − p).
    A Binomial of one trial is a Bernoulli.
    """

    event_shape = torch.Size()
    num_parameters = 1
    is_discrete = True

    def sufficient_statistics(self, value: Tensor) -> Tensor:
        return value.unsqueeze(-1)

    def log_partition(self, natural: Tensor) -> Tensor:
        return torch.logaddexp(natural, torch.zeros_like(natural)).squeeze(-1)

    def to_expectation(self, natural: Tensor) -> Tensor:
        return natural.sigmoid()

    def to_natural(self, expectation: Tensor) -> Tensor:
        return expectation.log() - (-expectation).log1p()

    def contains(self, natural: Tensor) -> Tensor:
        return natural.isfinite().squeeze(-1)

    def _bend(self, natural: Tensor, direction: Tensor) -> Tensor:
        return natural

    def moments(self, natural: Tensor) -> dict[str, Tensor]:
        return {"probs": torch.cat([-natural, natural], -1).sigmoid()}

    def message(self, natural: Tensor, gradients: Mapping[str, Tensor]) -> Tensor:
        """∇_{p₁} f − ∇_{p₀} f."""
        gradient = gradient_of(gradients, "probs", natural.expand(*natural.shape[:-1], 2))
        return gradient[..., 1:] - gradient[..., :1]

    def to_distribution(self, natural: Tensor) -> Any:
        return distributions.Bernoulli(logits=natural.squeeze(-1), validate_args=False)

    def from_distribution(self, distribution: Any) -> Tensor:
        if self.of(distribution) is None:
            raise self._refuse(distribution)
        return distribution.logits.unsqueeze(-1)

    @classmethod
    def of(cls, distribution: Any) -> "Bernoulli | None":
        single = not hasattr(distribution, "total_count") or bool((distribution.total_count == 1).all())
        return cls() if single else None

    def entropy(self, natural: Tensor) -> Tensor:
        """log(1 + e^−|λ|) + |λ| σ(−|λ|)."""
        size = natural.squeeze(-1).abs()
        return (-size).exp().log1p() + size * (-size).sigmoid()

    def fisher(self, natural: Tensor) -> Tensor:
        """p (1 − p)."""
        return (natural.sigmoid() * (-natural).sigmoid()).unsqueeze(-1)

    def natural_gradient(self, natural: Tensor, gradient: Tensor) -> Tensor:
        return gradient / (natural.sigmoid() * (-natural).sigmoid())
