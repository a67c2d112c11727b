"""Small tensors of a flat list of operations as Python's numbers: arithmetic on two of them costs a hundredth of torch's."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx

from pyro_blr.scalars import ON_NUMBERS, POWERS

__all__ = ["unrolled"]

_aten = torch.ops.aten
_SMALL = 4  # elements at most of what is unrolled

# What is gained, in microseconds of an idle machine.
_OPERATION, _NUMBER, _ENTRY, _EXIT = 1.2, 0.05, 0.4, 1.2


_REDUCTIONS: dict[Any, Callable] = {
    _aten.sum.default: operator.add,
    _aten.sum.dim_IntList: operator.add,
    _aten.all.default: operator.and_,
    _aten.all.dim: operator.and_,
}
_MOVES = {  # they only say where elements go, so they are run on the elements' places; zeros that they fill in are place 0
    _aten.reshape.default,
    _aten.unsqueeze.default,
    _aten.squeeze.default,
    _aten.squeeze.dim,
    _aten.squeeze.dims,
    _aten.expand.default,
    _aten.select.int,
    _aten.slice.Tensor,
    _aten.transpose.int,
    _aten.permute.default,
    _aten.t.default,
    _aten.cat.default,
    _aten.stack.default,
    _aten.diagonal.default,
    _aten.select_backward.default,
    _aten.slice_backward.default,
}
_NEUTRAL = {operator.mul: 1.0, operator.truediv: 1.0, operator.add: 0.0, operator.sub: 0.0}
_TAKES_NUMBERS = {_aten.mul.Tensor, _aten.add.Tensor}


def unrolled(module: fx.GraphModule) -> fx.GraphModule | None:
    """The same list with numbers in the place of small tensors, where that is shorter; None where there is nothing to gain.

    It raises `ArithmeticError` or `ValueError` where torch gives an infinity or a NaN (a division by zero, the logarithm of a negative
    number): the list as it was serves there.  Numbers are in double precision, whatever their tensors were.
    """
    graph = fx.Graph()
    places: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(module.graph, places)
    graph.output(result)
    copy = fx.GraphModule(module, graph)
    chosen = _worthwhile(copy)
    if not chosen:
        return None
    _Unrolling(copy, chosen).run()
    copy.graph.eliminate_dead_code()
    return copy


def _is_candidate(node: fx.Node) -> bool:
    value = node.meta.get("example")
    if (
        node.op != "call_function"
        or not _is_small(value)
        or value.dtype not in (torch.float64, torch.float32, torch.bool)
    ):
        return False
    if not all(_is_small(source.meta.get("example")) for source in node.all_input_nodes):
        return False
    return _rule(node) is not None


def _is_small(value: Any) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.device.type == "cpu" and 0 < value.numel() <= _SMALL


def _rule(node: fx.Node) -> Callable | None:
    """What is done to every element; None where that is not known."""
    target: Any = node.target
    if target in _MOVES:
        return operator.pos
    if target is _aten._to_copy.default:
        return operator.pos if node.meta["example"].is_floating_point() and _is_float(node.args[0]) else None
    if target is _aten.pow.Tensor_Scalar:
        return POWERS.get(node.args[1])  # type: ignore[arg-type]
    if target in _REDUCTIONS:
        return _REDUCTIONS[target] if not node.kwargs or set(node.kwargs) <= {"dtype"} else None
    return ON_NUMBERS.get(target) if not node.kwargs else None


def _is_float(source: Any) -> bool:
    return bool(source.meta["example"].is_floating_point())


def _worthwhile(module: fx.GraphModule) -> set[fx.Node]:
    """The candidates, in groups that hang together, whose operations cost more than numbers that go in and out."""
    candidates = [node for node in module.graph.nodes if _is_candidate(node)]
    group = {node: index for index, node in enumerate(candidates)}
    for node in candidates:
        for source in node.all_input_nodes:
            if source in group and group[source] != group[node]:
                old, new = group[source], group[node]
                group.update({other: new for other, index in group.items() if index == old})
    gains: dict[int, float] = {}
    entries = {
        (source, group[node])
        for node in candidates
        for source in node.all_input_nodes
        if source not in group and source.op != "get_attr"
    }
    for _, index in entries:
        gains[index] = gains.get(index, 0.0) - _ENTRY
    for node in candidates:
        gains[group[node]] = gains.get(group[node], 0.0) + _gain(node, group)
    return {node for node in candidates if gains[group[node]] > 0}


def _gain(node: fx.Node, group: dict[fx.Node, int]) -> float:
    leaves = any(user not in group for user in node.users)
    numbers = 0 if node.target in _MOVES else node.meta["example"].numel()
    return _OPERATION - _NUMBER * numbers - _EXIT * leaves


class _Unrolling:
    """Replaces the chosen operations, one after the other."""

    def __init__(self, module: fx.GraphModule, chosen: set[fx.Node]):
        self.module, self.graph, self.chosen = module, module.graph, chosen
        self.atoms: list[Any] = [0.0]  # a number, or the node that makes one
        self.places: dict[fx.Node, Tensor] = {}  # node -> for each of its elements the place of its atom

    def run(self) -> None:
        for node in list(self.graph.nodes):
            if node in self.chosen:
                with self.graph.inserting_before(node):
                    self.places[node] = self._unroll(node)
        for node in list(self.graph.nodes):
            if node in self.chosen:
                self._leave(node)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _unroll(self, node: fx.Node) -> Tensor:
        target: Any = node.target
        if target in _MOVES:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._places_of)
            return target(*args, **kwargs).clone()
        rule = _rule(node)
        assert rule is not None
        if target is _aten._to_copy.default:
            return self._places_of(node.args[0])
        if target is _aten.pow.Tensor_Scalar:
            return self._elementwise(rule, node, node.args[:1])
        if target in _REDUCTIONS:
            return self._reduced(rule, node)
        return self._elementwise(rule, node, node.args)

    def _elementwise(self, rule: Callable, node: fx.Node, operands: Iterable[Any]) -> Tensor:
        shape = node.meta["example"].shape
        places = [self._places_of(each).expand(shape).reshape(-1).tolist() for each in operands]
        examples = node.meta["example"].reshape(-1).tolist()
        made = [
            self._made(rule, [self.atoms[i] for i in each], example)
            for *each, example in zip(*places, examples, strict=True)
        ]
        return _places(made).reshape(shape)

    def _reduced(self, rule: Callable, node: fx.Node) -> Tensor:
        places = self._places_of(node.args[0])
        shape = node.meta["example"].shape
        dims: Any = node.args[1] if len(node.args) > 1 else list(range(places.dim()))
        dims = [dim % max(places.dim(), 1) for dim in ([dims] if isinstance(dims, int) else dims)]
        rest = [dim for dim in range(places.dim()) if dim not in dims]
        rows = places.permute(*rest, *dims).reshape(max(shape.numel(), 1), -1).tolist()
        made = []
        for row, example in zip(rows, node.meta["example"].reshape(-1).tolist(), strict=True):
            place = row[0]
            for other in row[1:]:
                place = self._made(rule, [self.atoms[place], self.atoms[other]], example)
            made.append(place)
        return _places(made).reshape(shape)

    def _made(self, rule: Callable, operands: list[Any], example: Any) -> int:
        """The place of the number that a rule makes of others; of constants it is made now."""
        if not any(isinstance(each, fx.Node) for each in operands):
            try:
                return self._place(rule(*operands))
            except (ArithmeticError, ValueError):
                pass  # at every call, then
        neutral = _NEUTRAL.get(rule)
        if neutral is not None and operands[1] == neutral:
            return self._place(operands[0])
        if rule in (operator.mul, operator.add) and operands[0] == neutral:
            return self._place(operands[1])
        made = self.graph.call_function(rule, tuple(operands))
        made.meta["example"] = example
        return self._place(made)

    def _place(self, atom: Any) -> int:
        self.atoms.append(atom)
        return len(self.atoms) - 1

    def _places_of(self, source: Any) -> Tensor:
        if not isinstance(source, fx.Node):  # a number of the call
            return _places(self._place(source))
        if source not in self.places:
            self.places[source] = self._enter(source)
        return self.places[source]

    # -- in and out ---------------------------------------------------------------------------------------------------

    def _enter(self, source: fx.Node) -> Tensor:
        value = source.meta["example"]
        numbers = value.reshape(-1).tolist()
        if source.op == "get_attr":
            return _places([self._place(number) for number in numbers]).reshape(value.shape)
        with self.graph.inserting_after(source):
            flat = source
            if value.dim() > 1:
                flat = self.graph.call_function(_aten.reshape.default, (source, [-1]))
                flat.meta["example"] = value.reshape(-1)
        with self.graph.inserting_after(flat):
            listed = self.graph.call_method("tolist", (flat,))
        atoms: list[Any] = [listed]
        if value.dim():
            with self.graph.inserting_after(listed):
                atoms = [self.graph.call_function(operator.getitem, (listed, i)) for i in range(len(numbers))]
        for atom, number in zip(atoms, numbers, strict=True):
            atom.meta["example"] = number
        return _places([self._place(atom) for atom in atoms]).reshape(value.shape)

    def _leave(self, node: fx.Node) -> None:
        """What is not unrolled gets a tensor of the numbers, or the number itself where a product or a sum takes one."""
        value, places = node.meta["example"], self.places[node]
        for user in [user for user in node.users if user not in self.chosen]:
            if not value.dim() and value.is_floating_point() and _takes_number(user, node):
                other = user.args[1] if user.args[0] is node else user.args[0]
                user.args = (other, self.atoms[int(places)])
        users = [user for user in node.users if user not in self.chosen]
        if not users:
            return
        with self.graph.inserting_before(node):
            nested = _nested(places.tolist(), self.atoms)
            make = torch.tensor if value.dim() else torch.scalar_tensor
            tensor = self.graph.call_function(make, (nested,), {"dtype": value.dtype, "device": value.device})
        tensor.meta["example"] = value
        for user in users:
            user.replace_input_with(node, tensor)


def _takes_number(user: fx.Node, number: fx.Node) -> bool:
    if user.target not in _TAKES_NUMBERS or user.kwargs or len(user.args) != 2 or user.args[0] is user.args[1]:
        return False
    other: Any = user.args[1] if user.args[0] is number else user.args[0]
    value = other.meta.get("example") if isinstance(other, fx.Node) else None
    return isinstance(value, Tensor) and value.dim() > 0 and value.dtype == user.meta["example"].dtype


def _nested(places: Any, atoms: list[Any]) -> Any:
    return [_nested(each, atoms) for each in places] if isinstance(places, list) else atoms[places]


def _places(found: Any) -> Tensor:
    return torch.tensor(found, device="cpu")
