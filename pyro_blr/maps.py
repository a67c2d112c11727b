"""Arguments whose coefficients never change, compiled: a ↦ b + Σ_l C_l x_l, read off once and applied without running the program.

An argument that depends on one run's data and on blocks of q alone is, in each block's statistic x, a constant affine map.  Where every
output sees one entry of x the map is a gather; otherwise its columns C_l are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_blr.blocks import Block
from pyro_blr.conjugacy import Argument
from pyro_blr.families import InverseGamma
from pyro_blr.kinds import Form
from pyro_blr.likelihoods import Expectation, Linear, Positive, Probability, Simplex

__all__ = ["AffineMap", "Columns", "Gather", "compiled"]


@dataclass(frozen=True)
class Gather:
    """out = x[index] (then shaped), where each output is one entry of x.

    `shape` alone: a reshape.  `rows`: whole rows of the last dim, which are cheaper to gather and to scatter back than entries.
    """

    shape: torch.Size
    index: Tensor | None = None
    rows: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self.rows is not None:
            return x.reshape(-1, x.shape[-1]).index_select(0, self.rows).reshape(self.shape)
        if self.index is not None:
            return x.reshape(-1).index_select(0, self.index).reshape(self.shape)
        return x.reshape(self.shape)


def gather_of(numbers: Tensor, source_shape: torch.Size) -> Gather | None:
    """The gather whose output at x = 0, 1, 2, … is `numbers`; None where these are no indices."""
    index = numbers.round()
    size = source_shape.numel()
    if not bool(((numbers - index).abs() < 1e-3).all()) or not bool(((index >= 0) & (index < size)).all()):
        return None
    index = index.long()
    flat = index.flatten()
    if flat.numel() == size and bool((flat == torch.arange(size, device=flat.device)).all()):
        return Gather(index.shape)
    width = source_shape[-1] if source_shape else 1
    if width > 1 and index.dim() > 0 and index.shape[-1] == width:
        first = index[..., :1]
        if bool((first % width == 0).all()) and bool((index == first + torch.arange(width, device=index.device)).all()):
            return Gather(index.shape, rows=(first // width).flatten())
    return Gather(index.shape, index=flat)


@dataclass(frozen=True)
class Columns:
    """out = Σ_l C_l x_l over all entries of x, and Var out = Σ_{lk} C_l V_lk C_k; C has shape (L, *out)."""

    columns: Tensor

    def mean(self, x: Tensor) -> Tensor:
        flat = self.columns.reshape(self.columns.shape[0], -1)
        return (x.reshape(1, -1) @ flat).reshape(self.columns.shape[1:])

    def variance(self, variance: Tensor | None, covariance: Tensor | None) -> Tensor:
        flat = self.columns.reshape(self.columns.shape[0], -1)
        if covariance is not None:
            spread = (flat * (covariance @ flat)).sum(0)
        else:
            assert variance is not None
            spread = (variance.reshape(1, -1) @ flat.square()).squeeze(0)
        return spread.reshape(self.columns.shape[1:])


Moments = Mapping[str, Mapping[str, Tensor]]
LeafFunction = Callable[[Mapping[str, Tensor]], Tensor]


@torch.no_grad()
def compiled(
    argument: Argument, function: LeafFunction, blocks: Mapping[str, Block], moments: Moments
) -> Callable[[Moments], Expectation] | None:
    """moments ↦ the argument's expectations, without running the program; None where its form is not one of these.

    `function` is the argument as a function of the leaves of its blocks.
    """
    try:
        if argument.role is Linear:
            return _affine(argument, function, blocks, moments)
        if len(argument.forms) != 1:
            return None
        ((name, form),) = argument.forms.items()
        mine = moments[name]
        if argument.role is Positive:
            return _positive(name, function, mine, isinstance(blocks[name].family, InverseGamma))
        if argument.role is Probability:
            return _probability(name, form, function, mine["log"])
        if argument.role is Simplex:
            return _simplex(name, function, mine["log"])
    except (RuntimeError, IndexError):  # the program objects to float64 leaves: it is run as it stands
        return None
    return None


def _numbered(like: Tensor) -> Tensor:
    """1, 2, 3, … in float64, which tells entries of x apart."""
    return torch.arange(1, like.numel() + 1, dtype=torch.float64, device=like.device).reshape(like.shape)


def _positive(name: str, function: LeafFunction, mine: Mapping[str, Tensor], inverse: bool) -> Any:
    """c x_i (c / x_i): E a = c E x_i^{±1}, E log a = log c ± E log x_i."""
    like = mine["log"]
    ones = torch.ones_like(like, dtype=torch.float64)
    coefficient = function({name: ones})
    ratio = function({name: _numbered(like)}) / coefficient
    gather = gather_of((ratio.reciprocal() if inverse else ratio) - 1, like.shape)
    if gather is None:
        return None
    c = coefficient.to(like.dtype)
    unit = bool((coefficient == 1).all())
    log_c = coefficient.log().to(like.dtype)

    def expectation(moments: Moments) -> Expectation:
        m = moments[name]
        mean = gather(m["inverse"] if inverse else m["mean"])
        log = gather(-m["log"] if inverse else m["log"])
        return Positive(mean, log) if unit else Positive(c * mean, log_c + log)

    return expectation


def _probability(name: str, form: Form, function: LeafFunction, like: Tensor) -> Any:
    numbers = _numbered(like) / (like.numel() + 1)
    value = function({name: numbers})
    flipped = form is Form.COMPLEMENT
    gather = gather_of((1 - value if flipped else value) * (like.numel() + 1) - 1, like.shape)
    if gather is None:
        return None

    def expectation(moments: Moments) -> Expectation:
        log, log_complement = gather(moments[name]["log"]), gather(moments[name]["log_complement"])
        return Probability(log_complement, log) if flipped else Probability(log, log_complement)

    return expectation


def _simplex(name: str, function: LeafFunction, like: Tensor) -> Any:
    gather = gather_of(function({name: _numbered(like)}) - 1, like.shape)
    return None if gather is None else lambda moments: Simplex(gather(moments[name]["log"]))


@dataclass(frozen=True)
class AffineMap:
    """b + Σ over blocks of a gather with coefficients, or of columns."""

    offset: Tensor
    gathers: Mapping[str, tuple[Tensor | None, Tensor | None, Gather]]
    columns: Mapping[str, Columns]

    def __call__(self, moments: Moments) -> Linear:
        mean: Tensor | None = self.offset if self.offset is not None else None
        variance = None
        for name, (coefficient, square, gather) in self.gathers.items():
            m, v = gather(moments[name]["mean"]), gather(_diagonal(moments[name]))
            if coefficient is not None:
                m, v = coefficient * m, square * v
            mean = m if mean is None else mean + m
            variance = v if variance is None else variance + v
        for name, columns in self.columns.items():
            m = columns.mean(moments[name]["mean"])
            v = columns.variance(moments[name].get("variance"), moments[name].get("covariance"))
            mean = m if mean is None else mean + m
            variance = v if variance is None else variance + v
        assert mean is not None
        return Linear(mean, variance)


def _diagonal(moments: Mapping[str, Tensor]) -> Tensor:
    if "covariance" in moments:
        return moments["covariance"].diagonal(dim1=-2, dim2=-1)
    return moments["variance"]


def _affine(argument: Argument, function: LeafFunction, blocks: Mapping[str, Block], moments: Moments) -> Any:
    if argument.products:
        return None
    leaves = {name: torch.zeros_like(moments[name]["mean"]) for name in argument.forms}
    offset = function(leaves)
    gathers, columns = {}, {}
    for name in argument.forms:
        like = leaves[name]
        mixed = argument.mixed[name]

        def change(x: Tensor, name: str = name) -> Tensor:
            return function({**leaves, name: x}) - offset

        if not mixed:
            ones = change(torch.ones_like(like))
            numbers = change(_numbered(like).to(like.dtype)).double() / ones.double()
            gather = gather_of(torch.where(ones == 0, 0.0, numbers - 1), like.shape)
            if gather is None:
                return None
            unit = bool((ones == 1).all())
            gathers[name] = (None if unit else ones, None if unit else ones.square(), gather)
        elif all(like.shape[dim] == 1 or dim in mixed for dim in range(-like.dim(), 0)):
            columns[name] = Columns(_columns(change, like))
        else:
            return None
    return AffineMap(None if bool((offset == 0).all()) else offset, gathers, columns)


def _columns(change: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    basis = torch.eye(like.numel(), dtype=like.dtype, device=like.device).reshape(-1, *like.shape)
    try:
        return torch.func.vmap(change)(basis)
    except (RuntimeError, ValueError, NotImplementedError):
        return torch.stack([change(e) for e in basis])
