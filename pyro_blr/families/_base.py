"""What a minimal exponential family is, and what follows from that."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self


class ExponentialFamily(ABC):
    """q(x) = exp(⟨λ, T(x)⟩ − A(λ)) with respect to a constant base measure, λ minimal.

    λ and μ = E T(x) = ∇A(λ) are packed in one tensor (*batch, num_parameters). Members are frozen dataclasses
    that hold shapes, never parameters, so equal families compare and hash equal. `moments`, `message`,
    `log_partition` and `entropy` have no branches on data: they can be traced, batched by `torch.func` and
    differentiated.

    `log_prob`, `entropy`, `kl`, `fisher` and `natural_gradient` follow from A and its gradient; a member
    overrides one only where a closed form is cheaper or holds to more digits.
    """

    @property
    @abstractmethod
    def event_shape(self) -> torch.Size:
        """Shape of one value."""

    @property
    @abstractmethod
    def num_parameters(self) -> int:
        """Length of λ."""

    @property
    def is_discrete(self) -> bool:
        """Whether values are counted rather than integrated over."""
        return False

    @property
    def num_levels(self) -> int:
        """How many uniform levels in (0, 1) one value is made of by `at_levels`; 0 where there is no such map."""
        return 0

    def at_levels(self, natural: Tensor, levels: Tensor) -> Tensor:
        """x(u) ~ q for u uniform on (0, 1)^num_levels: (*batch, p), (S, *batch, num_levels) -> (S, *batch, *event).

        Smooth in λ and u and differentiable in λ, so that it may take low-discrepancy levels and reparameterise.
        """
        raise NotImplementedError(f"{self!r} makes no values of levels: num_levels is {self.num_levels}")

    @abstractmethod
    def sufficient_statistics(self, value: Tensor) -> Tensor:
        """T(x): (*batch, *event) -> (*batch, p)."""

    @abstractmethod
    def log_partition(self, natural: Tensor) -> Tensor:
        """A(λ) = log ∫ exp⟨λ, T(x)⟩ dx: (*batch, p) -> (*batch)."""

    @abstractmethod
    def to_expectation(self, natural: Tensor) -> Tensor:
        """μ = ∇A(λ)."""

    @abstractmethod
    def to_natural(self, expectation: Tensor) -> Tensor:
        """λ with ∇A(λ) = μ, once differentiable: dλ = F(λ)⁻¹ dμ."""

    @abstractmethod
    def contains(self, natural: Tensor) -> Tensor:
        """Whether λ is finite and inside the open domain of A: (*batch, p) -> bool (*batch)."""

    @abstractmethod
    def moments(self, natural: Tensor) -> dict[str, Tensor]:
        """The named expectations that exact messages are derivatives in, never differences of raw moments."""

    @abstractmethod
    def message(self, natural: Tensor, gradients: Mapping[str, Tensor]) -> Tensor:
        """∇_μ f from the gradients of f in `moments`; a moment that is missing has gradient zero."""

    @abstractmethod
    def to_distribution(self, natural: Tensor) -> Any:
        """q as a Pyro distribution whose batch shape is λ's; arguments are not validated."""

    @abstractmethod
    def from_distribution(self, distribution: Any) -> Tensor:
        """λ of a distribution of this family, (*distribution.batch_shape, p)."""

    @classmethod
    @abstractmethod
    def of(cls, distribution: Any) -> Self | None:
        """The member that a distribution of a registered class denotes, if any."""

    @abstractmethod
    def _bend(self, natural: Tensor, direction: Tensor) -> Tensor:
        """A curve that starts as λ + d and stays inside, used where λ + d does not."""

    def retract(self, natural: Tensor, direction: Tensor) -> Tensor:
        """λ + d where that is inside; elsewhere a point that agrees with λ + d to first order and is inside.

        A direction from which rounding leaves no point (infinite, NaN) leaves λ where it is.
        """
        straight = natural + direction
        bent = self._bend(natural, direction)
        bent = torch.where(self.contains(bent).unsqueeze(-1), bent, natural)
        return torch.where(self.contains(straight).unsqueeze(-1), straight, bent)

    def log_prob(self, natural: Tensor, value: Tensor) -> Tensor:
        """⟨λ, T(x)⟩ − A(λ), summed in float64."""
        wide = natural.double()
        statistics = self.sufficient_statistics(value.double() if value.is_floating_point() else value)
        return ((wide * statistics).sum(-1) - self.log_partition(wide)).to(natural.dtype)

    def entropy(self, natural: Tensor) -> Tensor:
        """A(λ) − ⟨λ, μ⟩, summed in float64."""
        wide = natural.double()
        return (self.log_partition(wide) - (wide * self.to_expectation(wide)).sum(-1)).to(natural.dtype)

    def entropy_from(self, natural: Tensor, moments: Mapping[str, Tensor]) -> Tensor:
        """The entropy where λ's moments are known already; a member that they save work overrides it."""
        return self.entropy(natural)

    def kl(self, natural_q: Tensor, natural_p: Tensor) -> Tensor:
        """KL(q ‖ p) = A(λ_p) − A(λ_q) − ⟨λ_p − λ_q, μ_q⟩, summed in float64."""
        q, p = natural_q.double(), natural_p.double()
        inner = ((p - q) * self.to_expectation(q)).sum(-1)
        return (self.log_partition(p) - self.log_partition(q) - inner).to(natural_q.dtype)

    def fisher(self, natural: Tensor) -> Tensor:
        """F(λ) = ∇²A(λ): (*batch, p) -> (*batch, p, p)."""
        flat = natural.reshape(-1, self.num_parameters)
        jacobian = torch.func.vmap(torch.func.jacrev(self.to_expectation))(flat)
        return jacobian.reshape(*natural.shape, self.num_parameters)

    def natural_gradient(self, natural: Tensor, gradient: Tensor) -> Tensor:
        """F(λ)⁻¹ g, the step in λ whose first-order change of μ is g."""
        factor = torch.linalg.cholesky_ex(self.fisher(natural))[0]
        return torch.cholesky_solve(gradient.unsqueeze(-1), factor).squeeze(-1)

    def _differentiable(self, natural: Tensor, expectation: Tensor) -> Tensor:
        """The solution λ of an iteration on μ, with the derivative of the implicit function theorem."""
        natural = natural.detach()
        return natural + self.natural_gradient(natural, expectation - expectation.detach())

    def _refuse(self, distribution: Any) -> ValueError:
        return ValueError(
            f"found {distribution!r}, expected a distribution of the family {self!r}; "
            f"pass one that `family_of` maps to this family, or choose the family that fits the distribution"
        )


def gradient_of(gradients: Mapping[str, Tensor], name: str, like: Tensor) -> Tensor:
    """The gradient in one moment, zero of the moment's shape where it is missing."""
    gradient = gradients.get(name)
    return torch.zeros_like(like) if gradient is None else gradient


def bend_positive(x: Tensor, step: Tensor) -> Tensor:
    """x + d for d ≥ 0 and x² / (x − d) for d < 0: positive, and x + d to first order."""
    return x * (x / (x + torch.relu(-step))) + torch.relu(step)
