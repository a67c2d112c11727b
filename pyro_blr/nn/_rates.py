"""Step sizes: of the mean and of the curvature."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["compares", "curvature_rate", "mean_rate", "turned"]


def mean_rate(group: Mapping[str, Any], device: torch.device) -> Any:
    """α = lr / (1 + k / decay), k = `turns` of the group; `decay` 0 is a constant rate.

    While the mean travels, k stands still and so does the rate; from then on k counts steps, and the mean is an average over
    about T / (lr · decay) of the last T: a minibatch moves it by noise of variance α N / (2 B) posterior variances, which falls as 1 / T.
    """
    lr, decay, turns = group["lr"], group["decay"], group["turns"]
    if not decay:
        return lr
    return lr / (1 + (turns.item() if device.type == turns.device.type == "cpu" else turns.to(device)) / decay)


def compares(group: Mapping[str, Any]) -> bool:
    """Whether this step compares its gradient with those before it: every one of the first forty, then every fourth."""
    return group["decay"] > 0 and (group["draws"] < 40 or group["draws"] % 4 == 0)


def turned(group: dict[str, Any], agreement: Tensor | None) -> None:
    """k ← k + 2 c where a gradient turns against those before it (`agreement` negative), which noise does every other time.

    The rule of Kesten (1958) in several dimensions (Delyon and Juditsky 1993), with c steps from one comparison to the next.
    """
    if agreement is not None:
        group["turns"] = group["turns"] + (2.0 if group["draws"] < 40 else 8.0) * (agreement < 0)


def curvature_rate(measurement: int, group: Mapping[str, Any]) -> float:
    """ρ_n = max(curvature_rate, c / (n + 20)) at measurement n = 1, 2, …, c = 3, or 2 for Price's; without `decay` curvature_rate.

    The weight of measurement j among n is about c (j + 20)^(c − 1) / (n + 20)^c. Of c = 3 seven eighths lie on the last half, and what
    the curvature began with has weight (20 / (n + 20))³; Price's, which is noise above all, is averaged more evenly.
    """
    floor = group["curvature_rate"]
    power = 2 if group["curvature"] == "price" else 3
    return float(max(floor, power / (measurement + 20)) if group["decay"] else floor)
