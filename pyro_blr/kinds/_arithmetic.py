"""Rules for sums, products, powers and contractions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pyro_blr.kinds._algebra import add, contract, exponential, logarithm, multiply, negate, power
from pyro_blr.kinds._calls import Call, Rule
from pyro_blr.kinds._values import Form, Sort, Value, shared_dims

__all__ = ["ARITHMETIC_RULES"]


def plus(sign: int, is_reflected: bool = False) -> Rule:
    """a ± alpha b; reflected, b ± a."""

    def rule(call: Call) -> Value:
        a, b = call.value(call.first), call.value(call.argument(1, "other"))
        if is_reflected:
            a, b = b, a
        own_step = replace(call.step, shape=b.shape)
        b = multiply(own_step, b, call.value(call.argument(2, "alpha", default=1)))
        return add(call.step, a, negate(own_step, b) if sign < 0 else b)

    return rule


def times(call: Call) -> Value:
    a, b = call.value(call.first), call.value(call.argument(1, "other"))
    product = multiply(call.step, a, b)
    if product.is_monomial and product.shared < 2 and not product.is_diagonal and call.sort.event_dims == 0:
        constant = call.argument(1, "other") if b.is_constant else call.first
        if (a.is_constant or b.is_constant) and _is_diagonal(call, constant):
            call.assume(constant)
            return replace(product, is_diagonal=True)
    return product


def _is_diagonal(call: Call, constant: Any) -> bool:
    """Whether a constant holds diagonal matrices that span the last two dims of the result."""
    tensor = call.tensor(constant)
    if tensor is None or tensor.dim() < 2 or tensor.shape[-1] != tensor.shape[-2] or tensor.shape[-1] == 1:
        return False
    if tuple(tensor.shape[-2:]) != call.step.shape[-2:] or bool((tensor[..., 0, 1] != 0).any()):
        return False
    return bool((tensor.diagonal(dim1=-2, dim2=-1).diag_embed() == tensor).all())


def over(is_reflected: bool = False) -> Rule:
    """a / b; reflected, b / a."""

    def rule(call: Call) -> Value:
        if call.argument(2, "rounding_mode") is not None:
            return call.step.other()
        a, b = call.value(call.first), call.value(call.argument(1, "other"))
        if is_reflected:
            a, b = b, a
        inverse = power(replace(call.step, shape=b.shape), b, -1.0)
        return inverse if inverse.form is Form.OTHER else multiply(call.step, a, inverse)

    return rule


def to_the(exponent: float) -> Rule:
    return lambda call: power(call.step, call.value(call.first), exponent)


def raised(call: Call) -> Value:
    base, exponent = call.value(call.first), call.value(call.argument(1, "exponent"))
    return power(call.step, base, call.read(exponent)) if exponent.is_constant else call.step.other()


def negative(call: Call) -> Value:
    return negate(call.step, call.value(call.first))


def log(call: Call) -> Value:
    return logarithm(call.step, call.value(call.first))


def exp(call: Call) -> Value:
    return exponential(call.step, call.value(call.first))


# -- sums --------


def _dims(call: Call, rank: int) -> frozenset[int] | None:
    """The dims that a reduction is over; None where they cannot be told."""
    dims = call.argument(1, "dim", "axis")
    if dims is None:
        return frozenset(range(rank))
    dims = dims if isinstance(dims, (tuple, list)) else (dims,)
    if not all(type(dim) is int for dim in dims) or rank == 0:
        return frozenset() if rank == 0 else None
    return frozenset(dim % rank for dim in dims) or frozenset(range(rank))


def summed(call: Call) -> Value:
    """A sum is linear; that of a whole simplex is one, that of copies of one element a multiple of it."""
    value = call.value(call.first)
    step, rank = call.step, len(value.shape)
    dims = _dims(call, rank)
    if not value.is_monomial or value.is_single or not dims:
        return step.linear(value)
    if call.sort is Sort.SIMPLEX and value.is_whole and value.power == 1 and value.coefficient is not None:
        if dims == {rank - 1} and call.node.name == "sum":
            return step.constant(value.coefficient)
    if min(dims) >= rank - value.shared:
        left = max(0, value.shared - len(dims))
        token = ("summed", value.token, tuple(sorted(dims)), step.shape)
        whole = call.sort.event_dims == 0
        reduced = replace(value, shape=step.shape, token=token, shared=shared_dims(step.shape, left), is_whole=whole)
        return step.monomial(replace(reduced, is_diagonal=False), value.power, None)
    return step.linear(value)


def linear_map(call: Call) -> Value:
    if call.others_depend():
        return call.step.other()
    value = call.value(call.first)
    if call.node.name == "diff" and (len(call.args) > 3 or {"prepend", "append"} & set(call.node.kwargs)):
        return call.step.affine() if value.is_affine else call.step.other()
    return call.step.linear(value)


def _normalises(call: Call) -> Value | None:
    """The operand of a `softmax` over the last dim, if it is log p + c, p whole vectors of the simplex."""
    value, dim = call.value(call.first), call.argument(1, "dim")
    is_last = type(dim) is int and dim % max(len(value.shape), 1) == len(value.shape) - 1
    is_log = value.form is Form.LOG and value.power == 1 and value.coefficient is not None and value.is_whole
    return value if call.sort is Sort.SIMPLEX and is_log and is_last else None


def softmax(call: Call) -> Value:
    value = _normalises(call)
    if value is None:
        return call.step.other()
    form = Form.LOG if call.node.name == "log_softmax" else Form.MONOMIAL
    return replace(value, form=form, coefficient=1.0)


def logsumexp(call: Call) -> Value:
    value = _normalises(call)
    return call.step.other() if value is None else logarithm(call.step, call.step.constant(value.coefficient))


# -- contractions --------


def contraction(*positions: int) -> Rule:
    """A bilinear map of the arguments at `positions`."""
    return lambda call: contract(call.step, [call.value(call.args[position]) for position in positions])


def biased(call: Call) -> Value:
    """`linear`: x Wᵀ + b."""
    product = contract(call.step, [call.value(call.first), call.value(call.argument(1, "weight"))])
    bias = call.argument(2, "bias")
    if bias is None or product.form is Form.OTHER:
        return product
    return add(call.step, product, call.value(bias))


def outer(call: Call) -> Value:
    """Products of all pairs: nothing is summed, so that monomials stay."""
    return _unsummed(call, [call.value(call.args[0]), call.value(call.args[1])])


def _unsummed(call: Call, factors: list[Value]) -> Value:
    live = [factor for factor in factors if not factor.is_constant]
    if len(live) == 1 and live[0].is_monomial and not live[0].is_single:
        whole, shared = call.sort.event_dims == 0, shared_dims(call.step.shape)
        like = replace(live[0], shape=call.step.shape, token=call.own_token, shared=shared, is_whole=whole)
        return call.step.monomial(replace(like, is_diagonal=False), live[0].power, None)
    return contract(call.step, factors)


def einsum(call: Call) -> Value:
    equation, *operands = call.args
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = list(operands[0])
    if not isinstance(equation, str):
        return call.step.other()
    factors = [call.value(operand) for operand in operands]
    labels, arrow, output = equation.replace(" ", "").partition("->")
    terms = labels.split(",")
    for term, factor in zip(terms, factors, strict=True):
        is_kept = arrow and "." not in term and len(set(term)) == len(term) and set(term) <= set(output)
        if not factor.is_constant and not is_kept:
            return contract(call.step, factors)
    return _unsummed(call, factors)


def added_product(call: Call) -> Value:
    """`addmm` and its like: beta c + alpha a b."""
    product = contract(call.step, [call.value(call.args[1]), call.value(call.args[2])])
    alpha, beta = (call.value(call.node.kwargs.get(name, 1)) for name in ("alpha", "beta"))
    if product.form is Form.OTHER or len(call.args) > 3:
        return product if product.form is Form.OTHER else call.step.other()
    start = call.value(call.first)
    scaled = multiply(replace(call.step, shape=start.shape), start, beta)
    return add(call.step, multiply(call.step, product, alpha), scaled)


def interpolated(call: Call) -> Value:
    """`lerp`: (1 − w) a + w b."""
    a, b, weight = (call.value(call.argument(i, name)) for i, name in enumerate(("input", "end", "weight")))
    if not weight.is_constant:
        return call.step.other()
    parts = [value for value in (a, b) if not value.is_constant]
    if not parts:
        return call.step.constant()
    return call.step.affine() if all(value.is_affine for value in parts) else call.step.other()


ARITHMETIC_RULES: dict[str, Rule] = {
    **dict.fromkeys("add iadd radd".split(), plus(1)),
    **dict.fromkeys("sub subtract isub".split(), plus(-1)),
    "rsub": plus(-1, is_reflected=True),
    **dict.fromkeys("mul multiply imul rmul".split(), times),
    **dict.fromkeys("div divide true_divide truediv idiv itruediv".split(), over()),
    **dict.fromkeys("rdiv rtruediv".split(), over(is_reflected=True)),
    **dict.fromkeys("pow float_power ipow".split(), raised),
    **dict.fromkeys("neg negative".split(), negative),
    "sqrt": to_the(0.5),
    "rsqrt": to_the(-0.5),
    "reciprocal": to_the(-1.0),
    "square": to_the(2.0),
    "log": log,
    "exp": exp,
    **dict.fromkeys("sum mean".split(), summed),
    **dict.fromkeys("cumsum diff trace".split(), linear_map),
    **dict.fromkeys("softmax log_softmax".split(), softmax),
    "logsumexp": logsumexp,
    **dict.fromkeys("dot vdot inner tensordot linalg_vecdot linalg_cross cross".split(), contraction(0, 1)),
    **dict.fromkeys("outer ger kron".split(), outer),
    "linear": biased,
    **dict.fromkeys("addmm addmv addr addbmm baddbmm".split(), added_product),
    "einsum": einsum,
    "lerp": interpolated,
}
