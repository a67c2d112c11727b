"""E f(x) under x ~ N(m, V) in one or two dimensions, to a stated error, for many rows at once.

With x = m + L z, V = L Lᵀ, three integrals over a standard normal z say everything (Bonnet, Price; by parts, so that f needs no
derivative and may have kinks):

    E f,    E ∇f = L⁻ᵀ E[f z],    E ∇²f = L⁻ᵀ E[f (z zᵀ − I)] L⁻¹.

Gauss-Hermite rules of doubled order are compared row by row; what they leave unsettled is integrated over panels, each bisected along
the axis on which that changes most, until two orders agree there too.
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
_ORDERS = {1: (6, 12, 24, 48), 2: (5, 10, 20)}
_PANEL_ORDER = {1: 10, 2: 7}
_EDGES = {1: (-14.0, -9.0, -6.0, -3.0, -1.0, 1.0, 3.0, 6.0, 9.0, 14.0), 2: (-9.0, -4.0, -1.3, 1.3, 4.0, 9.0)}
_ROUNDS = {1: 40, 2: 24}  # bisections at most
_MOST_PANELS = {1: 200_000, 2: 20_000}  # in one round; what is left unsettled then is stated as error
_REACH = 7.0  # beyond so many sds (probability 3e-12) a value that is not finite counts as the central one
_POINT = 1e-4  # the relative width that stands for a variance of zero

# Points (Q, M, k), and the row (M,) that each of the M columns belongs to (None: all rows in order) -> values (Q, M).
LogFactor = Callable[[Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Integrals:
    """E f (n,), E ∇f (n, k), E ∇²f (n, k, k), and the error of E f (n,) as seen by two orders."""

    value: Tensor
    gradient: Tensor
    hessian: Tensor
    error: Tensor


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
    found, error, allowed = _by_hermite(problem, tolerance)
    unsettled = (error > allowed) & found.isfinite().all(-1)
    if bool(unsettled.any()):
        rows = unsettled.nonzero().squeeze(-1)
        found[rows], error[rows] = _by_panels(problem, rows, allowed)
    k = mean.shape[-1]
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
        points = mean + (root * z.unsqueeze(-2)).sum(-1)
        found = self.function(points, rows) - centre
        far = (z.square().sum(-1) > _REACH**2) & ~found.isfinite()
        return torch.where(far, 0.0, found)


# -- Gauss-Hermite ---------------------------------------------------------------------------------------------------


@functools.cache
def _hermite(order: int, k: int) -> tuple[Tensor, Tensor]:
    """Nodes (Q, 1, k) and the statistics at them times their weights (Q, S)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(order)
    z, w = _product(torch.as_tensor(nodes), torch.as_tensor(weights / weights.sum()), k)
    return z.unsqueeze(1), _statistics(z) * w.unsqueeze(-1)


def _product(nodes: Tensor, weights: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The product rule in k dims: (Q,), (Q,) -> (Qᵏ, k), (Qᵏ,)."""
    if k == 1:
        return nodes.unsqueeze(-1), weights
    return torch.cartesian_prod(*[nodes] * k), torch.cartesian_prod(*[weights] * k).prod(-1)


def _by_hermite(problem: _Problem, tolerance: float) -> tuple[Tensor, Tensor, Tensor]:
    """(integrals (n, S), error (n,), the error allowed), the order doubled for the rows where it matters."""
    n, k = problem.mean.shape
    found = _hermite_integrals(problem, _ORDERS[k][0], None)
    error = torch.full_like(found[:, 0], torch.inf)
    allowed = torch.zeros((), dtype=found.dtype, device=found.device)
    rows: Tensor | None = None
    for order in _ORDERS[k][1:]:
        better = _hermite_integrals(problem, order, rows)
        if rows is None:
            size = (problem.centre + better[:, 0]).abs() + better.abs().amax(-1)
            allowed = tolerance * size[size.isfinite()].mean().nan_to_num(1.0).clamp_min(1e-300)
            rows = torch.arange(n, device=found.device)
        error[rows] = (better - found[rows]).abs().amax(-1).nan_to_num(torch.inf, torch.inf, torch.inf)
        found[rows] = better
        rows = rows[(error[rows] > allowed) & better.isfinite().all(-1)]
        if rows.numel() == 0:
            break
    return found, error, allowed


def _hermite_integrals(problem: _Problem, order: int, rows: Tensor | None) -> Tensor:
    z, weighted = (x.to(problem.mean.device) for x in _hermite(order, problem.mean.shape[-1]))
    return problem.values(z, rows).mT @ weighted


# -- panels ----------------------------------------------------------------------------------------------------------


@functools.cache
def _lobatto(order: int, k: int) -> tuple[Tensor, Tensor]:
    """Nodes (Q, k) of [−1, 1]ᵏ, corners among them, and their weights (Q,).

    A kink between a corner and the next node would be invisible to a rule without the corner, in every half of the panel.
    """
    legendre = np.polynomial.legendre.Legendre.basis(order - 1)
    nodes = np.concatenate([[-1.0], np.sort(legendre.deriv().roots().real), [1.0]])
    weights = 2 / (order * (order - 1) * legendre(nodes) ** 2)
    return _product(torch.as_tensor(nodes), torch.as_tensor(weights), k)


@dataclass(frozen=True)
class _Panels:
    """Boxes of z: their lower and upper corners (M, k), and the row of each (M,)."""

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


def _by_panels(problem: _Problem, rows: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """(integrals (n, S), error (n,)) of some rows, panels bisected until halving one changes it by less than its share."""
    panels = _first_panels(problem, rows)
    whole = _panel_integrals(problem, panels)
    total = torch.zeros(problem.mean.shape[0], whole.shape[-1], dtype=whole.dtype, device=whole.device)
    error = torch.zeros_like(total[:, 0])
    k = problem.mean.shape[-1]
    for last in [False] * (_ROUNDS[k] - 1) + [True]:
        halves = []
        for along in range(k):
            split = panels.halves(torch.full_like(panels.rows, along))
            halves.append(_panel_integrals(problem, split).unflatten(0, (2, -1)))
        change = torch.stack([(half.sum(0) - whole).abs().amax(-1) for half in halves])
        worst, axis = change.nan_to_num(torch.inf, torch.inf, torch.inf).max(0)
        parts = torch.stack(halves)[axis, :, torch.arange(axis.numel(), device=axis.device)]  # (M, 2, S)
        share = allowed / 8
        over = last or panels.rows.numel() > _MOST_PANELS[k]
        done = (
            torch.ones_like(worst, dtype=torch.bool) if over else (worst <= share) | ~parts.isfinite().all(-1).all(-1)
        )
        total.index_add_(0, panels.rows[done], parts[done].sum(1))
        error.index_add_(0, panels.rows[done], worst[done])
        if bool(done.all()):
            break
        whole = parts[~done].transpose(0, 1).flatten(0, 1)
        panels = panels.where(~done).halves(axis[~done])
    return total[rows], error[rows]


def _first_panels(problem: _Problem, rows: Tensor) -> _Panels:
    k, like = problem.mean.shape[-1], problem.mean
    edges = _EDGES[k]
    boxes = torch.tensor(list(itertools.product(itertools.pairwise(edges), repeat=k)), dtype=like.dtype)
    low, high = boxes.to(like.device).unbind(-1)  # (B, k)
    count = low.shape[0]
    return _Panels(low.repeat(rows.numel(), 1), high.repeat(rows.numel(), 1), rows.repeat_interleave(count))


def _panel_integrals(problem: _Problem, panels: _Panels) -> Tensor:
    """∫ (f − f(m)) T φ over every panel, (M, S)."""
    k = panels.low.shape[-1]
    nodes, weights = (x.to(panels.low.device) for x in _lobatto(_PANEL_ORDER[k], k))
    half = 0.5 * (panels.high - panels.low)
    z = panels.low + half * (1 + nodes.unsqueeze(1))
    density = torch.exp(-0.5 * z.square().sum(-1)) * (2 * torch.pi) ** (-k / 2)
    values = problem.values(z, panels.rows) * density * weights.unsqueeze(-1) * half.prod(-1)
    return torch.einsum("qm,qms->ms", values, _statistics(z))
