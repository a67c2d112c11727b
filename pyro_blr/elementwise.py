"""Whether a factor is elementwise in the predictors of a cut, as its values show."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_blr.blocks import Block
from pyro_blr.cuts import RowsBelow, above, below, by_predictor, in_rows, wide
from pyro_blr.forms import UNUSABLE
from pyro_blr.plans import Cut, FactorPlan
from pyro_blr.probe import Probe
from pyro_blr.running import isolated_random_state
from pyro_blr.shapes import broadcast_shape
from pyro_blr.smoothness import smoothness

__all__ = ["is_by_rows", "is_elementwise", "is_smooth_in_rows"]

_EXCHANGES = 2
_LINES = 4  # points, between pairs of which derivatives are looked at


def is_elementwise(probe: Probe, plan: FactorPlan, cut: Cut, names: Sequence[str]) -> bool:
    """Whether each element of log f depends on its own element of every predictor alone, and is the factor's own.

    Random elements of the predictors are exchanged for those at another point: an element of log f must change to what it is
    when all are exchanged, or not at all.  The predictors have the shape of log f here, as in an integral.
    """
    try:
        return (_stands_exchanges_of_rows if cut.is_wide else _stands_exchanges)(probe, plan, cut, names)
    except UNUSABLE:  # a program may want its predictors in their own shape
        return False


def _stands_exchanges(probe: Probe, plan: FactorPlan, cut: Cut, names: Sequence[str]) -> bool:
    generator = torch.Generator().manual_seed(29)
    with torch.no_grad(), isolated_random_state(0):
        env = probe.site_values({}, plan.factor.latents)
        leaves = [_leaves(probe, names) for _ in range(2)]
        made = plan.factor.constructed
        assert made is not None
        points = [[p.expand(made.batch_shape) for p in _points(probe, cut, env, leaf)] for leaf in leaves]
        corners = list(itertools.product((0, 1), repeat=len(cut.predictors)))
        tables = {
            corner: _table(probe, plan, cut, env, [points[c][i] for i, c in enumerate(corner)]) for corner in corners
        }
        values = {**env, **{site: v for block, leaf in leaves[0] for site, v in block.values(leaf, env).items()}}
        first = tables[corners[0]]
        if not bool(first.isfinite().any()) or not _same(_table(probe, plan, Cut(()), values, ()), first):
            return False
        for _ in range(_EXCHANGES):
            masks = [(torch.rand(p.shape, generator=generator, device="cpu") < 0.5).to(p.device) for p in points[0]]
            mixed = [torch.where(m, y, x) for m, x, y in zip(masks, *points, strict=True)]
            if not _same(_table(probe, plan, cut, env, mixed), _chosen(tables, masks)):
                return False
    return True


def _stands_exchanges_of_rows(probe: Probe, plan: FactorPlan, cut: Cut, names: Sequence[str]) -> bool:
    """The same for predictors that are many numbers a row: whole rows are exchanged."""
    made, generator = plan.factor.constructed, torch.Generator().manual_seed(29)
    assert made is not None
    with torch.no_grad(), isolated_random_state(0):
        env = probe.site_values({}, plan.factor.latents)
        leaves = [_leaves(probe, names) for _ in range(2)]
        rows = [in_rows(cut, _points(probe, cut, env, leaf), made.batch_shape) for leaf in leaves]
        first, second = (_table(probe, plan, cut, env, by_predictor(cut, points)) for points in rows)
        values = {**env, **{site: v for block, leaf in leaves[0] for site, v in block.values(leaf, env).items()}}
        if not bool(first.isfinite().any()) or not _same(_table(probe, plan, Cut(()), values, ()), first):
            return False
        for _ in range(_EXCHANGES):
            mask = (torch.rand(made.batch_shape, generator=generator, device="cpu") < 0.5).to(first.device)
            mixed = torch.where(mask.unsqueeze(-1), rows[1], rows[0])
            if not _same(_table(probe, plan, cut, env, by_predictor(cut, mixed)), torch.where(mask, second, first)):
                return False
    return True


def is_smooth_in_rows(probe: Probe, plan: FactorPlan, cut: Cut, names: Sequence[str]) -> bool:
    """Whether log f has the two derivatives in its predictors that random points need, and can be batched over points."""
    made = plan.factor.constructed
    assert made is not None
    inputs = wide(probe.graph.tape.inputs)
    with isolated_random_state(0):
        env = probe.site_values({}, plan.factor.latents)
        with torch.no_grad():
            rows = torch.stack(
                [in_rows(cut, _points(probe, cut, env, _leaves(probe, names)), made.batch_shape) for _ in range(_LINES)]
            )

        def total(point: Tensor, _: Any) -> Tensor:
            return below(probe.graph, plan.factor, cut, env, by_predictor(cut, point), inputs).double().sum()

        try:
            return smoothness(total, rows, {}, rows[0].numel()) == 2
        except UNUSABLE:
            return False


def is_by_rows(probe: Probe, plan: FactorPlan, cut: Cut, names: Sequence[str]) -> bool:
    """Whether chosen elements, evaluated by number, are what they are among all."""
    made = plan.factor.constructed
    assert made is not None
    if plan.enumerated:
        return False
    with torch.no_grad(), isolated_random_state(0):
        env = probe.site_values({}, plan.factor.latents)
        points = _points(probe, cut, env, _leaves(probe, names))
        table = _table(probe, plan, cut, env, points).flatten()
        rows = torch.arange(table.numel(), device=table.device).flip(0)[::2]
        flat = torch.stack([point.expand(made.batch_shape).flatten() for point in points], -1)
        try:
            found = RowsBelow(probe.graph, plan.factor, cut, made.batch_shape)
            some, every = found(flat[rows].expand(3, -1, -1), rows), found(flat.expand(2, -1, -1), None)
        except UNUSABLE:
            return False
        return _same(some[2], table[rows]) and _same(every[1], table)


def _leaves(probe: Probe, names: Sequence[str]) -> list[tuple[Block, Tensor]]:
    blocks = [probe.blocks[name] for name in names]
    return [(block, probe.point(block).to(block.device)) for block in blocks]


def _points(probe: Probe, cut: Cut, env: Mapping[str, Tensor], leaves: Sequence[tuple[Block, Tensor]]) -> list[Tensor]:
    tape = probe.graph.tape
    return [above(tape, p.argument.ref, env, leaves, wide(tape.inputs)) for p in cut.predictors]


def _table(probe: Probe, plan: FactorPlan, cut: Cut, env: Any, points: Sequence[Tensor]) -> Tensor:
    made = plan.factor.constructed
    assert made is not None
    found = below(probe.graph, plan.factor, cut, env, points, wide(probe.graph.tape.inputs))
    return found.expand(broadcast_shape(found.shape, made.batch_shape))


def _chosen(tables: Mapping[tuple[int, ...], Tensor], masks: Sequence[Tensor]) -> Tensor:
    """Element by element the table of the corner that the masks name there."""
    result = next(iter(tables.values()))
    for corner, table in tables.items():
        here = torch.ones_like(table, dtype=torch.bool)
        for mask, c in zip(masks, corner, strict=True):
            here = here & (mask if c else ~mask).expand_as(here)
        result = torch.where(here, table, result)
    return result


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal up to the rounding of one element; not finite in the same places."""
    finite = a.isfinite()
    if not torch.equal(finite, b.isfinite()):
        return False
    return bool(((a - b)[finite].abs() <= 1e-9 * (1 + a[finite].abs())).all())
