"""Measurements of the curvature of the mean loss: squares of gradients at labels that the model draws, and its Hessian."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_blr.generators import isolated_torch_state
from pyro_blr.nn._noise import mixed, normal_like

__all__ = ["SMALL", "elements", "hessian", "is_due", "label_gradients", "probes", "squares"]

# Up to as many parameters are measured at each step; probes are as many as keep their gradients below as many numbers, up to 8.
SMALL, NUMBERS = 1_000, 100_000


def is_due(group: Mapping[str, Any]) -> bool:
    """Whether the curvature of a group is measured at its next step by more than its gradient."""
    if group["curvature"] == "price":
        return False
    every = group["curvature_every"] or (1 if elements(group) <= SMALL else 10)
    return group["draws"] < 20 or group["draws"] % every == 0


def elements(group: Mapping[str, Any]) -> int:
    return max(1, sum(parameter.numel() for parameter in group["params"] if parameter.requires_grad))


def probes(group: Mapping[str, Any]) -> int:
    """Sets of labels, or directions, of one measurement."""
    return max(1, min(8, NUMBERS // elements(group)))


def label_gradients(
    distribution: Distribution, parameters: Sequence[Tensor], count: int, seed: int, by_example: bool
) -> list[Tensor | None]:
    """√w ∇ −log p(ỹ | θ), ỹ ~ p(· | θ), one row a set of labels or an example, (rows, *shape) each: Σ_r g_r g_rᵀ is Ĝ.

    Gradients at labels that the model drew have mean zero and are independent between examples, so that the square of their
    sum is the sum of their squares in expectation, and that is the Fisher information: the Gauss-Newton curvature. Of the
    batch's mean loss: rows √B ∇ (1/B) Σ_i, one backward pass a set of labels. By example: rows ∇_i / √B, by torch's vmap over one
    graph (VOGN), B times the parameters. Averaged over `count` sets. None for a parameter that the distribution does not depend on.
    """
    with isolated_torch_state(seed), torch.no_grad():
        labels = [distribution.sample() for _ in range(count)]
    found = []
    for label in labels:
        losses = -distribution.log_prob(label).reshape(-1)
        weights = torch.full_like(losses, (losses.numel() * count) ** -0.5)
        if by_example:
            options: dict[str, Any] = {"grad_outputs": weights.diag(), "is_grads_batched": True}
        else:
            options = {"grad_outputs": weights}
        gradients = torch.autograd.grad(losses, parameters, retain_graph=True, allow_unused=True, **options)
        found.append([g if g is None or by_example else g[None] for g in gradients])
    return [None if rows[0] is None else torch.cat([raised(g) for g in rows]) for rows in zip(*found, strict=True)]


def squares(gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """ĥ = Σ_r g_r², in the parameters' shapes."""
    return [None if rows is None else rows.square().sum(0) for rows in gradients]


def hessian(
    loss: Tensor, parameters: Sequence[Tensor], scales: Sequence[Tensor], count: int, seed: int
) -> list[Tensor]:
    """ĥ = (v ∘ ∇²ℓ v) / σ², v = ± σ: the diagonal of the Hessian, averaged over `count` draws of the signs (Hutchinson 1990).

    What is off the diagonal is noise, of about the same size for every element because v is in posterior standard deviations.
    The kinks of ReLU units have no second derivative here. RuntimeError where an operation has none that autograd knows.
    """
    total = [torch.zeros_like(scale) for scale in scales]
    gradients = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
    curved = [(gradient, i) for i, gradient in enumerate(gradients) if gradient is not None and gradient.requires_grad]
    for probe in range(count if curved else 0):
        signs = [rademacher(scale, mixed(seed, probe, i)) for i, scale in enumerate(scales)]
        directions = [(signs[i] * scales[i]).to(gradient.dtype) for gradient, i in curved]
        products = torch.autograd.grad(
            [gradient for gradient, _ in curved], parameters, directions, retain_graph=True, allow_unused=True
        )
        for sum_, sign, scale, product in zip(total, signs, scales, products, strict=True):
            if product is not None:
                sum_.add_(sign * product / scale, alpha=1 / count)
    return total


def rademacher(template: Tensor, key: int) -> Tensor:
    """±1, in the shape of `template`."""
    return torch.ones_like(template).copysign(normal_like(template, key))


def raised(gradient: Tensor) -> Tensor:
    """In float32 at least."""
    return gradient.to(torch.promote_types(gradient.dtype, torch.float32))
