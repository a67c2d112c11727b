"""One step on the parameters of a group, from what the draws have told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_blr.nn._buckets import Bucket, Entry, buckets
from pyro_blr.nn._evidence import Evidence, accumulate
from pyro_blr.nn._metric import is_joint, move_gram, move_jointly, new_gram
from pyro_blr.nn._monitor import note
from pyro_blr.nn._noise import noise_numbers
from pyro_blr.nn._rates import turned
from pyro_blr.nn._start import first_curvature, new_state
from pyro_blr.nn._update import move_curvature, move_mean, price

__all__ = ["collect", "take"]


def take(groups: Sequence[tuple[dict[str, Any], Sequence[Entry]]], evidence: Evidence) -> None:
    """One step on every group, or on none: RuntimeError where a curvature is asked for that no distribution was given for."""
    evidence.settle()
    for group, entries in groups:
        resolve(group, entries, evidence)
    for group, entries in groups:
        take_group(group, entries, evidence, noise_numbers(group, 0))


def resolve(group: dict[str, Any], entries: Sequence[Entry], evidence: Evidence) -> None:
    """Which curvature "auto" is, at the first step.

    Raises RuntimeError where a curvature is asked for that no distribution was given for.
    """
    reached = [entry for entry in entries if evidence.gradient(entry.parameter) is not None]
    if group["curvature"] == "auto" and reached:
        smooth = any(entry.parameter in evidence.smooth for entry in entries)
        group["curvature"] = "hessian" if smooth else "labels" if evidence.squares else "price"
    if (
        group["curvature"] in ("labels", "examples", "hessian")
        and not evidence.squares
        and any(not entry.state for entry in reached)
    ):
        raise RuntimeError(
            f"curvature={group['curvature']!r}, but the first step saw no distribution; expected the closure to return (distribution, "
            "labels), or observe(distribution) before backward: do that, or choose curvature='price'"
        )


def take_group(group: dict[str, Any], entries: Sequence[Entry], evidence: Evidence, numbers: tuple[int, ...]) -> None:
    """Curvatures, then means, of all parameters that have a gradient; `numbers` are those of the noise of a single draw."""
    measures, definite = group["curvature"] != "price", group["curvature"] in ("labels", "examples")
    found = [(entry, evidence.gradient(entry.parameter)) for entry in entries]
    gradients = {entry.index: gradient for entry, gradient in found if gradient is not None}
    reached = [entry for entry in entries if entry.index in gradients]
    known = [entry for entry in reached if entry.state and (not measures or entry.parameter in evidence.squares)]
    for bucket in buckets(group, known):
        move_curvature(bucket, measured(bucket, evidence, numbers, measures), definite)
    for entry in known:
        entry.state["measurements"] += 1
        note(group, entry)
    for entry in reached:
        if not entry.state:
            square = evidence.squares.get(entry.parameter)
            first = first_curvature(entry, gradients[entry.index], square, group)
            entry.state.update(new_state(entry.parameter, first))
            if entry is entries[0]:
                entry.state.update(new_gram(group, entries))
    whole = len(reached) == len(entries)
    if whole and entries and entries[0].parameter in evidence.grams:
        move_gram(group, reached, evidence.grams[entries[0].parameter])
    if whole and entries and is_joint(group) and entries[0].state.get("grams"):
        agreement = move_jointly(group, reached, [gradients[entry.index] for entry in reached])
    else:
        agreement = []
        for bucket in buckets(group, reached):
            own = zip(bucket.entries, bucket.of_state("mean"), strict=True)
            agreement += move_mean(bucket, [entry.cut(gradients[entry.index]).to(mean.dtype) for entry, mean in own])
    for entry in reached:
        entry.state["step"] += 1
    if reached:
        turned(group, total_of(agreement))


def total_of(parts: Sequence[Tensor]) -> Tensor | None:
    """The sum of scalars, which may lie on several devices; None of none."""
    return torch.stack([part.to(parts[0].device) for part in parts]).sum() if parts else None


def collect(
    group: dict[str, Any],
    entries: Sequence[Entry],
    evidence: Evidence,
    numbers: tuple[int, ...],
    sign: float,
    weight: float,
) -> None:
    """Adds `weight` times the gradients of one of several draws, and Price's estimates where these will be asked for."""
    reached = [entry for entry in entries if entry.parameter.grad is not None]
    if group["curvature"] == "price" or (group["curvature"] == "auto" and not evidence.squares):
        for bucket in buckets(group, [entry for entry in reached if entry.state]):
            estimates = price(bucket, bucket.noise(*numbers), sign)
            for entry, estimate in zip(bucket.entries, estimates, strict=True):
                known = evidence.estimates.setdefault(entry.parameter, torch.zeros_like(entry.state["mean"]))
                entry.cut(known).add_(estimate, alpha=weight)
    everything = Bucket(group, reached)
    for parameter, gradient in zip(everything.parameters, everything.gradients, strict=True):
        accumulate(evidence.gradients, parameter, gradient, weight)


def measured(bucket: Bucket, evidence: Evidence, numbers: tuple[int, ...], measures: bool) -> list[Tensor]:
    """ĥ of every entry, (*shape) each."""
    if measures:
        return [entry.cut(evidence.squares[entry.parameter]) for entry in bucket.entries]
    if evidence.estimates:
        return [entry.cut(evidence.estimates[entry.parameter]) for entry in bucket.entries]
    return price(bucket, bucket.noise(*numbers), 1.0)
