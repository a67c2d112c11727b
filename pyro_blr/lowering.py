"""A function of tensors as a flat list of torch operations: traced once, simplified, replayed without the Python that made it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

__all__ = ["lowered"]

_aten = torch.ops.aten
_KEEPS_VALUE = {_aten.detach.default, _aten.alias.default, _aten.clone.default, _aten.lift_fresh_copy.default}
_KEEPS_VALUE_OF_SAME_FORM = {_aten._to_copy.default, _aten.expand.default, _aten.view.default, _aten.reshape.default}


@torch.no_grad()
def lowered(function: Callable[..., Any], example: Sequence[Tensor]) -> Callable[..., Any]:
    """The same function of tensors of the same shapes; it must be free of data-dependent Python and of side effects.

    Derivatives taken inside become operations like any other.  What depends on no argument is computed now, once.
    """
    module = make_fx(function)(*example)
    fx.passes.shape_prop.ShapeProp(module).propagate(*example)
    _view_any_strides(module)
    _remove_identities(module)
    _fold_constants(module)
    _merge_equal(module)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def _view_any_strides(module: fx.GraphModule) -> None:
    """A view of a copy becomes a reshape: copies are removed, and with them the strides that they made."""
    for node in module.graph.nodes:
        if node.target in (_aten.view.default, _aten._unsafe_view.default):
            node.target = _aten.reshape.default


def _remove_identities(module: fx.GraphModule) -> None:
    for node in list(module.graph.nodes):
        if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
            continue
        source = node.args[0]
        same = node.target in _KEEPS_VALUE
        if node.target in _KEEPS_VALUE_OF_SAME_FORM or node.target in _NEUTRAL:
            same = _form(node) is not None and _form(node) == _form(source)
            same = same and (node.target not in _NEUTRAL or node.args[1] == _NEUTRAL[node.target])
        if same:
            node.replace_all_uses_with(source)
            module.graph.erase_node(node)


_NEUTRAL = {_aten.mul.Tensor: 1, _aten.mul.Scalar: 1, _aten.div.Tensor: 1, _aten.add.Tensor: 0, _aten.sub.Tensor: 0}


def _form(node: fx.Node) -> Any:
    meta: Any = node.meta.get("tensor_meta")
    return (meta.shape, meta.dtype) if hasattr(meta, "shape") else None


def _fold_constants(module: fx.GraphModule) -> None:
    """Evaluates what no argument enters; multiplications by ones and additions of zeros go."""
    values: dict[fx.Node, Any] = {}
    for node in list(module.graph.nodes):
        if node.op == "get_attr":
            values[node] = operator.attrgetter(node.target)(module)
        elif node.op == "call_function":
            inputs = node.all_input_nodes
            if all(source in values for source in inputs) and not _draws(node):
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
                values[node] = node.target(*args, **kwargs)
                if isinstance(values[node], Tensor):
                    _replace_by_constant(module, node, values)
            elif node.target is _aten.mul.Tensor or node.target is _aten.add.Tensor:
                _remove_neutral(module, node, values, 1.0 if node.target is _aten.mul.Tensor else 0.0)


def _draws(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return torch.Tag.nondeterministic_seeded in tags


def _replace_by_constant(module: fx.GraphModule, node: fx.Node, values: dict[fx.Node, Any]) -> None:
    name = f"_folded_{len(values)}"
    module.register_buffer(name, values[node], persistent=False)
    with module.graph.inserting_before(node):
        constant = module.graph.get_attr(name)
    constant.meta = dict(node.meta)
    values[constant] = values[node]
    node.replace_all_uses_with(constant)
    module.graph.erase_node(node)


def _remove_neutral(module: fx.GraphModule, node: fx.Node, values: dict[fx.Node, Any], neutral: float) -> None:
    if len(node.args) != 2 or node.kwargs:
        return
    for kept, other in (node.args, node.args[::-1]):
        if isinstance(kept, fx.Node) and isinstance(other, fx.Node) and isinstance(values.get(other), Tensor):
            if _form(kept) is not None and _form(kept) == _form(node) and bool((values[other] == neutral).all()):
                node.replace_all_uses_with(kept)
                module.graph.erase_node(node)
                return


def _merge_equal(module: fx.GraphModule) -> None:
    """One node for equal calls on equal operands."""
    seen: dict[Any, fx.Node] = {}
    for node in list(module.graph.nodes):
        if node.op not in ("call_function", "get_attr") or (node.op == "call_function" and _draws(node)):
            continue
        key = (node.op, node.target, _key(node.args), _key(node.kwargs))
        try:
            first = seen.setdefault(key, node)
        except TypeError:  # an unhashable argument: left alone
            continue
        if first is not node:
            node.replace_all_uses_with(first)
            module.graph.erase_node(node)


def _key(tree: Any) -> Any:
    if isinstance(tree, (tuple, list)):
        return tuple(map(_key, tree))
    if isinstance(tree, dict):
        return tuple((name, _key(value)) for name, value in sorted(tree.items()))
    return tree if isinstance(tree, fx.Node) else (type(tree), tree)
