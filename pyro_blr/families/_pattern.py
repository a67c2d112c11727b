"""Which entries of a matrix may not be zero, the order in which its variables are eliminated, and what fills in."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ._elimination import Elimination

_HUB = (64, 20)  # a variable coupled with more than 64 others, and with more than one in 20 of all
_MOST_HUBS = 500
_SMALL = 48  # variables that are eliminated together, densely
_LARGEST_CORE = 2500
_MOST = 30_000_000  # entries at most
_DENSE = 0.4  # share of all pairs that are coupled: the rest is then dense


@dataclass(frozen=True, eq=False)
class Pattern:
    """Pairs i > j of `dimension` variables that may be coupled; two with the same pairs are equal.

    Values of a matrix with this pattern are one vector: the diagonal, then the entries of `pairs` and of what fills in, then the rows
    of the others in the columns of the hubs.
    """

    dimension: int
    rows: Tensor
    columns: Tensor

    @staticmethod
    def of(dimension: int, rows: Tensor, columns: Tensor) -> Pattern:
        """The pattern with these pairs, in any order, on any side of the diagonal."""
        low, high = torch.minimum(rows, columns).cpu(), torch.maximum(rows, columns).cpu()
        keys = (high * dimension + low)[high > low].unique()
        return Pattern(dimension, keys // dimension, keys % dimension)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Pattern)
            and self.dimension == other.dimension
            and torch.equal(self.rows, other.rows)
            and torch.equal(self.columns, other.columns)
        )

    def __hash__(self) -> int:
        return hash((self.dimension, len(self.rows), int(self.rows.sum()), int(self.columns.sum())))

    @cached_property
    def elimination(self) -> Elimination | None:
        """The order and what fills in; None where too much does."""
        return _eliminated(self)


def _eliminated(pattern: Pattern) -> Elimination | None:
    d, keys = pattern.dimension, pattern.rows * pattern.dimension + pattern.columns
    degree = torch.bincount(torch.cat([pattern.rows, pattern.columns]), minlength=d)
    hubs = (degree > max(_HUB[0], d // _HUB[1])).nonzero().squeeze(-1)
    if len(hubs) > _MOST_HUBS or len(hubs) * d > _MOST:
        return None
    is_hub = torch.zeros(d, dtype=torch.bool)
    is_hub[hubs] = True
    edges = keys[~is_hub[pattern.rows] & ~is_hub[pattern.columns]]
    known, alive, steps = [edges, _all_pairs(hubs, d)], ~is_hub, list[tuple[Tensor, Tensor]]()
    generator = torch.Generator().manual_seed(17)
    while True:
        rest = int(alive.sum())
        if rest <= _SMALL or len(edges) > _DENSE * rest * (rest - 1) / 2:
            break
        nodes, near = _independent(edges, alive, d, generator)
        if len(nodes) * 50 < rest <= _LARGEST_CORE:
            break  # hardly anything goes at once
        steps.append((nodes, near))
        alive[nodes] = False
        rows = near.unique(dim=0) if near.shape[1] else near[:0]
        left, right = torch.tril_indices(near.shape[1], near.shape[1], -1).unbind(0)
        if len(rows) * len(left) > _MOST:
            return None
        a, b = rows[:, left].flatten(), rows[:, right].flatten()
        fill = (torch.maximum(a, b) * d + torch.minimum(a, b))[(a < d) & (b < d)].unique()
        known.append(fill)
        edges = torch.cat([edges[alive[edges // d] & alive[edges % d]], fill]).unique()
        if sum(map(len, known)) > _MOST:
            return None
    core = alive.nonzero().squeeze(-1)
    if len(core) + len(hubs) > _LARGEST_CORE:
        return None
    known.append(_all_pairs(core, d))
    return Elimination(d, hubs, core, torch.cat(known).unique(), steps)


def _all_pairs(nodes: Tensor, d: int) -> Tensor:
    i, j = torch.tril_indices(len(nodes), len(nodes), -1).unbind(0)
    return nodes[i] * d + nodes[j]  # nodes are in order: the larger first


def _independent(edges: Tensor, alive: Tensor, d: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Variables of few neighbours, none next to another (Luby 1986), and their neighbours, padded with d."""
    one, other = edges // d, edges % d
    source, target = torch.cat([one, other]), torch.cat([other, one])
    degree = torch.bincount(source, minlength=d)
    free = alive & (degree <= 2 * int(degree[alive].min()) + 2)
    chosen, priority = torch.zeros_like(free), torch.rand(d, generator=generator)
    while bool(free.any()):
        between = free[source] & free[target]
        best = torch.full((d,), -1.0).scatter_reduce(0, source[between], priority[target[between]], "amax")
        found = free & (priority > best)
        chosen |= found
        free &= ~found
        free[target[found[source]]] = False
    nodes = chosen.nonzero().squeeze(-1)
    mine = chosen[source]
    source, target = source[mine], target[mine]
    order = (source * d + target).argsort()
    source, target = source[order], target[order]
    place = torch.searchsorted(nodes, source)
    first = torch.searchsorted(source, source)
    near = torch.full((len(nodes), int(degree[nodes].max())), d)
    near[place, torch.arange(len(source)) - first] = target
    return nodes, near
