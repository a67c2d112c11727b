"""What sums, products, powers, selections and joins of kinds are.

Every function here gives a claim that holds for every value of the site, or OTHER.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace

from pyro_blr.kinds._values import Form, Sort, Step, Value, common_trailing, shared_dims

__all__ = [
    "add",
    "broadcast",
    "contract",
    "exponential",
    "join",
    "logarithm",
    "multiply",
    "negate",
    "power",
    "select",
]


def select(step: Step, value: Value, kept: int, token: Hashable) -> Value:
    """Views and gathers: each element is one of `value`, whose last `kept` dims stay whole and in order."""
    if value.is_constant:
        return step.constant(value.coefficient)
    if value.form in (Form.OTHER, Form.AFFINE, Form.PARTIAL):
        return replace(value, shape=step.shape, product=None)
    if value.form in (Form.MATRIX, Form.CHOLESKY):
        return replace(value, shape=step.shape, token=token) if kept >= 2 else step.linear(value)
    single = value.is_single
    selected = _keep(step, value, kept)
    if single and selected.form is not Form.OTHER:
        return replace(selected, token=value.token, shared=len(step.shape))
    return replace(selected, token=token)


def _keep(step: Step, value: Value, kept: int) -> Value:
    """An elementwise value of which the last `kept` dims are left as they are."""
    is_whole = value.is_whole and kept >= step.sort.event_dims
    if value.is_selection and not is_whole:
        return step.other("selects part of the simplex")
    shared = shared_dims(step.shape, min(value.shared, kept))
    is_diagonal = value.is_diagonal and kept >= 2
    return replace(value, shape=step.shape, shared=shared, is_whole=is_whole, is_diagonal=is_diagonal)


def broadcast(step: Step, value: Value) -> Value:
    """`value` expanded to the shape of the result."""
    if value.shape == step.shape:
        return value
    shared, rank = 0, len(value.shape)
    for position in range(1, len(step.shape) + 1):
        if not (position <= value.shared or position > rank or value.shape[-position] == 1):
            break
        shared = position
    kept = common_trailing(value.shape, step.shape)
    selected = select(step, value, kept, ("broadcast", value.token, step.shape))
    if selected.form in (Form.MONOMIAL, Form.LOG, Form.COMPLEMENT):
        selected = replace(selected, shared=max(shared, selected.shared))
    return selected


def aligned(step: Step, a: Value, b: Value) -> bool:
    """Whether the same element of the site stands at every position of both, broadcast."""
    if a.is_single and b.is_single:
        return a.token == b.token
    a, b = broadcast(step, a), broadcast(step, b)
    return a.token == b.token and Form.OTHER not in (a.form, b.form)


def multiply(step: Step, a: Value, b: Value) -> Value:
    """Elementwise product."""
    if a.is_constant:
        a, b = b, a
    if a.is_constant:
        numbers = step.read(a), step.read(b)
        return step.constant(0.0 if 0 in numbers else _both(*numbers, lambda x, y: x * y))
    if b.is_constant:
        return _times_constant(step, a, b)
    if a.is_monomial and b.is_monomial and aligned(step, a, b):
        coefficient = _both(a.coefficient, b.coefficient, lambda x, y: x * y)
        like = broadcast(step, a)
        if like.form is Form.OTHER:
            return like
        return step.monomial(like, a.power + b.power, coefficient)
    return step.other()


def _times_constant(step: Step, value: Value, constant: Value) -> Value:
    number = step.read(constant)
    if number == 1:
        return broadcast(step, value)
    if value.is_monomial:
        coefficient = _both(value.coefficient, number, lambda x, y: x * y)
        unlabelled = replace(value, coefficient=None)  # not a selection any more, whole or not
        return step.monomial(broadcast(step, unlabelled), value.power, coefficient)
    if value.form is Form.PARTIAL:
        return broadcast(step, value)
    if value.form is Form.LOG and number is not None:
        return logarithm(step, power(step, exponential(step, broadcast(step, value)), number))
    if value.form is Form.COMPLEMENT and value.coefficient is not None and number is not None:
        return replace(broadcast(step, value), coefficient=value.coefficient * number)
    if value.form in (Form.MATRIX, Form.CHOLESKY) and all(size == 1 for size in constant.shape[-2:]):
        scaled = broadcast(step, value)
        if scaled.form is value.form:
            return replace(scaled, token=("scaled", scaled.token, constant.token, number))
        return scaled
    return step.linear(value)


def negate(step: Step, value: Value) -> Value:
    return multiply(step, value, Value(Form.CONSTANT, (), -1, coefficient=-1.0))


def power(step: Step, value: Value, exponent: float | None) -> Value:
    """Elementwise value ** exponent (None: not one known number)."""
    if value.is_constant:
        number = step.read(value)
        if number == 0 and (exponent is None or exponent < 1):
            return step.other()  # nothing but rounding, if a sum cancelled: its root or inverse is anything
        return step.constant(_both(number, exponent, _real_power))
    if exponent == 1:
        return broadcast(step, value)
    integers = exponent is not None and float(exponent).is_integer() and float(value.power).is_integer()
    if value.is_monomial and exponent is not None and (step.sort.is_positive or integers):
        raised = step.monomial(
            broadcast(step, value), value.power * exponent, _both(value.coefficient, exponent, _real_power)
        )
        return raised if exponent > 0 or raised.is_constant else replace(raised, is_diagonal=False)
    if value.form is Form.PARTIAL and exponent is not None and exponent != 0:
        return replace(broadcast(step, value), power=round(value.power * exponent, 12))
    return step.other()


def logarithm(step: Step, value: Value) -> Value:
    """log(c z^p) = log c + p log z; it keeps c as its coefficient."""
    if value.is_constant:
        number = step.read(value)
        return (
            step.other() if number == 0 else step.constant(None if number is None or number < 0 else math.log(number))
        )
    if value.is_monomial and step.sort.is_positive:
        return replace(value, form=Form.LOG, is_diagonal=False)
    return step.other()


def exponential(step: Step, value: Value) -> Value:
    if value.is_constant:
        return step.constant(_both(step.read(value), 0.0, lambda x, _: _exp(x)))
    return replace(value, form=Form.MONOMIAL) if value.form is Form.LOG else step.other()


def add(step: Step, a: Value, b: Value) -> Value:
    """Elementwise sum."""
    if a.is_constant:
        a, b = b, a
    if a.is_constant:
        return step.constant(_both(step.read(a), step.read(b), lambda x, y: x + y))
    if b.is_constant:
        return _plus_constant(step, a, b)
    if a.form is b.form is Form.LOG:
        return logarithm(step, multiply(step, exponential(step, a), exponential(step, b)))
    if a.is_monomial and b.is_monomial and a.power == b.power and aligned(step, a, b):
        coefficient = _both(a.coefficient, b.coefficient, lambda x, y: x + y)
        like = replace(a, coefficient=None, is_diagonal=a.is_diagonal and b.is_diagonal)
        return step.monomial(broadcast(step, like), a.power, coefficient)
    return step.affine() if a.is_affine and b.is_affine else step.other()


def _plus_constant(step: Step, value: Value, constant: Value) -> Value:
    number = step.read(constant)
    if number == 0:
        return broadcast(step, value)
    if value.form is Form.LOG:
        coefficient = (
            None if value.coefficient is None or number is None else value.coefficient * (_exp(number) or math.nan)
        )
        return logarithm(step, step.monomial(broadcast(step, value), value.power, coefficient))
    if number == 1 and value.coefficient == -1:
        if value.is_monomial and value.power == 1:
            return replace(broadcast(step, value), form=Form.COMPLEMENT, coefficient=1.0, is_diagonal=False)
        if value.form is Form.COMPLEMENT:
            return replace(broadcast(step, value), form=Form.MONOMIAL, power=1.0, coefficient=1.0)
    return step.affine() if value.is_affine else step.other()


def join(step: Step, parts: Sequence[Value], kept: int, token: Hashable) -> Value:
    """Each element of the result is one of one of the parts; over its last `kept` dims they stay together."""
    live = [part for part in parts if not part.is_constant]
    numbers = {step.read(part) for part in parts if part.is_constant}
    if not live:
        return step.constant(numbers.pop() if len(numbers) == 1 else None)
    first = live[0]
    alike = all(part.form is first.form and part.power == first.power for part in live)
    if alike and first.form is Form.MATRIX and not numbers and kept >= 2:
        return replace(first, shape=step.shape, token=token)
    if alike and (not numbers or (first.is_monomial and numbers == {0.0})):
        if first.form in (Form.MONOMIAL, Form.LOG, Form.COMPLEMENT):
            return _join_elements(step, live, kept, token, bool(numbers))
    partial = all(part.form in (Form.MONOMIAL, Form.PARTIAL) and part.power == first.power for part in live)
    if partial and step.sort is Sort.POSITIVE:
        return Value(Form.PARTIAL, step.shape, power=first.power, operation=step.operation, source=step.source)
    return step.affine() if all(part.is_affine for part in live) else step.other()


def _join_elements(step: Step, parts: Sequence[Value], kept: int, token: Hashable, has_zeros: bool) -> Value:
    first = parts[0]
    if has_zeros:  # a vector with zeros in it is no selection, whole or not
        parts = [replace(part, coefficient=None) for part in parts]
    one_element = all(part.is_single and part.token == first.token for part in parts)
    parts = [_keep(step, part, kept) for part in parts]
    broken = next((part for part in parts if part.form is Form.OTHER), None)
    if broken is not None:
        return broken
    coefficients = {part.coefficient for part in parts}
    return replace(
        parts[0],
        token=first.token if one_element else token,
        coefficient=coefficients.pop() if len(coefficients) == 1 else None,
        shared=len(step.shape) if one_element else shared_dims(step.shape, min(part.shared for part in parts)),
        is_whole=all(part.is_whole for part in parts),
        is_diagonal=all(part.is_diagonal for part in parts) and not has_zeros,
    )


def contract(step: Step, factors: Sequence[Value]) -> Value:
    """A multilinear map of the factors, with sums of which no more is known."""
    live = [factor for factor in factors if not factor.is_constant]
    if not live:
        return step.constant()
    if len(live) == 1:
        return step.linear(live[0])
    if all(factor.is_monomial and factor.is_single and factor.token == live[0].token for factor in live):
        return step.linear(replace(live[0], power=round(sum(factor.power for factor in live), 12)))
    return step.other()


def _both(x: float | None, y: float | None, function: Callable[[float, float], float | None]) -> float | None:
    return None if x is None or y is None else function(x, y)


def _real_power(base: float, exponent: float) -> float | None:
    try:
        result = base**exponent
    except (OverflowError, ZeroDivisionError):
        return None
    return result if isinstance(result, (int, float)) else None


def _exp(x: float) -> float | None:
    return math.exp(x) if x < 700 else None
