"""The log-Normal distribution."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyro.distributions as distributions
import torch
from torch import Tensor
from torch.nn.functional import pad

from . import _gaussian
from ._base import ExponentialFamily
from ._registry import register_family


@register_family(distributions.LogNormal)
@dataclass(frozen=True)
class LogNormal(ExponentialFamily):
    """log x ~ N(m, v): T(x) = (log x, log² x), λ = (m/v − 1, −1/(2v)),
    A(λ) = m²/(2v) + ½ log 2πv, μ = (m, v + m²).

    The −1 is the Jacobian 1/x, so that the base measure is dx. μ -> λ loses the digits that v + m² has lost:
    relative error ≤ 8 ε (1 + m²/v) + ε v. `moments` and `message` do not.
    """

    event_shape = torch.Size()
    num_parameters = 2

    def _mean_variance(self, natural: Tensor) -> tuple[Tensor, Tensor]:
        variance = -0.5 / natural[..., 1]
        return (natural[..., 0] + 1) * variance, variance

    def _natural(self, mean: Tensor, variance: Tensor) -> Tensor:
        return torch.stack([mean / variance - 1, -0.5 / variance], -1)

    def sufficient_statistics(self, value: Tensor) -> Tensor:
        log = value.log()
        return torch.stack([log, log * log], -1)

    def log_partition(self, natural: Tensor) -> Tensor:
        mean, variance = self._mean_variance(natural)
        return 0.5 * (mean * (natural[..., 0] + 1) + variance.log() + math.log(2 * math.pi))

    def to_expectation(self, natural: Tensor) -> Tensor:
        mean, variance = self._mean_variance(natural)
        return torch.stack([mean, variance + mean * mean], -1)

    def to_natural(self, expectation: Tensor) -> Tensor:
        mean, second = expectation.unbind(-1)
        return self._natural(mean, second - mean * mean)

    def contains(self, natural: Tensor) -> Tensor:
        return natural.isfinite().all(-1) & (natural[..., 1] < 0)

    def _bend(self, natural: Tensor, direction: Tensor) -> Tensor:
        jacobian = pad(torch.ones_like(natural[..., :1]), (0, 1))
        return _gaussian.bend(natural + jacobian, direction) - jacobian

    def moments(self, natural: Tensor) -> dict[str, Tensor]:
        mean, variance = self._mean_variance(natural)
        return {"mean": mean, "variance": variance}

    def message(self, natural: Tensor, gradients: Mapping[str, Tensor]) -> Tensor:
        """(∇_m f − 2 m ∇_v f, ∇_v f), m and v being of log x."""
        return _gaussian.message(*self._mean_variance(natural), gradients)

    def to_distribution(self, natural: Tensor) -> Any:
        mean, variance = self._mean_variance(natural)
        return distributions.LogNormal(mean, variance.sqrt(), validate_args=False)

    def from_distribution(self, distribution: Any) -> Tensor:
        return self._natural(distribution.loc, distribution.scale.square())

    @classmethod
    def of(cls, distribution: Any) -> "LogNormal":
        return cls()

    def log_prob(self, natural: Tensor, value: Tensor) -> Tensor:
        log = value.log()
        return _gaussian.log_prob(*self._mean_variance(natural), log) - log

    def entropy(self, natural: Tensor) -> Tensor:
        """½ log 2πev + m."""
        mean, variance = self._mean_variance(natural)
        return 0.5 * (1 + math.log(2 * math.pi) + variance.log()) + mean

    def kl(self, natural_q: Tensor, natural_p: Tensor) -> Tensor:
        return _gaussian.kl(*self._mean_variance(natural_q), *self._mean_variance(natural_p))

    def fisher(self, natural: Tensor) -> Tensor:
        return _gaussian.fisher(*self._mean_variance(natural))

    def natural_gradient(self, natural: Tensor, gradient: Tensor) -> Tensor:
        return _gaussian.natural_gradient(*self._mean_variance(natural), gradient)
