"""The Gauss-Newton matrix of all parameters of a small group together, as the metric in which its mean moves.

q stays as it is. The stationary point of the mean, N E_q[∇ℓ] + δ (m − m₀) = 0, is the same in every metric; how many steps lead there
is not: where the posterior is strongly correlated, a network of twenty weights wants some thousands in the diagonal metric.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_blr.nn._buckets import Bucket, Entry, state_dtype
from pyro_blr.nn._curvature import SMALL, elements
from pyro_blr.nn._ranks import is_sharded
from pyro_blr.nn._rates import compares, curvature_rate, mean_rate

__all__ = ["gram_of", "is_joint", "move_gram", "move_jointly", "new_gram"]

# Levenberg's part of the diagonal that is added to the matrix.
DAMPING = 1e-3


def is_joint(group: Mapping[str, Any]) -> bool:
    """Whether the mean of a group moves in the metric of all its parameters."""
    return group["curvature"] != "price" and is_small(group)


def gram_of(gradients: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> Tensor:
    """Ĝ = Σ_r g_r g_rᵀ of label gradients, (rows, *shape) each, as one matrix, (D, D)."""
    count = max(len(rows) for rows in gradients if rows is not None)
    columns = [
        torch.zeros(count, parameter.numel(), dtype=state_dtype(parameter), device=parameter.device)
        if rows is None
        else rows.reshape(count, -1)
        for rows, parameter in zip(gradients, parameters, strict=True)
    ]
    together = torch.cat(columns, 1)
    return together.T @ together


def is_small(group: Mapping[str, Any]) -> bool:
    """Whether the parameters of a group may have a matrix together."""
    if group["metric"] == "diagonal":
        return False
    free = [parameter for parameter in group["params"] if parameter.requires_grad]
    kinds = {(parameter.device, state_dtype(parameter)) for parameter in free}
    if any(is_sharded(parameter) for parameter in free):
        return False
    return len(kinds) == 1 and (group["metric"] == "joint" or elements(group) <= SMALL)


def new_gram(group: Mapping[str, Any], first: Entry) -> dict[str, Any]:
    """What the state of a small group's first parameter holds besides: G and the factor of A, (D, D), and how often G was measured."""
    if not is_small(group):
        return {}
    count, mean = elements(group), first.state["mean"]
    return {"grams": 0, "gram": mean.new_zeros(count, count), "factor": mean.new_zeros(count, count)}


@torch.no_grad()
def move_gram(group: dict[str, Any], entries: Sequence[Entry], gram: Tensor) -> None:
    """G ← (1 − ρ) G + ρ Ĝ, beginning at diag(h), and the factor of A, of a large matrix every so many times as it costs D³."""
    state = entries[0].state
    if len(state.get("gram", ())) != len(gram):  # others are frozen now
        state.update(new_gram(group, entries[0]))
    if state["grams"] == 0:
        state["gram"] = torch.cat([entry.state["curvature"].flatten() for entry in entries]).diag()
    state["grams"] += 1
    state["gram"].lerp_(gram.to(state["gram"].dtype), curvature_rate(state["grams"], group))
    if (state["grams"] - 1) % max(1, len(gram) ** 2 // 50_000) == 0:
        ridge = torch._foreach_add(
            [torch.zeros_like(e.state["mean"]) for e in entries], Bucket(group, list(entries)).ridge()
        )
        added = torch.cat([value.flatten() for value in ridge]).add_(state["gram"].diagonal(), alpha=DAMPING)
        state["factor"] = torch.linalg.cholesky(state["gram"] + added.clamp_min_(1e-30).diag())


@torch.no_grad()
def move_jointly(group: dict[str, Any], entries: Sequence[Entry], gradients: Sequence[Tensor]) -> list[Tensor]:
    """m ← m − α A⁻¹ (g / (1 − β^t) + δ (m − m₀) / N),  A = G + δ/N + 10⁻³ diag G, no longer than 2 trust √D in the norm of N A.

    Returns, where rates fall, ⟨ĝ, g⟩ before the step, both with the prior's, in the metric A.
    """
    first, data, bucket = entries[0].state, float(group["num_data"]), Bucket(group, list(entries))
    beta = group["momentum"]
    mean = torch.cat([entry.state["mean"].flatten() for entry in entries])
    pull = torch.cat([value.flatten() for value in bucket.pull()])
    factor = first["factor"]
    old = [entry.state["momentum"] / max(1 - beta ** entry.state["step"], 1e-8) for entry in entries]
    before = torch.cat([value.flatten() for value in old]) + pull
    now = torch.cat([gradient.flatten() for gradient in gradients]).to(mean.dtype) + pull
    rate = mean_rate(group, mean.device)
    agreement = [torch.dot(now, solved(factor, before))] if first["step"] and compares(group) else []
    for entry, gradient in zip(entries, gradients, strict=True):
        entry.state["momentum"].lerp_(gradient.to(mean.dtype), 1 - beta)
    running = [entry.state["momentum"] / (1 - beta ** (entry.state["step"] + 1)) for entry in entries]
    slope = torch.cat([value.flatten() for value in running]) + pull
    step = rate * solved(factor, slope)
    if group["trust"] is not None:
        length = (data * rate * (slope * step).sum()).clamp_min(0).sqrt()
        step = step * (2 * group["trust"] * len(step) ** 0.5 / length).clamp_max(1)
    mean -= step
    for entry, part in zip(entries, mean.split([entry.parameter.numel() for entry in entries]), strict=True):
        entry.state["mean"].copy_(part.view_as(entry.state["mean"]))
        entry.parameter.copy_(entry.state["mean"])
    return agreement


def solved(factor: Tensor, vector: Tensor) -> Tensor:
    """A⁻¹ v."""
    return torch.cholesky_solve(vector[:, None], factor)[:, 0]
