"""A factor cut at its predictors: what is above the cut, affine in Gaussian blocks, and what is below, elementwise in the predictors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributions import transforms

from pyro_blr.blocks import Block
from pyro_blr.families import LogNormal, TransformedNormal
from pyro_blr.graph import Factor, FactorGraph
from pyro_blr.plans import Argument, Cut
from pyro_blr.tape import Ref, Tape

__all__ = [
    "Moved",
    "RowsBelow",
    "Sum",
    "above",
    "addends",
    "below",
    "by_predictor",
    "elsewhere",
    "in_rows",
    "known_nodes",
    "refs_of",
    "transform_of",
    "unconstrained",
    "wide",
]


_SIGNS = {"add": (1.0, 1.0), "radd": (1.0, 1.0), "sub": (1.0, -1.0), "rsub": (-1.0, 1.0), "neg": (-1.0,)}


@dataclass(frozen=True)
class Moved:
    """The expression `ref`, which only moves elements of `site` about, at the unconstrained variable of its block."""

    ref: Ref
    site: str


@dataclass(frozen=True)
class Sum:
    """The sum of two predictors."""

    terms: tuple[Any, Any]


def refs_of(ref: Any) -> list[Ref]:
    """The expressions of the tape that a predictor is made of."""
    if isinstance(ref, Sum):
        return [found for term in ref.terms for found in refs_of(term)]
    return [ref.ref] if isinstance(ref, Moved) else [ref]


def transform_of(block: Block, site: str) -> Any:
    """The scalar bijection that a site's value is, element by element, of its block's variable; None where there is none."""
    member = next(member for member in block.views if member.site.name == site)
    family = block.family if not block.is_joint else member.family
    if isinstance(family, LogNormal):
        return transforms.ExpTransform()
    if not isinstance(family, TransformedNormal):
        return None
    found = family.transform
    while isinstance(found, transforms.IndependentTransform):
        found = found.base_transform
    return found if found.domain.event_dim == found.codomain.event_dim == 0 and _is_uniform(found) else None


def _is_uniform(transform: Any) -> bool:
    """Whether the transform is the same for every element."""
    parts = transform.parts if isinstance(transform, transforms.ComposeTransform) else []
    own = [value for value in vars(transform).values() if isinstance(value, Tensor)]
    return all(value.numel() == 1 for value in own) and all(map(_is_uniform, parts))


def unconstrained(block: Block, leaf: Tensor, site: str) -> Tensor:
    """The block's variable in the shape of a site that is its image element by element."""
    if not block.is_joint:
        return leaf.reshape(block.sites[0].shape)
    member = next(member for member in block.views if member.site.name == site)
    return member.unconstrained(leaf[..., member.start : member.stop], block.batch_shape)


def addends(tape: Tape, ref: Any) -> list[tuple[float, Any]]:
    """Signs and expressions whose sum an expression is, taken apart at sums and differences."""
    if isinstance(ref, Sum):
        return [found for term in ref.terms for found in addends(tape, term)]
    if not isinstance(ref, Ref):
        return [(1.0, ref)]
    node = tape.nodes[ref.index]
    signs = _SIGNS.get(node.name)
    if signs is None or node.kwargs or len(node.args) != len(signs):
        return [(1.0, ref)]
    return [
        (sign * inner, term)
        for sign, side in zip(signs, node.args, strict=True)
        if isinstance(side, Ref)
        for inner, term in addends(tape, side)
    ]


def above(
    tape: Tape,
    ref: Any,
    env: Mapping[str, Tensor],
    blocks: Sequence[tuple[Block, Tensor]],
    inputs: Sequence[Tensor] | None = None,
) -> Tensor:
    """A predictor at values of its blocks' variables; `env` has the values of all other latents."""
    if isinstance(ref, Sum):
        first, second = (above(tape, term, env, blocks, inputs) for term in ref.terms)
        return first + second
    values, wanted = dict(env), frozenset().union(*map(tape.latents_of, refs_of(ref)))
    for block, leaf in blocks:
        values.update(block.values(leaf, wanted))
        if isinstance(ref, Moved) and any(view.site.name == ref.site for view in block.views):
            values[ref.site] = unconstrained(block, leaf, ref.site)
    return tape.evaluate(refs_of(ref), values, inputs)[0]


def below(
    graph: FactorGraph,
    factor: Factor,
    cut: Cut,
    env: Mapping[str, Tensor],
    points: Sequence[Tensor],
    inputs: Sequence[Tensor],
) -> Tensor:
    """log f of the distribution itself (before `to_event` sums it, without mask and scale) at values of the predictors."""
    known = known_nodes(cut, points)
    if cut.log_prob is not None:
        return graph.tape.evaluate([cut.log_prob], env, inputs, known)[0]
    made = factor.constructed
    assert made is not None
    refs = [factor.value, *made.arguments.values()]
    value, *arguments = wide(graph.tape.evaluate(refs, env, inputs, known))
    return made.built(arguments).log_prob(value)


def known_nodes(cut: Cut, points: Sequence[Tensor]) -> dict[int, Tensor]:
    """What the cut's nodes hold where its predictors have these values; wide ones have a last dim of their own."""
    if cut.predictors and cut.predictors[0].entry is not None:
        return {cut.predictors[0].node: torch.stack(torch.broadcast_tensors(*points), -1)}
    return {
        predictor.node: point if predictor.transform is None else predictor.transform(point)
        for predictor, point in zip(cut.predictors, points, strict=True)
    }


def by_predictor(cut: Cut, rows: Tensor) -> list[Tensor]:
    """The numbers of every row, (..., k), as the cut's predictors have them."""
    parts = rows.split([predictor.width or 1 for predictor in cut.predictors], -1)
    return [
        part.squeeze(-1) if predictor.width is None else part
        for predictor, part in zip(cut.predictors, parts, strict=True)
    ]


def in_rows(cut: Cut, values: Sequence[Tensor], shape: torch.Size) -> Tensor:
    """The other way round: the predictors of the elements of a factor, (*shape, k)."""
    parts = [
        value.expand(shape).unsqueeze(-1) if predictor.width is None else value.expand(*shape, predictor.width)
        for predictor, value in zip(cut.predictors, values, strict=True)
    ]
    return torch.cat(parts, -1)


def wide(values: Sequence[Any]) -> list[Any]:
    """Floating-point tensors in float64; anything else as it is."""
    return [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in values]


@dataclass(frozen=True)
class _Flat:
    """A tensor that has an element for each row."""

    rows: Tensor


class RowsBelow:
    """`below` for chosen rows: elements of the log density by number, data that have an element each cut to them.

    Right where the program below the cut is elementwise by broadcasting alone, which `Cut.by_rows` says.
    """

    def __init__(self, graph: FactorGraph, factor: Factor, cut: Cut, shape: torch.Size):
        made = factor.constructed
        assert made is not None
        self.graph, self.factor, self.cut, self.shape, self.made = graph, factor, cut, shape, made
        refs = [factor.value, *made.arguments.values()] if cut.log_prob is None else [cut.log_prob]
        nodes = graph.tape.needed(refs, tuple(predictor.node for predictor in cut.predictors))
        used = {id(x) for x in graph.tape.inputs_at(nodes)}
        self.refs = [self._flat(ref) for ref in refs]
        self.inputs = [self._flat(x) if id(x) in used else x for x in graph.tape.inputs]

    def __call__(self, points: Tensor, rows: Tensor | None) -> Tensor:
        """log f at points (Q, M, k) of the rows (M,): (Q, M)."""
        known = known_nodes(self.cut, points.unbind(-1))
        inputs = [_chosen(x, rows) for x in self.inputs]
        values = self.graph.tape.evaluate([_chosen(ref, rows) for ref in self.refs], {}, inputs, known)
        if self.cut.log_prob is None:
            value, *arguments = values
            values = [self.made.built(arguments).log_prob(value)]
        return values[0].expand(points.shape[:-1])

    def _flat(self, x: Any) -> Any:
        """Floats in float64; a tensor that broadcasts to the elements in their order."""
        if not isinstance(x, Tensor):
            return x
        (x,) = wide([x])
        own, shape = tuple(x.shape), self.shape
        fits = len(own) <= len(shape) and all(a in (1, b) for a, b in zip(reversed(own), reversed(shape), strict=False))
        return _Flat(x.expand(shape).reshape(-1)) if fits and x.numel() > 1 else x.reshape(()) if x.numel() == 1 else x


def _chosen(x: Any, rows: Tensor | None) -> Any:
    if not isinstance(x, _Flat):
        return x
    return x.rows if rows is None else x.rows[rows]


def moved_on(cut: Cut, start: int, log_prob: Any) -> Cut:
    """The cut in another recording of the log density: what is inside it has moved with its beginning."""
    shift = start - cut.start
    return elsewhere(cut, log_prob, start, lambda index: index + shift if index >= cut.start else index)


def elsewhere(
    cut: Cut,
    log_prob: Any,
    start: int,
    node_of: Callable[[int], int],
    site_of: Callable[[str], str] = lambda site: site,
    block_of: Callable[[str], str] = lambda block: block,
) -> Cut:
    """The cut in expressions that are alike, by the nodes, sites and blocks that correspond."""

    def ref(old: Any) -> Any:
        if isinstance(old, Sum):
            return Sum((ref(old.terms[0]), ref(old.terms[1])))
        if isinstance(old, Moved):
            return Moved(ref(old.ref), site_of(old.site))
        return Ref(node_of(old.index))

    def argument(old: Argument) -> Argument:
        forms = {block_of(name): form for name, form in old.forms.items()}
        return replace(old, ref=ref(old.ref), forms=forms, mixed={block_of(n): d for n, d in old.mixed.items()})

    predictors = tuple(replace(p, node=ref(Ref(p.node)).index, argument=argument(p.argument)) for p in cut.predictors)
    joint = None if cut.joint is None else argument(cut.joint)
    return Cut(predictors, joint, log_prob, start, cut.by_rows)
