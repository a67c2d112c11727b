"""Whether a factor's discrete sites can be enumerated by broadcasting: one value a state on a new left dimension.

A program may use a state in a way that does not broadcast (`x[k] = 1`, `k.roll(1)`): every single assignment of states is right, all
states at once are not.  Only values tell.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pyro_blr.averages import FactorAverage
from pyro_blr.blocks import Block
from pyro_blr.graph import FactorGraph
from pyro_blr.initial import initial_natural
from pyro_blr.plans import FactorPlan
from pyro_blr.probe import close, leaf_point, leaf_shape
from pyro_blr.running import site_value
from pyro_blr.shapes import broadcast_shape

__all__ = ["misaligned_factors"]

_LARGE = 100_000  # entries of a table beyond which one random assignment is enough


@torch.no_grad()
def misaligned_factors(
    graph: FactorGraph,
    blocks: Mapping[str, Block],
    plans: Mapping[str, FactorPlan],
    averages: Mapping[str, FactorAverage],
) -> dict[str, frozenset[str]]:
    """The factors whose table over states, read off at some assignment, is not the factor at that assignment; and their latents."""
    wanted = [plan for plan in plans.values() if plan.enumerated and not plan.replayed]
    if not wanted:
        return {}
    used = {name for plan in wanted for name in plan.blocks}
    moments = {}
    for name in used:
        natural = blocks[name].select(initial_natural(blocks[name]), graph.subsamples).double()
        exact = blocks[name].family.moments(natural)
        moments[name] = {key: value.to(blocks[name].dtype) for key, value in exact.items()}
    return {
        plan.factor.name: plan.factor.latents
        for plan in wanted
        if not _broadcasts(graph, blocks, plan, averages[plan.factor.name], moments)
    }


def _broadcasts(
    graph: FactorGraph,
    blocks: Mapping[str, Block],
    plan: FactorPlan,
    average: FactorAverage,
    moments: Mapping[str, Mapping[str, Tensor]],
) -> bool:
    generator = torch.Generator().manual_seed(11)
    samples = {}
    for name in plan.sampled:
        moment = next(iter(moments[name].values()))
        samples[name] = leaf_point(blocks[name].family, leaf_shape(blocks[name]), generator).to(moment)
    try:
        table = average.elementwise(moments, samples)
    except (RuntimeError, IndexError, ValueError, TypeError):  # the program cannot run on states with dims of their own
        return False
    for draw in range(1, 2 if table.numel() > _LARGE else 4):
        drawn = {}
        for name in plan.enumerated:
            site = blocks[name].sites[0]
            drawn[name] = site_value(site, draw)
        single = FactorAverage(graph, blocks, plan)
        single.points = {name: {blocks[name].site_names[0]: value} for name, value in drawn.items()}
        expected = single.elementwise(moments, samples)
        found = _read_off(
            table, [_states_index(blocks[name], drawn[name]) for name in plan.enumerated], graph.max_plate_nesting
        )
        if found.numel() > expected.numel() or not _equal(found, expected):
            return False
    return True


def _states_index(block: Block, value: Tensor) -> Tensor:
    """(*batch) index of each element's state."""
    assert block.states is not None
    states = block.states.to(value)
    event = states.dim() - 1
    same = value.unsqueeze(-event - 1) == states
    return (same.flatten(-event).all(-1) if event else same).to(torch.int64).argmax(-1)


def _read_off(table: Tensor, indices: list[Tensor], rank: int) -> Tensor:
    """The entry of each batch element's own states; table (K_n, ..., K_1, *batch padded to rank)."""
    table = table.reshape((1,) * (rank + len(indices) - table.dim()) + table.shape)
    for index in reversed(indices):
        index = index.reshape((1,) * (rank - index.dim()) + index.shape)
        shape = broadcast_shape(index.shape, table.shape[table.dim() - rank :])
        if table.shape[0] == 1:
            table = table[0]
            continue
        inner = table.shape[1 : table.dim() - rank]
        wide = table.expand(table.shape[0], *inner, *shape)
        table = wide.gather(0, index.expand(1, *inner, *shape))[0]
    return table


def _equal(a: Tensor, b: Tensor) -> bool:
    """Equal up to rounding; impossible states in the same places."""
    a, b = torch.broadcast_tensors(a, b)
    finite = torch.isfinite(a)
    if not torch.equal(finite, torch.isfinite(b)) or not bool((a[~finite] == b[~finite]).all()):
        return False
    return close(a[finite], b[finite])
