"""What a likelihood template needs to know about a random argument a: a few expectations under q, all
elementwise.

Every class is a record of tensors that broadcast with each other. `of` builds it from a point (a constant
argument, an observed datum, a sampled or enumerated site), where an expectation is the function itself. A
point's logarithm stops at that of the smallest normal number, so that 0 · log 0 is 0, as in `torch.xlogy`,
and its gradient is finite.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Expectation(ABC):
    """E_q of the functions of an argument that a template is linear in."""

    requirement: ClassVar[
        str
    ]  # what an argument with latent sites must be for these to be exact; completes "a is not ..."

    @classmethod
    @abstractmethod
    def of(cls, value: Tensor) -> Expectation:
        """The expectations when q is a point mass at `value`."""


@dataclass(frozen=True)
class Constant(Expectation):
    """a itself: no latent site in it, or an enumerated one."""

    value: Tensor

    requirement: ClassVar[str] = "free of latent sites other than enumerated ones"

    @classmethod
    def of(cls, value: Tensor) -> Constant:
        return cls(value)


@dataclass(frozen=True)
class Linear(Expectation):
    """E a and Var a; `variance=None` is zero."""

    mean: Tensor
    variance: Tensor | None = None

    requirement: ClassVar[str] = "affine in Gaussian sites"

    @classmethod
    def of(cls, value: Tensor) -> Linear:
        return cls(value)


@dataclass(frozen=True)
class Vector(Expectation):
    """E a (…, d) and Cov a (…, d, d); `covariance=None` is zero."""

    mean: Tensor
    covariance: Tensor | None = None

    requirement: ClassVar[str] = "affine in Gaussian sites"

    @classmethod
    def of(cls, value: Tensor) -> Vector:
        return cls(value)


@dataclass(frozen=True)
class Positive(Expectation):
    """E a and E log a."""

    mean: Tensor
    log: Tensor

    requirement: ClassVar[str] = (
        "a positive constant times a Gamma site or times the reciprocal of an InverseGamma site "
        "(or a product of such in different sites)"
    )

    @classmethod
    def of(cls, value: Tensor) -> Positive:
        return cls(value, _log(value))


@dataclass(frozen=True)
class Probability(Expectation):
    """E log a and E log(1 − a)."""

    log: Tensor
    log_complement: Tensor

    requirement: ClassVar[str] = "a Beta site or one minus a Beta site"

    @classmethod
    def of(cls, value: Tensor) -> Probability:
        return cls(_log(value), torch.log1p(-value).clamp_min(_log_tiny(value)))


@dataclass(frozen=True)
class Simplex(Expectation):
    """E log a (…, K).

    A template takes a as given: that Σ a = 1 for every value of its sites is for the caller to verify. `of`
    normalises, log a − log Σ a, as torch does with `probs`.
    """

    log: Tensor

    requirement: ClassVar[str] = "a Dirichlet site, or rows or a permutation of one, that sums to one"

    @classmethod
    def of(cls, value: Tensor) -> Simplex:
        return cls(_log(value) - _log(value.sum(-1, keepdim=True)))


@dataclass(frozen=True)
class Matrix(Expectation):
    """E A (…, d, d) and E log|A|, A symmetric and positive definite."""

    mean: Tensor
    logdet: Tensor

    requirement: ClassVar[str] = "a Wishart site, or a Gamma site times a constant positive-definite matrix"

    @classmethod
    def of(cls, value: Tensor) -> Matrix:
        # not torch.logdet, whose forward derivative of a gradient is wrong in batches
        factor, failed = torch.linalg.cholesky_ex(value)
        logdet = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return cls(value, torch.where(failed > 0, torch.nan, logdet))


def _log_tiny(value: Tensor) -> float:
    return math.log(torch.finfo(value.dtype).tiny)


def _log(value: Tensor) -> Tensor:
    return value.clamp_min(torch.finfo(value.dtype).tiny).log()
