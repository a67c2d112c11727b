"""E f(x) under x ~ N(m, V) in several dimensions, for many rows at once, by random points that are exact for cubic f.

The points z of one row are ± pairs of scrambled Sobol points whose second moments are made those of N(0, 1), turned by a random rotation
of the row's own; x = m + L z, V = L Lᵀ.  Then (Bonnet, Price)

    E f,    ∇_m E f = E ∇f,    ∇_V E f = ½ E ∇²f

are averages of f and of its derivatives by automatic differentiation: a concave f keeps a concave average, and what does not bend (the
sum of logits, say) has no noise.  Rows err independently, so that the error of a sum over N of them grows as √N.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

from pyro_blr.batches import BUDGET, batched
from pyro_blr.quadrature import Integrals
from pyro_blr.sequences import balanced, uniform_levels

__all__ = ["random_integrals", "random_values"]

_HALVES = 2  # independent sets of points a row, whose difference tells the error
_SETS = 16  # sets of points that rows share by turns: rows with the same radii would err alike

# A point (*shape, k) of every row -> log f (*shape): each element a function of its own row alone.
RowFunction = Callable[[Tensor], Tensor]


def random_integrals(
    function: RowFunction, mean: Tensor, covariance: Tensor, shape: torch.Size, count: int
) -> Integrals:
    """E f, E ∇f and E ∇²f from `count` points a row; the error of each row's E f is signed, and independent of the others'.

    Args:
        function: twice differentiable, a sum over rows of functions of their own.
        mean: (n, k), float64, n the number of elements of `shape`.
        covariance: (n, k, k).
        shape: the shape in which `function` wants the rows.
        count: points a row; half of them are one set, half the other.
    """
    if not bool(covariance.any()):
        value, gradient, hessian = _averages(function, mean.unsqueeze(0), shape)
        return Integrals(value, gradient, hessian, torch.zeros_like(value), independent=True)
    root = _root(covariance)
    halves = []
    for half in range(_HALVES):
        halves.append(_averages(function, _moved(mean, root, count // _HALVES, half), shape))
    value, gradient, hessian = (sum(parts) / _HALVES for parts in zip(*halves, strict=True))
    return Integrals(value, gradient, hessian, 0.5 * (halves[0][0] - halves[1][0]), independent=True)


def random_values(function: RowFunction, mean: Tensor, covariance: Tensor, shape: torch.Size, count: int) -> Tensor:
    """E f (n,) alone, from other points than `random_integrals` takes: what was fitted to those has not seen these."""
    points = _moved(mean, _root(covariance), count, _HALVES)
    parts = points.split(max(1, BUDGET // mean.numel()))
    found = [
        batched(lambda x, _: function(x), part.reshape(-1, *shape, mean.shape[-1]), {}, mean.numel()) for part in parts
    ]
    return torch.cat(found).reshape(count, -1).mean(0)


def _moved(mean: Tensor, root: Tensor, count: int, half: int) -> Tensor:
    """m + L R z, (count, n, k): the same z and R at every call, so that a climb climbs one function."""
    n, k = mean.shape
    turned = root @ _rotations(n, k, half).to(root.device)
    points = mean.new_empty(count, n, k)
    for turn, z in enumerate(_sets(k, count, half).to(mean.device)):
        rows = slice(turn, None, _SETS)
        points[:, rows] = mean[rows] + torch.einsum("nij,qj->qni", turned[rows], z)
    return points


def _averages(function: RowFunction, points: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
    """The means over points (Q, n, k) of f (n,), ∇f (n, k) and ∇²f (n, k, k)."""
    count, n, k = points.shape
    basis = torch.eye(k, dtype=points.dtype, device=points.device)

    def total(point: Tensor) -> Tensor:
        return function(point).sum()

    def at(point: Tensor, _: object) -> tuple[Tensor, Tensor, Tensor]:
        columns = vmap(lambda e: jvp(grad(total), (point,), (e.expand_as(point),))[1])(basis)
        return function(point), grad(total)(point), columns

    value, gradient, hessian = (
        torch.zeros(size, dtype=points.dtype, device=points.device) for size in (n, (n, k), (n, k, k))
    )
    for part in points.split(max(1, BUDGET // (n * k * k))):
        values, gradients, columns = batched(at, part.reshape(-1, *shape, k), {}, n * k * k)
        value += values.reshape(-1, n).sum(0) / count
        gradient += gradients.reshape(-1, n, k).sum(0) / count
        hessian += columns.sum(0).reshape(k, n, k).movedim(0, 1) / count
    return value, gradient, 0.5 * (hessian + hessian.mT)


def _root(covariance: Tensor) -> Tensor:
    """L of V = L Lᵀ; a direction without variance gets next to none."""
    diagonal = covariance.diagonal(dim1=-2, dim2=-1)
    least = 1e-12 * diagonal.amax(-1, keepdim=True).clamp_min(1e-300)
    return torch.linalg.cholesky(covariance + torch.diag_embed(least.expand_as(diagonal)))


@functools.lru_cache(maxsize=4)
def _sets(k: int, count: int, half: int) -> Tensor:
    """(S, count, k)"""
    levels = [uniform_levels(count, k, _SETS * half + s)[: count // 2] for s in range(_SETS)]
    return torch.stack([balanced(torch.special.ndtri(level)) for level in levels])


@functools.lru_cache(maxsize=4)
def _rotations(n: int, k: int, seed: int) -> Tensor:
    """(n, k, k) orthogonal matrices, uniform (Stewart 1980)."""
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(n, k, k, generator=generator, dtype=torch.float64, device="cpu"))
    return q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
