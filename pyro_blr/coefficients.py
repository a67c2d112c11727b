"""Which parameter of a guide each coefficient of one latent in another is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor

from pyro_blr.conditionals import Coefficient, Conditional, Conditionals
from pyro_blr.families import MultivariateNormal, Normal
from pyro_blr.laws import Law, is_latent, is_weighted, law_of
from pyro_blr.links import Argument, find_argument
from pyro_blr.parameters import Slot, nudged, remembered, statement_slot
from pyro_blr.parts import UnreadableGuide
from pyro_blr.running import isolated_random_state
from pyro_blr.statements import found_arguments

__all__ = ["read_conditionals"]

_MOST = 200  # dimensions of one Gaussian: the guide runs once for each


class _Linear(NamedTuple):
    """What the guide's Gaussian sites do at one setting of its parameters, z in all of them flat."""

    values: dict[str, Tensor]  # parameter -> constrained value
    laws: dict[str, Law]  # at z = 0
    weights: dict[str, Tensor]  # site -> ∂ loc / ∂ z, (d, D)
    affine: frozenset[str]  # sites whose laws are these everywhere, and follow no other site


def read_conditionals(guide: Any, args: tuple, kwargs: Mapping[str, Any]) -> list[Conditionals]:
    """The groups of sites that are linear in each other, all coefficients parameters of their own; found by running the guide at
    unit vectors of its own Gaussian latents, at two settings of all parameters.
    """
    trace = poutine.trace(guide).get_trace(*args, **kwargs)
    nodes: Mapping[str, Any] = trace.nodes
    slots = {n: statement_slot(n, node) for n, node in nodes.items() if node["type"] == "param"}
    shapes = {n: node["value"].shape for n, node in nodes.items() if is_latent(node)}
    gaussian = [name for name in shapes if not is_weighted(nodes[name]) and _is_gaussian(name, nodes[name]["fn"])]
    sizes = {name: shapes[name].numel() for name in gaussian}
    if len(gaussian) < 2 or sum(sizes.values()) > _MOST:
        return []
    restore = remembered(list(slots.values()))
    try:
        seen = [_linear(guide, args, kwargs, slots, gaussian, shapes, seed) for seed in (1, 2)]
    finally:
        restore()
    return [Conditionals(group) for group in _groups(_conditionals(gaussian, sizes, slots, seen))]


def _is_gaussian(name: str, distribution: Any) -> bool:
    try:
        law = law_of(name, distribution)
    except UnreadableGuide:
        return False
    one = distribution.batch_shape.numel() == 1
    return isinstance(law.family, Normal) or isinstance(law.family, MultivariateNormal) and one


def _linear(
    guide: Any,
    args: tuple,
    kwargs: Mapping[str, Any],
    slots: Mapping[str, Slot],
    gaussian: Sequence[str],
    shapes: Mapping[str, torch.Size],
    seed: int,
) -> _Linear:
    nudged(slots.values(), seed)
    sizes = [shapes[name].numel() for name in gaussian]
    with isolated_random_state(seed), torch.no_grad():
        start: Mapping[str, Any] = poutine.trace(guide).get_trace(*args, **kwargs).nodes

    def at(z: Tensor, draw: int) -> dict[str, Law]:
        pieces = dict(zip(gaussian, z.split(sizes), strict=True))
        with isolated_random_state(draw), torch.no_grad():
            others = poutine.trace(guide).get_trace(*args, **kwargs).nodes if draw != seed else start
            values = {n: others[n]["value"] for n in shapes}
            values |= {n: piece.reshape(shapes[n]).to(start[n]["value"]) for n, piece in pieces.items()}
            nodes = poutine.trace(poutine.condition(guide, data=values)).get_trace(*args, **kwargs).nodes
        return {n: law_of(n, nodes[n]["fn"]) for n in gaussian}

    base = at(torch.zeros(sum(sizes), dtype=torch.float64), seed)
    columns = [at(unit, seed) for unit in torch.eye(sum(sizes), dtype=torch.float64)]
    weights = {n: torch.stack([_loc(column[n]) - _loc(base[n]) for column in columns], -1) for n in gaussian}
    narrow = {n: w.to(base[n].arguments["loc"].dtype) for n, w in weights.items()}  # as exact as the guide is
    z = torch.randn(sum(sizes), generator=torch.Generator().manual_seed(seed), dtype=torch.float64, device="cpu")
    other = at(z, seed + 10)
    affine = frozenset(n for n in gaussian if _agrees(base[n], other[n], weights[n] @ z))
    return _Linear({n: slot.value.clone() for n, slot in slots.items()}, base, narrow, affine)


def _loc(law: Law) -> Tensor:
    return law.arguments["loc"].double().flatten()


def _agrees(base: Law, other: Law, moved: Tensor) -> bool:
    tolerance = 1e-9 if base.arguments["loc"].dtype == torch.float64 else 1e-4
    same = all(
        x.shape == other.arguments[n].shape and bool(torch.allclose(x, other.arguments[n], rtol=tolerance))
        for n, x in base.arguments.items()
        if n != "loc"
    )
    return same and bool(torch.allclose(_loc(base) + moved, _loc(other), rtol=tolerance, atol=tolerance))


def _conditionals(
    gaussian: Sequence[str], sizes: Mapping[str, int], slots: Mapping[str, Slot], seen: Sequence[_Linear]
) -> list[Conditional]:
    """Sites that are linear in sites of the list alone, in order."""
    spans = dict(zip(gaussian, torch.arange(sum(sizes.values())).split([sizes[n] for n in gaussian]), strict=True))
    found: dict[str, Conditional] = {}
    used: set[str] = set()
    for name in gaussian:
        if not all(name in each.affine for each in seen):
            continue
        parents = [n for n in gaussian if any(bool(each.weights[name][:, spans[n]].any()) for each in seen)]
        blocks = {n: [each.weights[name][:, spans[n]] for each in seen] for n in parents}
        try:
            arguments = found_arguments(name, [e.laws[name] for e in seen], slots, [e.values for e in seen])
            coefficients = [_coefficient(name, n, blocks[n], slots, seen) for n in parents]
        except UnreadableGuide:
            continue
        whole = Conditional(
            name,
            seen[0].laws[name].distribution_class,
            next(a for a in arguments if a.name == "loc"),
            tuple(a for a in arguments if a.name != "loc"),
            tuple(coefficients),
        )
        mine = [argument.slot.name for argument in whole.arguments]
        if whole.intercept.shape.numel() != sizes[name] or len(set(mine)) < len(mine) or used & set(mine):
            continue
        if all(parent in found for parent in parents):
            found[name] = whole
            used |= set(mine)
    return list(found.values())


def _coefficient(
    name: str, parent: str, matrices: list[Tensor], slots: Mapping[str, Slot], seen: Sequence[_Linear]
) -> Coefficient:
    values = [each.values for each in seen]
    forms = {"matrix": matrices, "transposed": [m.mT for m in matrices]}
    if matrices[0].shape[0] == matrices[0].shape[1] and all(bool((m == m.diagonal().diag()).all()) for m in matrices):
        forms = {"diagonal": [m.diagonal() for m in matrices]}
    for form, tensors in forms.items():
        argument = find_argument(name, f"the coefficient of {parent}", tensors, slots, values)
        if isinstance(argument, Argument):
            return Coefficient(parent, argument, form)
    raise UnreadableGuide(str(argument))


def _groups(conditionals: Iterable[Conditional]) -> list[list[Conditional]]:
    """Connected sites together, in the guide's order; sites by themselves left out."""
    group_of: dict[str, list[Conditional]] = {}
    for conditional in conditionals:
        joined = [conditional]
        for parent in {id(group_of[c.parent]): group_of[c.parent] for c in conditional.coefficients}.values():
            joined = [*parent, *joined]
        order = {c.site: place for place, c in enumerate(joined)}
        joined = sorted({c.site: c for c in joined}.values(), key=lambda c: order[c.site])
        for member in joined:
            group_of[member.site] = joined
    unique = {id(group): group for group in group_of.values()}
    return [group for group in unique.values() if len(group) > 1]
