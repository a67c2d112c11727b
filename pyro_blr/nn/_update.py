"""One step of the rule for a diagonal Gaussian on a bucket of parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_blr.nn._buckets import Bucket
from pyro_blr.nn._rates import curvature_rate, mean_rate

__all__ = ["move_curvature", "move_mean", "price"]


def price(bucket: Bucket, noise: Sequence[Tensor], sign: float) -> list[Tensor]:
    """ĥ = ∇ℓ(θ) (θ − m) / σ² = ± ∇ℓ(θ) ε / σ, whose expectation is E_q[∂²ℓ] (Price's theorem); (*shape) each.

    The gradients are those at the parameters.
    """
    estimate = torch._foreach_div(list(noise), bucket.scale())
    torch._foreach_mul_(estimate, bucket.gradients)
    torch._foreach_mul_(estimate, sign)
    return list(estimate)


def move_curvature(bucket: Bucket, measured: Sequence[Tensor], definite: bool) -> None:
    """h ← h + clip(ρ (ĥ − h) + ½ ρ² (ĥ − h)² / (h + δ/N)), clipped at ± trust (h + δ/N).

    The second term, of the improved rule (Lin, Schmidt and Khan 2020, eq. 8), keeps s = N h + δ positive; what is never
    negative (`definite`) does without it, and without the bias that noise gives it.
    """
    group, state = bucket.group, bucket.entries[0].state
    rate = curvature_rate(state["measurements"] + 1, group["curvature_rate"], group["decay"] > 0)
    curvature = bucket.of_state("curvature")
    prior = bucket.prior("prior_precision")
    each = [one / group["num_data"] for one in prior] if isinstance(prior, list) else prior / group["num_data"]
    total = list(torch._foreach_add(curvature, each))
    difference = list(torch._foreach_sub(list(measured), curvature))
    torch._foreach_mul_(difference, rate)
    if not definite:
        second = torch._foreach_mul(difference, difference)
        torch._foreach_div_(second, total)
        torch._foreach_add_(difference, second, alpha=0.5)
    if group["trust"] is not None:
        torch._foreach_mul_(total, group["trust"])
        clip(difference, total)
    torch._foreach_add_(curvature, difference)
    for entry in bucket.entries:
        entry.state["measurements"] += 1


def move_mean(bucket: Bucket, gradient: Sequence[Tensor]) -> None:
    """g ← β g + (1 − β) ĝ;  m ← m − clip(α (g / (1 − β^t) + δ (m − m₀) / N) / (h + δ/N)), clipped at ± trust σ."""
    group, state = bucket.group, bucket.entries[0].state
    step, beta = state["step"] + 1, group["momentum"]
    momentum, mean = bucket.of_state("momentum"), bucket.of_state("mean")
    torch._foreach_lerp_(momentum, list(gradient), 1 - beta)
    # N (g + δ (m − m₀) / N) / s, the natural gradient.
    direction = list(torch._foreach_mul(momentum, group["num_data"] / (1 - beta**step)))
    add_prior(bucket, direction)
    precision = bucket.precision()
    torch._foreach_div_(direction, precision)
    torch._foreach_mul_(direction, -mean_rate(step, group["lr"], group["decay"]))
    if group["trust"] is not None:
        torch._foreach_sqrt_(precision)
        torch._foreach_reciprocal_(precision)
        torch._foreach_mul_(precision, group["trust"])
        clip(direction, precision)
    torch._foreach_add_(mean, direction)
    torch._foreach_copy_(bucket.parameters, mean)
    for entry in bucket.entries:
        entry.state["step"] = step


def add_prior(bucket: Bucket, direction: list[Tensor]) -> None:
    """direction += δ (m − m₀)."""
    precision, origin, mean = bucket.prior("prior_precision"), bucket.prior("prior_mean"), bucket.of_state("mean")
    if not isinstance(precision, list) and not isinstance(origin, list):
        torch._foreach_add_(direction, mean, alpha=precision)
        torch._foreach_sub_(direction, precision * origin)
        return
    away = list(torch._foreach_sub(mean, origin))
    torch._foreach_mul_(away, precision)
    torch._foreach_add_(direction, away)


def clip(values: list[Tensor], radius: list[Tensor]) -> None:
    """values ← min(max(values, −radius), radius); turns the sign of `radius`."""
    torch._foreach_clamp_max_(values, radius)
    torch._foreach_neg_(radius)
    torch._foreach_clamp_min_(values, radius)
