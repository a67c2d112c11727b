"""Step sizes: of the mean and of the curvature."""

from __future__ import annotations

__all__ = ["curvature_rate", "mean_rate"]


def mean_rate(step: int, lr: float, decay: float) -> float:
    """α_t = lr / (1 + t / decay) at step t = 1, 2, …; `decay` 0 is a constant rate.

    At the end of T steps the mean is an average over about T / (lr · decay) of them, whatever T is: a minibatch moves it by noise of
    variance α N / (2 B) posterior variances, which falls as 1 / T.
    """
    return lr / (1 + step / decay) if decay else lr


def curvature_rate(measurement: int, floor: float, decays: bool) -> float:
    """ρ_n = max(floor, 2 / (n + 20)) at measurement n = 1, 2, …; the floor itself if the rate does not decay.

    The weight of measurement j among n is about 2 (j + 20) / (n + 20)²: three quarters lie on the last half, and what the curvature
    began with has weight (20 / (n + 20))².
    """
    return max(floor, 2 / (measurement + 20)) if decays else floor
