"""Scalar and multivariate Gaussian algebra, shared by the families that are Gaussian in x, log x or u.

λ = (P m, vech(−½ P) with off-diagonals doubled), T = (x, vech x xᵀ), vech row-major over the lower triangle.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


def mean_variance(natural: Tensor) -> tuple[Tensor, Tensor]:
    """(m, v) of λ = (m/v, −1/(2v))."""
    first, second = natural.unbind(-1)
    variance = -0.5 / second
    return first * variance, variance


def natural(mean: Tensor, variance: Tensor) -> Tensor:
    """λ = (m/v, −1/(2v))."""
    precision = variance.reciprocal()
    return torch.stack([mean * precision, -0.5 * precision], -1)


def message(mean: Tensor, variance: Tensor, gradients: Mapping[str, Tensor]) -> Tensor:
    """(∇_m f − 2 m ∇_v f, ∇_v f), the chain rule through v = E x² − m²."""
    in_mean, in_variance = gradients.get("mean"), gradients.get("variance")
    if in_variance is None:
        in_mean = torch.zeros_like(mean) if in_mean is None else in_mean
        return torch.stack([in_mean, torch.zeros_like(in_mean)], -1)
    first = -2 * mean * in_variance
    return torch.stack([first if in_mean is None else in_mean + first, in_variance.expand_as(first)], -1)


def bend(natural: Tensor, direction: Tensor) -> Tensor:
    """m ← m + (dη − dS m) / S, S ← S + dS + ½ dS²/S on the precision S (Lin, Schmidt and Khan 2020)."""
    mean, variance = mean_variance(natural)
    step, change = direction[..., 0], -2 * direction[..., 1]
    relative = change * variance
    precision = (0.5 + 0.5 * (1 + relative).square()) / variance
    moved = mean + (step - change * mean) * variance
    return torch.stack([precision * moved, -0.5 * precision], -1)


def log_prob(mean: Tensor, variance: Tensor, value: Tensor) -> Tensor:
    """−½ ((x − m)²/v + log 2πv)."""
    return -0.5 * ((value - mean).square() / variance + variance.log() + math.log(2 * math.pi))


def kl(mean_q: Tensor, variance_q: Tensor, mean_p: Tensor, variance_p: Tensor) -> Tensor:
    """½ (r − 1 − log r + (m_q − m_p)²/v_p), r = v_q/v_p."""
    ratio = variance_q / variance_p
    return 0.5 * (ratio - 1 - ratio.log() + (mean_q - mean_p).square() / variance_p)


def fisher(mean: Tensor, variance: Tensor) -> Tensor:
    """Cov (x, x²) = [[v, 2mv], [2mv, 4m²v + 2v²]]."""
    cross = 2 * mean * variance
    rows = [variance, cross, cross, 2 * mean * cross + 2 * variance.square()]
    return torch.stack(rows, -1).unflatten(-1, (2, 2))


def natural_gradient(mean: Tensor, variance: Tensor, gradient: Tensor) -> Tensor:
    """dλ of dμ: dm = g₁, dv = g₂ − 2 m dm, dP = −dv/v², dη = dP m + dm/v."""
    step = gradient[..., 0]
    change = -(gradient[..., 1] - 2 * mean * step) / variance.square()
    return torch.stack([change * mean + step / variance, -0.5 * change], -1)


class Packing(NamedTuple):
    """Index and weight tensors between symmetric matrices and half-vectors."""

    lower: Tensor  # (d(d+1)/2) flat positions of the lower triangle, row-major
    full: Tensor  # (d·d) the half-vector element that each matrix element reads
    halves: Tensor  # (d(d+1)/2) ½ on the diagonal, 1 off it
    twice: Tensor  # (d·d) −2 on the diagonal, −1 off it


_PACKINGS: dict[tuple[int, torch.dtype, torch.device], Packing] = {}


def packing(dimension: int, like: Tensor) -> Packing:
    """The packing for d × d matrices in the dtype and on the device of `like`, made once."""
    key = (dimension, like.dtype, like.device)
    found = _PACKINGS.get(key)
    if found is None:
        with torch.inference_mode(False):
            found = _make_packing(dimension, like.dtype, like.device)
        if type(found.lower) is torch.Tensor:  # a tracer's stand-in must not outlive its trace
            _PACKINGS[key] = found
    return found


def _make_packing(dimension: int, dtype: torch.dtype, device: torch.device) -> Packing:
    rows, columns = torch.tril_indices(dimension, dimension, device=device).unbind(0)
    lower = rows * dimension + columns
    positions = torch.zeros(dimension, dimension, dtype=torch.long, device=device)
    count = torch.arange(len(lower), device=device)
    positions = positions.index_put((rows, columns), count).index_put((columns, rows), count)
    identity = torch.eye(dimension, dtype=dtype, device=device)
    halves = 1 - 0.5 * identity.flatten().index_select(0, lower)
    return Packing(lower, positions.flatten(), halves, -1 - identity.flatten())


def vech(matrix: Tensor) -> Tensor:
    """The lower triangle, row by row: (*batch, d, d) -> (*batch, d(d+1)/2)."""
    return matrix.flatten(-2).index_select(-1, packing(matrix.shape[-1], matrix).lower)


def unvech(vector: Tensor, dimension: int) -> Tensor:
    """The symmetric matrix with this lower triangle."""
    return vector.index_select(-1, packing(dimension, vector).full).unflatten(-1, (dimension, dimension))


def pack_dual(matrix: Tensor) -> Tensor:
    """v with ⟨v, vech X⟩ = tr(M X) for symmetric X: off-diagonals g_ij + g_ji."""
    index = packing(matrix.shape[-1], matrix)
    return (matrix + matrix.mT).flatten(-2).index_select(-1, index.lower) * index.halves


def precision_of(vector: Tensor, dimension: int) -> Tensor:
    """P of v = vech(−½ P) with off-diagonals doubled."""
    index = packing(dimension, vector)
    flat = vector.index_select(-1, index.full) * index.twice
    return flat.unflatten(-1, (dimension, dimension))


def pack_precision(precision: Tensor) -> Tensor:
    """vech(−½ P) with off-diagonals doubled, from the lower triangle of P."""
    index = packing(precision.shape[-1], precision)
    return -precision.flatten(-2).index_select(-1, index.lower) * index.halves


def cholesky(matrix: Tensor) -> Tensor:
    """The lower factor; meaningless, but not an error, outside the cone."""
    return torch.linalg.cholesky_ex(matrix)[0]


def half_logdet(factor: Tensor) -> Tensor:
    """½ log|L Lᵀ|."""
    return factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def is_positive_definite(matrix: Tensor) -> Tensor:
    """Whether a Cholesky factor exists."""
    return torch.linalg.cholesky_ex(matrix)[1] == 0


def matvec(matrix: Tensor, vector: Tensor) -> Tensor:
    """M v."""
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def solve(factor: Tensor, vector: Tensor) -> Tensor:
    """(L Lᵀ)⁻¹ v."""
    return torch.cholesky_solve(vector.unsqueeze(-1), factor).squeeze(-1)


def inverse(factor: Tensor) -> Tensor:
    """(L Lᵀ)⁻¹; torch.cholesky_inverse would synchronise with the device, and raise where L is singular."""
    identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    root = torch.linalg.solve_triangular(factor, identity, upper=False)
    return root.mT @ root


def scale_tril_of_precision(precision: Tensor) -> Tensor:
    """L with L Lᵀ = P⁻¹ and L lower triangular: the inverse transpose of P's reversed Cholesky factor."""
    reversed_factor = cholesky(precision.flip((-2, -1))).flip((-2, -1)).mT
    identity = torch.eye(precision.shape[-1], dtype=precision.dtype, device=precision.device)
    return torch.linalg.solve_triangular(reversed_factor, identity, upper=False)


def bend_precision(precision: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
    """S + t dS + ½ t² dS S⁻¹ dS = ½ (S + W Wᵀ), W = (S + t dS) L⁻ᵀ, and t (Lin, Schmidt and Khan 2020).

    t = 1 unless ‖L⁻¹ dS L⁻ᵀ‖ is above ε^(−1/4): beyond, rounding would lose S, and with it definiteness.
    """
    factor = cholesky(precision)
    white = torch.linalg.solve_triangular(factor, change, upper=False)
    size = torch.linalg.solve_triangular(factor, white.mT, upper=False).flatten(-2).norm(dim=-1)
    limit = torch.finfo(precision.dtype).eps ** -0.25
    fraction = (limit / size.clamp(min=limit))[..., None, None]
    root = factor + fraction * white.mT
    return 0.5 * (precision + root @ root.mT), fraction.squeeze(-1)
