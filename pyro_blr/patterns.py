"""Which entries of a large joint Gaussian are coupled, given the rest: those that a row of some factor sees together."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pyro_blr.arguments import Arguments
from pyro_blr.blocks import Block
from pyro_blr.families import MultivariateNormal, Pattern, TransformedNormal
from pyro_blr.graph import FactorGraph
from pyro_blr.integrals import PredictorMoments
from pyro_blr.likelihoods import Linear
from pyro_blr.maps import AffineMap
from pyro_blr.plans import Argument, FactorPlan
from pyro_blr.probe import leaf_shape

__all__ = ["described", "pattern_of"]

_EVENT = 16  # entries of one value at most whose covariances are kept whether or not a factor couples them


@torch.no_grad()
def pattern_of(
    graph: FactorGraph, blocks: Mapping[str, Block], plans: Mapping[str, FactorPlan], name: str
) -> Pattern | None:
    """The pattern of a joint block's precision; None where it cannot be read off, or fills in too much."""
    block = blocks[name]
    if not isinstance(block.family, MultivariateNormal) or block.batch_shape.numel() != 1:
        return None
    size = block.num_directions
    parts = [_within_values(block)]
    for plan in plans.values():
        if name not in plan.blocks:
            continue
        if plan.replayed or name in plan.sampled or plan.enumerated or (plan.cut is not None and plan.cut.is_wide):
            return None
        cut, arguments = plan.cut, plan.arguments
        reader = Arguments(graph, blocks, plan)
        if cut is not None:
            reader, arguments = PredictorMoments(graph, blocks, plan), tuple(p.argument for p in cut.predictors)
            arguments += () if cut.joint is None else (cut.joint,)
        for argument in arguments:
            if name in argument.forms:
                found = _pairs(reader, argument, blocks, name)
                if found is None:
                    return None
                parts.append(found)
    rows, columns = (torch.cat(ends) for ends in zip(*parts, strict=True))
    pattern = Pattern.of(size, rows, columns)
    return None if pattern.elimination is None else pattern


def _pairs(
    reader: Arguments, argument: Argument, blocks: Mapping[str, Block], name: str
) -> tuple[Tensor, Tensor] | None:
    """Entries that a row of one argument sees together; None where its coefficients change."""
    if argument.role is not Linear or argument.products or not reader.is_constant(argument):
        return None
    zeros = {
        other: {"mean": torch.zeros(leaf_shape(blocks[other]), dtype=blocks[other].dtype, device=blocks[other].device)}
        for other in argument.forms
    }
    reader.prepare(argument, zeros)
    found = reader.compiled(argument, {}, zeros)
    if not isinstance(found, AffineMap) or name not in found.joints:
        return None
    rows, columns = found.joints[name].pairs()
    return rows.cpu(), columns.cpu()


def _within_values(block: Block) -> tuple[Tensor, Tensor]:
    """Entries of one value, so that its marginal is at hand."""
    rows, columns = [torch.zeros(0, dtype=torch.long)], [torch.zeros(0, dtype=torch.long)]
    for member in block.members:
        base = member.family.base if isinstance(member.family, TransformedNormal) else member.family
        width = base.event_shape.numel() if base is not None else 1
        if 1 < width <= _EVENT:
            i, j = torch.tril_indices(width, width, -1).unbind(0)
            starts = torch.arange(member.start, member.stop, width).unsqueeze(-1)
            rows.append((starts + i).flatten())
            columns.append((starts + j).flatten())
    return torch.cat(rows), torch.cat(columns)


def described(pattern: Pattern) -> str:
    """What a person wants to know of a sparse Gaussian."""
    solved = pattern.elimination
    assert solved is not None
    rounds = f"eliminated in {len(solved.levels(torch.device('cpu')))} rounds" if solved.num_others else "dense"
    hubs = f", {solved.num_hubs:,} of them coupled with many" if solved.num_hubs else ""
    return (
        f"sparse: of {pattern.dimension:,} dimensions{hubs}, {len(pattern.rows):,} pairs are coupled given the rest; {rounds}, "
        f"which fills in {solved.size - pattern.dimension - len(pattern.rows):,}"
    )
