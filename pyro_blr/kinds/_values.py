"""What is known of an expression as a function of one site: the public `Kind`, the `Value` of the rules."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

__all__ = [
    "CholeskyFactor",
    "Form",
    "Kind",
    "Shape",
    "Sort",
    "Step",
    "Value",
    "common_trailing",
    "shared_dims",
]

Shape = tuple[int, ...]


class Sort(enum.Enum):
    """What a site's values are; one of SIMPLEX spans the last dim, one of MATRIX (positive definite) two."""

    REAL = "real"
    POSITIVE = "positive"
    PROBABILITY = "probability"
    SIMPLEX = "simplex"
    MATRIX = "matrix"

    @property
    def event_dims(self) -> int:
        return {Sort.SIMPLEX: 1, Sort.MATRIX: 2}.get(self, 0)

    @property
    def is_positive(self) -> bool:
        return self in (Sort.POSITIVE, Sort.PROBABILITY, Sort.SIMPLEX)


class Form(enum.Enum):
    """What an expression is to a site z, whatever the value of z.

    CONSTANT    free of z
    SELECTION   every element is an element of z (SIMPLEX: every vector is a vector of z)
    COMPLEMENT  one minus a selection
    MONOMIAL    every element is c z_i^power, i and c its own (SIMPLEX: the vectors kept whole)
    PARTIAL     every element is c z_i^power or a constant (sites of sort POSITIVE only)
    LOG         every element is c + power log z_i
    AFFINE      c + a linear map of z
    MATRIX      every matrix is a constant times A W^power Aᵀ, A square, power ±1, W a matrix of z
    CHOLESKY    every matrix is the lower Cholesky factor of such a matrix (up to a constant's sign)
    POWERS      every element is c Π_i z_i^a_i (1 - z_i)^b_i; claimed of numbers alone, never of an expression
    OTHER       nothing of this is known
    """

    CONSTANT = "constant"
    SELECTION = "selection"
    COMPLEMENT = "complement"
    MONOMIAL = "monomial"
    PARTIAL = "partial"
    LOG = "log"
    AFFINE = "affine"
    MATRIX = "matrix"
    CHOLESKY = "cholesky"
    POWERS = "powers"
    OTHER = "other"


@dataclass(frozen=True)
class Kind:
    """What `kind_of` says: the form, and the operation that gave it with its line.

    For OTHER that is the first operation that broke the form.  Over the last `shared_dims` dims all elements
    come from one element of the site; `is_diagonal`: the last two dims hold diagonal matrices.  `assumes`:
    the tape's inputs whose values, not only shapes, the claim rests on.
    """

    form: Form
    power: float = 1.0
    operation: str = ""
    source: str = ""
    coefficient: float | None = None  # c, where it is one known number for all elements
    shared_dims: int = 0
    is_diagonal: bool = False
    assumes: frozenset[int] = frozenset()

    @property
    def is_affine(self) -> bool:
        """Whether the expression is a constant plus a linear map of the site."""
        if self.form in (Form.MONOMIAL, Form.PARTIAL, Form.MATRIX):
            return self.power == 1
        return self.form in (Form.CONSTANT, Form.SELECTION, Form.COMPLEMENT, Form.AFFINE)

    @property
    def scales_matrix(self) -> bool:
        """Whether every matrix is z_i^power times a constant, or diagonal: log |.| is affine in log z."""
        return self.form in (Form.SELECTION, Form.MONOMIAL) and (self.shared_dims >= 2 or self.is_diagonal)


class CholeskyFactor(NamedTuple):
    """X = L, Lᵀ, L⁻¹ or L⁻ᵀ; X Xᵀ is the matrix, or Xᵀ X if `is_left`; `is_flipped`: Xᵀ bears the token."""

    is_left: bool = False
    is_flipped: bool = False
    is_lower: bool = True


@dataclass(frozen=True)
class Value:
    """An abstract value.  SELECTION is a MONOMIAL of power 1 and coefficient 1 here.

    `token` names which element of the site stands where: two values with equal tokens and shapes are aligned.
    For a CONSTANT it names the constant, for a MATRIX its value.  `product` marks A W^power (or W^power A),
    half way to A W^power Aᵀ: (side, A's token).
    """

    form: Form
    shape: Shape
    token: Hashable = None
    power: float = 1.0
    coefficient: float | None = None
    shared: int = 0
    is_whole: bool = False
    is_diagonal: bool = False
    factor: CholeskyFactor | None = None
    product: tuple[str, Hashable] | None = None
    operation: str = ""
    source: str = ""

    @property
    def is_constant(self) -> bool:
        return self.form is Form.CONSTANT

    @property
    def is_monomial(self) -> bool:
        return self.form is Form.MONOMIAL

    @property
    def is_single(self) -> bool:
        """Whether one element of the site is all there is of it."""
        return self.shared >= len(self.shape) and self.form in (Form.MONOMIAL, Form.LOG, Form.COMPLEMENT)

    @property
    def is_selection(self) -> bool:
        return self.is_monomial and self.power == 1 and self.coefficient == 1 and self.is_whole

    @property
    def is_affine(self) -> bool:
        if self.form in (Form.MONOMIAL, Form.PARTIAL, Form.MATRIX):
            return self.power == 1
        return self.form in (Form.COMPLEMENT, Form.AFFINE)

    def kind(self, sort: Sort, assumes: frozenset[int]) -> Kind:
        """The same in public words."""
        form, power, where = self.form, self.power, (self.operation, self.source)
        if form is Form.CONSTANT:
            return Kind(form, coefficient=self.coefficient, assumes=assumes)
        if self.is_selection:
            form = Form.SELECTION
        elif form is Form.COMPLEMENT and (self.coefficient != 1 or not self.is_whole):
            form = Form.AFFINE
        elif self.is_monomial and not self.is_whole and sort is Sort.SIMPLEX:
            form = Form.AFFINE if power == 1 else Form.OTHER
        elif self.factor is not None and (self.factor.is_left or not self.factor.is_lower):
            form = Form.OTHER
        if form in (Form.AFFINE, Form.OTHER):
            return Kind(form, 1.0, *where, assumes=assumes)
        shared = min(self.shared, len(self.shape)) if form not in (Form.MATRIX, Form.CHOLESKY) else 0
        return Kind(form, power, *where, self.coefficient, shared, self.is_diagonal, assumes)


@dataclass(frozen=True)
class Step:
    """Where a rule stands: the sort of the site, the operation, and the shape of its result."""

    sort: Sort
    operation: str
    source: str
    shape: Shape
    index: int
    read: Callable[[Value], float | None]  # the number that all elements of a constant are, if they are

    def constant(self, number: float | None = None) -> Value:
        return Value(Form.CONSTANT, self.shape, ("node", self.index), coefficient=number)

    def affine(self, **marks: Any) -> Value:
        return Value(Form.AFFINE, self.shape, **marks)

    def other(self, operation: str | None = None) -> Value:
        return Value(Form.OTHER, self.shape, operation=operation or self.operation, source=self.source)

    def monomial(self, like: Value, power: float, coefficient: float | None) -> Value:
        """c z^power, aligned as `like` is."""
        power = round(power, 12)
        if coefficient is not None and not math.isfinite(coefficient):
            coefficient = None
        if power == 0:
            return self.constant(coefficient)
        return replace(like, form=Form.MONOMIAL, power=power, coefficient=coefficient, operation="", source="")

    def linear(self, value: Value) -> Value:
        """A linear map of `value` of which no more is known."""
        if value.is_constant:
            return self.constant()
        if value.is_monomial and value.is_single:
            like = replace(value, shape=self.shape, shared=len(self.shape), is_whole=self.sort.event_dims == 0)
            return self.monomial(replace(like, is_diagonal=False), value.power, None)
        return self.affine() if value.is_affine else self.other()


def common_trailing(a: Shape, b: Shape) -> int:
    """How many of the last dims of two shapes agree."""
    count = 0
    while count < min(len(a), len(b)) and a[-1 - count] == b[-1 - count]:
        count += 1
    return count


def shared_dims(shape: Shape, at_least: int = 0) -> int:
    """The last dims over which one element of the site stands: those known, then those of size 1."""
    count = min(at_least, len(shape))
    while count < len(shape) and shape[-1 - count] == 1:
        count += 1
    return count
