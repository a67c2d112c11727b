"""Sparse symmetric matrices by elimination: the algebra along the way.

Variables that share no entry are eliminated at once, so that a chain of T takes about log T rounds of batched operations and the groups of
a hierarchy one.  *Hubs*, coupled with a large part of all others, are kept for the end, their rows dense; so is the *core*,
what is left when elimination no longer pays.  Entries fill in as in any Cholesky factor; inverses are wanted at these entries only
(Takahashi, Fagan and Chin 1973; Erisman and Tinney 1975).
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor


class Level(NamedTuple):
    """Variables eliminated together, padded where one has fewer neighbours: k of them with m neighbours."""

    nodes: Tensor  # (k)
    rows: Tensor  # (k) their rows among those of no hub
    near: Tensor  # (k, m) neighbours, D where there is none
    near_rows: Tensor  # (k, m)
    own: Tensor  # (k, m) places of the entries between them
    pairs: Tensor  # (k, m (m + 1) / 2) places of the entries between neighbours


class Factor(NamedTuple):
    """P = L D Lᵀ along the levels: pivots, the rows of L, and the Cholesky factor of what is left."""

    pivots: list[Tensor]
    near: list[Tensor]
    hubs: list[Tensor]
    core: Tensor
    failed: Tensor


class Elimination:
    """The algebra of symmetric matrices with one pattern.  Leading dims of values and vectors are batches, which broadcast."""

    def __init__(self, dimension: int, hubs: Tensor, core: Tensor, keys: Tensor, steps: list[tuple[Tensor, Tensor]]):
        self.dimension, self.hubs, self.core, self.keys = dimension, hubs, core, keys
        is_hub = torch.zeros(dimension + 1, dtype=torch.bool)
        is_hub[hubs] = True
        self.num_hubs, self.num_others = len(hubs), dimension - len(hubs)
        self._row = torch.cumsum((~is_hub).long(), 0) - 1  # of the padding: the last one
        self._row[hubs] = torch.arange(len(hubs))
        self._is_hub = is_hub
        self.num_pairs = len(keys)
        self.size = dimension + len(keys) + self.num_others * self.num_hubs
        self._devices: dict[torch.device, list[Level]] = {}
        self._levels = [self._level(nodes, near) for nodes, near in steps]
        self._core_places = self.places(core[:, None], core[None, :])
        self._hub_places = self.places(hubs[:, None], hubs[None, :])

    def _level(self, nodes: Tensor, near: Tensor) -> Level:
        left, right = torch.tril_indices(near.shape[1], near.shape[1]).unbind(0)
        own, pairs = self.places(nodes[:, None], near), self.places(near[:, left], near[:, right])
        return Level(nodes, self._row[nodes], near, self._row[near], own, pairs)

    def places(self, i: Tensor, j: Tensor) -> Tensor:
        """Where the entries (i, j) stand among the values, on the CPU; `size` where one is the padding.  Unknown pairs raise."""
        i, j = torch.broadcast_tensors(i.cpu(), j.cpu())
        d, padded = self.dimension, (i >= self.dimension) | (j >= self.dimension)
        high, low = torch.maximum(i, j), torch.minimum(i, j)
        one = self._is_hub[i] ^ self._is_hub[j]
        other, hub = torch.where(self._is_hub[i], j, i), torch.where(self._is_hub[i], i, j)
        beside = d + self.num_pairs + self._row[other] * self.num_hubs + self._row[hub]
        key = high * d + low
        found = torch.searchsorted(self.keys, key.contiguous())
        known = (
            (found < self.num_pairs) & (self.keys[found.clamp(max=max(self.num_pairs - 1, 0))] == key)
            if self.num_pairs
            else found < 0
        )
        if not bool((known | one | padded | (i == j)).all()):
            raise ValueError("found a pair of variables that the pattern does not hold")
        place = torch.where(one, beside, d + found)
        return torch.where(padded, self.size, torch.where(i == j, i, place))

    def levels(self, device: torch.device) -> list[Level]:
        if device not in self._devices:
            self._devices[device] = [Level(*(part.to(device) for part in level)) for level in self._levels]
        return self._devices[device]

    # -- values ---------------------------------------------------------------------------------------------------------

    def _apart(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The values with a zero for the padding, and the rows beside the hubs, with one of zeros."""
        batch, start = values.shape[:-1], self.dimension + self.num_pairs
        rows = values[..., start:].reshape(*batch, self.num_others, self.num_hubs)
        return _padded(values, -1), _padded(rows, -2)

    def times(self, values: Tensor, vector: Tensor) -> Tensor:
        """The matrix times a vector."""
        i, j = (part.to(values.device) for part in (self.keys // self.dimension, self.keys % self.dimension))
        off = values[..., self.dimension : self.dimension + self.num_pairs]
        result = values[..., : self.dimension] * vector
        result = result.index_add(-1, i, off * vector[..., j]).index_add(-1, j, off * vector[..., i])
        if self.num_hubs:
            rows = values[..., self.dimension + self.num_pairs :].unflatten(-1, (self.num_others, self.num_hubs))
            others, hubs = self._others.to(values.device), self.hubs.to(values.device)
            beside = (rows @ vector[..., hubs].unsqueeze(-1)).squeeze(-1)
            below = (rows.mT @ vector[..., others].unsqueeze(-1)).squeeze(-1)
            result = result.index_add(-1, others, beside).index_add(-1, hubs, below)
        return result

    @cached_property
    def _others(self) -> Tensor:
        return (~self._is_hub[: self.dimension]).nonzero().squeeze(-1)

    @cached_property
    def ends(self) -> tuple[Tensor, Tensor]:
        """The two variables of every value."""
        diagonal = torch.arange(self.dimension)
        beside, hubs = self._others.repeat_interleave(self.num_hubs), self.hubs.repeat(self.num_others)
        first = torch.cat([diagonal, self.keys // self.dimension, beside])
        return first, torch.cat([diagonal, self.keys % self.dimension, hubs])

    # -- factors ----------------------------------------------------------------------------------------------------------

    def factor(self, values: Tensor) -> Factor:
        """P = L D Lᵀ; `failed` where P is not positive definite, and the rest meaningless."""
        all_values, rows = self._apart(values)
        pivots, nears, hubs = [], [], []
        left = all_values.new_zeros(*values.shape[:-1], self.num_hubs, self.num_hubs)
        failed = torch.zeros(values.shape[:-1], dtype=torch.bool, device=values.device)
        for level in self.levels(values.device):
            pivot = all_values[..., level.nodes]
            failed = failed | ~(pivot > 0).all(-1)
            own, beside = all_values[..., level.own], rows[..., level.rows, :]
            near, hub = own / pivot.unsqueeze(-1), beside / pivot.unsqueeze(-1)
            i, j = torch.tril_indices(own.shape[-1], own.shape[-1], device=values.device).unbind(0)
            change = -(near[..., i] * own[..., j]).flatten(-2)
            all_values = all_values.index_add(-1, level.pairs.flatten(), change)
            if self.num_hubs:
                change = -(near.unsqueeze(-1) * beside.unsqueeze(-2)).flatten(-3, -2)
                rows = rows.index_add(-2, level.near_rows.flatten(), change)
                left = left - hub.mT @ beside
            pivots.append(pivot)
            nears.append(near)
            hubs.append(hub)
        core, info = torch.linalg.cholesky_ex(self._dense(all_values, rows, left))
        return Factor(pivots, nears, hubs, core, failed | (info != 0))

    def _dense(self, values: Tensor, rows: Tensor, left: Tensor) -> Tensor:
        """What is left of core and hubs, as one matrix."""
        inner, outer = values[..., self._core_places.to(values.device)], values[..., self._hub_places.to(values.device)]
        beside = rows[..., self._row[self.core].to(values.device), :]
        return torch.cat([torch.cat([inner, beside], -1), torch.cat([beside.mT, outer + left], -1)], -2)

    def _last(self, device: torch.device) -> Tensor:
        return torch.cat([self.core, self.hubs]).to(device)

    def half_logdet(self, factor: Factor) -> Tensor:
        """½ log|P|."""
        last = factor.core.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return last + 0.5 * sum((pivot.log().sum(-1) for pivot in factor.pivots), torch.zeros_like(last))

    def solve(self, factor: Factor, vector: Tensor) -> Tensor:
        """P⁻¹ v."""
        x = _padded(vector, -1)
        hubs = self.hubs.to(vector.device)
        for level, near, hub in zip(self.levels(vector.device), factor.near, factor.hubs, strict=True):
            here = x[..., level.nodes].unsqueeze(-1)
            x = x.index_add(-1, level.near.flatten(), -(near * here).flatten(-2))
            x = x.index_add(-1, hubs, -(hub * here).sum(-2)) if self.num_hubs else x
        last = self._last(vector.device)
        x = x.index_copy(-1, last, torch.cholesky_solve(x[..., last].unsqueeze(-1), factor.core).squeeze(-1))
        for level, pivot in zip(self.levels(vector.device), factor.pivots, strict=True):
            x = x.index_copy(-1, level.nodes, x[..., level.nodes] / pivot)
        return self._back(factor, x)

    def colour(self, factor: Factor, noise: Tensor) -> Tensor:
        """x with covariance P⁻¹ from independent standard normals: Lᵀ x = D^−½ ε."""
        last, x = self._last(noise.device), _padded(noise, -1)
        core = torch.linalg.solve_triangular(factor.core.mT, noise[..., last].unsqueeze(-1), upper=True).squeeze(-1)
        x = x.index_copy(-1, last, core)
        for level, pivot in zip(self.levels(noise.device), factor.pivots, strict=True):
            x = x.index_copy(-1, level.nodes, x[..., level.nodes] * pivot.rsqrt())
        return self._back(factor, x)

    def _back(self, factor: Factor, x: Tensor) -> Tensor:
        """Lᵀ⁻¹ x, what is in the core apart."""
        hubs = self.hubs.to(x.device)
        for level, near, hub in reversed(list(zip(self.levels(x.device), factor.near, factor.hubs, strict=True))):
            change = (near * x[..., level.near]).sum(-1) + (hub * x[..., hubs].unsqueeze(-2)).sum(-1)
            x = x.index_add(-1, level.nodes, -change)
        return x[..., : self.dimension]

    def inverse(self, factor: Factor) -> Tensor:
        """The values of P⁻¹, at the entries of the pattern."""
        device, count = factor.core.device, len(self.core)
        batch, identity = (
            factor.core.shape[:-2],
            torch.eye(factor.core.shape[-1], dtype=factor.core.dtype, device=device),
        )
        root = torch.linalg.solve_triangular(factor.core, identity, upper=False)
        last = root.mT @ root
        values = factor.core.new_zeros(*batch, self.size + 1)
        rows = factor.core.new_zeros(*batch, self.num_others + 1, self.num_hubs)
        values = values.index_copy(-1, self._core_places.flatten().to(device), last[..., :count, :count].flatten(-2))
        values = values.index_copy(-1, self._hub_places.flatten().to(device), last[..., count:, count:].flatten(-2))
        rows = rows.index_copy(-2, self._row[self.core].to(device), last[..., :count, count:])
        hubs_alone = last[..., count:, count:]
        steps = zip(self.levels(device), factor.pivots, factor.near, factor.hubs, strict=True)
        for level, pivot, near, hub in reversed(list(steps)):
            width = near.shape[-1]
            among = values[..., level.pairs[:, _square(width).to(device)]]  # (k, m, m)
            beside = rows[..., level.near_rows, :]  # (k, m, h)
            in_near = -(near.unsqueeze(-2) @ among).squeeze(-2) - (beside @ hub.unsqueeze(-1)).squeeze(-1)
            in_hubs = -(near.unsqueeze(-2) @ beside).squeeze(-2) - hub @ hubs_alone
            own = pivot.reciprocal() - (near * in_near).sum(-1) - (hub * in_hubs).sum(-1)
            values = values.index_copy(-1, level.nodes, own)
            values = values.index_copy(-1, level.own.flatten(), in_near.flatten(-2))
            rows = rows.index_copy(-2, level.rows, in_hubs)
        return torch.cat([values[..., : self.dimension + self.num_pairs], rows[..., :-1, :].flatten(-2)], -1)

    def precision(self, covariance: Tensor) -> Tensor:
        """The values of P from those of P⁻¹: each variable is regressed on those eliminated after it that it is coupled with."""
        values, rows = self._apart(covariance)
        device, batch = covariance.device, covariance.shape[:-1]
        hubs = values[..., self._hub_places.to(device)]
        found, found_rows = torch.zeros_like(values), torch.zeros_like(rows)
        last = torch.linalg.inv(self._dense(values, rows, torch.zeros_like(hubs)))
        count = len(self.core)
        outer = last[..., count:, count:]
        for level in self.levels(device):
            k, width = level.near.shape
            among = values[..., level.pairs[:, _square(width).to(device)]]
            among = among + torch.diag_embed((level.near == self.dimension).to(values))
            beside = rows[..., level.near_rows, :]
            corner = hubs.unsqueeze(-3).expand(*batch, k, self.num_hubs, self.num_hubs)
            whole = torch.cat([torch.cat([among, beside], -1), torch.cat([beside.mT, corner], -1)], -2)
            cross = torch.cat([values[..., level.own], rows[..., level.rows, :]], -1)
            weights = -torch.linalg.solve(whole, cross.unsqueeze(-1)).squeeze(-1)
            pivot = (values[..., level.nodes] + (weights * cross).sum(-1)).reciprocal()
            near, hub = weights[..., :width], weights[..., width:]
            scaled = pivot.unsqueeze(-1) * near
            i, j = torch.tril_indices(width, width, device=device).unbind(0)
            found = found.index_add(-1, level.nodes, pivot).index_add(-1, level.own.flatten(), scaled.flatten(-2))
            found = found.index_add(-1, level.pairs.flatten(), (scaled[..., i] * near[..., j]).flatten(-2))
            found_rows = found_rows.index_add(-2, level.rows, pivot.unsqueeze(-1) * hub)
            change = (scaled.unsqueeze(-1) * hub.unsqueeze(-2)).flatten(-3, -2)
            found_rows = found_rows.index_add(-2, level.near_rows.flatten(), change)
            outer = outer + hub.mT @ (pivot.unsqueeze(-1) * hub)
        i, j = torch.tril_indices(count, count, device=device).unbind(0)
        found = found.index_add(-1, self._core_places.to(device)[i, j], last[..., :count, :count][..., i, j])
        i, j = torch.tril_indices(self.num_hubs, self.num_hubs, device=device).unbind(0)
        found = found.index_add(-1, self._hub_places.to(device)[i, j], outer[..., i, j])
        found_rows = found_rows.index_add(-2, self._row[self.core].to(device), last[..., :count, count:])
        return torch.cat([found[..., : self.dimension + self.num_pairs], found_rows[..., :-1, :].flatten(-2)], -1)


def _padded(values: Tensor, dim: int) -> Tensor:
    """With one zero more at the end of a dim."""
    shape = list(values.shape)
    shape[dim] = 1
    return torch.cat([values, values.new_zeros(shape)], dim)


def _square(width: int) -> Tensor:
    """Which of the entries of a lower triangle each entry of the square reads."""
    i, j = torch.tril_indices(width, width).unbind(0)
    place = torch.zeros(width, width, dtype=torch.long)
    place[i, j] = place[j, i] = torch.arange(len(i))
    return place
