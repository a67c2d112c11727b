"""Independent Normals over one event."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyro.distributions as distributions
import torch
from torch import Tensor

from . import _gaussian
from ._base import ExponentialFamily


@dataclass(frozen=True)
class DiagonalNormal(ExponentialFamily):
    """Π_j N(m_j, v_j): T(x) = (x, x²), λ = (m/v, −1/(2v)), A(λ) = Σ_j m_j²/(2v_j) + ½ log 2πv_j, μ = (m, v + m²).

    No distribution denotes it: it is the base of a pushforward whose bijection takes a whole vector (a simplex, a
    Cholesky factor) where q is to be factorised. μ -> λ loses digits as `Normal`'s does.
    """

    dimension: int

    @property
    def event_shape(self) -> torch.Size:
        return torch.Size([self.dimension])

    @property
    def num_parameters(self) -> int:
        return 2 * self.dimension

    def _elements(self, packed: Tensor) -> Tensor:
        """(*batch, 2d) -> (*batch, d, 2), each element's own λ or μ."""
        return torch.stack(packed.split(self.dimension, -1), -1)

    def _packed(self, elements: Tensor) -> Tensor:
        return torch.cat(elements.unbind(-1), -1)

    def _mean_variance(self, natural: Tensor) -> tuple[Tensor, Tensor]:
        return _gaussian.mean_variance(self._elements(natural))

    def sufficient_statistics(self, value: Tensor) -> Tensor:
        return torch.cat([value, value * value], -1)

    def log_partition(self, natural: Tensor) -> Tensor:
        mean, variance = self._mean_variance(natural)
        return 0.5 * (mean * natural[..., : self.dimension] + variance.log() + math.log(2 * math.pi)).sum(-1)

    def to_expectation(self, natural: Tensor) -> Tensor:
        mean, variance = self._mean_variance(natural)
        return torch.cat([mean, variance + mean * mean], -1)

    def to_natural(self, expectation: Tensor) -> Tensor:
        mean, second = expectation.split(self.dimension, -1)
        return self.natural_of(mean, second - mean * mean)

    def natural_of(self, mean: Tensor, variance: Tensor) -> Tensor:
        """λ of elementwise means and variances, (*batch, d) each."""
        return self._packed(_gaussian.natural(mean, variance))

    def contains(self, natural: Tensor) -> Tensor:
        return natural.isfinite().all(-1) & (natural[..., self.dimension :] < 0).all(-1)

    def _bend(self, natural: Tensor, direction: Tensor) -> Tensor:
        return self._packed(_gaussian.bend(self._elements(natural), self._elements(direction)))

    def moments(self, natural: Tensor) -> dict[str, Tensor]:
        mean, variance = self._mean_variance(natural)
        return {"mean": mean, "variance": variance}

    def message(self, natural: Tensor, gradients: Mapping[str, Tensor]) -> Tensor:
        """(∇_m f − 2 m ∇_v f, ∇_v f)."""
        return self._packed(_gaussian.message(*self._mean_variance(natural), gradients))

    def to_distribution(self, natural: Tensor) -> Any:
        mean, variance = self._mean_variance(natural)
        return distributions.Normal(mean, variance.sqrt(), validate_args=False).to_event(1)

    def from_distribution(self, distribution: Any) -> Tensor:
        if distribution.event_shape != self.event_shape:
            raise self._refuse(distribution)
        return self.natural_of(distribution.mean, distribution.variance)

    @classmethod
    def of(cls, distribution: Any) -> None:
        return None  # independent Normals are Normals whose elements stand one by one

    def log_prob(self, natural: Tensor, value: Tensor) -> Tensor:
        return _gaussian.log_prob(*self._mean_variance(natural), value).sum(-1)

    def entropy(self, natural: Tensor) -> Tensor:
        """Σ_j ½ log 2πe v_j."""
        variance = self._mean_variance(natural)[1]
        return 0.5 * (1 + math.log(2 * math.pi) + variance.log()).sum(-1)

    def kl(self, natural_q: Tensor, natural_p: Tensor) -> Tensor:
        return _gaussian.kl(*self._mean_variance(natural_q), *self._mean_variance(natural_p)).sum(-1)

    def natural_gradient(self, natural: Tensor, gradient: Tensor) -> Tensor:
        return self._packed(_gaussian.natural_gradient(*self._mean_variance(natural), self._elements(gradient)))
