"""Rules for joins and writes, for constants in the form of the site, and for matrices made of vectors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pyro_blr.kinds._algebra import broadcast, join, select
from pyro_blr.kinds._calls import Broken, Call, Rule
from pyro_blr.kinds._values import Form, Shape, Step, Value, common_trailing, shared_dims
from pyro_blr.kinds._views import BY_LATENT, kept_by_index

__all__ = ["JOIN_RULES"]


def tokenless_like(number: float | None) -> Rule:
    """A new constant that takes no more than its form from the site."""

    def rule(call: Call) -> Value:
        return call.step.other() if call.others_depend() else call.step.constant(number)

    return rule


def full_like(call: Call) -> Value:
    fill = call.argument(2 if call.node.name == "new_full" else 1, "fill_value")
    return call.step.other() if call.depends(fill) else call.step.constant(call.read(call.value(fill)))


def joined(is_stack: bool, default: int | None = 0) -> Rule:
    """`stack`, `cat`: the parts stay together right of the dim along which they are joined."""

    def rule(call: Call) -> Value:
        operands = call.argument(0, "tensors")
        if not isinstance(operands, (tuple, list)):
            return call.step.other()
        parts = [call.value(operand) for operand in operands]
        dim = call.argument(1, "dim", "axis", default=default)
        rank = len(call.step.shape)
        kept = rank - 1 - dim % rank if type(dim) is int and rank else 0
        return join(call.step, parts, kept, call.token)

    return rule


def nested_stack(call: Call) -> Value:
    """`torch.tensor([[a, b], [c, d]])`."""

    def leaves(tree: Any) -> list[Any]:
        return [leaf for item in tree for leaf in leaves(item)] if isinstance(tree, (tuple, list)) else [tree]

    items = leaves(call.args[0])
    parts = [call.value(item) for item in items]
    if not isinstance(call.args[0], (tuple, list)):
        return select(call.step, parts[0], common_trailing(parts[0].shape, call.step.shape), call.token)
    return join(call.step, parts, min(len(part.shape) for part in parts), call.token)


def _uniform_dims(mask: Shape, shape: Shape) -> int:
    """The last dims of `shape` over which a mask does not vary."""
    count = 0
    while count < len(shape) and (count >= len(mask) or mask[-1 - count] == 1):
        count += 1
    return count


def _choose(call: Call, condition: Any, *operands: Any) -> Value:
    if call.depends(condition):
        call.value(condition)  # raises, naming what it is made by: a comparison, usually
        return call.step.other()
    parts = [_spread(call.step, call.value(operand)) for operand in operands]
    return join(call.step, parts, _uniform_dims(call.shape_of(condition), call.step.shape), call.token)


def _spread(step: Step, value: Value) -> Value:
    spread = value if value.is_constant else broadcast(step, value)
    if spread.form is Form.OTHER:
        raise Broken(spread)
    return spread


def where(call: Call) -> Value:
    if len(call.args) + len(call.node.kwargs) < 3:
        return call.step.other()
    operands = (call.argument(0, "condition"), call.argument(1, "input", "self"), call.argument(2, "other"))
    if hasattr(call.node.function, "__objclass__"):  # Tensor.where(self, condition, other)
        operands = (
            call.argument(1, "condition"),
            call.argument(0, "input", "self"),
            call.argument(2, "other"),
        )
    return _choose(call, *operands)


def masked_fill(call: Call) -> Value:
    return _choose(call, call.argument(1, "mask"), call.first, call.argument(2, "value"))


def write(call: Call) -> Value:
    """`x[index] = value` as a new x: elements of the old one and of the value."""
    return written(call, *call.args)


def written(call: Call, target: Any, index: Any, value: Any) -> Value:
    if call.depends(index):
        return call.step.other(BY_LATENT)
    items = list(index) if isinstance(index, tuple) else [index]
    shape = call.step.shape
    if all(item is Ellipsis or item is None or isinstance(item, slice) for item in items):
        if kept_by_index(call, [item for item in items if item is not None], shape) == len(shape):
            return _spread(call.step, call.value(value))
    before, after = call.value(target), call.value(value)
    kept = kept_by_index(call, items, shape)
    if not after.is_constant and not after.is_single:
        kept = min(kept, common_trailing(after.shape, shape))
    return join(call.step, [before, after], kept, call.token)


def overwrite(call: Call) -> Value:
    """`copy_`, `fill_`: nothing is left of the old value."""
    return _spread(call.step, call.value(call.argument(1, "src", "value", "other")))


def put(call: Call) -> Value:
    """`index_put`, as a write or, accumulating, as a sum."""
    if call.argument(3, "accumulate", default=False) is not False:
        return accumulate(call)
    return written(call, call.first, tuple(call.argument(1, "indices")), call.argument(2, "values"))


def accumulate(call: Call) -> Value:
    """`index_add`, `scatter_add`: linear in the old value and in what is added."""
    operands = [ref for ref in (*call.args, *call.node.kwargs.values()) if call.depends(ref)]
    values = [call.value(operand) for operand in operands]
    proper = {
        call.first,
        call.argument(2 if call.node.name.startswith("index_put") else 3, "source", "src", "values"),
    }
    if not set(operands) <= proper or not all(value.is_affine for value in values):
        return call.step.other()
    return call.step.affine()


def on_blocks(call: Call) -> Value:
    """`block_diag`: its arguments, and zeros."""
    zero = Value(Form.CONSTANT, (), 0, coefficient=0.0)
    return join(call.step, [*(call.value(operand) for operand in call.args), zero], 0, call.token)


def put_on_diagonal(call: Call) -> Value:
    """`diag_embed`, and `diag` of a vector: the elements on the diagonal of a matrix of zeros."""
    value = call.value(call.first)
    step, offset = call.step, call.argument(1, "offset", "diagonal", default=0)
    if call.node.name == "diag" and len(value.shape) == 2:
        return select(step, value, 0, call.token)
    if value.is_constant:
        return step.constant()
    if not value.is_monomial:
        return step.linear(value)
    options = {*range(2, len(call.args)), *(set(call.node.kwargs) - {"input", "offset", "diagonal"})}
    proper = offset == 0 and not options and (call.node.name == "diag_embed" or len(value.shape) == 1)
    shared = (
        len(step.shape)
        if value.is_single
        else shared_dims(step.shape, value.shared + 1 if value.shared and proper else 0)
    )
    return replace(
        value,
        shape=step.shape,
        token=value.token if value.is_single else call.token,
        coefficient=None,
        shared=shared,
        is_whole=call.sort.event_dims == 0,
        is_diagonal=proper,
    )


def triangle(call: Call) -> Value:
    """`tril`, `triu`: zeros in place of some elements."""
    value = call.value(call.first)
    if value.is_monomial:
        single = value.is_single
        return replace(
            value,
            coefficient=None,
            token=value.token if single else call.token,
            is_whole=call.sort.event_dims == 0,
            is_diagonal=value.is_diagonal,
        )
    return call.step.constant() if value.is_constant else call.step.linear(value)


JOIN_RULES: dict[str, Rule] = {
    **dict.fromkeys(("stack",), joined(True)),
    **dict.fromkeys("cat concat concatenate".split(), joined(False)),
    **dict.fromkeys("hstack vstack dstack column_stack row_stack".split(), joined(False, None)),
    **dict.fromkeys("diag_embed diag diagflat".split(), put_on_diagonal),
    **dict.fromkeys("tril triu".split(), triangle),
    **dict.fromkeys("zeros_like new_zeros".split(), tokenless_like(0.0)),
    **dict.fromkeys("ones_like new_ones".split(), tokenless_like(1.0)),
    **dict.fromkeys("empty_like new_empty new_tensor".split(), tokenless_like(None)),
    **dict.fromkeys("full_like new_full".split(), full_like),
    "nested_stack": nested_stack,
    "where": where,
    "masked_fill": masked_fill,
    **dict.fromkeys("copy fill".split(), overwrite),
    **dict.fromkeys("index_add scatter_add".split(), accumulate),
    "index_put": put,
    "block_diag": on_blocks,
    "setitem": write,
}
