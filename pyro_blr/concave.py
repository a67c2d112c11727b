"""Newton's method where a log density is not concave: uphill all the same."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_blr.families import ExponentialFamily, LogNormal, MultivariateNormal

__all__ = ["uphill"]

_LEAST = 1e-3  # of a curvature beside the largest, variables scaled by their own


def uphill(family: ExponentialFamily, mean: Tensor, target: Tensor) -> Tensor:
    """m + |S|⁻¹ g, where ⟨λ̂, T(u)⟩ = −½ uᵀ S u + … has the gradient g at m = `mean`; shapes (*batch, d), or (*batch).

    |S| has the absolute eigenvalues of S, in variables scaled by √|diag S|, so that units do not matter: from a saddle or the
    far side of an inflection m goes uphill, the shorter the more the density bends (Dauphin et al. 2014).
    """
    base = getattr(family, "base", family)
    if not isinstance(base, MultivariateNormal):  # each element by itself
        first, second = (part.reshape(mean.shape) for part in target.chunk(2, -1))
        if isinstance(base, LogNormal):
            first = first + 1  # the Jacobian of log x
        slope, curvature = first + 2 * second * mean, (2 * second).abs()
        return mean + slope / curvature.clamp_min(_LEAST * float(curvature.max().clamp_min(1e-300)))
    first, second = target.split([base.dimension, target.shape[-1] - base.dimension], -1)
    precision = torch.diag_embed(torch.zeros_like(first))
    rows, columns = torch.tril_indices(base.dimension, base.dimension, device=target.device)
    precision[..., rows, columns] -= second
    precision[..., columns, rows] -= second  # the diagonal once more
    slope = first - (precision @ mean.unsqueeze(-1)).squeeze(-1)
    scale = precision.diagonal(dim1=-2, dim2=-1).abs().sqrt()
    scale = scale.clamp_min(1e-8 * scale.amax(-1, keepdim=True).clamp_min(1e-300))
    values, vectors = torch.linalg.eigh(precision / scale.unsqueeze(-1) / scale.unsqueeze(-2))
    values = values.abs()
    values = values.clamp_min(_LEAST * values.amax(-1, keepdim=True))
    white = (vectors.mT @ (slope / scale).unsqueeze(-1)) / values.unsqueeze(-1)
    return mean + (vectors @ white).squeeze(-1) / scale
