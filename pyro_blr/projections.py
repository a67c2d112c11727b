"""The member of a curved exponential family {λ(θ)} that is nearest to a given λ̂ of the family around it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_blr.families import ExponentialFamily

__all__ = ["LARGEST", "Projection"]

LARGEST = 200  # parameters of which a Hessian is formed, where elements do not have their own
_STEPS, _HALVINGS = 60, 30
_DONE = 1e-13  # nats to be gained, beside the divergence itself, below which nothing is moved
_FLAT = 1e-12  # curvature, relative to the largest, below which a direction is taken to be flat
_LONGEST = 5.0  # of a step in unconstrained space

Place = Sequence[Tensor]


@dataclass(frozen=True)
class Projection:
    """argmin_θ Σ_e KL(q_λ(θ)_e ‖ q_λ̂_e), by Newton's method with the Hessian's absolute eigenvalues.

    `natural` is λ(θ), (*batch, p), of a list of float64 tensors. `elements` says that the n-th element of each of them is the n-th
    batch element's alone; the Hessian then has a small block for each.
    """

    natural: Callable[[Place], Tensor]
    family: ExponentialFamily
    elements: bool

    @staticmethod
    def of(natural: Callable[[Place], Tensor], start: Place, family: ExponentialFamily) -> Projection:
        """The projection, whose blocks are found at `start`; raises ValueError where it has too many parameters in one block."""
        apart = Projection(natural, family, elements=True)
        size, count = sum(leaf.numel() for leaf in start), {leaf.numel() for leaf in start}
        with torch.no_grad():
            batch = natural(start).shape[:-1].numel()
        if size > 1 and count == {batch} and batch > 1 and apart._has_blocks(start):
            return apart
        if size > LARGEST:
            raise ValueError(f"{size} parameters together make its arguments, expected {LARGEST} at most")
        return Projection(natural, family, elements=False)

    def nearest(self, target: Tensor, start: Place) -> tuple[Tensor, list[Tensor]]:
        """(λ(θ), θ) of least divergence from `target`, searched from `start`."""
        place = [leaf.detach().clone() for leaf in start]
        value = self._value(place, target)
        for _ in range(_STEPS if place else 0):
            gradient, hessian = self._derivatives(place, target)
            step, decrement = _newton_step(gradient, hessian)
            if not decrement > _DONE * max(1.0, value):
                break
            for halving in range(_HALVINGS):
                tried = self._moved(place, 0.5**halving * step)
                reached = self._value(tried, target)
                if reached < value:
                    break
            else:
                break
            place, value = tried, reached
        with torch.no_grad():
            return self.natural(place), place

    def _divergence(self, place: Place, target: Tensor) -> Tensor:
        return self.family.kl(self.natural(place), target).sum()

    @torch.no_grad()
    def _value(self, place: Place, target: Tensor) -> float:
        natural = self.natural(place)
        if not bool(self.family.contains(natural).all()):
            return float("inf")
        value = float(self.family.kl(natural, target).sum())
        return value if value == value else float("inf")

    def _gradients(self, place: Place, target: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        leaves = [leaf.detach().requires_grad_() for leaf in place]
        total = self._divergence(leaves, target)
        return leaves, list(torch.autograd.grad(total, leaves, create_graph=True, materialize_grads=True))

    def _derivatives(self, place: Place, target: Tensor) -> tuple[Tensor, Tensor]:
        """(gradient (N, k), Hessian (N, k, k)) of N blocks of k parameters."""
        with torch.enable_grad():
            leaves, gradients = self._gradients(place, target)
            if self.elements:
                rows = [torch.stack(_flat(_again(g.sum(), leaves)), -1) for g in gradients]
                return torch.stack(_flat(gradients), -1).detach(), torch.stack(rows, -2)
            slopes = torch.cat(_flat(gradients))
            rows = [torch.cat(_flat(_again(slope, leaves))) for slope in slopes]
        return slopes.detach().unsqueeze(0), torch.stack(rows).unsqueeze(0)

    def _has_blocks(self, start: Place) -> bool:
        """Whether the Hessian times a random vector is that of its blocks."""
        generator = torch.Generator().manual_seed(0)
        noise = [torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x) for x in start]
        place = [x + 0.1 * y for x, y in zip(start, noise, strict=True)]
        with torch.no_grad():
            target = self.natural(place)
        _, hessian = self._derivatives(start, target)
        with torch.enable_grad():
            leaves, gradients = self._gradients(start, target)
            along = sum(((g * v).sum() for g, v in zip(gradients, noise, strict=True)), torch.zeros(()))
            product = torch.stack(_flat(_again(along, leaves)), -1)
        expected = (hessian @ torch.stack(_flat(noise), -1).unsqueeze(-1)).squeeze(-1)
        return bool(torch.allclose(product, expected, rtol=1e-6, atol=1e-8 * float(product.abs().max())))

    def _moved(self, place: Place, step: Tensor) -> list[Tensor]:
        if self.elements:
            return [leaf + part.reshape(leaf.shape) for leaf, part in zip(place, step.unbind(-1), strict=True)]
        parts = step.squeeze(0).split([leaf.numel() for leaf in place])
        return [leaf + part.reshape(leaf.shape) for leaf, part in zip(place, parts, strict=True)]


def _newton_step(gradient: Tensor, hessian: Tensor) -> tuple[Tensor, float]:
    """(−|H|⁻¹ g, ½ gᵀ |H|⁻¹ g summed over blocks)."""
    values, vectors = torch.linalg.eigh(0.5 * (hessian + hessian.mT))
    curvature = values.abs().clamp(min=_FLAT * max(float(values.abs().max()), 1e-300))
    inside = (vectors.mT @ gradient.unsqueeze(-1)).squeeze(-1) / curvature
    step = -(vectors @ inside.unsqueeze(-1)).squeeze(-1)
    step = step * (_LONGEST / step.abs().amax(-1, keepdim=True).clamp(min=1e-300)).clamp(max=1.0)
    return step, -0.5 * float((gradient * step).sum())


def _again(total: Tensor, leaves: list[Tensor]) -> Sequence[Tensor]:
    if not total.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    return torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)


def _flat(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.reshape(-1) for tensor in tensors]
