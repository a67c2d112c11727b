"""Constant affine maps of a joint Gaussian's variable, member by member: outputs that see one entry of a member are a gather.

out_n = Σ_p c_pn x[i_pn] + Σ_l C_ln x_l.  Its variance takes the entries of the covariance that it needs, and sums over data are
scattered instead of multiplied, so that a thousand random effects cost no more than one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pyro_blr.blocks import Block
from pyro_blr.families import ExponentialFamily, SparseNormal, TransformedNormal
from pyro_blr.gathers import columns_of
from pyro_blr.members import Member

__all__ = ["Entries", "JointMap", "Slab", "joint_map"]

_WIDEST = 16  # places in an event at most that outputs may see all of
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

    @property
    def entries(self) -> Tensor:
        """Which entries it sees."""
        return self.start + torch.arange(self.columns.shape[0], device=self.columns.device)


class JointMap:
    """The sum of a joint block's pieces: its mean and variance at the block's moments, mean (*batch, D) and covariances."""

    def __init__(self, pieces: Sequence[Entries | Slab], size: int, num_batch: int, family: ExponentialFamily):
        self.pieces, self.size, self.num_batch, self.family = tuple(pieces), size, num_batch, family

    def mean(self, mean: Tensor) -> Tensor:
        return sum((piece(mean) for piece in self.pieces[1:]), self.pieces[0](mean))

    def variance(self, moments: Mapping[str, Tensor]) -> Tensor:
        """Σ_pq c_p c_q V[i_p, i_q]."""
        if "covariance" in moments:
            flat = moments["covariance"].reshape(-1)
        else:
            flat = torch.cat([moments["variance"], moments["entries"]], -1)
        total: Tensor | None = None
        for position, weight in self._positions:
            part = flat[position]
            part = part if weight is None else weight * part
            total = part if total is None else total + part
        slabs = [piece for piece in self.pieces if isinstance(piece, Slab)]
        for number, slab in enumerate(slabs):
            for part in self._with_slab(slab, slabs[:number], flat):
                total = part if total is None else total + part
        assert total is not None
        return total

    def _with_slab(self, slab: Slab, before: Sequence[Slab], flat: Tensor) -> list[Tensor]:
        """A slab's own variance, and twice its covariances with the gathers and with the slabs before it."""
        columns = slab.columns.reshape(slab.columns.shape[0], -1)
        parts = [(columns * (self._between(slab, slab, flat) @ columns)).sum(0).reshape(slab.columns.shape[1:])]
        for other in before:
            mixed = self._between(slab, other, flat) @ other.columns.reshape(other.columns.shape[0], -1)
            parts.append(2 * (columns * mixed).sum(0).reshape(slab.columns.shape[1:]))
        for piece in self.pieces:
            if isinstance(piece, Entries):
                found = torch.mul(*_in_line([slab.columns, self._between(slab, piece, flat)])).sum(0)
                parts.append(2 * found if piece.coefficient is None else 2 * piece.coefficient * found)
        return parts

    def _between(self, slab: Slab, other: Entries | Slab, flat: Tensor) -> Tensor:
        """Covariances of a slab's entries with those of another piece, (L, *those)."""
        mine = slab.entries
        theirs = other.entries if isinstance(other, Slab) else other.index
        if isinstance(self.family, SparseNormal):
            key = id(slab), id(other)
            if key not in self._places:
                wide = mine.reshape(-1, *[1] * theirs.dim())
                self._places[key] = self.family.places(wide, theirs.unsqueeze(0))
            return flat[self._places[key]]
        rows = flat.reshape(self.size, self.size)[slab.start : slab.start + len(mine)]
        if isinstance(other, Slab):
            return rows[:, other.start : other.start + len(theirs)]
        return rows[:, theirs]

    @cached_property
    def _places(self) -> dict[tuple[int, int], Tensor]:
        return {}

    @cached_property
    def _positions(self) -> list[tuple[Tensor, Tensor | None]]:
        """Where the covariance of each pair of gathers stands in the flattened ones, and its coefficient."""
        gathers = [piece for piece in self.pieces if isinstance(piece, Entries)]
        found: list[tuple[Tensor, Tensor | None]] = []
        for number, a in enumerate(gathers):
            for b in gathers[: number + 1]:
                if isinstance(self.family, SparseNormal):
                    position = self.family.places(a.index, b.index)
                else:
                    position = a.index * self.size + b.index % self.size
                weight = _product(a.coefficient, b.coefficient)
                if a is not b:
                    weight = position.new_full((), 2.0, dtype=torch.float64) if weight is None else 2 * weight
                    weight = weight.to(a.coefficient.dtype) if a.coefficient is not None else weight
                found.append((position, weight))
        return found

    def pairs(self) -> tuple[Tensor, Tensor]:
        """The pairs of entries of one batch element that an output sees together."""
        first, second = [], []
        for number, a in enumerate(self.pieces):
            for b in self.pieces[: number + 1]:
                i = a.index if isinstance(a, Entries) else a.entries.unsqueeze(-1)
                j = b.index if isinstance(b, Entries) else b.entries.unsqueeze(0)
                if isinstance(a, Slab) != isinstance(b, Slab):
                    i, j = (
                        (i.reshape(-1, 1), j.reshape(1, -1))
                        if isinstance(a, Slab)
                        else (i.reshape(1, -1), j.reshape(-1, 1))
                    )
                i, j = torch.broadcast_tensors(i, j)
                keys = (i.flatten() * self.size + j.flatten()).unique()
                first.append(keys // self.size)
                second.append(keys % self.size)
        return torch.cat(first), torch.cat(second)


def _product(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a * b


# --------------------------------------------------------------------------------------------------------------------
# Reading a map off


def joint_map(
    block: Block,
    changes: Sequence[Callable[[Tensor], Tensor]],
    like: Tensor,
    sites: Collection[str],
    design_of: Callable[[str], Tensor | None],
) -> JointMap | None:
    """The sum of linear functions of a joint block's variable, of `like`'s shape (*batch, D); None where it is none of these.

    `design_of(site)` is X where the site enters as X @ site, else None; no other member than `sites` enters.
    """
    size, num_batch = like.shape[-1], like.shape[:-1].numel()
    pieces: list[Entries | Slab] = []
    for member in (m for m in block.views if m.site.name in sites):
        design = design_of(member.site.name) if num_batch == 1 else None
        if design is not None:
            pieces.append(Slab(member.start, design.mT))
            continue
        entries = [_entries_of(change, member, like) for change in changes]
        if all(found is not None for found in entries):
            pieces += [piece for found in entries for piece in found or ()]
        elif num_batch > 1:
            return None
        else:
            basis = torch.eye(size, dtype=like.dtype, device=like.device)[member.start : member.stop]
            basis = basis.reshape(-1, *like.shape)
            columns = [columns_of(change, basis) for change in changes]
            pieces.append(Slab(member.start, functools.reduce(torch.add, _in_line(columns))))
    if not pieces or (num_batch > 1 and not _agree(pieces, size)):
        return None
    return JointMap(pieces, size, num_batch, block.family)


def _in_line(columns: Sequence[Tensor]) -> list[Tensor]:
    """Stacked functions (L, *out), whose outputs broadcast, with as many dims each."""
    rank = max(column.dim() for column in columns)
    return [c.reshape(c.shape[0], *[1] * (rank - c.dim()), *c.shape[1:]) for c in columns]


def _entries_of(change: Callable[[Tensor], Tensor], member: Member, like: Tensor) -> list[Entries] | None:
    """The gathers by which outputs see a member: one, or one for each place in its event, of which outputs may see several."""
    mine = torch.zeros_like(like)
    mine[..., member.start : member.stop] = 1.0
    found = _entries(change, mine)
    base = member.family.base if isinstance(member.family, TransformedNormal) else member.family
    width = base.event_shape.numel() if base is not None else 1
    if found is not None or not 1 < width <= _WIDEST or width == member.stop - member.start:
        return found
    pieces: list[Entries] = []
    for place in range(width):
        mine = torch.zeros_like(like)
        mine[..., member.start + place : member.stop : width] = 1.0
        one = _entries(change, mine)
        if one is None:
            return None
        pieces += one
    return pieces


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
