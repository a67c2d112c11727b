"""Sums over data, done once: Σ_n E log N(y_n | b_n + C_n x, (c_n τ)⁻¹) is a quadratic form in x whose size does not grow with N."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_blr.likelihoods import Linear, Positive
from pyro_blr.maps import AffineMap, Monomial

__all__ = ["QuadraticSummary", "summarise"]

_ROWS = 1 << 15  # rows accumulated at once in float64
_LARGEST = 4096  # unknowns beyond which the Gram matrix is not formed

Moments = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class QuadraticSummary:
    """Σ_n s_n E log N = constant + ½ n E log τ − ½ E τ (q − 2 hᵀ m + mᵀ G m + tr G V), accumulated in float64."""

    slices: Mapping[str, slice]
    gram: Tensor
    cross: Tensor
    square: Tensor
    count: Tensor
    constant: Tensor
    precision: Monomial | None

    def __call__(self, moments: Moments) -> Tensor:
        mean = torch.cat([moments[name]["mean"].reshape(-1) for name in self.slices]).to(self.gram.dtype)
        quadratic = self.square - 2 * (self.cross @ mean) + mean @ (self.gram @ mean)
        for name, part in self.slices.items():
            block = self.gram[part, part]
            if "covariance" in moments[name]:
                covariance = moments[name]["covariance"].to(self.gram.dtype)
                quadratic = quadratic + (block * covariance.reshape(block.shape)).sum()
            else:
                quadratic = quadratic + block.diagonal() @ moments[name]["variance"].reshape(-1).to(self.gram.dtype)
        if self.precision is None:
            return self.constant - 0.5 * quadratic
        tau = self.precision.scalar(moments)
        mean_tau, log_tau = tau.mean.to(self.gram.dtype), tau.log.to(self.gram.dtype)
        return self.constant + 0.5 * self.count * log_tau - 0.5 * mean_tau * quadratic


@torch.no_grad()
def summarise(
    value: Any, loc: Any, precision: Any, shape: torch.Size, weights: Tensor | float
) -> QuadraticSummary | None:
    """The summary of a Normal factor from its compiled arguments; None where its coefficients vary with a latent.

    Args:
        value: `Linear` point.
        loc: `AffineMap`.
        precision: `Positive` point, or a `Monomial` in one scalar site.
        shape: batch shape of the factor before its event dims are summed.
        weights: scale times mask, broadcastable to `shape`.
    """
    if not isinstance(value, Linear) or value.variance is not None or not isinstance(loc, AffineMap):
        return None
    columns = loc.global_columns()
    if columns is None or sum(c.shape[0] for c in columns.values()) > _LARGEST:
        return None
    if isinstance(precision, Positive):
        coefficient, monomial = precision.mean, None
    elif isinstance(precision, Monomial) and precision.is_scalar:
        coefficient, monomial = precision.coefficient, precision
    else:
        return None
    residual = value.mean if loc.offset is None else value.mean - loc.offset
    wide = torch.float64 if residual.device.type != "mps" else torch.float32
    weight = torch.as_tensor(weights, dtype=wide, device=residual.device)
    if coefficient.numel() == 1:
        scaled = weight * coefficient.reshape(()).to(wide)
    else:
        scaled = weight * coefficient.to(wide)
    count = weight.expand(shape).sum()
    constant = (
        0.5
        * ((coefficient.to(wide).log() - torch.log(torch.tensor(2 * torch.pi, dtype=wide))) * weight)
        .expand(shape)
        .sum()
    )
    slices, start = {}, 0
    for name, column in columns.items():
        slices[name] = slice(start, start + column.shape[0])
        start += column.shape[0]
    gram, cross, square = _accumulate(list(columns.values()), residual, scaled, shape, wide)
    return QuadraticSummary(slices, gram, cross, square, count, constant, monomial)


def _accumulate(
    columns: list[Tensor], residual: Tensor, weights: Tensor, shape: torch.Size, wide: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    total = shape.numel()
    columns = [c.reshape(c.shape[0], *[1] * (len(shape) - c.dim() + 1), *c.shape[1:]) for c in columns]
    flat = [c.expand(c.shape[0], *shape).reshape(c.shape[0], total) for c in columns]
    residual = residual.expand(shape).reshape(total)
    uniform = weights.numel() == 1
    row_weights = None if uniform else weights.expand(shape).reshape(total)
    size = sum(c.shape[0] for c in flat)
    gram = torch.zeros(size, size, dtype=wide, device=residual.device)
    cross = torch.zeros(size, dtype=wide, device=residual.device)
    square = torch.zeros((), dtype=wide, device=residual.device)
    for start in range(0, total, _ROWS):
        stop = min(start + _ROWS, total)
        rows = (
            torch.cat([c[:, start:stop].mT.to(wide) for c in flat], -1)
            if len(flat) > 1
            else flat[0][:, start:stop].mT.to(wide)
        )
        r = residual[start:stop].to(wide)
        weighted = rows if row_weights is None else rows * row_weights[start:stop, None]
        gram.addmm_(weighted.mT, rows)
        cross += weighted.mT @ r
        square += r @ r if row_weights is None else (row_weights[start:stop] * r) @ r
    if uniform:
        w = weights.reshape(())
        return gram * w, cross * w, square * w
    return gram, cross, square
