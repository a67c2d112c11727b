"""What a softmax head asks of the structure of its covariance."""

from __future__ import annotations

import abc

from torch import Tensor

__all__ = ["Statistics", "Structure", "WeightGaussian"]

# Sums over data, and what they are taken in (a basis, references), by name.
Statistics = dict[str, Tensor]


class WeightGaussian(abc.ABC):
    """The covariance Λ⁻¹ of W (C, P), and that of the logits of rows φ (n, P)."""

    @abc.abstractmethod
    def times(self, weights: Tensor) -> Tensor:
        """Λ w, (C, P)."""

    @abc.abstractmethod
    def solve(self, gradient: Tensor) -> Tensor:
        """Λ⁻¹ g, (C, P)."""

    @abc.abstractmethod
    def stddev(self) -> Tensor:
        """Of every weight, (C, P)."""

    @abc.abstractmethod
    def variance(self, rows: Tensor) -> Tensor:
        """Var f, (n, C)."""

    @abc.abstractmethod
    def contrast(self, rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Cov(f, aᵀf) (n, C) and Var(aᵀf) (n,), with a = `weights` (n, C)."""

    @abc.abstractmethod
    def draw(self, rows: Tensor, count: int) -> Tensor:
        """Draws of f − E f, (count, n, C), from torch's generator."""


class Structure(abc.ABC):
    """How Σ_n H_n ⊗ φ_n φ_nᵀ is summed up, H = E[diag(p) − p pᵀ]."""

    sums: tuple[str, ...]  # the statistics that are sums over data

    @abc.abstractmethod
    def zeros(self, like: Tensor) -> Statistics:
        """Of no data; `like` is (C, P)."""

    @abc.abstractmethod
    def curvature(self, draws: Tensor) -> Tensor:
        """What is needed of H, averaged over draws of p, (S, n, C): (n, C, C), or its diagonal (n, C)."""

    @abc.abstractmethod
    def add(self, statistics: Statistics, rows: Tensor, curvature: Tensor, weight: float) -> None:
        """Adds `weight` times the sums of these rows, in place."""

    @abc.abstractmethod
    def turned(self, statistics: Statistics) -> Statistics:
        """The same precision, as nearly as it can be, in the basis that these statistics would have; sums are written into."""

    @abc.abstractmethod
    def gaussian(self, statistics: Statistics, prior_precision: float) -> WeightGaussian:
        """Λ = δ I + what is summed up; ValueError where it is not positive definite."""
