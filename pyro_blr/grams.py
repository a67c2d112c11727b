"""Sums over data of what a joint Gaussian's pieces see: scattered where a row sees single entries, multiplied where it sees many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pyro_blr.pieces import Entries, Slab

__all__ = ["gram_of_pieces"]

_ROWS = 1 << 15  # rows of dense columns taken to float64 at once


def gram_of_pieces(
    pieces: Mapping[str, Sequence[Entries | Slab]], residual: Tensor, weights: Tensor, shape: torch.Size
) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
    """(block -> the entries of its variable that enter, in order; G = Σ_n w_n a_n a_nᵀ; Σ w r a; Σ w r²), in float64.

    a_n holds the coefficients of these entries, the blocks' one after the other, in the n-th output.
    """
    wide = torch.float64 if residual.device.type != "mps" else torch.float32
    used = {name: _used(some) for name, some in pieces.items()}
    flat: list[tuple[Tensor, Tensor | None, Tensor | None]] = []  # (positions, coefficient (N,), columns (L, N))
    start = 0
    for name, some in pieces.items():
        flat += [_flattened(piece, used[name], start, shape) for piece in some]
        start += len(used[name])
    r = residual.to(wide).expand(shape).reshape(-1)
    w = weights.to(wide).expand(shape).reshape(-1)
    gram = torch.zeros(start, start, dtype=wide, device=residual.device)
    cross = torch.zeros(start, dtype=wide, device=residual.device)
    for number, a in enumerate(flat):
        _add_cross(cross, a, w * r)
        for b in flat[: number + 1]:
            _add_pair(gram, a, b, w, a is b)
    return used, gram, cross, (w * r) @ r


def _used(pieces: Sequence[Entries | Slab]) -> Tensor:
    parts = []
    for piece in pieces:
        if isinstance(piece, Entries):
            parts.append(piece.index.reshape(-1).unique())
        else:
            parts.append(piece.start + torch.arange(piece.columns.shape[0], device=piece.columns.device))
    return torch.cat(parts).unique()


def _flattened(
    piece: Entries | Slab, used: Tensor, start: int, shape: torch.Size
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    if isinstance(piece, Entries):
        position = (start + torch.searchsorted(used, piece.index.contiguous())).expand(shape).reshape(-1)
        coefficient = piece.coefficient
        return position, None if coefficient is None else coefficient.expand(shape).reshape(-1), None
    size = piece.columns.shape[0]
    entries = piece.start + torch.arange(size, device=used.device)
    aligned = piece.columns.reshape(size, *[1] * (len(shape) - piece.columns.dim() + 1), *piece.columns.shape[1:])
    return start + torch.searchsorted(used, entries), None, aligned.expand(size, *shape).reshape(size, -1)


def _add_cross(cross: Tensor, a: tuple[Tensor, Tensor | None, Tensor | None], weighted: Tensor) -> None:
    position, coefficient, columns = a
    if columns is None:
        cross.index_add_(0, position, weighted if coefficient is None else weighted * coefficient)
        return
    for rows in _chunks(columns.shape[1]):
        cross[position] += columns[:, rows].to(cross.dtype) @ weighted[rows]


def _add_pair(gram: Tensor, a: tuple, b: tuple, weights: Tensor, same: bool) -> None:
    (at, c_a, columns_a), (bt, c_b, columns_b) = (a, b) if a[2] is None else (b, a)  # a gather first
    if columns_a is not None:
        for rows in _chunks(columns_a.shape[1]):
            part = (columns_a[:, rows].to(gram.dtype) * weights[rows]) @ columns_b[:, rows].to(gram.dtype).mT
            _add_block(gram, at, bt, part, same)
        return
    scaled = weights if c_a is None else weights * c_a
    if columns_b is None:
        scaled = scaled if c_b is None else scaled * c_b
        gram.view(-1).index_add_(0, at * gram.shape[1] + bt, scaled)
        if not same:
            gram.view(-1).index_add_(0, bt * gram.shape[1] + at, scaled)
        return
    block = torch.zeros(gram.shape[0], columns_b.shape[0], dtype=gram.dtype, device=gram.device)
    for rows in _chunks(columns_b.shape[1]):
        block.index_add_(0, at[rows], (columns_b[:, rows].to(gram.dtype) * scaled[rows]).mT)
    gram[:, bt] += block
    gram[bt, :] += block.mT


def _add_block(gram: Tensor, at: Tensor, bt: Tensor, part: Tensor, same: bool) -> None:
    gram[at[:, None], bt] += part
    if not same:
        gram[bt[:, None], at] += part.mT


def _chunks(total: int) -> list[slice]:
    return [slice(start, min(start + _ROWS, total)) for start in range(0, total, _ROWS)]
