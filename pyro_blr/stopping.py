"""When to end: exact bounds by their extrapolated gain, noisy ones by a running mean that knows its noise."""

from __future__ import annotations

import math

import torch

__all__ = ["has_levelled", "remaining_gain"]


def remaining_gain(history: list[float]) -> float:
    """Aitken's extrapolation of how much a linearly converging bound can still gain."""
    if len(history) < 3:
        return math.inf
    last, before = history[-1] - history[-2], history[-2] - history[-3]
    if abs(last) <= 1e-12 * max(1.0, abs(history[-1])):
        return 0.0
    if before <= 0:
        return abs(last)
    ratio = last / before
    return last * ratio / (1 - ratio) if ratio < 1 else math.inf


def has_levelled(history: list[float], window: int, tol: float) -> bool:
    """Whether the mean of the last `window` values exceeds that of the window before by less than noise or
    tol.
    """
    recent = torch.tensor(history[-window:], dtype=torch.float64)
    earlier = torch.tensor(history[-2 * window : -window], dtype=torch.float64)
    noise = float(((recent.var() + earlier.var()) / window).sqrt())
    return float(recent.mean() - earlier.mean()) < max(tol, noise)
