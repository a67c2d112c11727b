"""Measurements of the Gauss-Newton curvature: squares of gradients at labels that the model draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_blr.generators import isolated_torch_state

__all__ = ["is_due", "measure"]

# Up to as many parameters are measured at each step; sets of labels are as many as keep their gradients below as many numbers, up to 8.
SMALL, NUMBERS = 1_000, 100_000


def is_due(group: Mapping[str, Any]) -> bool:
    """Whether the Gauss-Newton curvature of a group is measured at its next step."""
    if group["curvature"] == "price":
        return False
    every = group["curvature_every"] or (1 if elements(group) <= SMALL else 10)
    return group["draws"] < 20 or group["draws"] % every == 0


def measure(
    group: Mapping[str, Any], distribution: Distribution, parameters: Sequence[Tensor], seed: int
) -> list[Tensor | None]:
    """ĥ of each parameter, by the way that the group names; of small groups from up to eight sets of labels."""
    probes = max(1, min(8, NUMBERS // elements(group)))
    estimate = per_example if group["curvature"] == "examples" else sampled_labels
    return estimate(distribution, parameters, probes, seed)


def elements(group: Mapping[str, Any]) -> int:
    return max(1, sum(parameter.numel() for parameter in group["params"]))


def sampled_labels(
    distribution: Distribution, parameters: Sequence[Tensor], probes: int, seed: int
) -> list[Tensor | None]:
    """ĥ = B (∇ (1/B) Σ_i −log p(ỹ_i | θ))², ỹ_i ~ p(· | θ), averaged over `probes` sets of labels.

    Gradients at labels that the model drew have mean zero and are independent between examples, so that the square of their
    sum is the sum of their squares in expectation, and that is the Fisher information: the Gauss-Newton curvature, one
    backward pass a set. Shapes as the parameters; None for a parameter that the distribution does not depend on.
    """
    total: list[Tensor | None] = [None] * len(parameters)
    for losses in drawn_losses(distribution, probes, seed):
        gradients = torch.autograd.grad(losses.mean(), parameters, retain_graph=True, allow_unused=True)
        for i, gradient in enumerate(gradients):
            total[i] = added(total[i], gradient, losses.numel() / probes)
    return total


def per_example(
    distribution: Distribution, parameters: Sequence[Tensor], probes: int, seed: int
) -> list[Tensor | None]:
    """ĥ = (1/B) Σ_i (∇ −log p(ỹ_i | θ))², ỹ_i ~ p(· | θ): gradients of every example, by torch's vmap over one graph (VOGN).

    Memory is B times the parameters. Shapes as the parameters; None as for `sampled_labels`.
    """
    total: list[Tensor | None] = [None] * len(parameters)
    for losses in drawn_losses(distribution, probes, seed):
        losses = losses.reshape(-1)
        rows = torch.eye(losses.numel(), dtype=losses.dtype, device=losses.device)
        gradients = torch.autograd.grad(
            losses, parameters, rows, retain_graph=True, allow_unused=True, is_grads_batched=True
        )
        for i, gradient in enumerate(gradients):
            total[i] = added(total[i], gradient, 1 / probes, examples=True)
    return total


def drawn_losses(distribution: Distribution, probes: int, seed: int) -> list[Tensor]:
    """−log p(ỹ | θ) of each example, `probes` times; the generators are left as they were."""
    with isolated_torch_state(seed), torch.no_grad():
        labels = [distribution.sample() for _ in range(probes)]
    return [-distribution.log_prob(label) for label in labels]


def added(total: Tensor | None, gradient: Tensor | None, weight: float, examples: bool = False) -> Tensor | None:
    """total + weight · gradient², averaged over examples where the first dimension is theirs; float32 at least."""
    if gradient is None:
        return total
    square = gradient.to(torch.promote_types(gradient.dtype, torch.float32)).square().mul_(weight)
    square = square.mean(0) if examples else square
    return square if total is None else total.add_(square)
