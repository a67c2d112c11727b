"""One step on the parameters of a group, from what the draws have told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pyro_blr.nn._buckets import Bucket, Entry, buckets
from pyro_blr.nn._evidence import Evidence, accumulate
from pyro_blr.nn._monitor import note
from pyro_blr.nn._noise import noise_numbers
from pyro_blr.nn._start import first_curvature, new_state
from pyro_blr.nn._update import move_curvature, move_mean, price

__all__ = ["collect", "take"]


def take(groups: Sequence[tuple[dict[str, Any], Sequence[Entry]]], evidence: Evidence) -> None:
    """One step on every group, or on none: RuntimeError where a curvature is asked for that no distribution was given for."""
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
        group["curvature"] = "labels" if evidence.squares else "price"
    if (
        group["curvature"] in ("labels", "examples")
        and not evidence.squares
        and any(not entry.state for entry in reached)
    ):
        raise RuntimeError(
            f"curvature={group['curvature']!r}, but the first step saw no distribution; expected the closure to return (distribution, "
            "labels), or observe(distribution) before backward: do that, or choose curvature='price'"
        )


def take_group(group: dict[str, Any], entries: Sequence[Entry], evidence: Evidence, numbers: tuple[int, ...]) -> None:
    """Curvatures, then means, of all parameters that have a gradient; `numbers` are those of the noise of a single draw."""
    definite = group["curvature"] != "price"
    found = [(entry, evidence.gradient(entry.parameter)) for entry in entries]
    gradients = {entry.index: gradient for entry, gradient in found if gradient is not None}
    reached = [entry for entry in entries if entry.index in gradients]
    known = [entry for entry in reached if entry.state and (not definite or entry.parameter in evidence.squares)]
    for bucket in buckets(group, known):
        move_curvature(bucket, measured(bucket, evidence, numbers, definite), definite)
        note(bucket)
    for entry in reached:
        if not entry.state:
            square = evidence.square(entry.parameter) if entry.parameter in evidence.squares else None
            first = first_curvature(entry, gradients[entry.index], square, group)
            entry.state.update(new_state(entry.parameter, first))
    for bucket in buckets(group, reached):
        own = zip(bucket.entries, bucket.of_state("mean"), strict=True)
        move_mean(bucket, [gradients[entry.index].to(mean.dtype) for entry, mean in own])


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
            for parameter, estimate in zip(bucket.parameters, estimates, strict=True):
                accumulate(evidence.estimates, parameter, estimate, weight)
    everything = Bucket(group, reached)
    for parameter, gradient in zip(everything.parameters, everything.gradients, strict=True):
        accumulate(evidence.gradients, parameter, gradient, weight)


def measured(bucket: Bucket, evidence: Evidence, numbers: tuple[int, ...], definite: bool) -> list[Tensor]:
    """ĥ of every entry, (*shape) each."""
    if definite:
        return [evidence.square(parameter) for parameter in bucket.parameters]
    if evidence.estimates:
        return [evidence.estimates[parameter] for parameter in bucket.parameters]
    return price(bucket, bucket.noise(*numbers), 1.0)
