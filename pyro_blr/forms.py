"""The numerical judge: which form an argument has along random lines in a block's variable, and which form a template needs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from pyro_blr.blocks import Block, is_gaussian
from pyro_blr.families import Beta, Dirichlet, Gamma, InverseGamma, LogNormal, Wishart
from pyro_blr.kinds import Form, Kind
from pyro_blr.likelihoods import Expectation, Linear, Matrix, Positive, Probability, Simplex, Vector
from pyro_blr.plans import Argument
from pyro_blr.probabilities import powers_form, probability_form, simplex_form
from pyro_blr.probe import Probe, close, tolerance

__all__ = [
    "UNUSABLE",
    "allowed_form",
    "for_any_data",
    "holds_for_other_data",
    "is_jointly_affine",
    "numerical_at_all_states",
]

_T = TypeVar("_T")


def allowed_form(role: type[Expectation], block: Block, kind: Kind) -> Form | None:
    """The form under which the template is exact for the block's family, if the kind has it."""
    family, form = block.family, kind.form
    if role in (Linear, Vector) and is_gaussian(family):
        if isinstance(family, LogNormal):
            return Form.AFFINE if form is Form.LOG else None
        if form is Form.MONOMIAL and kind.power == 1:
            return Form.AFFINE
        return form if form in (Form.SELECTION, Form.AFFINE) else (Form.AFFINE if form is Form.COMPLEMENT else None)
    if role is Positive and isinstance(family, (Gamma, InverseGamma)):
        power = 1.0 if form is Form.SELECTION else kind.power if form in (Form.MONOMIAL, Form.PARTIAL) else None
        wanted = 1.0 if isinstance(family, Gamma) else -1.0
        return form if power == wanted else None
    if role is Probability and isinstance(family, Beta):
        return form if form in (Form.SELECTION, Form.COMPLEMENT) else None
    if role is Simplex and isinstance(family, Dirichlet):
        return form if form in (Form.SELECTION, Form.MONOMIAL) else None
    if role is Matrix:
        if isinstance(family, Wishart) and form in (Form.MATRIX, Form.SELECTION):
            return Form.MATRIX if form is Form.SELECTION or kind.power == 1 else None
        if isinstance(family, Gamma) and (
            form in (Form.MATRIX, Form.SELECTION) or (form is Form.MONOMIAL and kind.power == 1)
        ):
            return Form.MATRIX
    return None


# --------------------------------------------------------------------------------------------------------------------
# The numerical judge

_STEPS = (0.37, -0.8, 1.9)


def numerical_form(probe: Probe, argument: Argument, block: Block) -> tuple[Form | None, int]:
    """The form that the argument's values have along random lines in the block's variable, and at how many points it was seen."""
    role, family = argument.role, block.family
    if role in (Linear, Vector) and is_gaussian(family):
        ok = all(_affine(probe, argument.ref, block, probe.point(block), probe.point(block)) for _ in range(3))
        return (Form.AFFINE if ok else None), 3 * (len(_STEPS) + 2)
    if role is Positive and isinstance(family, (Gamma, InverseGamma)):
        return _positive_form(probe, argument.ref, block), 3 * 8
    if role is Probability and isinstance(family, Beta):
        return probability_form(probe, argument.ref, block), 3 * 2
    if role is Simplex and isinstance(family, Dirichlet):
        return simplex_form(probe, argument.ref, block), 3 * 3
    if role is Simplex and isinstance(family, Beta):
        return powers_form(probe, argument.ref, block)
    if role is Matrix and isinstance(family, Wishart):
        return _matrix_form(probe, argument.ref, block), 3 * 4
    if role is Matrix and isinstance(family, Gamma):
        return _scaled_matrix_form(probe, argument.ref, block), 3 * 6
    return None, 0


def numerical_at_all_states(probe: Probe, argument: Argument, block: Block) -> tuple[Form | None, int]:
    """The form that holds whatever the states of the expression's discrete sites; the same one throughout."""
    found: Form | None = None
    total = 0
    for turn in probe.assignments(argument.ref):
        form, points = numerical_form(probe, argument, block)
        total += points
        if {form, found} == {Form.MONOMIAL, Form.PARTIAL}:
            form = found = Form.PARTIAL
        if form is None or (turn > 0 and form is not found):
            return None, total
        found = form
    return found, total


# What a program may say of values or data it was not written for.
UNUSABLE = (RuntimeError, IndexError, ValueError, TypeError)


def holds_for_other_data(probe: Probe, argument: Argument, block: Block, form: Form) -> bool:
    """Whether a form without proof is more than a coincidence of the data, as far as the program takes other data, and is that
    of every output, not only of the largest."""
    turns = probe.assignments(argument.ref)
    if argument.role in (Linear, Vector) and not all(_each_affine(probe, argument.ref, block) for _ in turns):
        return False
    with probe.other_data():
        try:
            return numerical_at_all_states(probe, argument, block)[0] is form
        except UNUSABLE:
            return True


def for_any_data(probe: Probe, ref: Any, find: Callable[[], _T]) -> Iterator[_T]:
    """`find()` at the program's data and at others, in all states of the expression's discrete sites."""
    for _ in probe.assignments(ref):
        yield find()
    with probe.other_data():
        for _ in probe.assignments(ref):
            with contextlib.suppress(*UNUSABLE):
                yield find()


def _affine(probe: Probe, ref: Any, block: Block, a: Tensor, b: Tensor) -> bool:
    start, end = (probe.evaluate(ref, {block.name: point}) for point in (a, b))
    return all(close(probe.evaluate(ref, {block.name: (1 - t) * a + t * b}), (1 - t) * start + t * end) for t in _STEPS)


def _each_affine(probe: Probe, ref: Any, block: Block) -> bool:
    """Affine output by output: each by its own size, and what the rounding of the largest would leave in it."""
    a, b = probe.point(block), probe.point(block)
    start, end = (probe.evaluate(ref, {block.name: point}) for point in (a, b))
    own = start.abs() + end.abs()
    rounding = 64 * torch.finfo(own.dtype).eps * own.max() if own.numel() else own
    for t in _STEPS:
        off = probe.evaluate(ref, {block.name: (1 - t) * a + t * b}) - ((1 - t) * start + t * end)
        if not bool((off.abs() <= tolerance(off, own) * own + rounding).all()):
            return False
    return True


def _positive_form(probe: Probe, ref: Any, block: Block) -> Form | None:
    """c x (c / x for an InverseGamma): linear in x^p, and log-affine with degree p; PARTIAL where some outputs are constants."""
    power = 1.0 if isinstance(block.family, Gamma) else -1.0
    still: Tensor | None = None  # outputs that do not move
    for _ in range(3):
        a, b = probe.point(block), probe.point(block)
        f_a, f_b = (probe.evaluate(ref, {block.name: x}) for x in (a, b))
        if not bool((f_a > 0).all() and (f_b > 0).all()):
            return None
        for t in (0.37, 0.81):
            middle = ((1 - t) * a**power + t * b**power) ** power
            if not close(probe.evaluate(ref, {block.name: middle}), (1 - t) * f_a + t * f_b):
                return None
        for t in _STEPS[:2]:
            value = probe.evaluate(ref, {block.name: a ** (1 - t) * b**t})
            if not bool((value > 0).all()) or not close(value.log(), (1 - t) * f_a.log() + t * f_b.log()):
                return None
        for c in (1e-3, 1e3):
            ratio = probe.evaluate(ref, {block.name: c * a}) / f_a
            here = (ratio - 1).abs() < tolerance(ratio)
            still = here if still is None else still
            expected = torch.where(still, 1.0, torch.full_like(ratio, c**power))
            if not torch.equal(here, still) or not bool(((ratio / expected - 1).abs() < tolerance(ratio)).all()):
                return None
    return Form.PARTIAL if still is not None and bool(still.any()) else Form.MONOMIAL


def _matrix_form(probe: Probe, ref: Any, block: Block) -> Form | None:
    """A W Aᵀ: linear in W without a constant, and log|·| moves with log|W| alone."""
    for _ in range(3):
        a, b = probe.point(block), probe.point(block)
        f_a, f_b = (probe.evaluate(ref, {block.name: x}) for x in (a, b))
        if not close(probe.evaluate(ref, {block.name: 0.4 * a + 1.7 * b}), 0.4 * f_a + 1.7 * f_b):
            return None
        if not close(f_a, f_a.mT):
            return None
        d = a.shape[-1]
        same = b * ((torch.linalg.slogdet(a)[1] - torch.linalg.slogdet(b)[1]) / d).exp()[..., None, None]
        f_same = probe.evaluate(ref, {block.name: same})
        if not close(torch.linalg.slogdet(f_same)[1], torch.linalg.slogdet(f_a)[1]):
            return None
    return Form.MATRIX


def _scaled_matrix_form(probe: Probe, ref: Any, block: Block) -> Form | None:
    """Linear in τ without a constant, positive definite, log|·| affine in log τ."""
    for _ in range(3):
        a, b = probe.point(block), probe.point(block)
        f_a, f_b = (probe.evaluate(ref, {block.name: x}) for x in (a, b))
        if not close(probe.evaluate(ref, {block.name: 0.4 * a + 1.7 * b}), 0.4 * f_a + 1.7 * f_b):
            return None
        for t in _STEPS:
            value = probe.evaluate(ref, {block.name: a ** (1 - t) * b**t})
            expected = (1 - t) * torch.linalg.slogdet(f_a)[1] + t * torch.linalg.slogdet(f_b)[1]
            if not close(torch.linalg.slogdet(value)[1], expected):
                return None
    return Form.MATRIX


def is_jointly_affine(probe: Probe, ref: Any, block: Block) -> bool:
    """Whether an expression affine in each site of a block is so in all together (no products of two of them)."""
    return _affine(probe, ref, block, probe.point(block), probe.point(block))
