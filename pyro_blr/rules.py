"""Steps in λ: how far to move towards a target, and how the distance shrinks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_blr.families import ExponentialFamily

__all__ = ["BLR", "Passes", "RobbinsMonro", "gap"]


@dataclass(frozen=True)
class BLR:
    """λ ← (1 − ρ) λ + ρ λ̂   (Khan and Rue 2023, eq. 3); at ρ = 1 the target itself, Bayes' rule as addition.

    Where the straight step would leave the domain, λ moves along the family's retraction, which cannot (for
    Gaussians the improved rule of Lin, Schmidt and Khan 2020, eq. 8).
    """

    def step(self, family: ExponentialFamily, natural: Tensor, target: Tensor, rate: float) -> Tensor:
        """Shapes (*batch, p)."""
        if rate == 1.0:
            inside = family.contains(target)
            if bool(inside.all()):
                return target
        return family.retract(natural, rate * (target - natural))


def gap(family: ExponentialFamily, natural: Tensor, target: Tensor) -> Tensor:
    """½ ⟨λ̂ − λ, F(λ) (λ̂ − λ)⟩, nats: the KL divergence of the straight step, to second order; shape (*batch).

    F d = ∇_λ ⟨μ(λ), d⟩, since F = ∂μ/∂λ is symmetric.
    """
    direction = target - natural
    with torch.enable_grad():
        leaf = natural.detach().requires_grad_()
        (change,) = torch.autograd.grad((family.to_expectation(leaf) * direction).sum(), leaf)
    return 0.5 * (direction * change).sum(-1)


@dataclass(frozen=True)
class RobbinsMonro:
    """ρ_t = (t + t₀)^−κ: sums to infinity, squares do not (Hoffman et al. 2013, eq. 26)."""

    delay: float = 1.0
    decay: float = 0.7

    def rate(self, step: int) -> float:
        """The rate of step 0, 1, 2, …"""
        return float(torch.tensor(step + self.delay, dtype=torch.float64) ** -self.decay)


@dataclass(frozen=True)
class Passes:
    """ρ_t = (t + 1)^−κ during the first pass over the data, of T steps, and T^(1 − κ) / (t + 1) after it; κ = 0.4.

    Quick while λ is far; then the rate of an average over all later steps, as small after any number of passes as
    the noise of a minibatch needs.
    """

    steps: float
    decay: float = 0.4

    def rate(self, step: int) -> float:
        """The rate of step 0, 1, 2, …"""
        return (step + 1) ** -self.decay if step < self.steps else self.steps ** (1 - self.decay) / (step + 1)
