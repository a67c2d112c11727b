"""Quasi-random levels in (0, 1), antithetic, and standard normals at them."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["balanced", "standard_normals", "uniform_levels"]

_SOBOL_DIM = 1024
_FULL = 1.5  # pairs a dimension from which all second moments are made those of N(0, 1); with fewer, variances alone


def uniform_levels(num_samples: int, dim: int, seed: int) -> Tensor:
    """(num_samples, dim) levels in (0, 1), on the CPU in float64, antithetic (u, then 1 − u): scrambled Sobol points in the
    first dims, pseudo-random ones beyond.
    """
    half, sobol = (num_samples + 1) // 2, min(dim, _SOBOL_DIM)
    levels = torch.quasirandom.SobolEngine(max(sobol, 1), scramble=True, seed=seed).draw(half, dtype=torch.float64)
    levels = levels[:, :sobol]
    if dim > sobol:
        generator = torch.Generator().manual_seed(seed)
        rest = torch.rand(half, dim - sobol, generator=generator, device="cpu", dtype=torch.float64)
        levels = torch.cat([levels, rest], -1)
    levels = levels.clamp(1e-12, 1 - 1e-12)
    return torch.cat([levels, 1 - levels])[:num_samples]


def standard_normals(levels: Tensor) -> Tensor:
    """Standard normals (S, dim) at `uniform_levels`; the second half is minus the first, without rounding."""
    normal = torch.special.ndtri(levels[: (levels.shape[0] + 1) // 2])
    return torch.cat([normal, -normal])[: levels.shape[0]]


def balanced(half: Tensor) -> Tensor:
    """(2h, dim) normals z and −z of h rows, their second moments made 1: averages over them are exact for cubic functions.

    z ← z M^{−1/2}, M = zᵀz / h, which moves the rows least.  Too few rows for M in all dims get unit variances only.  Fourth
    moments come out low, by about 2/h of themselves, which no average over seeds takes away: for draws that stay fixed.
    """
    rows, dim = half.shape
    if rows >= _FULL * dim:
        values, vectors = torch.linalg.eigh(half.mT @ half / rows)
        half = half @ (vectors * values.rsqrt()) @ vectors.mT
    else:
        half = half / half.square().mean(0).sqrt()
    return torch.cat([half, -half])
