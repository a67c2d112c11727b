"""A function of tensors as a flat list of torch operations: traced once, simplified, replayed without the Python that made it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_blr.bindings import replayed
from pyro_blr.shortcuts import take_shortcuts

__all__ = ["flattened", "lowered"]

_aten = torch.ops.aten
_KEEPS_VALUE = {_aten.detach.default, _aten.alias.default, _aten.clone.default, _aten.lift_fresh_copy.default}
_KEEPS_VALUE_OF_SAME_FORM = {_aten._to_copy.default, _aten.expand.default, _aten.view.default, _aten.reshape.default}
_NEUTRAL = {_aten.mul.Tensor: 1, _aten.mul.Scalar: 1, _aten.div.Tensor: 1, _aten.add.Tensor: 0, _aten.sub.Tensor: 0}
_NEUTRAL |= {_aten.pow.Tensor_Scalar: 1}
_OF_THE_FORM_ALONE = {_aten.ones_like.default, _aten.zeros_like.default, _aten.full_like.default}
_OF_THE_FORM_ALONE |= {_aten.new_zeros.default, _aten.new_ones.default, _aten.new_full.default}


def lowered(function: Callable[..., Any], example: Sequence[Tensor]) -> Callable[..., Any]:
    """The same function of tensors of the same shapes; it must be free of data-dependent Python and of side effects."""
    return replayed(flattened(function, example))


@torch.no_grad()
def flattened(function: Callable[..., Any], example: Sequence[Tensor]) -> fx.GraphModule:
    """The function's operations, simplified.

    Derivatives taken inside become operations like any other.  What depends on no argument, or on shapes alone, is computed now, once.
    """
    module = make_fx(function)(*example)
    _View(module).run(*example)
    _refuse_writes(module)
    _simplify(module)
    _remove_identities(module)
    _fold_constants(module)
    take_shortcuts(module)
    _fold_constants(module)
    _merge_equal(module)
    _shorten_finiteness(module)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


class _View(fx.Interpreter):
    """Runs a graph and leaves every value it takes on its node, under `example`."""

    def run_node(self, n: fx.Node) -> Any:
        n.meta["example"] = super().run_node(n)
        return n.meta["example"]


def _refuse_writes(module: fx.GraphModule) -> None:
    """A constant that is written into would be another one in the next call."""
    for node in module.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.is_mutable:
            raise NotImplementedError(f"{node.target} writes into its operand")


def _simplify(module: fx.GraphModule) -> None:
    """A view of a copy becomes a reshape: copies are removed, and with them the strides that they made; a sum of one number a cast."""
    for node in module.graph.nodes:
        if node.target in (_aten.view.default, _aten._unsafe_view.default):
            node.target = _aten.reshape.default
        elif node.target is _aten.sum.default and len(node.args) == 1 and not node.args[0].meta["example"].shape:
            node.target = _aten._to_copy.default


def _remove_identities(module: fx.GraphModule) -> None:
    for node in list(module.graph.nodes):
        source: Any = node.args[0] if node.op == "call_function" and node.args else None
        same = node.target in _KEEPS_VALUE
        if node.target is _aten.cat.default and len(source) == 1:
            source, same = source[0], True
        elif node.target in _KEEPS_VALUE_OF_SAME_FORM or node.target in _NEUTRAL:
            same = _form(node) is not None and _form(node) == _form(source)
            same = same and (node.target not in _NEUTRAL or node.args[1] == _NEUTRAL[node.target])
        elif node.target is _aten.slice.Tensor:
            same = _form(node) == _form(source) and len(node.args) < 5  # of step one
        elif node.target in (_aten.all.default, _aten.any.default):
            same = _form(node) == _form(source)  # of one number
        if same and isinstance(source, fx.Node):
            node.replace_all_uses_with(source)
            module.graph.erase_node(node)


def _form(node: Any) -> Any:
    value = node.meta.get("example") if isinstance(node, fx.Node) else None
    return (value.shape, value.dtype, value.device) if isinstance(value, Tensor) else None


def _fold_constants(module: fx.GraphModule) -> None:
    """Evaluates what no argument enters; multiplications by ones and additions of zeros go."""
    values: dict[fx.Node, Any] = {}
    for node in list(module.graph.nodes):
        if node.op == "get_attr":
            values[node] = operator.attrgetter(node.target)(module)
        elif node.op == "call_function":
            known = all(source in values for source in node.all_input_nodes) and not _draws(node)
            if known or node.target in _OF_THE_FORM_ALONE:
                values[node] = node.meta["example"]
                if isinstance(values[node], Tensor):
                    _replace_by_constant(module, node, values)
            elif node.target is _aten.mul.Tensor or node.target is _aten.add.Tensor:
                _remove_neutral(module, node, values, 1.0 if node.target is _aten.mul.Tensor else 0.0)
            elif node.target in (_aten.index_select.default, _aten.index_add.default):
                _move_in_one_piece(module, node, values)


def _draws(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return torch.Tag.nondeterministic_seeded in tags


def _replace_by_constant(module: fx.GraphModule, node: fx.Node, values: dict[fx.Node, Any]) -> None:
    name = f"_folded_{node.name}"
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


def _move_in_one_piece(module: fx.GraphModule, node: fx.Node, values: dict[fx.Node, Any]) -> None:
    """Entries start, start + 1, … are a slice; adding to all of them, to zeros, is what is added."""
    source: Any
    index: Any
    added: Any
    source, dim, index, added = (*node.args, None)[:4]
    entries = values.get(index)
    if not isinstance(entries, Tensor) or entries.dim() != 1 or not len(entries) or _form(source) is None:
        return
    start, count = int(entries[0]), len(entries)
    size = _form(source)[0][dim]
    if not torch.equal(entries, torch.arange(start, start + count, device=entries.device, dtype=entries.dtype)):
        return
    if node.target is _aten.index_select.default:
        with module.graph.inserting_before(node):
            piece = module.graph.call_function(_aten.slice.Tensor, (source, dim, start, start + count))
        piece.meta = dict(node.meta)
        node.replace_all_uses_with(source if count == size else piece)
    elif count == size and not node.kwargs and _form(added) == _form(node) and isinstance(values.get(source), Tensor):
        if not bool((values[source] == 0).all()):
            return
        node.replace_all_uses_with(added)
    else:
        return
    module.graph.erase_node(node)


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


def _shorten_finiteness(module: fx.GraphModule) -> None:
    """(x = x) (|x| ≠ ∞) is 0 x = 0."""
    for node in list(module.graph.nodes):
        if node.target is not _aten.mul.Tensor:
            continue
        equal, unequal = node.args
        if getattr(equal, "target", None) is not _aten.eq.Tensor or equal.args[0] is not equal.args[1]:
            continue
        if getattr(unequal, "target", None) is not _aten.ne.Scalar or unequal.args[1] != float("inf"):
            continue
        if unequal.args[0].target is _aten.abs.default and unequal.args[0].args[0] is equal.args[0]:
            with module.graph.inserting_before(node):
                zero = module.graph.call_function(_aten.mul.Tensor, (equal.args[0], 0))
                finite = module.graph.call_function(_aten.eq.Scalar, (zero, 0))
            zero.meta["example"] = equal.args[0].meta["example"] * 0
            finite.meta = dict(node.meta)
            node.replace_all_uses_with(finite)
            module.graph.erase_node(node)


def _key(tree: Any) -> Any:
    if isinstance(tree, (tuple, list)):
        return tuple(map(_key, tree))
    if isinstance(tree, dict):
        return tuple((name, _key(value)) for name, value in sorted(tree.items()))
    return tree if isinstance(tree, fx.Node) else (type(tree), tree)
