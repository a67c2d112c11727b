"""Sums over data, done once: Σ_n E log N(y_n | b_n + C_n x, (c_n τ)⁻¹) is a quadratic form in x whose size does not grow with N."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_blr.grams import gram_of_pieces
from pyro_blr.likelihoods import Linear, Positive
from pyro_blr.maps import AffineMap, Monomial
from pyro_blr.pieces import Entries

__all__ = ["QuadraticSummary", "summarise"]

_ROWS = 1 << 15  # rows accumulated at once in float64
_CHEAP = 10_000  # entries of a Gram matrix that is formed however few the rows
_LARGEST = 4096  # unknowns beyond which the Gram matrix is not formed

Moments = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class QuadraticSummary:
    """Σ_n s_n E log N = constant + ½ n E log τ − ½ E τ (q − 2 hᵀ m + mᵀ G m + tr G V), accumulated in float64."""

    slices: Mapping[str, slice]
    used: Mapping[str, Tensor | None]  # which entries of a block's variable enter; None where all do
    gram: Tensor
    cross: Tensor
    square: Tensor
    count: Tensor
    constant: Tensor
    precision: Monomial | None
    families: Mapping[str, Any]  # of joint blocks
    places: dict[str, tuple[Tensor, Tensor]] = field(
        default_factory=dict
    )  # of a sparse block: G's entries in its moments

    def __call__(self, moments: Moments) -> Tensor:
        mean = torch.cat([self._of(name, moments[name]["mean"].reshape(-1)) for name in self.slices])
        quadratic = self.square - 2 * (self.cross @ mean) + mean @ (self.gram @ mean)
        for name, part in self.slices.items():
            block = self.gram[part, part]
            if "covariance" in moments[name]:
                quadratic = quadratic + self._spread(name, block, moments[name]["covariance"])
            elif "entries" in moments[name]:
                quadratic = quadratic + self._sparse_spread(name, block, moments[name])
            else:
                quadratic = quadratic + block.diagonal() @ self._of(name, moments[name]["variance"].reshape(-1))
        if self.precision is None:
            return self.constant - 0.5 * quadratic
        tau = self.precision.scalar(moments)
        mean_tau, log_tau = tau.mean.to(self.gram.dtype), tau.log.to(self.gram.dtype)
        return self.constant + 0.5 * self.count * log_tau - 0.5 * mean_tau * quadratic

    def _spread(self, name: str, block: Tensor, covariance: Tensor) -> Tensor:
        """tr G V; a block with several batch elements is gathered, so that its part of G is diagonal."""
        if covariance.shape[:-2].numel() > 1:
            return block.diagonal() @ self._of(name, covariance.diagonal(dim1=-2, dim2=-1).reshape(-1))
        rows = self._of(name, covariance.reshape(covariance.shape[-2:]))
        return (block * self._of(name, rows.mT)).sum()

    def _sparse_spread(self, name: str, block: Tensor, moments: Mapping[str, Tensor]) -> Tensor:
        """tr G V over the entries that G has."""
        if name not in self.places:
            i, j = block.nonzero().unbind(-1)
            index = self.used[name]
            ends = (i, j) if index is None else (index[i], index[j])
            self.places[name] = self.families[name].places(*ends), block[i, j]
        place, weight = self.places[name]
        return weight @ torch.cat([moments["variance"], moments["entries"]], -1)[place].to(weight)

    def _of(self, name: str, tensor: Tensor) -> Tensor:
        """The rows of the entries that enter, in the precision of the sums."""
        used = self.used[name]
        return (tensor if used is None else tensor.index_select(0, used)).to(self.gram.dtype)


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
    if not _pays(loc, shape):
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
    used, gram, cross, square = _sums(loc, residual, scaled, shape, wide)
    slices, start = {}, 0
    for name, (size, _) in used.items():
        slices[name] = slice(start, start + size)
        start += size
    entries = {name: index for name, (_, index) in used.items()}
    families = {name: joint.family for name, joint in loc.joints.items()}
    return QuadraticSummary(slices, entries, gram, cross, square, count, constant, monomial, families)


def _pays(loc: AffineMap, shape: torch.Size) -> bool:
    """Whether a sum over all pairs of entries is cheaper than one over the rows' own pairs, or at least cheap."""
    pieces = loc.pieces()
    if pieces is None:
        columns = loc.global_columns()
        return columns is not None and sum(c.shape[0] for c in columns.values()) <= _LARGEST
    every = [piece for some in pieces.values() for piece in some]
    width = sum(1 if isinstance(piece, Entries) else piece.columns.shape[0] for piece in every)
    entries = sum(p.index.unique().numel() if isinstance(p, Entries) else p.columns.shape[0] for p in every)
    return entries <= _LARGEST and entries**2 <= max(_CHEAP, shape.numel() * width**2)


def _sums(
    loc: AffineMap, residual: Tensor, weights: Tensor, shape: torch.Size, wide: torch.dtype
) -> tuple[dict[str, tuple[int, Tensor | None]], Tensor, Tensor, Tensor]:
    """Block -> how many of its entries enter, and which (None: all); and the sums over rows."""
    pieces = loc.pieces()
    if pieces is not None:
        used, *sums = gram_of_pieces(pieces, residual, weights, shape)
        return {name: (len(index), index) for name, index in used.items()}, sums[0], sums[1], sums[2]
    columns = loc.global_columns()
    assert columns is not None
    sizes: dict[str, tuple[int, Tensor | None]] = {name: (column.shape[0], None) for name, column in columns.items()}
    return sizes, *_accumulate(list(columns.values()), residual, weights, shape, wide)


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
