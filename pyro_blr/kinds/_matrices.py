"""Rules for products of matrices, inverses and Cholesky factors."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any

import torch

from pyro_blr.kinds._algebra import contract
from pyro_blr.kinds._calls import Broken, Bundle, Call, Rule
from pyro_blr.kinds._values import CholeskyFactor, Form, Sort, Step, Value
from pyro_blr.tape import Input, Ref

__all__ = ["MATRIX_RULES"]


def _scales(value: Value) -> bool:
    """Whether every matrix is z_i^p times a constant one."""
    return value.is_monomial and len(value.shape) >= 2 and value.shared >= 2


def _square(value: Value) -> bool:
    return len(value.shape) >= 2 and value.shape[-1] == value.shape[-2]


# -- products --------


def matmul(call: Call) -> Value:
    a, b = call.first, call.argument(1, "other", "mat2", "vec", "tensor2")
    return multiplied(call, b, a) if call.node.name == "rmatmul" else multiplied(call, a, b)


def multiplied(call: Call, left: Any, right: Any) -> Value:
    a, b = _operand(call, left), _operand(call, right)
    for result in (_congruence(call, a, b), _gram(call, a, b), _scaled(call, a, b)):
        if result is not None:
            return result
    if Form.OTHER in (a.form, b.form):
        raise Broken(a if a.form is Form.OTHER else b)
    return contract(call.step, [a, b])


def _operand(call: Call, argument: Any) -> Value:
    """As `call.value`, but a half-made A W⁻¹ passes."""
    value = call.values.get(argument.index) if isinstance(argument, Ref) else None
    if isinstance(value, Value) and value.product is not None:
        return value
    return call.value(argument)


def _congruence(call: Call, a: Value, b: Value) -> Value | None:
    """A W, W B, and A W Aᵀ."""
    step = call.step
    if not (a.is_constant or b.is_constant) or call.sort is not Sort.MATRIX:
        return None
    matrix, constant, side = (b, a, "left") if a.is_constant else (a, b, "right")
    if matrix.form is Form.MATRIX and _square(constant) and constant.shape[-1] == matrix.shape[-1]:
        product = (side, constant.token)
        if matrix.power == 1:
            return step.affine(product=product)
        return replace(step.other(), product=product, power=matrix.power)
    if matrix.product is None:
        return None
    half_side, other = matrix.product
    if half_side != side and are_transposes(call, other, constant.token):
        return Value(Form.MATRIX, step.shape, call.own_token, matrix.power)
    return None


def are_transposes(call: Call, a: Hashable, b: Hashable) -> bool:
    """Whether two constants are matrix transposes of one another."""
    (a, a_flips), (b, b_flips) = _untransposed(call, a), _untransposed(call, b)
    if a == b and a_flips != b_flips:
        return True
    if not isinstance(a, Input) or not isinstance(b, Input):
        return False
    first, second = call.tape.inputs[a.index], call.tape.inputs[b.index]
    second = second if a_flips != b_flips else second.mT
    if first.shape != second.shape or not bool((first == second).all()):
        return False
    call.assume(a, b)
    return True


def _untransposed(call: Call, token: Any) -> tuple[Any, bool]:
    flips = False
    while True:
        if isinstance(token, tuple) and token[:1] == ("transposed",):
            token = token[1]
        elif isinstance(token, Ref) and call.tape.nodes[token.index].name in (
            "mT",
            "T",
            "t",
            "adjoint",
            "mH",
        ):
            node = call.tape.nodes[token.index]
            if node.name in ("T", "t") and len(node.shape or ()) != 2:
                return token, flips
            token = node.args[0]
        else:
            return token, flips
        flips = not flips


def _gram(call: Call, a: Value, b: Value) -> Value | None:
    """L Lᵀ and L⁻ᵀ L⁻¹."""
    if a.factor is None or b.factor is None or a.token != b.token or a.power != b.power:
        return None
    if a.factor.is_left or a.factor.is_flipped == b.factor.is_flipped:
        return None
    return Value(Form.MATRIX, call.step.shape, ("gram", a.token, a.factor), a.power)


def _scaled(call: Call, a: Value, b: Value) -> Value | None:
    """Products of z_i^p times constant matrices, and of diagonal ones."""
    step = call.step
    if a.is_monomial and b.is_monomial:
        same = a.token == b.token and a.shape == b.shape and _square(a)
        if same and (_scales(a) and _scales(b)):
            return step.monomial(replace(a, is_diagonal=False), a.power + b.power, None)
        if same and a.is_diagonal and b.is_diagonal:
            return step.monomial(a, a.power + b.power, None)
        return None
    matrix, constant = (a, b) if b.is_constant else (b, a)
    if not constant.is_constant or not _scales(matrix) or len(constant.shape) < 2:
        return None
    if matrix.is_single:
        return None
    kept_batch = matrix.shape[:-2] == step.shape[:-2]
    token = matrix.token if kept_batch and matrix.shape == step.shape else ("scaled", matrix.token, step.shape)
    shared = matrix.shared if kept_batch else 2
    like = replace(matrix, shape=step.shape, token=token, shared=shared, is_diagonal=False)
    return step.monomial(like, matrix.power, None)


# -- inverses and factors --------


def inverted(step: Step, value: Value) -> Value:
    if value.is_constant:
        return step.constant()
    if value.form is Form.MATRIX:
        return replace(value, power=-value.power, token=("inverse", value.token))
    if value.factor is not None:
        left, flipped, lower = value.factor
        factor = CholeskyFactor(not left, flipped, lower)
        return replace(value, power=-value.power, token=("inverse", value.token), factor=factor)
    if _square(value) and (_scales(value) or (value.is_monomial and value.is_diagonal)):
        return step.monomial(value, -value.power, None)
    return step.other()


def inverse(call: Call) -> Value:
    return inverted(call.step, call.value(call.first))


def pseudoinverse(call: Call) -> Value:
    """The inverse, but that it may drop small elements of a diagonal one, or what is below a tolerance."""
    value = call.value(call.first)
    has_options = len(call.args) > 1 or any(option is not None for option in call.node.kwargs.values())
    return call.step.other() if has_options or value.is_diagonal else inverted(call.step, value)


def factored(step: Step, value: Value) -> Value:
    if value.is_constant:
        return step.constant()
    if value.form is Form.MATRIX:
        return replace(value, form=Form.CHOLESKY, token=("cholesky", value.token), factor=CholeskyFactor())
    if step.sort.is_positive and _square(value) and (_scales(value) or (value.is_monomial and value.is_diagonal)):
        return step.monomial(value, 0.5 * value.power, None)
    return step.other()


def cholesky(call: Call) -> Value:
    if call.argument(1, "upper", default=False) is not False:
        return call.step.other()
    return factored(call.step, call.value(call.first))


def with_flag(make: Callable[[Step, Value], Value]) -> Rule:
    """`cholesky_ex`, `inv_ex`: a result, and a flag of no known form."""

    def rule(call: Call) -> Value | Bundle:
        if call.node.kwargs.get("upper"):
            return call.step.other()
        value = call.value(call.first)
        return Bundle(lambda step, item: make(step, value) if item == 0 else step.other())

    return rule


def _inverse_gram(step: Step, value: Value) -> Value:
    """(L Lᵀ)⁻¹ of a lower factor."""
    if value.is_constant:
        return step.constant()
    if value.factor == CholeskyFactor(False, False, True):
        return Value(Form.MATRIX, value.shape, ("inverse", ("gram", value.token, value.factor)), -value.power)
    if _square(value) and (_scales(value) or (value.is_monomial and value.is_diagonal)):
        return step.monomial(value, -2 * value.power, None)
    return step.other()


def cholesky_inverse(call: Call) -> Value:
    if call.argument(1, "upper", default=False) is not False:
        return call.step.other()
    return _inverse_gram(call.step, call.value(call.first))


def cholesky_solve(call: Call) -> Value:
    if call.argument(2, "upper", default=False) is not False:
        return call.step.other()
    right, factor = call.value(call.first), call.value(call.argument(1, "L", "input2"))
    return _solved(call, _inverse_gram(replace(call.step, shape=factor.shape), factor), call.first, right)


def solve(call: Call) -> Value:
    matrix, right = call.value(call.first), call.value(call.argument(1, "B", "other"))
    if call.argument(2, "left", default=True) is not True:
        return call.step.other()
    return _solved(
        call, inverted(replace(call.step, shape=matrix.shape), matrix), call.argument(1, "B", "other"), right
    )


def solve_triangular(call: Call) -> Value:
    matrix, right = call.value(call.first), call.value(call.argument(1, "B"))
    options = call.node.kwargs
    if not matrix.is_constant:
        is_lower = matrix.factor is not None and matrix.factor.is_lower
        if options.get("upper") is is_lower or options.get("unitriangular") or options.get("left", True) is not True:
            return call.step.other()
        if matrix.factor is None and not matrix.is_diagonal:
            return call.step.other()
    return _solved(call, inverted(replace(call.step, shape=matrix.shape), matrix), call.argument(1, "B"), right)


def _solved(call: Call, inverse: Value, argument: Any, right: Value) -> Value:
    """inverse @ right."""
    if inverse.form is Form.OTHER:
        return inverse
    if not inverse.is_constant and inverse.shape == call.step.shape and _is_identity(call, argument):
        call.assume(argument)
        return inverse
    if len(inverse.shape) == len(right.shape) == len(call.step.shape):  # else `right` may be a batch of vectors
        result = _congruence(call, inverse, right) or _scaled(call, inverse, right)
        if result is not None:
            return result
    return contract(call.step, [inverse, right])


def _is_identity(call: Call, argument: Any) -> bool:
    tensor = call.tensor(argument)
    if tensor is None or tensor.dim() < 2 or tensor.shape[-1] != tensor.shape[-2]:
        return False
    return bool((tensor == torch.eye(tensor.shape[-1], dtype=tensor.dtype, device=tensor.device)).all())


MATRIX_RULES: dict[str, Rule] = {
    **dict.fromkeys("matmul mm bmm mv rmatmul linalg_matmul".split(), matmul),
    **dict.fromkeys("inverse linalg_inv".split(), inverse),
    **dict.fromkeys("pinverse linalg_pinv".split(), pseudoinverse),
    **dict.fromkeys("cholesky linalg_cholesky".split(), cholesky),
    "linalg_cholesky_ex": with_flag(factored),
    "linalg_inv_ex": with_flag(inverted),
    "cholesky_inverse": cholesky_inverse,
    "cholesky_solve": cholesky_solve,
    "linalg_solve": solve,
    "linalg_solve_triangular": solve_triangular,
}
