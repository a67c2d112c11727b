"""torch's elementwise operations as functions of Python's numbers; these raise where torch gives an infinity or a NaN."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["ON_NUMBERS", "POWERS"]

_aten = torch.ops.aten


def _selected(condition: bool, one: float, other: float) -> float:
    return one if condition else other


def _reciprocal(x: float) -> float:
    return 1.0 / x


def _reversed_difference(x: float, y: float) -> float:
    return y - x


def _square(x: float) -> float:
    return x * x


def _inverse_root(x: float) -> float:
    return 1.0 / math.sqrt(x)


def _digamma(x: float) -> float:
    return torch.digamma(torch.scalar_tensor(x, dtype=torch.float64, device=_CPU)).item()


_CPU = torch.device("cpu")

ON_NUMBERS: dict[Any, Callable] = {
    _aten.add.Tensor: operator.add,
    _aten.sub.Tensor: operator.sub,
    _aten.mul.Tensor: operator.mul,
    _aten.mul.Scalar: operator.mul,
    _aten.div.Tensor: operator.truediv,
    _aten.rsub.Scalar: _reversed_difference,
    _aten.rsub.Tensor: _reversed_difference,
    _aten.neg.default: operator.neg,
    _aten.abs.default: abs,
    _aten.reciprocal.default: _reciprocal,
    _aten.square.default: _square,
    _aten.sqrt.default: math.sqrt,
    _aten.rsqrt.default: _inverse_root,
    _aten.log.default: math.log,
    _aten.log1p.default: math.log1p,
    _aten.exp.default: math.exp,
    _aten.lgamma.default: math.lgamma,
    _aten.digamma.default: _digamma,
    _aten.where.self: _selected,
    _aten.bitwise_and.Tensor: operator.and_,
    _aten.logical_and.default: operator.and_,
}
ON_NUMBERS |= {
    getattr(getattr(_aten, name), form): getattr(operator, name)
    for name in ("eq", "ne", "lt", "le", "gt", "ge")
    for form in ("Tensor", "Scalar")
}
POWERS = {2: _square, -1: _reciprocal, 0.5: math.sqrt, -0.5: _inverse_root}
