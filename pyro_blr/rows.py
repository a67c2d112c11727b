"""The moments of the numbers through which each row of a factor sees Gaussian blocks, with all their covariances."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_blr.arguments import Moments
from pyro_blr.batches import batched
from pyro_blr.blocks import Block
from pyro_blr.cuts import above, in_rows, wide
from pyro_blr.graph import FactorGraph
from pyro_blr.plans import FactorPlan

__all__ = ["RowMoments"]


class RowMoments:
    """Means and covariances of the numbers through which each row of a factor sees Gaussian blocks, x = c + A u in every row.

    A is read off once, and kept for those entries of u that each number sees: K logits of K columns of weights are K small arrays.
    """

    def __init__(self, graph: FactorGraph, blocks: Mapping[str, Block], plan: FactorPlan):
        assert plan.cut is not None and plan.factor.constructed is not None
        self.graph, self.cut, self.shape = graph, plan.cut, plan.factor.constructed.batch_shape
        self.blocks = [blocks[name] for name in plan.integrated]
        self._base: Tensor | None = None
        self._columns: dict[str, tuple[Tensor, Tensor]] = {}

    def __call__(self, moments: Moments) -> tuple[Tensor, Tensor]:
        """(n, k) and (n, k, k)."""
        if self._base is None:
            self._base = self._read(moments)
        mean: Any = self._base
        covariance: Any = 0.0
        for block in self.blocks:
            place, columns = self._columns[block.name]  # (k, d), (k, n, d)
            given = moments[block.name]
            mean = mean + torch.einsum("ind,id->ni", columns, given["mean"].reshape(-1)[place])
            if "covariance" in given:
                spread = _block_diagonal(given["covariance"])[place[:, None, :, None], place[None, :, None, :]]
                covariance = covariance + torch.einsum("ind,ijde,jne->nij", columns, spread, columns)
            else:
                spread = given["variance"].reshape(-1)[place].unsqueeze(1)
                covariance = covariance + self._diagonal(columns, spread, place)
        return mean, covariance

    def _diagonal(self, columns: Tensor, spread: Tensor, place: Tensor) -> Tensor:
        """Σ_d A_id v_d A_jd where the numbers i and j see the same entry."""
        k, n, _ = columns.shape
        total = int(place.max()) + 1
        full = torch.zeros(k, n, total, dtype=columns.dtype, device=columns.device)
        full = full.scatter_add(2, place.unsqueeze(1).expand_as(columns), columns)
        scaled = torch.zeros_like(full).scatter_add(2, place.unsqueeze(1).expand_as(columns), columns * spread)
        return torch.einsum("ind,jnd->nij", scaled, full)

    @torch.no_grad()
    def _read(self, moments: Moments) -> Tensor:
        """c; A by columns."""
        inputs = wide(self.graph.tape.inputs)
        zeros = {block.name: torch.zeros_like(moments[block.name]["mean"]) for block in self.blocks}

        def at(leaves: Mapping[str, Tensor]) -> Tensor:
            given = [(block, leaves[block.name]) for block in self.blocks]
            values = [above(self.graph.tape, p.argument.ref, {}, given, inputs) for p in self.cut.predictors]
            return in_rows(self.cut, values, self.shape).reshape(-1, self.cut.numbers)

        base = at(zeros)
        for name, zero in zeros.items():
            units = torch.eye(zero.numel(), dtype=zero.dtype, device=zero.device).reshape(-1, *zero.shape)
            found = batched(lambda unit, _, name=name: at({**zeros, name: unit}) - base, units, {}, base.numel())
            self._columns[name] = _without_zeros(found.permute(2, 1, 0))
        return base


def _without_zeros(columns: Tensor) -> tuple[Tensor, Tensor]:
    """(k, n, D) -> places (k, d) and columns (k, n, d): for each number the columns that are not zero, filled up with zero ones."""
    seen = columns.abs().amax(1) > 0
    most = max(int(seen.sum(-1).max()), 1)
    place = seen.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[:, :most]
    return place, columns.gather(2, place.unsqueeze(1).expand(-1, columns.shape[1], -1)).contiguous()


def _block_diagonal(covariance: Tensor) -> Tensor:
    """(*batch, d, d) -> one matrix over all elements."""
    flat = covariance.reshape(-1, *covariance.shape[-2:])
    return flat[0] if flat.shape[0] == 1 else torch.block_diag(*flat)
