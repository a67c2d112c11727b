"""What a parameter begins with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_blr.nn._buckets import Entry, state_dtype
from pyro_blr.nn._ranks import local, mean_over

__all__ = ["first_curvature", "new_state"]


@torch.no_grad()
def new_state(parameter: Tensor, curvature: float) -> dict[str, Any]:
    """Mean, momentum and curvature, in float32 at least; `before` and `lately` are the monitor's notes."""
    mean = parameter.detach().to(state_dtype(parameter), copy=True)
    return {
        "step": 0,
        "measurements": 0,
        "before": None,
        "lately": None,
        "mean": mean,
        "momentum": torch.zeros_like(mean),
        "curvature": torch.full_like(mean, curvature),
    }


@torch.no_grad()
def first_curvature(entry: Entry, gradient: Tensor, measured: Tensor | None, group: Mapping[str, Any]) -> float:
    """h₀, the same for all elements, so that one small gradient makes no large standard deviation.

    Measured at the mean where it could be. Otherwise so that the first standard deviations are at most a tenth of the weights'
    root mean square and (N mean ĝ²)^−½, which are small: Price's estimator then leads from there.
    """
    if measured is not None:
        return float(measured.mean())
    said = group["prior_precision"]
    said = said[entry.place] if isinstance(said, (list, tuple)) else said
    prior = float(torch.as_tensor(said).mean(dtype=torch.float64))
    size, slope = (
        mean_over(local(tensor).to(torch.float64).square(), entry.parameter) for tensor in (entry.parameter, gradient)
    )
    precision = max(prior, 100 / size if size > 0 else 0.0, group["num_data"] * slope)
    return (precision - prior) / group["num_data"]
