"""Whether the curvature has come to rest: posterior scales now and at half as many measurements."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Any

import torch

from pyro_blr.nn._buckets import Bucket, Entry
from pyro_blr.nn._ranks import mean_over

__all__ = ["SETTLED", "drift", "note", "warn_of_drift"]

# Of a standard deviation: what a posterior may still change by without a word.
SETTLED = 0.1


@torch.no_grad()
def note(group: dict[str, Any], entry: Entry) -> None:
    """At measurement 1, 2, 4, 8, … keeps the average of log s of a parameter, and the one before it."""
    count = entry.state["measurements"]
    if count & (count - 1):
        return
    entry.state["before"] = entry.state["lately"]
    entry.state["lately"] = mean_over(Bucket(group, [entry]).precision()[0].log_(), entry.parameter)


def drift(entries: Iterable[Entry]) -> float:
    """By what part posterior standard deviations changed between the last two notes, root mean square; infinite without two.

    log σ = −½ log s, averaged within each parameter, which takes out what a single weight's measurement fluctuates by.
    """
    squares, elements = 0.0, 0
    for entry in entries:
        before, lately = entry.state["before"], entry.state["lately"]
        if before is None or lately is None:
            return math.inf
        squares += entry.parameter.numel() * (0.5 * (lately - before)) ** 2
        elements += entry.parameter.numel()
    return math.sqrt(squares / elements) if elements else math.inf


def warn_of_drift(change: float) -> bool:
    """Warns, and says that it did, where standard deviations still move."""
    if change <= SETTLED:
        return False
    found = (
        f"changed by {change:.0%} since half as many measurements"
        if math.isfinite(change)
        else "were measured once or never"
    )
    warnings.warn(
        f"the curvature has not converged: posterior standard deviations {found}; expected at most {SETTLED:.0%}: take more steps before "
        "trusting them",
        stacklevel=4,
    )
    return True
