"""E f(x) under x ~ N(m, V) in one or two dimensions, to a stated error, for many rows at once.

With x = m + L z, V = L Lᵀ, three integrals over a standard normal z say everything (Bonnet, Price; by parts, so that f needs no
derivative and may have kinks):

    E f,    E ∇f = L⁻ᵀ E[f z],    E ∇²f = L⁻ᵀ E[f (z zᵀ − I)] L⁻¹.

Gauss-Hermite rules are compared, row by row and axis by axis, with those of twice the order; an axis that they leave unsettled is cut
in panels, each bisected along the axis on which that changes most, until this changes nothing there either.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["TOLERANCE", "Integrals", "LogFactor", "gaussian_expectation", "gaussian_integrals"]

TOLERANCE = 1e-9  # of the average magnitude of the rows
_FIRST_ORDER, _LAST_ORDER = 6, 48  # of Gauss-Hermite rules
_PANEL_ORDER = {1: 10, 2: 11}  # of Gauss-Lobatto rules, by how many axes have panels
_EDGES = {1: (-14.0, -9.0, -6.0, -3.0, -1.0, 1.0, 3.0, 6.0, 9.0, 14.0), 2: (-9.0, -4.0, -1.3, 1.3, 4.0, 9.0)}
_ROUNDS = {1: 40, 2: 24}  # bisections at most
_MOST_PANELS = {1: 200_000, 2: 20_000}  # in one round; what is left unsettled then is stated as error
_REACH = 7.0  # beyond so many sds (probability 3e-12) a value that is not finite counts as the central one
_POINT = 1e-4  # the relative width that stands for a variance of zero

# Points (Q, M, k), and the row (M,) that each of the M columns belongs to (None: all rows in order) -> values (Q, M).
LogFactor = Callable[[Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Integrals:
    """E f (n,), E ∇f (n, k), E ∇²f (n, k, k), and the error of E f (n,) as seen by two orders, or two sets of points.

    `independent`: the errors have signs, and those of different rows average out.
    """

    value: Tensor
    gradient: Tensor
    hessian: Tensor
    error: Tensor
    independent: bool = False

    @property
    def total_error(self) -> float:
        """Of the sum over rows."""
        if not self.independent:
            return float(self.error.sum())
        return float(self.error.sum().abs() + self.error.norm())


def gaussian_expectation(found: Integrals, mean: Tensor, covariance: Tensor) -> Tensor:
    """E f as a function of (m, V), (n,): its derivatives there are ∇_m = E ∇f, ∇_m² = E ∇²f, ∇_V = ½ E ∇²f."""
    if not (mean.requires_grad or covariance.requires_grad):
        return found.value
    step, widened = mean - mean.detach(), covariance - covariance.detach()
    bent = (found.hessian * (step.unsqueeze(-1) * step.unsqueeze(-2) + widened)).sum((-2, -1))
    return found.value + (found.gradient * step).sum(-1) + 0.5 * bent


@torch.no_grad()
def gaussian_integrals(
    function: LogFactor, mean: Tensor, covariance: Tensor, tolerance: float = TOLERANCE
) -> Integrals:
    """E f, E ∇f and E ∇²f for rows of N(m, V): mean (n, k), covariance (n, k, k), float64, k at most 2."""
    root = _root(mean, covariance)
    centre = function(mean.unsqueeze(0), None)[0]
    centre = torch.where(centre.isfinite(), centre, 0.0)
    problem = _Problem(function, mean, root, centre)
    coarse = _by_hermite(problem, tolerance)
    found, error, k = coarse.found, coarse.error, mean.shape[-1]
    unsettled = (error > coarse.allowed) & found.isfinite().all(-1)
    for rough in itertools.product((False, True), repeat=k) if bool(unsettled.any()) else ():
        axes = tuple(axis for axis in range(k) if rough[axis])
        alike = (coarse.rough == torch.tensor(rough, device=mean.device)).all(-1)
        rows = (unsettled & alike).nonzero().squeeze(-1)
        if axes and rows.numel() > 0:
            panelled = _Panelled(problem, axes, coarse.orders, coarse.allowed)
            found[rows], error[rows] = panelled.integrals(rows)
    inverse = torch.linalg.solve_triangular(root, torch.eye(k, dtype=root.dtype, device=root.device), upper=False)
    gradient = (inverse.mT @ found[:, 1 : 1 + k].unsqueeze(-1)).squeeze(-1)
    hessian = inverse.mT @ _symmetric(found[:, 1 + k :], k) @ inverse
    return Integrals(centre + found[:, 0], gradient, hessian, error)


def _root(mean: Tensor, covariance: Tensor) -> Tensor:
    """L of V = L Lᵀ; a direction without variance gets a width that is small against the mean."""
    least = (_POINT * (1 + mean.abs())).square()
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    variance = torch.where(variance > 0, variance, least)
    first = variance[:, 0].sqrt()
    if mean.shape[-1] == 1:
        return first[:, None, None]
    below = covariance[:, 1, 0] / first
    rest = torch.maximum(variance[:, 1] - below.square(), 1e-10 * variance[:, 1]).sqrt()
    return torch.stack([torch.stack([first, torch.zeros_like(first)], -1), torch.stack([below, rest], -1)], -2)


def _symmetric(upper: Tensor, k: int) -> Tensor:
    """The symmetric matrices whose entries (0, 0), (0, 1), (1, 1) are given."""
    return upper.unsqueeze(-1) if k == 1 else upper[:, [0, 1, 1, 2]].unflatten(-1, (2, 2))


def _statistics(z: Tensor) -> Tensor:
    """1, z_i, z_i z_j − δ_ij (i ≤ j): (..., k) -> (..., S)."""
    k = z.shape[-1]
    second = [z[..., i] * z[..., j] - float(i == j) for i in range(k) for j in range(i, k)]
    return torch.stack([torch.ones_like(z[..., 0]), *z.unbind(-1), *second], -1)


@dataclass(frozen=True)
class _Problem:
    """f, the rows of N(m, L Lᵀ), and f at the means, from which values are counted."""

    function: LogFactor
    mean: Tensor
    root: Tensor
    centre: Tensor

    def values(self, z: Tensor, rows: Tensor | None) -> Tensor:
        """f(m + L z) − f(m) at z (Q, M, k) or (Q, 1, k) of the rows (M,)."""
        mean, root, centre = (
            (self.mean, self.root, self.centre)
            if rows is None
            else (self.mean[rows], self.root[rows], self.centre[rows])
        )
        axes = []  # a sum over a last dim of two is slow
        for i in range(mean.shape[-1]):
            moved = sum(root[:, i, j] * z[..., j] for j in range(i + 1))
            axes.append(mean[:, i] + moved)
        found = self.function(torch.stack(axes).movedim(0, -1), rows) - centre
        finite = found.isfinite()
        if bool(finite.all()):
            return found
        return torch.where((z.square().sum(-1) > _REACH**2) & ~finite, 0.0, found)


# -- Gauss-Hermite ---------------------------------------------------------------------------------------------------


@functools.cache
def _rule(orders: tuple[int, ...], panels: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    """The product rule (Q, k), (Q,): Gauss-Hermite of these orders, on the axes in `panels` Gauss-Lobatto on [−1, 1].

    Lobatto, because a kink between the end of a panel and the next node would be invisible to a rule without the end, in every half.
    """
    rules = [_lobatto(order) if axis in panels else _hermite(order) for axis, order in enumerate(orders)]
    nodes, weights = zip(*rules, strict=True)
    if len(orders) == 1:
        return nodes[0].unsqueeze(-1), weights[0]
    return torch.cartesian_prod(*nodes), torch.cartesian_prod(*weights).prod(-1)


def _hermite(order: int) -> tuple[Tensor, Tensor]:
    nodes, weights = np.polynomial.hermite_e.hermegauss(order)
    return torch.as_tensor(nodes), torch.as_tensor(weights / weights.sum())


def _lobatto(order: int) -> tuple[Tensor, Tensor]:
    legendre = np.polynomial.legendre.Legendre.basis(order - 1)
    nodes = np.concatenate([[-1.0], np.sort(legendre.deriv().roots().real), [1.0]])
    return torch.as_tensor(nodes), torch.as_tensor(2 / (order * (order - 1) * legendre(nodes) ** 2))


@dataclass(frozen=True)
class _Coarse:
    """Integrals (n, S) by Gauss-Hermite rules of these orders, their error (n,), the error allowed, and each row's rough axes (n, k)."""

    found: Tensor
    error: Tensor
    allowed: Tensor
    rough: Tensor
    orders: tuple[int, ...]


def _by_hermite(problem: _Problem, tolerance: float) -> _Coarse:
    """Orders are doubled, axis by axis, while that matters to some row, and for the rows to which it does."""
    n, k = problem.mean.shape
    orders, base = (_FIRST_ORDER,) * k, _hermite_integrals(problem, (_FIRST_ORDER,) * k, None)
    found, error = base.clone(), torch.full_like(base[:, 0], torch.inf)
    rough = torch.ones(n, k, dtype=torch.bool, device=base.device)
    rows: Tensor | None = None
    allowed = torch.zeros_like(error[:0].sum())
    while True:
        doubled = [_hermite_integrals(problem, _doubled(orders, (axis,)), rows) for axis in range(k)]
        changes = torch.stack([finer - base for finer in doubled])
        sizes = changes.abs().amax(-1).nan_to_num(torch.inf, torch.inf, torch.inf)  # (k, M)
        better = base + changes.sum(0)
        if rows is None:
            magnitude = (problem.centre + better[:, 0]).abs() + better.abs().amax(-1)
            allowed = tolerance * magnitude[magnitude.isfinite()].mean().nan_to_num(1.0).clamp_min(1e-300)
            rows = torch.arange(n, device=base.device)
        found[rows], error[rows], rough[rows] = better, sizes.sum(0), (sizes > allowed / (2 * k)).T
        pending = (error[rows] > allowed) & better.isfinite().all(-1)
        wanted = rough[rows[pending]].any(0).tolist()
        axes = tuple(axis for axis in range(k) if wanted[axis] and 4 * orders[axis] <= _LAST_ORDER)
        if not axes:
            return _Coarse(found, error, allowed, rough, orders)
        rows, orders = rows[pending], _doubled(orders, axes)
        base = doubled[axes[0]][pending] if len(axes) == 1 else _hermite_integrals(problem, orders, rows)


def _doubled(orders: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(2 * order if axis in axes else order for axis, order in enumerate(orders))


def _hermite_integrals(problem: _Problem, orders: tuple[int, ...], rows: Tensor | None) -> Tensor:
    z, weights = (x.to(problem.mean.device) for x in _rule(orders))
    return problem.values(z.unsqueeze(1), rows).mT @ (_statistics(z) * weights.unsqueeze(-1))


# -- panels ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Panels:
    """Boxes on some axes of z: their lower and upper corners (M, a), and the row of each (M,)."""

    low: Tensor
    high: Tensor
    rows: Tensor

    def halves(self, axis: Tensor) -> _Panels:
        """Both halves of every box along its own axis (M,): lower ones first."""
        along = torch.nn.functional.one_hot(axis, self.low.shape[-1]).bool()
        middle = 0.5 * (self.low + self.high)
        low = torch.cat([self.low, torch.where(along, middle, self.low)])
        high = torch.cat([torch.where(along, middle, self.high), self.high])
        return _Panels(low, high, torch.cat([self.rows, self.rows]))

    def where(self, chosen: Tensor) -> _Panels:
        return _Panels(self.low[chosen], self.high[chosen], self.rows[chosen])


@dataclass(frozen=True)
class _Panelled:
    """Panels on the rough `axes`, Gauss-Hermite rules of twice the `orders` on the others."""

    problem: _Problem
    axes: tuple[int, ...]
    orders: tuple[int, ...]
    allowed: Tensor

    def integrals(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(integrals (n, S), error (n,)) of some rows, panels bisected until halving one changes it by less than its share."""
        panels, count = self._first_panels(rows), len(self.axes)
        whole = self._over(panels)
        total = torch.zeros(self.problem.mean.shape[0], whole.shape[-1], dtype=whole.dtype, device=whole.device)
        error = torch.zeros_like(total[:, 0])
        for last in [False] * (_ROUNDS[count] - 1) + [True]:
            halves = []
            for along in range(count):
                split = panels.halves(torch.full_like(panels.rows, along))
                halves.append(self._over(split).unflatten(0, (2, -1)))
            change = torch.stack([(half.sum(0) - whole).abs().amax(-1) for half in halves])
            worst, axis = change.nan_to_num(torch.inf, torch.inf, torch.inf).max(0)
            parts = torch.stack(halves)[axis, :, torch.arange(axis.numel(), device=axis.device)]  # (M, 2, S)
            done = (worst <= self.allowed / 8) | ~parts.isfinite().all(-1).all(-1)
            if last or panels.rows.numel() > _MOST_PANELS[count]:
                done = torch.ones_like(done)
            total.index_add_(0, panels.rows[done], parts[done].sum(1))
            error.index_add_(0, panels.rows[done], worst[done])
            if bool(done.all()):
                break
            whole = parts[~done].transpose(0, 1).flatten(0, 1)
            panels = panels.where(~done).halves(axis[~done])
        return total[rows], error[rows]

    def _first_panels(self, rows: Tensor) -> _Panels:
        like, edges = self.problem.mean, _EDGES[len(self.axes)]
        boxes = torch.tensor(
            list(itertools.product(itertools.pairwise(edges), repeat=len(self.axes))), dtype=like.dtype
        )
        low, high = boxes.to(like.device).unbind(-1)  # (B, a)
        count = low.shape[0]
        return _Panels(low.repeat(rows.numel(), 1), high.repeat(rows.numel(), 1), rows.repeat_interleave(count))

    def _over(self, panels: _Panels) -> Tensor:
        """∫ (f − f(m)) T φ over every panel, (M, S)."""
        axes = list(self.axes)
        orders = tuple(
            _PANEL_ORDER[len(axes)] if axis in axes else min(2 * order, _LAST_ORDER)
            for axis, order in enumerate(self.orders)
        )
        nodes, weights = (x.to(panels.low.device) for x in _rule(orders, self.axes))
        z = nodes.unsqueeze(1).repeat(1, panels.rows.numel(), 1)
        half = 0.5 * (panels.high - panels.low)
        z[..., axes] = panels.low + half * (1 + z[..., axes])
        density = torch.exp(-0.5 * z[..., axes].square().sum(-1)) * (2 * torch.pi) ** (-len(axes) / 2)
        values = self.problem.values(z, panels.rows) * density * weights.unsqueeze(-1) * half.prod(-1)
        return torch.einsum("qm,qms->ms", values, _statistics(z))
