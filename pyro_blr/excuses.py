"""When an expression has a form and its values do not, without either judge being wrong: constraints, overflow, rounding."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_blr.blocks import Block
from pyro_blr.likelihoods import Expectation, Matrix, Positive, Probability, Simplex
from pyro_blr.plans import Argument
from pyro_blr.probe import Probe, tolerance
from pyro_blr.tape import Ref

__all__ = ["excuse"]

_OPERATIONS = 1e3  # roundings that may add up in one expression


def excuse(probe: Probe, argument: Argument, block: Block) -> str:
    """What keeps the values from the form that the expression has, in any state of its discrete sites; "" where nothing does."""
    for _ in probe.assignments(argument.ref):
        leaves = {block.name: probe.point(block)}
        value = probe.evaluate(argument.ref, leaves)
        found = _outside(argument.role, value) or _rounding(probe, argument.ref, leaves, value)
        if found:
            return found
    return ""


def _outside(role: type[Expectation], value: Tensor) -> str:
    if value.numel() == 0:
        return "it has no elements"
    if not bool(torch.isfinite(value).all()):
        return "its values are not finite"
    if role is Positive and not bool((value > 0).all()):
        return "its values are not all positive"
    if role is Probability and not bool(((value > 0) & (value < 1)).all()):
        return "its values are not all between 0 and 1"
    if role is Simplex and not bool(((value.sum(-1) - 1).abs() < 1e-3).all()):
        return "its values do not sum to one"
    if role is Matrix and not bool((torch.linalg.cholesky_ex(value)[1] == 0).all()):
        return "its values are not positive definite"
    return ""


def _rounding(probe: Probe, ref: Ref, leaves: dict[str, Tensor], value: Tensor) -> str:
    """Rounding of the least precise and the largest number on the way, against what the numerical judge tolerates."""
    smallest = float(value.abs().max().clamp_min(1e-300))
    for index in sorted(probe.graph.tape.needed([ref])):
        part = probe.evaluate(Ref(index), leaves)
        if not isinstance(part, Tensor) or not part.is_floating_point() or part.numel() == 0:
            continue
        largest = float(part.abs().max())
        if not largest < float("inf"):
            return "its values overflow on the way"
        if _OPERATIONS * torch.finfo(part.dtype).eps * max(largest / smallest, 1.0) > tolerance(value):
            return f"rounding on the way, at numbers of {largest:.1g} in {str(part.dtype).removeprefix('torch.')}"
    return ""
