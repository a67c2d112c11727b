"""Linear maps read off by evaluating them: gathers, where every output sees one entry, and columns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Gather", "columns_of", "gather_of"]


@dataclass(frozen=True)
class Gather:
    """out = x[index] (then shaped), where each output is one entry of x.

    `shape` alone: a reshape.  `rows`: whole rows of the last dim, which are cheaper to gather and to scatter back than entries.
    """

    shape: torch.Size
    source: int
    index: Tensor | None = None
    rows: Tensor | None = None

    def rows_as_entries(self) -> Tensor | None:
        """The same gather by entries; None for a reshape."""
        if self.rows is None:
            return None
        width = self.shape[-1]
        return (self.rows[:, None] * width + torch.arange(width, device=self.rows.device)).flatten()

    def __call__(self, x: Tensor) -> Tensor:
        if self.rows is not None:
            return x.reshape(-1, x.shape[-1]).index_select(0, self.rows).reshape(self.shape)
        if self.index is not None:
            return x.reshape(-1).index_select(0, self.index).reshape(self.shape)
        return x.reshape(self.shape)


def gather_of(numbers: Tensor, source_shape: torch.Size) -> Gather | None:
    """The gather whose output at x = 0, 1, 2, … is `numbers`; None where these are no indices."""
    index = numbers.round()
    size = source_shape.numel()
    if not bool(((numbers - index).abs() < 1e-3).all()) or not bool(((index >= 0) & (index < size)).all()):
        return None
    index = index.long()
    flat = index.flatten()
    if size == 1:
        return Gather(torch.Size([1] * index.dim()), 1)  # one entry for every output: left to broadcasting
    if flat.numel() == size and bool((flat == torch.arange(size, device=flat.device)).all()):
        return Gather(index.shape, size)
    width = source_shape[-1] if source_shape else 1
    if width > 1 and index.dim() > 0 and index.shape[-1] == width:
        first = index[..., :1]
        if bool((first % width == 0).all()) and bool((index == first + torch.arange(width, device=index.device)).all()):
            return Gather(index.shape, size, rows=(first // width).flatten())
    return Gather(index.shape, size, index=flat)


def columns_of(change: Callable[[Tensor], Tensor], basis: Tensor) -> Tensor:
    """A linear function at each of the stacked vectors of a basis."""
    try:
        return torch.func.vmap(change)(basis)
    except (RuntimeError, ValueError, NotImplementedError):
        return torch.stack([change(e) for e in basis])
