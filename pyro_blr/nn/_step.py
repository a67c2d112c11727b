"""One step on the parameters of a group, from what the draws have told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_blr.nn._buckets import Bucket, Entry, buckets, state_dtype
from pyro_blr.nn._curvature import is_due
from pyro_blr.nn._evidence import Evidence, accumulate
from pyro_blr.nn._metric import is_joint, move_gram, move_jointly, new_gram
from pyro_blr.nn._monitor import note
from pyro_blr.nn._noise import noise_numbers
from pyro_blr.nn._ranks import is_sharded, local, sum_over, world_size
from pyro_blr.nn._rates import turned
from pyro_blr.nn._settings import OWN_NOISE
from pyro_blr.nn._start import first_curvature, new_state
from pyro_blr.nn._update import move_curvature, move_mean, price, price_of_drawn

__all__ = ["begin", "collect", "take"]


def take(groups: Sequence[tuple[dict[str, Any], Sequence[Entry]]], evidence: Evidence) -> None:
    """One step on every group, or on none: RuntimeError where a curvature is asked for that no distribution was given for."""
    for group, entries in groups:
        resolve(group, entries, evidence)
    settle(groups, evidence)
    for group, entries in groups:
        take_group(group, entries, evidence, noise_numbers(group, 0))
    # The means of the others are written already.
    evidence.drawn[:] = [
        bucket
        for bucket in evidence.drawn
        if any(evidence.gradient(entry.parameter) is None for entry in bucket.entries)
    ]


def resolve(group: dict[str, Any], entries: Sequence[Entry], evidence: Evidence) -> None:
    """Which curvature "auto" is, at the first step.

    Raises RuntimeError where a curvature is asked for that no distribution was given for.
    """
    reached = [entry for entry in entries if evidence.gradient(entry.parameter) is not None]
    if group["curvature"] == "auto" and reached:
        smooth = any(entry.parameter in evidence.smooth for entry in entries)
        group["curvature"] = "hessian" if smooth else "labels" if evidence.squares else "price"
    if group["noise"] == "own" and group["curvature"] == "price" and world_size() > 1:
        raise RuntimeError(OWN_NOISE)
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
            begin(group, [entry], first)
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
        turned(group, total_of(agreement, any(is_sharded(entry.parameter) for entry in reached)))


def begin(group: dict[str, Any], entries: Sequence[Entry], curvature: float) -> None:
    """States of parameters without one."""
    for entry in entries:
        entry.state.update(new_state(entry.parameter, curvature))
        if entry.place == first_place(group):
            entry.state.update(new_gram(group, entry))


def first_place(group: dict[str, Any]) -> int:
    """Of the first parameter of a group that is not frozen."""
    return next(place for place, parameter in enumerate(group["params"]) if parameter.requires_grad)


def total_of(parts: Sequence[Tensor], sharded: bool) -> Tensor | None:
    """The sum of scalars, which may lie on several devices, over shards too; None of none."""
    if not parts:
        return None
    total = torch.stack([part.to(parts[0].device) for part in parts]).sum()
    if sharded:
        sum_over([total])
    return total


def settle(groups: Sequence[tuple[dict[str, Any], Sequence[Entry]]], evidence: Evidence) -> None:
    """Averages curvatures over observations, of all processes: as if one had made them all, with the labels that each drew."""
    observations = evidence.observations * world_size()
    for group, entries in groups if evidence.observations else ():
        if world_size() > 1 and is_due(group) and not any(is_sharded(entry.parameter) for entry in entries):
            together(evidence, [entry.parameter for entry in entries])
    for value in (*evidence.squares.values(), *evidence.grams.values()) if observations > 1 else ():
        value.div_(observations)


def together(evidence: Evidence, parameters: Sequence[Tensor]) -> None:
    """Sums the curvatures of a group over processes, where one may have none of a parameter that another has."""
    if not parameters:
        return
    holders = [found.get(parameter) for found in (evidence.squares, evidence.grams) for parameter in parameters]
    present = torch.tensor([float(value is not None) for value in holders], device=parameters[0].device)
    sum_over([present])
    said = iter(present.tolist())
    reduced = []
    for found in (evidence.squares, evidence.grams):
        for parameter in parameters:
            if next(said):
                count = sum(other.numel() for other in parameters)
                shape = parameter.shape if found is evidence.squares else (count, count)
                zeros = parameter.new_zeros(shape, dtype=state_dtype(parameter))
                reduced.append(found.setdefault(parameter, zeros))
    sum_over(reduced)


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
                known = evidence.estimates.setdefault(entry.parameter, torch.zeros_like(local(entry.state["mean"])))
                entry.cut(known).add_(estimate, alpha=weight)
    for entry, gradient in zip(reached, Bucket(group, reached).gradients, strict=True):
        accumulate(evidence.gradients, entry.parameter, gradient, weight)


def measured(bucket: Bucket, evidence: Evidence, numbers: tuple[int, ...], measures: bool) -> list[Tensor]:
    """ĥ of every entry, (*shape) each."""
    if measures:
        return [entry.cut(evidence.squares[entry.parameter]) for entry in bucket.entries]
    if evidence.estimates:
        return [entry.cut(evidence.estimates[entry.parameter]) for entry in bucket.entries]
    if evidence.drawn and bucket.parameters[0].dtype == bucket.of_state("mean")[0].dtype:
        return price_of_drawn(bucket)
    return price(bucket, bucket.noise(*numbers), 1.0)
