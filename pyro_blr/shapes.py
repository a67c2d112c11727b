"""Shapes that broadcast: `torch.broadcast_shapes` imports SymPy on its first call, a second or more, and is ten times slower later."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["broadcast_shape"]


def broadcast_shape(*shapes: Sequence[int]) -> torch.Size:
    """The shape that all of them broadcast to; a RuntimeError where there is none."""
    rank = max(map(len, shapes), default=0)
    result = [1] * rank
    for shape in shapes:
        for dim, size in enumerate(shape, rank - len(shape)):
            if size != 1:
                if result[dim] not in (1, size):
                    raise RuntimeError(f"shapes {', '.join(str(tuple(s)) for s in shapes)} do not broadcast")
                result[dim] = size
    return torch.Size(result)
