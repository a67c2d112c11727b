"""E_q[log f] = Σ_j c_j t_j: sums of products of expectations, without materialising large broadcasts.

A term is elementwise over the batch of f. `sum_terms` adds terms and sums them over the rightmost batch dims:
elementwise where that is small, and each term by itself, as matrix products, where the joint broadcast (data
against the components of a mixture) is much larger than the operands.
"""

from __future__ import annotations

import functools
import string
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_blr.shapes import broadcast_shape

from ._expectations import Linear
from ._select import select

_LARGE = 4  # a broadcast is large when it has more than this many times the elements of its operands


class Term(ABC):
    """One summand of E_q[log f], elementwise over the batch of f."""

    @property
    @abstractmethod
    def operands(self) -> list[torch.Size]:
        """Shapes whose broadcast is the term's batch shape."""

    @abstractmethod
    def elementwise(self) -> Tensor:
        """The term, with its whole batch shape."""

    @abstractmethod
    def contracted(self, num_event_dims: int, weights: Tensor | None) -> Tensor:
        """Σ w · term over the rightmost dims of the broadcast of term and w."""


@dataclass(frozen=True)
class Product(Term):
    """Σ c t over `inner` further dims on the right of the batch's (the entries of a vector or a matrix).

    The statistic is the side of the data, which weights usually fit.
    """

    coefficient: Tensor
    statistic: Tensor
    inner: int = 0

    @property
    def operands(self) -> list[torch.Size]:
        return [x.shape[: x.dim() - self.inner] for x in (self.coefficient, self.statistic)]

    def elementwise(self) -> Tensor:
        return contract(self.coefficient, self.statistic, self.inner)

    def contracted(self, num_event_dims: int, weights: Tensor | None) -> Tensor:
        statistic = self.statistic
        if weights is not None:
            statistic = statistic * weights[(...,) + (None,) * self.inner]
        return contract(self.coefficient, statistic, num_event_dims + self.inner)


@dataclass(frozen=True)
class Square(Term):
    """E c (x − m)² = c ((E x − E m)² + Var x + Var m), with c, x and m independent."""

    coefficient: Tensor
    value: Linear
    loc: Linear

    @property
    def operands(self) -> list[torch.Size]:
        tensors = (self.coefficient, self.value.mean, self.value.variance, self.loc.mean, self.loc.variance)
        return [tensor.shape for tensor in tensors if tensor is not None]

    def elementwise(self) -> Tensor:
        square = (self.value.mean - self.loc.mean).square()
        for variance in (self.value.variance, self.loc.variance):
            square = square if variance is None else square + variance
        return self.coefficient * square

    def contracted(self, num_event_dims: int, weights: Tensor | None) -> Tensor:
        # c x² − 2 c m x + c m² loses (x / sd)² of accuracy: so relative to a point near m, and in float64.
        c, x, m = self.coefficient.double(), self.value.mean.double(), self.loc.mean.double()
        reference = m.detach()
        if m.dim() > num_event_dims:
            reference = reference.mean(tuple(range(m.dim() - num_event_dims)))
        x, m = x - reference, m - reference
        square = x.square() if self.value.variance is None else x.square() + self.value.variance
        offset = m.square() if self.loc.variance is None else m.square() + self.loc.variance
        products: list[Term | Tensor] = [Product(c, square), Product(-2 * c * m, x), c * offset]
        total = _contract_terms(products, num_event_dims, None if weights is None else weights.double())
        return total.to(_result_type(self.coefficient, self.value.mean, self.loc.mean))


@dataclass(frozen=True)
class Lookup(Term):
    """log a[k]: one entry of each row of logarithms (*batch, V), chosen by an index (*batch)."""

    log: Tensor
    index: Tensor

    @property
    def operands(self) -> list[torch.Size]:
        return [self.log.shape[:-1], self.index.shape]

    def elementwise(self) -> Tensor:
        return select(self.log, self.index)

    def contracted(self, num_event_dims: int, weights: Tensor | None) -> Tensor:
        chosen = self.elementwise()
        return _sum_right(chosen if weights is None else chosen * weights, num_event_dims)


def contract(coefficient: Tensor, statistic: Tensor, num_event_dims: int) -> Tensor:
    """Σ c t over the rightmost `num_event_dims` dims of the broadcast of c and t.

    A matrix product where that is cheaper: data (N, D) against components (K, 1, D) give (K, N) without a
    (K, N, D) tensor.
    """
    if num_event_dims == 0:
        return coefficient * statistic
    a = _sum_unshared(coefficient, statistic, num_event_dims)
    b = _sum_unshared(statistic, coefficient, num_event_dims)
    if a.shape[-num_event_dims:].numel() > 1 and _is_large([a.shape, b.shape]):
        dtype = _result_type(a, b)
        letters = string.ascii_letters[: max(a.dim(), b.dim())]
        sides = ",".join(letters[len(letters) - x.dim() :] for x in (a, b))
        return torch.einsum(f"{sides}->{letters[:-num_event_dims]}", a.to(dtype), b.to(dtype))
    return _sum_right(a * b, num_event_dims)


def sum_terms(terms: Sequence[Term | Tensor], num_event_dims: int, weights: Tensor | None = None) -> Tensor:
    """Σ_event w Σ_j term_j, the event being the rightmost `num_event_dims` dims of their broadcast."""
    if num_event_dims and _is_large([shape for term in terms for shape in _operands(term)]):
        return _contract_terms(terms, num_event_dims, weights)
    total, *others = (term.elementwise() if isinstance(term, Term) else term for term in terms)
    for other in others:
        total = total + other
    return _sum_right(total if weights is None else total * weights, num_event_dims)


def _contract_terms(terms: Sequence[Term | Tensor], num_event_dims: int, weights: Tensor | None) -> Tensor:
    """Σ_j Σ_event w term_j, term by term; one that lacks an event dim counts as often as it is long."""
    terms = sorted(terms, key=lambda term: broadcast_shape(*_operands(term)).numel())  # small ones are added first
    event_sizes = [_event_size([term], num_event_dims, weights) for term in terms]
    event_size = _event_size(terms, num_event_dims, weights)
    total: Tensor | None = None
    for term, size in zip(terms, event_sizes, strict=True):
        product = term if isinstance(term, Term) else Product(term, term.new_ones(()))
        summand = product.contracted(num_event_dims, weights)
        summand = summand if size == event_size else summand * (event_size // size)
        total = summand if total is None else total + summand
    assert total is not None
    return total


def _event_size(terms: Sequence[Term | Tensor], num_event_dims: int, weights: Tensor | None) -> int:
    shapes = [shape for term in terms for shape in _operands(term)]
    if weights is not None:
        shapes.append(weights.shape)
    return broadcast_shape(*shapes)[-num_event_dims:].numel()


def _result_type(*tensors: Tensor) -> torch.dtype:
    return functools.reduce(torch.promote_types, [tensor.dtype for tensor in tensors])


def _operands(term: Term | Tensor) -> list[torch.Size]:
    return term.operands if isinstance(term, Term) else [term.shape]


def _is_large(shapes: Sequence[torch.Size]) -> bool:
    return broadcast_shape(*shapes).numel() > _LARGE * sum(shape.numel() for shape in shapes)


def _sum_unshared(tensor: Tensor, other: Tensor, num_event_dims: int) -> Tensor:
    """Sum `tensor` over the event dims along which `other` does not vary, keeping them."""
    dims = [
        -i
        for i in range(1, min(num_event_dims, tensor.dim()) + 1)
        if tensor.size(-i) != 1 and (i > other.dim() or other.size(-i) == 1)
    ]
    return tensor.sum(dims, keepdim=True) if dims else tensor


def _sum_right(tensor: Tensor, num_dims: int) -> Tensor:
    num_dims = min(num_dims, tensor.dim())
    if num_dims == 0:
        return tensor
    kept = tensor.shape[: tensor.dim() - num_dims]
    if tensor.shape[-num_dims:].numel() == 1:
        return tensor.reshape(kept)
    return tensor.sum(tuple(range(-num_dims, 0)))
