"""Statements of a loop that are alike, as one statement with a dim for the loop.

Sixty statements are sixty small programs to run and to integrate; as one, they are a batch.  q stays what it is: a stack of like
members of a joint block is another view of the same variable.  What is woven is compared with its statements, one by one, and left
apart where it is not they.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from pyro_blr.blocks import Block
from pyro_blr.cuts import refs_of
from pyro_blr.graph import FactorGraph
from pyro_blr.likeness import Alike, Outline
from pyro_blr.looms import Loom
from pyro_blr.members import Member
from pyro_blr.plans import FactorPlan
from pyro_blr.tape import Latent, Ref

__all__ = ["woven"]

_FEWEST = 3  # like statements at least


def woven(
    graph: FactorGraph, blocks: Mapping[str, Block], plans: Mapping[str, FactorPlan]
) -> tuple[FactorGraph, Mapping[str, Block], Mapping[str, FactorPlan]]:
    """The same sum of factors over the same q, with like statements as one."""
    alike, kinds = Alike(graph, blocks), dict[Any, list[tuple[FactorPlan, Outline]]]()
    for plan in plans.values():
        found = _kind(alike, plan)
        if found is not None:
            kinds.setdefault(found[0], []).append((plan, found[1]))
    groups = [group for group in kinds.values() if len(group) >= _FEWEST]
    stacks = _stacks(graph, alike, groups)
    if not groups:
        return graph, blocks, plans
    joint = {name: replace(block, stacks=tuple(stacks.get(name, ()))) for name, block in blocks.items()}
    loom = Loom(graph, joint)
    result = {plan.factor.name: plan for plan in plans.values()}
    factors = dict(graph.factors)
    for group in groups:
        cloth = loom.weave(group)
        if cloth is not None:
            first, *others = (one.factor.name for one, _ in group)
            result[first] = cloth
            factors[cloth.factor.name] = cloth.factor
            for name in others:
                del result[name]
    return replace(graph, factors=factors), joint, {plan.factor.name: plan for plan in result.values()}


# -- which statements, and which sites -----------------------------------------------------------------------------------


def _kind(alike: Alike, plan: FactorPlan) -> tuple[Any, Outline] | None:
    """What statements that can be woven together have in common, and the outline of this one."""
    made, factor, cut = plan.factor.constructed, plan.factor, plan.cut
    if made is None or plan.replayed or plan.enumerated:
        return None
    if cut is not None and (cut.is_wide or any(predictor.entry is not None for predictor in cut.predictors)):
        return None
    outline = alike.outline(_outputs(plan), list(alike.blocks), values=False)
    if outline is None:
        return None
    arguments = tuple(
        (a.name, a.role, tuple(a.forms.items()), tuple(sorted(a.mixed.items())), a.products) for a in plan.all_arguments
    )
    seen: Any = None
    if cut is not None:
        nodes = tuple((outline.nodes.index(p.node), type(p.transform)) for p in cut.predictors)
        seen = nodes, cut.joint is None, cut.log_prob is None, cut.by_rows
    form = made.distribution_class, tuple(made.arguments), made.batch_shape, made.event_dim, made.reinterpreted
    statement = factor.batch_shape, factor.plates, factor.looped, factor.is_observed, type(plan.likelihood)
    q = plan.analytic, plan.integrated, plan.sampled
    return (form, statement, arguments, q, seen, outline.key), outline


def _outputs(plan: FactorPlan) -> list[Any]:
    """All expressions that averaging the factor evaluates."""
    made, factor, cut = plan.factor.constructed, plan.factor, plan.cut
    assert made is not None
    found = [factor.value, factor.scale, factor.mask, made.mask, *made.arguments.values()]
    found += [argument.ref for argument in plan.arguments]
    if cut is not None:
        found += [Ref(predictor.node) for predictor in cut.predictors]
        refs = [p.argument.ref for p in cut.predictors] + ([cut.joint.ref] if cut.joint is not None else [])
        found += [one for ref in refs for one in refs_of(ref)]
        found += [cut.log_prob] if cut.log_prob is not None else []
    return found


def _stacks(
    graph: FactorGraph, alike: Alike, groups: list[list[tuple[FactorPlan, Outline]]]
) -> dict[str, list[Member]]:
    """Block -> stacks of its members that stand at one place of like statements; drops groups whose sites cannot be stacked."""
    together: dict[str, set[str]] = {}
    for group in list(groups):
        varying = [set(names) for names in _leaves(graph, group) if len(set(names)) > 1]
        blocks = [{alike.block_of[name] for name in names} for names in varying]
        if not all(len(mine) == 1 and alike.blocks[next(iter(mine))].is_joint for mine in blocks):
            groups.remove(group)
            continue
        for names in varying:
            union = set().union(names, *(together[name] for name in names if name in together))
            together.update(dict.fromkeys(union, union))
    found: dict[str, list[Member]] = {}
    refused: set[str] = set()
    for names in {id(union): union for union in together.values()}.values():
        members = sorted((alike.members[name] for name in names), key=lambda member: member.start)
        if all(a.stop == b.start for a, b in zip(members, members[1:], strict=False)):
            found.setdefault(alike.block_of[members[0].site.name], []).append(_stack(members))
        else:
            refused |= names
    groups[:] = [group for group in groups if not any(refused & set(names) for names in _leaves(graph, group))]
    return found


def _leaves(graph: FactorGraph, group: Sequence[tuple[FactorPlan, Outline]]) -> Iterable[list[str]]:
    """Place by place the latents that the statements have there."""
    for place in range(len(group[0][1].nodes)):
        nodes = [graph.tape.nodes[outline.nodes[place]] for _, outline in group]
        if isinstance(nodes[0].function, Latent):
            yield [node.name for node in nodes]


def _stack(members: Sequence[Member]) -> Member:
    first, last = members[0], members[-1]
    shape = torch.Size((len(members), *first.site.shape))
    site = replace(first.site, name=f"{first.site.name} … {last.site.name}", shape=shape)
    return Member(site, first.start, last.stop, first.family, len(members))
