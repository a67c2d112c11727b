"""Factorised Gaussians whose elements meet in a factor: their means move together."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pyro_blr.families import ExponentialFamily, LogNormal, SparseNormal

__all__ = ["gaussian_natural", "moved_together"]


def moved_together(family: ExponentialFamily, mean: Tensor, target: Tensor, hessian: Tensor) -> Tensor:
    """The target with its means moved together, by m − H⁻¹ ∇ with H = E ∇² of the whole batch, (n, n).

    Each element by itself would move as if the others stayed, and together they would overshoot.  Where −H is
    not positive definite the target stays what it was.
    """
    if not bool(family.contains(target).all()):
        return target
    wanted = family.moments(target)
    joint = "covariance" in wanted
    precisions = torch.linalg.inv(wanted["covariance"]) if joint else wanted["variance"].reciprocal()
    precisions = precisions.reshape(-1, *precisions.shape[-2:] if joint else (1, 1))
    apart = torch.block_diag(*precisions)
    gradient = apart @ (wanted["mean"] - mean).flatten().to(apart)
    own = torch.block_diag(*torch.ones_like(precisions)) > 0
    factor, failed = torch.linalg.cholesky_ex(torch.where(own, apart, -hessian.to(apart)))
    if int(failed):
        return target
    step = torch.cholesky_solve(gradient.unsqueeze(-1), factor).reshape(mean.shape)
    return gaussian_natural(family, (mean + step).to(target.dtype), wanted, target)


def gaussian_natural(family: ExponentialFamily, mean: Tensor, moments: Mapping[str, Tensor], like: Tensor) -> Tensor:
    """λ with a given mean and the covariance of `moments`; `like` has that covariance's second part."""
    if isinstance(family, SparseNormal):
        return family.with_mean(like, mean)
    if "covariance" in moments:
        precision = torch.linalg.inv(moments["covariance"])
        first = (precision @ mean.unsqueeze(-1)).squeeze(-1)
    else:
        first = mean / moments["variance"]
        first = first if first.dim() == like.dim() else first.unsqueeze(-1)  # elements inside an event, or one by one
    if isinstance(family, LogNormal):
        first = first - 1  # the Jacobian of log x
    return torch.cat([first, like[..., first.shape[-1] :]], -1)
