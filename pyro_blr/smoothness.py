"""How far autograd's derivatives of a function are its own: a latent may leave torch, be rounded, be
compared, or pass a kink.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import grad

from pyro_blr.batches import batched

__all__ = ["smoothness"]

_POINTS = 16  # on a line
_BISECTIONS = 24  # of a line whose sum is doubted: what is smooth is resolved by then, a jump never
_TOLERANCE = 1e-2


def smoothness(function: Callable[[Tensor, Any], Tensor], leaves: Tensor, others: Any, elements: int = 0) -> int:
    """2 where ∇f integrates to the differences of f and ∇²f to those of ∇f, on lines between stacked draws; 1
    where only ∇f does; 0 where neither does.  `elements` is as in `batched`.

    A jump is no derivative's integral: `z.round()` has none, `z.item()` a zero one, relu(z) a kink that its
    second derivative misses.
    """
    half = leaves.shape[0] // 2
    start, end = leaves[:half].detach(), leaves[half : 2 * half].detach()
    order = 0
    for level in (1, 2):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # `float(z)` of what requires a gradient: that is what we want to know
                if not _integrates(function, start, end - start, _half(others, half), level, elements):
                    return order
        except (
            RuntimeError,
            NotImplementedError,
            TypeError,
            ValueError,
        ):  # `.numpy()` of what requires a gradient
            return order
        order = level
    return order


def _integrates(function: Callable, start: Tensor, apart: Tensor, others: Any, level: int, elements: int) -> bool:
    """Whether φ⁽ᵏ⁾ is the integral of φ⁽ᵏ⁺¹⁾, φ(t) = f(start + t apart), along every line.

    Where it is not, the worse half of the line is looked at again: on a piece that is short enough a smooth φ
    is resolved.
    """

    def derivatives(t: Tensor, place: Any) -> tuple[Tensor, Tensor]:
        def along(s: Tensor) -> Tensor:
            return function(place[0] + s.to(place[0].dtype) * place[1], place[2]).to(s.dtype)

        lower = along if level == 1 else grad(along)
        return lower(t), grad(lower)(t)

    def one_by_one(t: Tensor, place: Any) -> tuple[Tensor, Tensor]:
        t = t.detach().requires_grad_()
        with torch.enable_grad():
            value = function(place[0] + t.to(place[0].dtype) * place[1], place[2]).to(t.dtype)
            if level == 2:
                value = _slope(value, t, True)
            return value.detach(), _slope(value, t, False).detach()

    middles = (torch.arange(_POINTS, dtype=torch.float64) + 0.5) / _POINTS
    on_line = torch.cat([torch.tensor([0.0, 1.0], dtype=torch.float64), middles])
    for _ in range(_BISECTIONS):
        times = on_line.repeat(start.shape[0])
        rows = torch.arange(start.shape[0]).repeat_interleave(on_line.numel())
        places = (start[rows], apart[rows], _rows(others, rows))
        values, slopes = (
            x.reshape(-1, on_line.numel()) for x in batched(derivatives, times, places, elements, one_by_one)
        )
        change = values[:, 1] - values[:, 0]
        travelled = slopes[:, 2:].abs().mean(1) + change.abs()
        excess = (slopes[:, 2:].mean(1) - change).abs() - _TOLERANCE * travelled - 1e-7 * values.abs().amax(1)
        wrong = excess > 0
        if not bool(wrong.any()):
            return True
        if not bool(slopes[wrong].any()):
            return False
        doubted = (excess / travelled.clamp_min(1e-300)).nan_to_num(-1.0).topk(min(2, int(wrong.sum()))).indices
        start, apart, others = start[doubted], 0.5 * apart[doubted], _rows(others, doubted)
        start, apart = torch.cat([start, start + apart]), torch.cat([apart, apart])
        others = {key: torch.cat([value, value]) for key, value in others.items()}
    return False


def _slope(value: Tensor, t: Tensor, create_graph: bool) -> Tensor:
    if not value.requires_grad:
        return torch.zeros_like(t)
    return torch.autograd.grad(value, t, create_graph=create_graph, allow_unused=True, materialize_grads=True)[0]


def _half(tree: Any, count: int) -> Any:
    return {key: value[:count] for key, value in tree.items()}


def _rows(tree: Any, rows: Tensor) -> Any:
    return {key: value[rows] for key, value in tree.items()}
