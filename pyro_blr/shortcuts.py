"""Shorter ways to say the same in a flat list of operations."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

__all__ = ["take_shortcuts"]

_aten = torch.ops.aten
_BROADCASTS = {_aten.mul.Tensor, _aten.add.Tensor, _aten.sub.Tensor, _aten.div.Tensor}


def take_shortcuts(module: fx.GraphModule) -> None:
    """Rewrites what derivatives and indexing spell out; every node's value is under `example`."""
    for node in list(module.graph.nodes):
        for rule in (_lookup, _addition_at, _without_expansion, _product_with_vector, _difference):
            rule(module, node)


def _lookup(module: fx.GraphModule, node: fx.Node) -> None:
    """x[i] at constant places is `index_select`, a fourth of the time."""
    if node.target is _aten.index.Tensor:
        indices: Any = node.args[1]
        if len(indices) == 1 and _are_places(module, indices[0]):
            _replace(module, node, _aten.index_select.default, (node.args[0], 0, indices[0]))


def _addition_at(module: fx.GraphModule, node: fx.Node) -> None:
    """x.index_put((i,), y, accumulate=True) at constant places is `index_add`."""
    if node.target is not _aten.index_put.default or len(node.args) != 4 or not node.args[3]:
        return
    indices: Any
    source, indices, added, _ = node.args
    places = indices[0] if len(indices) == 1 else None
    if _are_places(module, places):
        a, b, i = _value(source), _value(added), _value(places)
        if (
            a is not None
            and b is not None
            and i is not None
            and a.dtype == b.dtype
            and b.shape == i.shape + a.shape[1:]
        ):
            _replace(module, node, _aten.index_add.default, (source, 0, places, added))


def _without_expansion(module: fx.GraphModule, node: fx.Node) -> None:
    """What is expanded to the shape of the other operand broadcasts by itself."""
    if node.target not in _BROADCASTS or len(node.args) != 2 or node.kwargs:
        return
    for place, other in ((0, 1), (1, 0)):
        wide: Any = node.args[place]
        if getattr(wide, "target", None) is _aten.expand.default:
            narrow, against = _value(wide.args[0]), _value(node.args[other])
            if narrow is not None and against is not None and narrow.dtype == against.dtype:
                if against.shape == node.meta["example"].shape:
                    node.update_arg(place, wide.args[0])


def _product_with_vector(module: fx.GraphModule, node: fx.Node) -> None:
    """(A x[:, None])[:, 0] is A x."""
    product: Any = node.args[0] if node.target is _aten.squeeze.dim else None
    if getattr(product, "target", None) is not _aten.mm.default or node.args[1] not in (-1, 1):
        return
    column = product.args[1]
    if column.target is _aten.unsqueeze.default and column.args[1] in (-1, 1):
        vector = _value(column.args[0])
        if vector is not None and vector.dim() == 1:
            _replace(module, node, _aten.mv.default, (product.args[0], column.args[0]))


def _difference(module: fx.GraphModule, node: fx.Node) -> None:
    """a + (−b) is a − b."""
    if node.target is not _aten.add.Tensor or len(node.args) != 2 or node.kwargs:
        return
    for kept, negative in (node.args, node.args[::-1]):
        if getattr(negative, "target", None) is _aten.neg.default and isinstance(kept, fx.Node):
            _replace(module, node, _aten.sub.Tensor, (kept, negative.args[0]))  # type: ignore[union-attr]
            return


def _are_places(module: fx.GraphModule, node: Any) -> bool:
    """Whether a node is a constant list of places, none counted from the end."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return False
    places = operator.attrgetter(str(node.target))(module)
    return places.dim() == 1 and places.dtype == torch.int64 and bool((places >= 0).all())


def _value(node: Any) -> Tensor | None:
    value = node.meta.get("example") if isinstance(node, fx.Node) else None
    return value if isinstance(value, Tensor) else None


def _replace(module: fx.GraphModule, node: fx.Node, target: Any, args: tuple) -> None:
    with module.graph.inserting_before(node):
        shorter = module.graph.call_function(target, args)
    shorter.meta = dict(node.meta)
    node.replace_all_uses_with(shorter)
    module.graph.erase_node(node)
