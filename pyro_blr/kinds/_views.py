"""Rules for views, gathers and joins: operations that move elements about."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from pyro_blr.kinds._algebra import broadcast, select
from pyro_blr.kinds._calls import Broken, Bundle, Call, Rule
from pyro_blr.kinds._values import Form, Shape, Value, common_trailing
from pyro_blr.tape import Input, Ref

__all__ = ["BY_LATENT", "VIEW_RULES", "kept_by_index", "pick"]

BY_LATENT = "index by a latent"


def view(kept: Callable[[Call, Shape], int]) -> Rule:
    """A selection of elements of the first argument, whose last `kept(call, shape)` dims stay in order."""

    def rule(call: Call) -> Value:
        if call.others_depend():
            return call.step.other(BY_LATENT)
        value = call.value(call.first)
        return select(call.step, value, kept(call, value.shape), call.token)

    return rule


def embedding(call: Call) -> Value:
    """Rows of the second argument."""
    weight = call.argument(1, "weight")
    if call.depends(call.first):
        return call.step.other(BY_LATENT)
    if call.argument(3, "max_norm") is not None:
        return call.step.other()
    return select(call.step, call.value(weight), 1, call.token)


def pieces(position: int) -> Rule:
    """Selections that come as a tuple: `unbind`, `split`, `chunk`."""

    def rule(call: Call) -> Value | Bundle:
        if call.others_depend():
            return call.step.other(BY_LATENT)
        value = call.value(call.first)
        kept = _right_of(position, "dim", "axis", default=0)(call, value.shape)
        return Bundle(lambda step, item: select(step, value, kept, (call.token, item)))

    return rule


# -- how many of the last dims a view keeps --------


def _in_order(call: Call, shape: Shape) -> int:
    """Reshapes keep the order of elements: the last dims that agree are whole."""
    if any(isinstance(argument, torch.dtype) for argument in call.args) and call.node.name == "view":
        raise Broken(call.step.other())  # a reinterpretation of bits
    return common_trailing(shape, call.step.shape)


def _nothing(call: Call, shape: Shape) -> int:
    return 0


def _right_of(position: int, *names: str, default: Any = None) -> Callable[[Call, Shape], int]:
    """What is to the right of the dim (or dims) that an argument names; nothing where it names none."""

    def kept(call: Call, shape: Shape) -> int:
        dims = call.argument(position, *names, default=default)
        dims = (dims,) if isinstance(dims, int) else dims
        if not isinstance(dims, (tuple, list)) or not all(type(dim) is int for dim in dims):
            return 0
        return min((len(shape) - 1 - dim % len(shape) for dim in dims), default=0) if shape else 0

    return kept


def _dims_after(call: Call, position: int, *names: str) -> Any:
    """Dims given as one sequence or one by one: `permute(0, 2, 1)`, `flip((0, 1))`."""
    first = call.argument(position, *names)
    return tuple(call.args[position:]) if isinstance(first, int) else first


def _flip(call: Call, shape: Shape) -> int:
    dims = _dims_after(call, 1, "dims")
    return min((len(shape) - 1 - dim % len(shape) for dim in dims), default=0) if dims and shape else 0


def _permute(call: Call, shape: Shape) -> int:
    dims = _dims_after(call, 1, "dims") or ()
    return common_trailing(tuple(dim % len(shape) for dim in dims), tuple(range(len(shape)))) if shape else 0


def _swap(call: Call, shape: Shape) -> int:
    first, second = (
        call.argument(1, "dim0", "axis0", "source"),
        call.argument(2, "dim1", "axis1", "destination"),
    )
    dims = [d for ds in (first, second) for d in (ds if isinstance(ds, (tuple, list)) else (ds,))]
    if not shape or not all(isinstance(dim, int) for dim in dims):
        return 0
    return len(shape) - 1 - max(dim % len(shape) for dim in dims)


def _index(call: Call, shape: Shape) -> int:
    """`x[index]`: the dims of x after the last one that `index` does more to than take it whole."""
    index = call.argument(1)
    items = list(index) if isinstance(index, tuple) else [index]
    return kept_by_index(call, items, shape)


def kept_by_index(call: Call, items: Sequence[Any], shape: Shape) -> int:
    if not all(_is_plain_index(item) for item in items):
        return 0
    used = sum(_dims_used(call, item) for item in items)
    if any(item is Ellipsis for item in items):
        position = next(i for i, item in enumerate(items) if item is Ellipsis)
    else:
        position, items = len(items), [*items, Ellipsis]
    kept, after = 0, list(items[position + 1 :])
    for item in reversed(after):
        if not _is_full(item, shape[-1 - kept] if kept < len(shape) else None):
            return kept
        kept += 1
    kept += len(shape) - used
    for item in reversed(list(items[:position])):
        if kept >= len(shape) or not _is_full(item, shape[-1 - kept]):
            return kept
        kept += 1
    return kept


def _is_plain_index(item: Any) -> bool:
    if isinstance(item, list):
        return all(type(entry) is int for entry in item)
    return item is None or item is Ellipsis or isinstance(item, (bool, int, slice, Input, Ref))


def _dims_used(call: Call, item: Any) -> int:
    if item is None or item is Ellipsis or isinstance(item, bool):
        return 0
    tensor = call.tensor(item)
    dtype = call.tape.nodes[item.index].dtype if isinstance(item, Ref) else None if tensor is None else tensor.dtype
    if dtype in (torch.bool, torch.uint8):
        return len(call.shape_of(item))
    return 1


def _is_full(item: Any, size: int | None) -> bool:
    if not isinstance(item, slice) or size is None:
        return False
    stops_after = item.stop is None or (type(item.stop) is int and item.stop >= size)
    return item.start in (None, 0) and item.step in (None, 1) and stops_after


# -- rules of their own --------


def transposed(call: Call, value: Value) -> Value:
    """The matrix transposition of the last two dims."""
    step = call.step
    square = len(value.shape) >= 2 and value.shape[-1] == value.shape[-2]
    if value.form is Form.MATRIX:
        return value
    if value.form is Form.CHOLESKY and value.factor is not None:
        left, flipped, lower = value.factor
        return replace(value, factor=type(value.factor)(not left, not flipped, not lower))
    if value.is_monomial and square and (value.is_diagonal or value.shared >= 2) and step.sort.event_dims == 0:
        return value
    if value.product is not None:  # (A W)ᵀ = W Aᵀ
        side, matrix = value.product
        flipped_side = "right" if side == "left" else "left"
        return replace(value, shape=step.shape, product=(flipped_side, ("transposed", matrix)))
    return select(step, value, 0, call.token)


def transpose(call: Call) -> Value:
    value = call.value(call.first)
    rank, name = len(value.shape), call.node.name
    if name in ("T", "t"):
        is_matrix = rank == 2
    elif name in ("mT", "mH", "H", "adjoint"):
        is_matrix = True
    else:
        dims = (call.argument(1, "dim0", "axis0"), call.argument(2, "dim1", "axis1"))
        is_matrix = rank >= 2 and {dim % rank for dim in dims if isinstance(dim, int)} == {rank - 1, rank - 2}
    if is_matrix:
        return transposed(call, value)
    kept = rank if rank < 2 else 0 if name in ("T", "t") else _swap(call, value.shape)
    return select(call.step, value, kept, call.token)


def expand(call: Call) -> Value:
    """Expansion and broadcasting of the first argument; the others only lend a shape."""
    return broadcast(call.step, call.value(call.first))


def broadcast_together(call: Call) -> Bundle:
    operands = call.args[0] if isinstance(call.args[0], (tuple, list)) else call.args
    return Bundle(lambda step, item: broadcast(step, call.value(operands[item])))


def unchanged(call: Call) -> Value:
    """Copies and conversions."""
    return replace(call.value(call.first), shape=call.step.shape)


def pick(call: Call) -> Value:
    bundle = call.values[call.args[0].index]
    if isinstance(bundle, Value):
        return bundle
    return bundle.pick(call.step, call.args[1])


VIEW_RULES: dict[str, Rule] = {
    **dict.fromkeys(
        "clone identity contiguous detach alias to type type_as double float half bfloat16".split(),
        unchanged,
    ),
    **dict.fromkeys("cpu cuda as_tensor asarray positive real conj resolve_conj resolve_neg".split(), unchanged),
    **dict.fromkeys("reshape view flatten unflatten ravel view_as reshape_as".split(), view(_in_order)),
    **dict.fromkeys("squeeze unsqueeze repeat tile atleast_1d".split(), view(_in_order)),
    **dict.fromkeys("expand expand_as broadcast_to".split(), expand),
    **dict.fromkeys("select narrow index_select".split(), view(_right_of(1, "dim"))),
    **dict.fromkeys("gather take_along_dim take masked_select diagonal linalg_diagonal unfold".split(), view(_nothing)),
    **dict.fromkeys("flip fliplr flipud".split(), view(_flip)),
    **dict.fromkeys("movedim moveaxis".split(), view(_swap)),
    **dict.fromkeys("mT mH H T t adjoint transpose swapaxes swapdims".split(), transpose),
    **dict.fromkeys("split chunk tensor_split split_with_sizes".split(), pieces(2)),
    "getitem": view(_index),
    "embedding": embedding,
    "permute": view(_permute),
    "roll": view(_right_of(2, "dims")),
    "repeat_interleave": view(_right_of(2, "dim")),
    "unbind": pieces(1),
    "broadcast_tensors": broadcast_together,
}
