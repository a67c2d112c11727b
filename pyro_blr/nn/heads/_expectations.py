"""Expectations of the softmax likelihood under the logits' posterior, over parts of a batch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_blr.nn.heads._structures import Structure, WeightGaussian

__all__ = ["Batch", "Expectations", "expectations", "spread_change"]

# Numbers that the draws of a part of the batch take; where the weights are more than sixteen times as many, a sixteenth of these.
PART_NUMBERS = 1 << 22


class Batch(NamedTuple):
    """Rows φ (n, P), with the bias's column, and class numbers (n,)."""

    rows: Tensor
    targets: Tensor


class Expectations(NamedTuple):
    """value: Σ E log p(y). residual: y − E p, (n, C). curvature: as the structure has it, (n, ...)."""

    value: float
    residual: Tensor
    curvature: Tensor


def expectations(
    structure: Structure,
    gaussian: WeightGaussian | None,
    mean: Tensor,
    batch: Batch,
    num_draws: int,
) -> Expectations:
    """Over draws of the logits under `gaussian`, in pairs m ± ε, or at the mean without one or without draws."""
    residual = torch.empty(len(batch.rows), len(mean), dtype=mean.dtype, device=mean.device)
    curvatures: list[Tensor] = []
    value, draws = 0.0, 0 if gaussian is None else num_draws
    size = max(1, max(PART_NUMBERS, mean.numel() // 16) // (len(mean) * max(1, draws)))
    for start in range(0, len(batch.rows), size):
        rows, targets = batch.rows[start : start + size], batch.targets[start : start + size]
        logits = (rows @ mean.mT)[None]
        if gaussian is not None and draws:
            shift = gaussian.draw(rows, draws // 2)
            logits = torch.cat([logits + shift, logits - shift])
        logits = logits.log_softmax(-1)
        value += float(
            logits[:, torch.arange(len(targets), device=targets.device), targets].sum(dtype=torch.float64)
        ) / len(logits)
        probabilities = logits.exp_()
        curvatures.append(structure.curvature(probabilities))
        part = residual[start : start + size]
        torch.mean(probabilities, 0, out=part)
        part.neg_()
        part[torch.arange(len(targets), device=targets.device), targets] += 1
    return Expectations(value, residual, torch.cat(curvatures))


def spread_change(before: WeightGaussian, after: WeightGaussian, rows: Tensor) -> float:
    """Root mean square of the change of log sd of the logits of these rows."""
    change = 0.5 * (after.variance(rows).log() - before.variance(rows).log())
    return float(change.square().mean().sqrt())
