"""The Normal distribution."""

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


@register_family(distributions.Normal)
@dataclass(frozen=True)
class Normal(ExponentialFamily):
    """N(m, v): T(x) = (x, x²), λ = (m/v, −1/(2v)), A(λ) = m²/(2v) + ½ log 2πv, μ = (m, v + m²).

    μ -> λ loses the digits that v + m² has lost: relative error ≤ 8 ε (1 + m²/v). `moments` and
    `message` do not.
    """

    event_shape = torch.Size()
    num_parameters = 2

    def sufficient_statistics(self, value: Tensor) -> Tensor:
        return torch.stack([value, value * value], -1)

    def log_partition(self, natural: Tensor) -> Tensor:
        mean, variance = _gaussian.mean_variance(natural)
        return 0.5 * (mean * natural[..., 0] + variance.log() + math.log(2 * math.pi))

    def to_expectation(self, natural: Tensor) -> Tensor:
        mean, variance = _gaussian.mean_variance(natural)
        return torch.stack([mean, variance + mean * mean], -1)

    def to_natural(self, expectation: Tensor) -> Tensor:
        mean, second = expectation.unbind(-1)
        return _gaussian.natural(mean, second - mean * mean)

    def contains(self, natural: Tensor) -> Tensor:
        return natural.isfinite().all(-1) & (natural[..., 1] < 0)

    def _bend(self, natural: Tensor, direction: Tensor) -> Tensor:
        return _gaussian.bend(natural, direction)

    def moments(self, natural: Tensor) -> dict[str, Tensor]:
        mean, variance = _gaussian.mean_variance(natural)
        return {"mean": mean, "variance": variance}

    def message(self, natural: Tensor, gradients: Mapping[str, Tensor]) -> Tensor:
        """(∇_m f − 2 m ∇_v f, ∇_v f)."""
        return _gaussian.message(*_gaussian.mean_variance(natural), gradients)

    def to_distribution(self, natural: Tensor) -> Any:
        mean, variance = _gaussian.mean_variance(natural)
        return distributions.Normal(mean, variance.sqrt(), validate_args=False)

    def from_distribution(self, distribution: Any) -> Tensor:
        return _gaussian.natural(distribution.loc, distribution.scale.square())

    @classmethod
    def of(cls, distribution: Any) -> "Normal":
        return cls()

    def log_prob(self, natural: Tensor, value: Tensor) -> Tensor:
        return _gaussian.log_prob(*_gaussian.mean_variance(natural), value)

    def entropy(self, natural: Tensor) -> Tensor:
        """½ log 2πev."""
        return 0.5 * (1 + math.log(math.pi) - (-natural[..., 1]).log())

    def kl(self, natural_q: Tensor, natural_p: Tensor) -> Tensor:
        return _gaussian.kl(*_gaussian.mean_variance(natural_q), *_gaussian.mean_variance(natural_p))

    def fisher(self, natural: Tensor) -> Tensor:
        return _gaussian.fisher(*_gaussian.mean_variance(natural))

    def natural_gradient(self, natural: Tensor, gradient: Tensor) -> Tensor:
        return _gaussian.natural_gradient(*_gaussian.mean_variance(natural), gradient)
