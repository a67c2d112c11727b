"""One step of the rule for a diagonal Gaussian on a bucket of parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_blr.nn._buckets import Bucket
from pyro_blr.nn._rates import compares, curvature_rate, mean_rate

__all__ = ["move_curvature", "move_mean", "price", "price_of_drawn"]


def price(bucket: Bucket, noise: Sequence[Tensor], sign: float) -> list[Tensor]:
    """ĥ = ∇ℓ(θ) (θ − m) / σ² = ± ∇ℓ(θ) ε / σ, whose expectation is E_q[∂²ℓ] (Price's theorem); (*shape) each.

    The gradients are those at the parameters.
    """
    estimate = bucket.total()
    torch._foreach_sqrt_(estimate)
    torch._foreach_mul_(estimate, list(noise))
    torch._foreach_mul_(estimate, bucket.gradients)
    torch._foreach_mul_(estimate, sign * float(bucket.group["num_data"]) ** 0.5)
    return estimate


def price_of_drawn(bucket: Bucket) -> list[Tensor]:
    """The same of parameters that hold θ still: ĥ = ∇ℓ(θ) (θ − m) s, without drawing the noise again."""
    estimate = list(torch._foreach_sub(bucket.parameters, bucket.of_state("mean")))
    torch._foreach_mul_(estimate, bucket.gradients)
    torch._foreach_mul_(estimate, bucket.total())
    torch._foreach_mul_(estimate, float(bucket.group["num_data"]))
    return estimate


def move_curvature(bucket: Bucket, measured: Sequence[Tensor], definite: bool) -> None:
    """h ← h + clip(ρ (ĥ − h) + ½ ρ² (ĥ − h)² / (h + δ/N)), clipped at ± trust (h + δ/N).

    The second term, of the improved rule (Lin, Schmidt and Khan 2020, eq. 8), keeps s = N h + δ positive; what is never
    negative (`definite`) does without it, and without the bias that noise gives it.
    """
    group, state = bucket.group, bucket.entries[0].state
    rate = curvature_rate(state["measurements"] + 1, group)
    curvature = bucket.of_state("curvature")
    total = bucket.total()
    difference = list(torch._foreach_sub(list(measured), curvature))
    torch._foreach_mul_(difference, rate)
    if not definite:
        torch._foreach_addcdiv_(difference, torch._foreach_mul(difference, difference), total, value=0.5)
    if group["trust"] is not None:
        torch._foreach_mul_(total, group["trust"])
        clip(difference, total)
    torch._foreach_add_(curvature, difference)


def move_mean(bucket: Bucket, gradient: Sequence[Tensor]) -> list[Tensor]:
    """g ← β g + (1 − β) ĝ;  m ← m − clip(α (g / (1 − β^t) + δ (m − m₀) / N) / (h + δ/N)), clipped at ± trust σ.

    Returns, where rates fall, the parts of ⟨ĝ, g⟩ before the step, both with the prior's and in the metric 1 / (h + δ/N).
    """
    group, state = bucket.group, bucket.entries[0].state
    step, beta, data = state["step"] + 1, group["momentum"], float(group["num_data"])
    momentum, mean = bucket.of_state("momentum"), bucket.of_state("mean")
    pull = bucket.pull()
    total = bucket.total()
    agreement: list[Tensor] = []
    if step > 1 and compares(group):
        before = list(torch._foreach_add(pull, momentum, alpha=1 / max(1 - beta ** (step - 1), 1e-8)))
        torch._foreach_div_(before, total)
        now = torch._foreach_add(pull, list(gradient))
        agreement = [torch.dot(a.flatten(), b.flatten()) for a, b in zip(before, now, strict=True)]
    torch._foreach_lerp_(momentum, list(gradient), 1 - beta)
    torch._foreach_add_(pull, momentum, alpha=1 / (1 - beta**step))
    torch._foreach_div_(pull, total)
    torch._foreach_mul_(pull, mean_rate(group, mean[0].device))
    if group["trust"] is not None:
        torch._foreach_rsqrt_(total)
        torch._foreach_mul_(total, group["trust"] / data**0.5)
        clip(pull, total)
    torch._foreach_sub_(mean, pull)
    torch._foreach_copy_(bucket.parameters, mean)
    return agreement


def clip(values: list[Tensor], radius: list[Tensor]) -> None:
    """values ← min(max(values, −radius), radius); turns the sign of `radius`."""
    torch._foreach_clamp_max_(values, radius)
    torch._foreach_neg_(radius)
    torch._foreach_clamp_min_(values, radius)
