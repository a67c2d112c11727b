"""Class labels, checked."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["class_labels"]


def class_labels(targets: Tensor, shape: torch.Size, classes: int) -> Tensor:
    """targets (*shape) as integers (n,); ValueError where they are none of 0, …, classes − 1."""
    if targets.shape != shape:
        raise ValueError(f"targets have shape {tuple(targets.shape)}; expected {tuple(shape)} beside these features")
    if targets.is_floating_point() or targets.is_complex():
        raise ValueError(f"targets are {targets.dtype}; expected class numbers, integers from 0 to {classes - 1}")
    labels = targets.detach().reshape(-1).long()
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(
            f"targets go from {int(labels.min())} to {int(labels.max())}; expected class numbers from 0 to {classes - 1}: leave out "
            "rows to be ignored"
        )
    return labels
