"""Weaving: one expression of all statements of a loop, from the expressions of each.

Steps that are elementwise by broadcasting take the loop's dim as they are; others are batched by `vmap`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pyro_blr.blocks import Block
from pyro_blr.cuts import below, elsewhere, refs_of, wide
from pyro_blr.graph import Constructed, Factor, FactorGraph, Site
from pyro_blr.likelihoods import Matrix, Simplex, Vector
from pyro_blr.likeness import Outline
from pyro_blr.plans import FactorPlan
from pyro_blr.recorded import Recorded
from pyro_blr.running import isolated_random_state, site_value
from pyro_blr.tape import Input, Latent, Node, Ref

__all__ = ["Loom"]

_ELEMENTWISE = frozenset(
    "add radd sub rsub mul rmul div truediv rtruediv pow rpow neg exp log log1p expm1 sqrt rsqrt square reciprocal abs sigmoid tanh "
    "softplus lgamma".split()
)
_COPIES = frozenset({"expand", "expand_as", "broadcast_to", "clone", "contiguous", "identity"})
_OF_ONE_VALUE = {Vector: 1, Simplex: 1, Matrix: 2}  # dims of one value of an argument, beyond those of the batch


class _Stacked:
    """A function of one statement as one of all: the tensors in `dims` have the loop's dim first, and need not broadcast."""

    def __init__(self, function: Callable, dims: tuple):
        self.function, self.dims = function, dims
        self.__name__ = f"stacked {Node(function, (), {}, '').name}"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return torch.func.vmap(lambda *a: self.function(*a, **kwargs), self.dims)(*args)


@dataclass
class _Values:
    """What the nodes of one group hold, by their places: values, and whether the loop's dim is first in them."""

    places: Mapping[int, int]  # node of the first statement -> place
    values: list[Any] = field(default_factory=list)
    many: list[bool] = field(default_factory=list)
    is_plain: bool = True  # every step is elementwise by broadcasting


class Loom:
    """Weaves statements of a graph over the stacks of its blocks."""

    def __init__(self, graph: FactorGraph, blocks: Mapping[str, Block]):
        self.graph, self.tape, self.recording = graph, graph.tape, graph.recording
        self.position: dict[str, tuple[str, int]] = {}  # site -> the stack it is in, and where
        self.stacked: dict[str, tuple[list[Site], Recorded]] = {}  # stack -> its sites, and its leaf
        for block in blocks.values():
            for stack in block.stacks:
                inside = [m.site for m in block.members if stack.start <= m.start and m.stop <= stack.stop]
                with self.recording:
                    leaf = self.recording.latent(
                        stack.site.name, torch.stack([graph.values[site.name] for site in inside])
                    )
                self.stacked[stack.site.name] = inside, leaf
                self.position.update((site.name, (stack.site.name, place)) for place, site in enumerate(inside))

    def weave(self, group: Sequence[tuple[FactorPlan, Outline]]) -> FactorPlan | None:
        """The plan of the statements as one; None where they cannot be, or would not be the same."""
        departures = self.tape.departures
        known = len(departures)
        try:
            with self.recording.again(group[0][0].factor.source), torch.no_grad():
                plan = self._woven(group)
        except Exception:  # whatever a step, or a distribution, may object to in stacks: the statements stay apart
            return None
        finally:
            del departures[known:]  # the program's own are known already
        return plan if self._agrees(group, plan) else None

    def _woven(self, group: Sequence[tuple[FactorPlan, Outline]]) -> FactorPlan:
        plans, outlines = [plan for plan, _ in group], [outline for _, outline in group]
        found = _Values({index: place for place, index in enumerate(outlines[0].nodes)})
        for place in range(len(outlines[0].nodes)):
            value, many = self._value([outline.nodes[place] for outline in outlines], found)
            found.values.append(value)
            found.many.append(many)
        first, made = plans[0], self._constructed([plan.factor.constructed for plan in plans], found)
        rank = len(made.batch_shape) - 1
        canonical = tuple(
            replace(
                a, ref=self._output([p.arguments[i].ref for p in plans], found, rank + _OF_ONE_VALUE.get(a.role, 0))
            )
            for i, a in enumerate(first.arguments)
        )
        factor = self._factor([plan.factor for plan in plans], made, found)
        refs = [factor.value, factor.scale, factor.mask, made.mask, *made.arguments.values()]
        refs += [argument.ref for argument in canonical]
        factor = replace(factor, latents=frozenset().union(*map(self.tape.latents_of, refs)))
        cut = None if first.cut is None else self._cut(first, found, rank)
        return replace(first, factor=factor, arguments=canonical, cut=cut, verdicts=())

    def _constructed(self, every: Sequence[Any], found: _Values) -> Constructed:
        first, rank = every[0], len(every[0].batch_shape)
        arguments = {}
        for name in first.arguments:
            one = getattr(first.distribution_class.arg_constraints.get(name), "event_dim", 0)
            arguments[name] = self._output([made.arguments[name] for made in every], found, rank + one)
        mask = self._output([made.mask for made in every], found, rank)
        return replace(first, arguments=arguments, batch_shape=torch.Size((len(every), *first.batch_shape)), mask=mask)

    def _factor(self, factors: Sequence[Factor], made: Constructed, found: _Values) -> Factor:
        first, rank = factors[0], len(factors[0].batch_shape)
        return replace(
            first,
            name=f"{first.name} … {factors[-1].name}",
            constructed=made,
            distribution=first.distribution.expand(torch.Size((len(factors), *first.batch_shape))),
            value=self._output([f.value for f in factors], found, len(made.batch_shape) - 1 + made.event_dim),
            scale=self._output([f.scale for f in factors], found, rank),
            mask=self._output([f.mask for f in factors], found, rank),
        )

    def _cut(self, plan: FactorPlan, found: _Values, batch: int) -> Any:
        cut, tape = plan.cut, self.tape
        assert cut is not None
        for predictor in cut.predictors:
            many, shape = found.many[found.places[predictor.node]], tape.nodes[predictor.node].shape
            if len(shape or ()) != batch or not (many or found.is_plain):
                raise ValueError("a predictor that all statements share, or of another rank, is not woven")

        def node_of(index: int) -> int:
            return self.recording.reference(found.values[found.places[index]]).index

        def site_of(site: str) -> str:
            return self.position[site][0] if site in self.position else site

        log_prob = cut.log_prob if cut.log_prob is None else Ref(node_of(cut.log_prob.index))
        moved = elsewhere(cut, log_prob, cut.start, node_of, site_of)
        return replace(moved, by_rows=cut.by_rows and found.is_plain)

    # -- steps -------------------------------------------------------------------------------------------------------------

    def _value(self, indices: Sequence[int], found: _Values) -> tuple[Any, bool]:
        """What one step holds, and whether the loop's dim is in it."""
        tape, node = self.tape, self.tape.nodes[indices[0]]
        if isinstance(node.function, Latent):
            return self._leaf([tape.nodes[index].name for index in indices], indices[0])
        if len(set(indices)) == 1 and not tape.latents_of(Ref(indices[0])) & set(self.position):
            return self._known(indices[0]), False
        nodes = [tape.nodes[index] for index in indices]
        args = [self._joined(items, found) for items in zip(*(n.args for n in nodes), strict=True)]
        kwargs = {key: self._joined([n.kwargs[key] for n in nodes], found) for key in node.kwargs}
        values, shapes = tuple(value for value, _ in args), [self._shape(arg) for arg in node.args]
        options = {key: value for key, (value, _) in kwargs.items()}
        if node.function is operator.getitem and isinstance(values[0], (tuple, list)):
            return values[0][values[1]], bool(_any(args[0][1]))
        if node.name in _COPIES and shapes and shapes[0] == node.shape:
            return values[0], bool(_any(args[0][1]))
        many = any(_any(dims) for _, dims in (*args, *kwargs.values()))
        if any(_any(dims) for _, dims in kwargs.values()):
            raise ValueError("a keyword that differs between statements is not stacked")
        function: Any = node.function
        if node.name in _ELEMENTWISE:
            rank = len(node.shape or ())
            values = tuple(_in_line(value, rank) if _any(dims) else value for value, dims in args)
        elif many:
            function, found.is_plain = _Stacked(node.function, tuple(dims for _, dims in args)), False
        return self.recording.call(
            function, values, options, [v for v in _flat((values, options)) if isinstance(v, Recorded)]
        ), many

    def _known(self, index: int) -> Any:
        value = self.tape.evaluate([Ref(index)], self.graph.values)[0]
        return Recorded.wrap(value, self.recording, index) if isinstance(value, Tensor) else value

    def _leaf(self, names: Sequence[str], index: int) -> tuple[Any, bool]:
        if names[0] not in self.position:
            return self._known(index), False
        stack, place = self.position[names[0]]
        sites, leaf = self.stacked[stack]
        if len(set(names)) == 1:
            return leaf[place], False
        places = [self.position[name][1] for name in names]
        if places == list(range(len(sites))):
            return leaf, True
        if places == list(range(places[0], places[0] + len(places))):
            return leaf[places[0] : places[0] + len(places)], True
        return leaf[torch.tensor(places, device=leaf.device)], True

    def _joined(self, items: Sequence[Any], found: _Values) -> tuple[Any, Any]:
        """One argument of all statements, and where in it the loop's dim is (0 or None, in the argument's own structure)."""
        first = items[0]
        if isinstance(first, Ref):
            place = found.places[first.index]
            return found.values[place], 0 if found.many[place] else None
        if isinstance(first, Input):
            return _stacked([self.tape.inputs[item.index] for item in items])
        if isinstance(first, Tensor):
            return _stacked(items)
        if isinstance(first, (tuple, list)):
            parts = [self._joined(each, found) for each in zip(*items, strict=True)]
            dims = type(first)(dim for _, dim in parts)
            return type(first)(value for value, _ in parts), dims if _any(dims) else None
        if isinstance(first, slice):
            bounds, dims = self._joined([(item.start, item.stop, item.step) for item in items], found)
            if _any(dims):
                raise ValueError("bounds that differ between statements are not stacked")
            return slice(*bounds), None
        return first, None

    def _shape(self, item: Any) -> tuple[int, ...] | None:
        if isinstance(item, Ref):
            return self.tape.nodes[item.index].shape
        tensor = self.tape.inputs[item.index] if isinstance(item, Input) else item
        return tuple(tensor.shape) if isinstance(tensor, Tensor) else None

    def _output(self, items: Sequence[Any], found: _Values, rank: int) -> Any:
        """One expression of all statements, its dims in line with a batch of `rank` dims right of the loop's."""
        value, dims = self._joined(items, found)
        if not _any(dims):
            return self.recording.reference(value)
        return self.recording.reference(_in_line(value, rank))

    # -- whether it is the same --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _agrees(self, group: Sequence[tuple[FactorPlan, Outline]], plan: FactorPlan) -> bool:
        """Whether log f, the canonical arguments and log f below its cut are those of the statements."""
        values = {site.name: site_value(site, 1) for site in self.graph.sites.values()}
        values |= {name: torch.stack([values[s.name] for s in inside]) for name, (inside, _) in self.stacked.items()}
        try:
            with isolated_random_state(0):
                mine = self._values_of(plan, values, None)
                for place, (one, _) in enumerate(group):
                    theirs = self._values_of(one, values, place)
                    if not all(_same(all_of[place], own) for all_of, own in zip(mine, theirs, strict=True)):
                        return False
        except Exception:  # as above
            return False
        return True

    def _values_of(self, plan: FactorPlan, values: Mapping[str, Tensor], place: int | None) -> list[Tensor]:
        factor, made, cut = plan.factor, plan.factor.constructed, plan.cut
        assert made is not None
        shape = made.batch_shape
        graph = replace(self.graph, factors={factor.name: factor})
        found = [graph.log_prob(factor.name, values).expand(factor.batch_shape)]
        refs = [(a.ref, _OF_ONE_VALUE.get(a.role, 0)) for a in plan.arguments]
        refs += [(ref, 0) for p in (cut.predictors if cut else ()) for ref in refs_of(p.argument.ref)]
        for (_, own), value in zip(refs, self.tape.evaluate([ref for ref, _ in refs], values), strict=True):
            value = torch.as_tensor(value)
            found.append(value.expand(torch.Size((*shape, *value.shape[value.dim() - own :]))))
        if cut is not None:
            generator = torch.Generator().manual_seed(31)
            single = shape if place is not None else shape[1:]
            points = [torch.randn(single, generator=generator, dtype=torch.float64) for _ in cut.predictors]
            points = [point.to(found[0].device).expand(shape) for point in points]
            log_prob = below(graph, factor, cut, values, points, wide(self.tape.inputs))
            found.append(log_prob.expand(shape))
        return found


def _stacked(tensors: Sequence[Tensor]) -> tuple[Tensor, int | None]:
    if all(tensor is tensors[0] for tensor in tensors):
        return tensors[0], None
    if any(tensor.requires_grad for tensor in tensors):
        raise ValueError("parameters that are learned are not stacked")
    return torch.stack(list(tensors)), 0


def _in_line(value: Tensor, rank: int) -> Tensor:
    """The value with dims of size one after the loop's, so that `rank` dims are right of it."""
    missing = rank - (value.dim() - 1)
    return value.reshape(value.shape[0], *[1] * missing, *value.shape[1:]) if missing > 0 else value


def _any(dims: Any) -> bool:
    return any(map(_any, dims)) if isinstance(dims, (tuple, list)) else dims is not None


def _flat(tree: Any) -> Iterable[Any]:
    if isinstance(tree, (tuple, list)):
        for item in tree:
            yield from _flat(item)
    elif isinstance(tree, Mapping):
        yield from _flat(list(tree.values()))
    else:
        yield tree


def _same(a: Tensor, b: Tensor) -> bool:
    a, b = a.double(), b.double()
    return a.shape == b.shape and bool(torch.isclose(a, b, rtol=1e-5, atol=1e-6, equal_nan=True).all())
