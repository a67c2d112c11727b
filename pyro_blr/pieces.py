"""Constant affine maps of a joint Gaussian's variable, member by member: outputs that see one entry of a member are a gather.

out_n = Σ_p c_pn x[i_pn] + Σ_l C_ln x_l.  Its variance takes the entries of the covariance that it needs, and sums over data are
scattered instead of multiplied, so that a thousand random effects cost no more than one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pyro_blr.blocks import Block
from pyro_blr.gathers import columns_of

__all__ = ["Entries", "JointMap", "Slab", "gram_of_pieces", "joint_map"]

_ROWS = 1 << 15  # rows of dense columns taken to float64 at once
_CHECKS = 2  # random values that an index read off must agree with


@dataclass(frozen=True)
class Entries:
    """out_n = c_n x[index_n], x flattened; `coefficient` is None where all are one."""

    index: Tensor
    coefficient: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        found = x.reshape(-1)[self.index]
        return found if self.coefficient is None else self.coefficient * found


@dataclass(frozen=True)
class Slab:
    """out_n = Σ_l C_ln x[start + l]; C has shape (L, *out)."""

    start: int
    columns: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        flat = self.columns.reshape(self.columns.shape[0], -1)
        part = x.reshape(-1)[self.start : self.start + flat.shape[0]]
        return (part @ flat).reshape(self.columns.shape[1:])


class JointMap:
    """The sum of a joint block's pieces: its mean and variance at the block's mean (*batch, D) and covariance (*batch, D, D)."""

    def __init__(self, pieces: Sequence[Entries | Slab], size: int, num_batch: int):
        self.pieces, self.size, self.num_batch = tuple(pieces), size, num_batch

    def mean(self, mean: Tensor) -> Tensor:
        return sum((piece(mean) for piece in self.pieces[1:]), self.pieces[0](mean))

    def variance(self, covariance: Tensor) -> Tensor:
        """Σ_pq c_p c_q V[i_p, i_q]."""
        flat = covariance.reshape(-1)
        total: Tensor | None = None
        for position, weight in self._positions:
            part = flat[position]
            part = part if weight is None else weight * part
            total = part if total is None else total + part
        slabs = [piece for piece in self.pieces if isinstance(piece, Slab)]
        for number, slab in enumerate(slabs):
            for part in self._with_slab(slab, slabs[:number], covariance):
                total = part if total is None else total + part
        assert total is not None
        return total

    def _with_slab(self, slab: Slab, before: Sequence[Slab], covariance: Tensor) -> list[Tensor]:
        """A slab's own variance, and twice its covariances with the gathers and with the slabs before it."""
        size, shape = slab.columns.shape[0], slab.columns.shape[1:]
        flat = slab.columns.reshape(size, -1)
        rows = covariance.reshape(self.size, self.size)[slab.start : slab.start + size]
        parts = [(flat * (rows[:, slab.start : slab.start + size] @ flat)).sum(0).reshape(shape)]
        for other in before:
            theirs = other.columns.reshape(other.columns.shape[0], -1)
            mixed = rows[:, other.start : other.start + theirs.shape[0]] @ theirs
            parts.append(2 * (flat * mixed).sum(0).reshape(shape))
        for piece in self.pieces:
            if isinstance(piece, Entries):
                found = (slab.columns * rows[:, piece.index]).sum(0)
                parts.append(2 * found if piece.coefficient is None else 2 * piece.coefficient * found)
        return parts

    @cached_property
    def _positions(self) -> list[tuple[Tensor, Tensor | None]]:
        """Where the covariance of each pair of gathers stands in the flattened (*batch, D, D), and its coefficient."""
        gathers = [piece for piece in self.pieces if isinstance(piece, Entries)]
        found: list[tuple[Tensor, Tensor | None]] = []
        for number, a in enumerate(gathers):
            for b in gathers[: number + 1]:
                position = a.index * self.size + b.index % self.size
                weight = _product(a.coefficient, b.coefficient)
                if a is not b:
                    weight = position.new_full((), 2.0, dtype=torch.float64) if weight is None else 2 * weight
                    weight = weight.to(a.coefficient.dtype) if a.coefficient is not None else weight
                found.append((position, weight))
        return found


def _product(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a * b


# --------------------------------------------------------------------------------------------------------------------
# Reading a map off


def joint_map(
    block: Block,
    change: Callable[[Tensor], Tensor],
    like: Tensor,
    design_of: Callable[[str], Tensor | None],
) -> JointMap | None:
    """The linear function `change` of a joint block's variable, of `like`'s shape (*batch, D); None where it is none of these.

    `design_of(site)` is X where the site enters as X @ site, else None.
    """
    size, num_batch = like.shape[-1], like.shape[:-1].numel()
    pieces: list[Entries | Slab] = []
    for member in block.members:
        mine = torch.zeros_like(like)
        mine[..., member.start : member.stop] = 1.0
        design = design_of(member.site.name) if num_batch == 1 else None
        if design is not None:
            pieces.append(Slab(member.start, design.mT))
            continue
        entries = _entries(change, mine)
        if entries is not None:
            pieces += entries
        elif num_batch > 1:
            return None
        else:
            basis = torch.eye(size, dtype=like.dtype, device=like.device)[member.start : member.stop]
            pieces.append(Slab(member.start, columns_of(change, basis.reshape(-1, *like.shape))))
    if not pieces or (num_batch > 1 and not _agree(pieces, size)):
        return None
    return JointMap(pieces, size, num_batch)


def _entries(change: Callable[[Tensor], Tensor], mine: Tensor) -> list[Entries] | None:
    """The gather by which outputs see the entries where `mine` is one: [] where none does, None where some see several."""
    generator = torch.Generator().manual_seed(5)
    ones = change(mine)
    numbers = torch.arange(mine.numel(), dtype=mine.dtype, device=mine.device).reshape(mine.shape) + 1
    raw = change(mine * numbers).double() / ones.double()
    index = torch.where(ones == 0, 1.0, raw).round() - 1
    if not bool(((index >= 0) & (index < mine.numel())).all()):
        return None
    index = index.long()
    tolerance = 1e-9 if ones.dtype == torch.float64 else 1e-5
    for _ in range(_CHECKS):
        weights = torch.rand(mine.shape, generator=generator, device="cpu", dtype=torch.float64).to(mine) + 0.5
        value = change(mine * weights)
        if not bool(
            ((value - ones * weights.reshape(-1)[index]).abs() <= tolerance * (ones.abs() + value.abs())).all()
        ):
            return None
    if bool((ones == 0).all()):
        return []
    first = mine.reshape(-1).nonzero()[0, 0]
    index = torch.where(ones == 0, first, index)
    if bool((index == index.reshape(-1)[0]).all()):
        index = index.reshape(-1)[:1].reshape([1] * index.dim())  # one entry for every output: left to broadcasting
        if bool((ones == ones.reshape(-1)[0]).all()):
            ones = ones.reshape(-1)[:1].reshape([1] * ones.dim())
    return [Entries(index, None if bool((ones == 1).all()) else ones)]


def _agree(pieces: Sequence[Entries | Slab], size: int) -> bool:
    """Whether the entries that one output sees are of one batch element."""
    owners = [piece.index // size for piece in pieces if isinstance(piece, Entries)]
    return len(owners) == len(pieces) and all(bool((owner == owners[0]).all()) for owner in owners)


# --------------------------------------------------------------------------------------------------------------------
# Sums over data


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
        position = (start + torch.searchsorted(used, piece.index)).expand(shape).reshape(-1)
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
