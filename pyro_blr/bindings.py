"""A flat list of torch operations, called: through Python's own bindings, and on numbers where its tensors are small."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from pyro_blr.unrolling import unrolled

__all__ = ["replayed"]

_aten = torch.ops.aten
_BOUND = (torch, torch._C._linalg, torch._C._special)  # type: ignore[attr-defined]  # where Python's own bindings are


@torch.no_grad()
def replayed(module: fx.GraphModule) -> Callable[..., Any]:
    """A flattened function, operation by operation; the module is used up."""
    numbers = unrolled(module)
    plain = _called(module)
    return _replayed(plain if numbers is None else _first_of(_called(numbers), plain))


def _first_of(numbers: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    def first(*arguments: Tensor) -> Any:
        try:
            return numbers(*arguments)
        except (ArithmeticError, ValueError):  # Python raises where torch gives an infinity or a NaN
            return plain(*arguments)

    return first


def _bind(module: fx.GraphModule) -> None:
    """Operations through Python's own bindings, half the cost of a call through the registry, where these do the same."""
    for node in list(module.graph.nodes):
        if node.target is _aten.slice.Tensor and len(node.args) == 4:
            source, dim, start, stop = node.args
            size = node.meta["example"].shape[dim]
            if isinstance(start, int) and start >= 0:
                node.target, node.args = torch.narrow, (source, dim, start, size)
        elif node.target is _aten._to_copy.default and set(node.kwargs) <= {"dtype", "layout", "device"}:
            value, source = node.meta["example"], node.args[0].meta["example"]
            if value.device == source.device and value.layout == source.layout and value.dtype != source.dtype:
                with module.graph.inserting_before(node):
                    cast = module.graph.call_method("to", (node.args[0], value.dtype))
                cast.meta = dict(node.meta)
                node.replace_all_uses_with(cast)
                module.graph.erase_node(node)
        elif isinstance(node.target, torch._ops.OpOverload):
            node.target = _bound(node.target, node) or node.target


def _bound(operation: Any, node: fx.Node) -> Callable | None:
    args: Any
    kwargs: Any
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: source.meta["example"])
    for namespace in _BOUND:
        function: Any = getattr(namespace, operation._schema.name.removeprefix("aten::"), None)
        if isinstance(function, type(torch.mul)):
            try:
                found = function(*args, **kwargs)
            except (TypeError, RuntimeError):
                continue
            if _same(found, operation(*args, **kwargs)):
                return function
    return None


def _same(a: Any, b: Any) -> bool:
    if isinstance(b, (tuple, list)):
        return isinstance(a, (tuple, list)) and len(a) == len(b) and all(map(_same, a, b))
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return type(a) is type(b) and a == b
    return (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride()) and torch.equal(a, b)


def _as_arguments(module: fx.GraphModule) -> list[Any]:
    """Constants become the first arguments, which are read faster than attributes; returns them."""
    constants: dict[Any, fx.Node] = {}
    first = next(iter(module.graph.nodes))
    for node in list(module.graph.nodes):
        if node.op == "get_attr":
            if node.target not in constants:
                with module.graph.inserting_before(first):
                    constants[node.target] = module.graph.placeholder(f"constant_{len(constants)}")
            node.replace_all_uses_with(constants[node.target])
            module.graph.erase_node(node)
    return [operator.attrgetter(name)(module) for name in constants]


def _called(module: fx.GraphModule) -> Callable[..., Any]:
    _bind(module)
    constants = _as_arguments(module)
    module.graph.lint()
    module.recompile()
    return functools.partial(type(module).forward, None, *constants)


def _replayed(run: Callable[..., Any]) -> Callable[..., Any]:
    def replay(*arguments: Tensor) -> Any:
        with torch.inference_mode():  # half the bookkeeping of an operation is for derivatives
            found = run(*arguments)
        return tuple(item.clone() for item in found)

    return replay
