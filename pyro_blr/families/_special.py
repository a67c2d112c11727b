"""Functions of the gamma function that hold to rounding where the textbook forms cancel, and their inverses.

δ(x) = log x − ψ(x) and τ(x) = x ψ′(x) − 1 are both ~1/(2x): written as differences they lose log₂ x bits.
All iterations have a fixed count, so that they can be traced, batched and captured; they are run in float64.
"""

import torch
from torch import Tensor

_SWITCH = 12.0  # from here on the asymptotic series below are exact to float64
_GAP = (1 / 2, 1 / 12, -1 / 120, 1 / 252, -1 / 240, 1 / 132, -691 / 32760, 1 / 12)
_TRIGAMMA_GAP = (1 / 2, 1 / 6, -1 / 30, 1 / 42, -1 / 30, 5 / 66, -691 / 2730, 7 / 6)


def _series(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    """c₀/x + c₁/x² + c₂/x⁴ + c₃/x⁶ + …"""
    inverse = x.clamp(min=_SWITCH).reciprocal()
    square = inverse * inverse
    total = torch.full_like(square, coefficients[-1])
    for coefficient in coefficients[-2:0:-1]:
        total = total * square + coefficient
    return total * square + coefficients[0] * inverse


def trigamma(x: Tensor) -> Tensor:
    """ψ′(x) = ζ(2, x) for x > 0, NaN elsewhere; torch.polygamma(1, x) is right to 1e-9 only.

    torch's ζ counts its argument up to 9 in steps of one, so a large negative one would never return.
    """
    return torch.special.zeta(2.0, torch.where(x > 0, x, torch.nan))


def digamma_gap(x: Tensor) -> Tensor:
    """δ(x) = log x − ψ(x), to 1e-14 relative in float64."""
    return torch.where(x < _SWITCH, x.log() - x.digamma(), _series(_GAP, x))


def trigamma_gap(x: Tensor) -> Tensor:
    """τ(x) = x ψ′(x) − 1, to 1e-14 relative in float64."""
    return torch.where(x < _SWITCH, x * trigamma(x) - 1, _series(_TRIGAMMA_GAP, x))


def reciprocal_trigamma_gap(x: Tensor) -> Tensor:
    """1/ψ′(x) − x = −x τ(x) / (1 + τ(x)), between −½ and 0."""
    gap = trigamma_gap(x)
    return -x * gap / (1 + gap)


def multivariate_digamma(x: Tensor, dimension: int) -> Tensor:
    """ψ_d(x) = Σ_{i<d} ψ(x − i/2)."""
    return _half_steps(x, dimension).digamma().sum(-1)


def multivariate_digamma_gap(x: Tensor, dimension: int) -> Tensor:
    """δ_d(x) = d log x − ψ_d(x) = Σ_{i<d} δ(x − i/2) − log(1 − i/(2x))."""
    steps = _half_steps(x, dimension)
    halves = torch.arange(dimension, dtype=x.dtype, device=x.device) / 2
    return (digamma_gap(steps) - torch.log1p(-halves / x.unsqueeze(-1))).sum(-1)


def multivariate_trigamma_gap(x: Tensor, dimension: int) -> Tensor:
    """τ_d(x) = ψ_d′(x) − d/x = Σ_{i<d} (τ(x − i/2) + i/(2x)) / (x − i/2)."""
    steps = _half_steps(x, dimension)
    halves = torch.arange(dimension, dtype=x.dtype, device=x.device) / 2
    return ((trigamma_gap(steps) + halves / x.unsqueeze(-1)) / steps).sum(-1)


def multivariate_lgamma(x: Tensor, dimension: int) -> Tensor:
    """log Γ_d(x) = d(d−1)/4 log π + Σ_{i<d} log Γ(x − i/2)."""
    constant = dimension * (dimension - 1) / 4 * 1.1447298858494002
    return _half_steps(x, dimension).lgamma().sum(-1) + constant


def _half_steps(x: Tensor, dimension: int) -> Tensor:
    if dimension == 1:
        return x.unsqueeze(-1)
    return x.unsqueeze(-1) - torch.arange(dimension, dtype=x.dtype, device=x.device) / 2


def inverse_multivariate_digamma_gap(gap: Tensor, dimension: int = 1, iterations: int = 8) -> Tensor:
    """The x > (d − 1)/2 with δ_d(x) = gap, for gap > 0 (Minka 2002 at d = 1).

    Newton's method on 1/δ_d, nearly linear in x − (d − 1)/2 at both ends of the domain. NaN where gap ≤ 0.
    """
    lower = (dimension - 1) / 2
    target = torch.where(gap > 0, gap, torch.nan).reciprocal()
    excess = target
    for _ in range(iterations):
        x = excess + lower
        value = multivariate_digamma_gap(x, dimension)
        slope = multivariate_trigamma_gap(x, dimension)
        excess = (excess + (target * value - 1) * value / slope).clamp(min=0.1 * excess)
    return excess + lower


def inverse_digamma(y: Tensor, iterations: int = 5) -> Tensor:
    """The x with ψ(x) = y: Newton's method from Minka's two-sided start (Minka 2000, appendix C)."""
    x = torch.where(y >= -2.22, y.exp() + 0.5, -1 / (y.clamp(max=-2.22) + 0.5772156649015329))
    for _ in range(iterations):
        x = x - (x.digamma() - y) / trigamma(x)
    return x


def dirichlet_solve(concentration: Tensor, vector: Tensor) -> Tensor:
    """(diag ψ′(α) − ψ′(Σα) 11ᵀ)⁻¹ v, by Sherman and Morrison.

    The denominator 1/ψ′(Σα) − Σ 1/ψ′(α) is a difference of gaps, so it does not cancel at large α.
    """
    inverse = trigamma(concentration).reciprocal()
    total = reciprocal_trigamma_gap(concentration.sum(-1)) - reciprocal_trigamma_gap(concentration).sum(-1)
    shift = (inverse * vector).sum(-1) / total
    return inverse * (vector + shift.unsqueeze(-1))


def inverse_dirichlet_mean_log(mean_log: Tensor, iterations: int = 8, polish: int = 3) -> Tensor:
    """The α with ψ(α_k) − ψ(Σα) = mean_log_k.

    G(s) = Σ_k ψ⁻¹(mean_log_k + ψ(s)) − s is concave with one positive root, s = Σα. Newton's method decreases
    monotonically to it from the root of G's asymptote, ½ (K − E) / (1 − E) with E = Σ exp mean_log;
    a few joint Newton steps on α polish the result. NaN where E ≥ 1, which no distribution has.
    """
    complement = -torch.expm1(mean_log.logsumexp(-1))
    complement = torch.where(complement > 0, complement, torch.nan)
    total = 0.5 * (mean_log.shape[-1] - 1 + complement) / complement
    for _ in range(iterations):
        concentration = inverse_digamma(mean_log + total.digamma().unsqueeze(-1))
        slope = (trigamma(total).unsqueeze(-1) / trigamma(concentration)).sum(-1) - 1
        total = (total - (concentration.sum(-1) - total) / slope).clamp(min=0.1 * total)
    for _ in range(polish):
        residual = mean_log - concentration.digamma() + concentration.sum(-1, keepdim=True).digamma()
        moved = concentration + dirichlet_solve(concentration, residual)
        concentration = torch.where(moved > 0, moved, concentration)
    return concentration
