"""Arguments whose coefficients never change, compiled: a ↦ b + Σ_l C_l x_l, read off once and applied without running the program.

An argument that depends on one run's data and on blocks of q alone is, in each block's statistic x, a constant affine map.  Where every
output sees one entry of x the map is a gather; otherwise its columns C_l are kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_blr.blocks import Block
from pyro_blr.families import InverseGamma, MultivariateNormal, Normal, Wishart
from pyro_blr.gathers import Gather, columns_of, gather_of
from pyro_blr.kinds import Form
from pyro_blr.likelihoods import Expectation, Linear, Matrix, Positive, Probability, Simplex, Vector
from pyro_blr.pieces import Entries, JointMap, Slab, joint_map
from pyro_blr.plans import Argument
from pyro_blr.probabilities import powers_map

__all__ = ["AffineMap", "Columns", "Monomial", "SimplexRows", "compiled"]


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
    argument: Argument,
    function: LeafFunction,
    terms: Sequence[LeafFunction],
    blocks: Mapping[str, Block],
    moments: Moments,
    sites: Collection[str],
    design_of: Callable[[str], Tensor | None] = lambda site: None,
) -> Callable[[Moments], Expectation] | None:
    """moments ↦ the argument's expectations, without running the program; None where its form is not one of these.

    `function` is the argument as a function of the leaves of its blocks, in which only `sites` matter, and but for what is
    constant the sum of `terms`; `design_of(site)` its matrix, where that is at hand.
    """
    try:
        if argument.role is Linear:
            return _affine(argument, function, terms, blocks, moments, sites, design_of)
        if len(argument.forms) != 1:
            return None
        ((name, form),) = argument.forms.items()
        mine = moments[name]
        if argument.role is Positive and form is not Form.PARTIAL:
            return _positive(name, function, mine, isinstance(blocks[name].family, InverseGamma))
        if argument.role is Probability:
            return _probability(name, form, function, mine["log"])
        if argument.role is Simplex and form is Form.POWERS:
            return powers_map(name, function, mine["log"])
        if argument.role is Simplex:
            return _simplex(name, function, mine["log"])
        if argument.role is Vector and "covariance" in mine and not blocks[name].is_joint:
            return _vector(name, function, mine["mean"])
        if argument.role is Matrix and isinstance(blocks[name].family, Wishart):
            return _matrix(name, function, mine["mean"])
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
    unit = bool((coefficient == 1).all())
    c = coefficient.to(like.dtype)
    return Monomial(name, c, None if unit else coefficient.log().to(like.dtype), gather, inverse)


@dataclass(frozen=True)
class Monomial:
    """c x_i, or c / x_i for an InverseGamma site, elementwise; `log_coefficient` is None where c is one."""

    name: str
    coefficient: Tensor
    log_coefficient: Tensor | None
    gather: Gather
    inverse: bool

    @property
    def is_scalar(self) -> bool:
        """Whether one entry of the site serves every output."""
        return self.gather.shape.numel() == 1

    def __call__(self, moments: Moments) -> Positive:
        mine = moments[self.name]
        mean = self.gather(mine["inverse"] if self.inverse else mine["mean"])
        log = self.gather(-mine["log"] if self.inverse else mine["log"])
        if self.log_coefficient is None:
            return Positive(mean, log)
        return Positive(self.coefficient * mean, self.log_coefficient + log)

    def scalar(self, moments: Moments) -> Positive:
        """The site's own expectations, without the coefficient."""
        mine = moments[self.name]
        mean = self.gather(mine["inverse"] if self.inverse else mine["mean"]).reshape(())
        return Positive(mean, self.gather(-mine["log"] if self.inverse else mine["log"]).reshape(()))


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


@dataclass(frozen=True)
class SimplexRows:
    """Rows of a Dirichlet site: E log a is a gather of E log p."""

    name: str
    gather: Gather

    def __call__(self, moments: Moments) -> Simplex:
        return Simplex(self.gather(moments[self.name]["log"]))


def _simplex(name: str, function: LeafFunction, like: Tensor) -> SimplexRows | None:
    gather = gather_of(function({name: _numbered(like)}) - 1, like.shape)
    return None if gather is None else SimplexRows(name, gather)


def _vector(name: str, function: LeafFunction, like: Tensor) -> Any:
    """Whole vectors of the site, each output one of them."""
    gather = gather_of(function({name: _numbered(like)}) - 1, like.shape)
    offset = function({name: torch.zeros_like(like, dtype=torch.float64)})
    if gather is None or gather.index is not None or bool((offset != 0).any()):
        return None
    d = like.shape[-1]
    if gather.shape.numel() > 0 and gather.rows is None and gather.shape[-1:] != like.shape[-1:]:
        return None

    def expectation(moments: Moments) -> Expectation:
        covariance = moments[name]["covariance"].reshape(-1, d * d)
        if gather.rows is not None:
            covariance = covariance.index_select(0, gather.rows)
        return Vector(gather(moments[name]["mean"]), covariance.reshape(*gather.shape, d))

    return expectation


def _matrix(name: str, function: LeafFunction, like: Tensor) -> Any:
    """A positive constant times whole matrices of the site, each output one of them."""
    d = like.shape[-1]
    batch = like.shape[:-2]
    generator = torch.Generator().manual_seed(3)
    root = torch.randn(d, d, generator=generator, device="cpu", dtype=torch.float64).to(like.device)
    pattern = root @ root.mT + torch.eye(d, dtype=torch.float64, device=like.device)
    numbers = _numbered(like[..., 0, 0]) if batch else torch.ones((), dtype=torch.float64, device=like.device)
    value = function({name: numbers[..., None, None] * pattern})
    first = function({name: torch.ones_like(numbers)[..., None, None] * pattern})
    scale = first[..., 0, 0] / pattern[0, 0]
    if not bool(torch.allclose(first, scale[..., None, None] * pattern, rtol=1e-6)):
        return None
    gather = gather_of(value[..., 0, 0] / first[..., 0, 0] - 1, torch.Size(batch))
    if gather is None:
        return None
    index = gather.index if gather.index is not None else gather.rows_as_entries()
    unit = bool((scale == 1).all())
    c, log_c = scale.to(like.dtype)[..., None, None], (d * scale.log()).to(like.dtype)

    def expectation(moments: Moments) -> Expectation:
        mean = moments[name]["mean"].reshape(-1, d * d)
        mean = (mean if index is None else mean.index_select(0, index)).reshape(*gather.shape, d, d)
        logdet = gather(moments[name]["logdet"])
        return Matrix(mean, logdet) if unit else Matrix(c * mean, log_c + logdet)

    return expectation


@dataclass(frozen=True)
class AffineMap:
    """b + Σ over blocks of a gather with coefficients, of columns, or of a joint block's pieces."""

    offset: Tensor | None
    gathers: Mapping[str, tuple[Tensor | None, Tensor | None, Gather]]
    columns: Mapping[str, Columns]
    joints: Mapping[str, JointMap]

    def __call__(self, moments: Moments) -> Linear:
        mean = self.offset
        variance = None
        for name, (coefficient, square, gather) in self.gathers.items():
            m, v = gather(moments[name]["mean"]), gather(_diagonal(moments[name]))
            if coefficient is not None and square is not None:
                m, v = coefficient * m, square * v
            mean = m if mean is None else mean + m
            variance = v if variance is None else variance + v
        for name, columns in self.columns.items():
            m = columns.mean(moments[name]["mean"])
            v = columns.variance(moments[name].get("variance"), moments[name].get("covariance"))
            mean = m if mean is None else mean + m
            variance = v if variance is None else variance + v
        for name, joint in self.joints.items():
            m, v = joint.mean(moments[name]["mean"]), joint.variance(moments[name])
            mean = m if mean is None else mean + m
            variance = v if variance is None else variance + v
        assert mean is not None
        return Linear(mean, variance)

    def global_columns(self) -> dict[str, Tensor] | None:
        """Block -> columns (L, *out), where every block enters whole; None where one is gathered by rows, or joint."""
        if self.joints:
            return None
        result = {name: columns.columns for name, columns in self.columns.items()}
        for name, (coefficient, _, gather) in self.gathers.items():
            if gather.index is not None or gather.rows is not None or gather.source != 1:
                return None
            result[name] = torch.ones(1, *gather.shape) if coefficient is None else coefficient.unsqueeze(0)
        return result

    def pieces(self) -> dict[str, tuple[Entries | Slab, ...]] | None:
        """Block -> its pieces, where some block is joint; None where none is, or where a joint one is in a plate."""
        if not self.joints or any(joint.num_batch > 1 for joint in self.joints.values()):
            return None
        result: dict[str, tuple[Entries | Slab, ...]] = {name: joint.pieces for name, joint in self.joints.items()}
        result |= {name: (Slab(0, columns.columns),) for name, columns in self.columns.items()}
        for name, (coefficient, _, gather) in self.gathers.items():
            if gather.rows is not None:
                return None
            source = torch.arange(gather.source, device=self._device)
            index = source if gather.index is None else gather.index
            result[name] = (Entries(index.reshape(gather.shape), coefficient),)
        return result

    @property
    def _device(self) -> torch.device:
        first = next(iter(self.joints.values())).pieces[0]
        return (first.index if isinstance(first, Entries) else first.columns).device


def _diagonal(moments: Mapping[str, Tensor]) -> Tensor:
    if "covariance" in moments:
        return moments["covariance"].diagonal(dim1=-2, dim2=-1)
    return moments["variance"]


def _changed(term: LeafFunction, leaves: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    """What a term is at x more than at zero."""
    return term({**leaves, name: x}) - term(leaves)


def _affine(
    argument: Argument,
    function: LeafFunction,
    terms: Sequence[LeafFunction],
    blocks: Mapping[str, Block],
    moments: Moments,
    sites: Collection[str],
    design_of: Callable[[str], Tensor | None],
) -> Any:
    if argument.products:
        return None
    leaves = {name: torch.zeros_like(moments[name]["mean"]) for name in argument.forms}
    offset = function(leaves)
    gathers, columns, joints = {}, {}, {}
    for name in argument.forms:
        like = leaves[name]
        mixed = argument.mixed[name]

        def change(x: Tensor, name: str = name) -> Tensor:
            return function({**leaves, name: x}) - offset

        if blocks[name].is_joint:
            changes = [functools.partial(_changed, term, leaves, name) for term in terms]
            joint = joint_map(blocks[name], changes, like, sites, design_of)
            if joint is None:
                return None
            joints[name] = joint
        elif not mixed:
            ones = change(torch.ones_like(like))
            numbers = change(_numbered(like).to(like.dtype)).double() / ones.double()
            gather = gather_of(torch.where(ones == 0, 0.0, numbers - 1), like.shape)
            if gather is None:
                return None
            unit = bool((ones == 1).all())
            gathers[name] = (None if unit else ones, None if unit else ones.square(), gather)
        elif all(like.shape[dim] == 1 or dim in mixed for dim in range(-like.dim(), 0)):
            plain = len(argument.forms) == 1 and isinstance(blocks[name].family, (Normal, MultivariateNormal))
            design = design_of(blocks[name].site_names[0]) if plain else None
            columns[name] = Columns(
                columns_of(
                    change, torch.eye(like.numel(), dtype=like.dtype, device=like.device).reshape(-1, *like.shape)
                )
                if design is None
                else design.mT
            )
        else:
            return None
    return AffineMap(None if bool((offset == 0).all()) else offset, gathers, columns, joints)
