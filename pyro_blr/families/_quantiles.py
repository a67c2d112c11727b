"""Quantiles of the standard Gamma law, differentiable in its shape: what draws from levels in (0, 1) are made of.

Draws that are a smooth function of λ at fixed levels take low-discrepancy levels, and stay where they are while λ moves little;
those of a rejection sampler jump.
"""

from typing import Any

import torch
from torch import Tensor

_TINY = 1e-8  # below it P(α, x) = x^α / Γ(α + 1) · (1 − α x / (α + 1)) to rounding
_LARGE = 1e8  # from here on Wilson and Hilferty's cube is right to more digits than P(α, x)
_STEPS = 60  # of Halley's method at most; three are usual
_LAST = 1e-5  # sds of y: a step so short leaves an error of the order of its cube


class _LogStandardGamma(torch.autograd.Function):
    """y = log x with P(α, x) = u, and ∂y/∂α at fixed u (implicit reparameterisation, Figurnov et al. 2018, eq. 5)."""

    @staticmethod
    def forward(ctx: Any, concentration: Tensor, level: Tensor) -> Tensor:
        y = _solved(concentration, level)
        ctx.save_for_backward(concentration, y)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        concentration, y = ctx.saved_tensors
        x = y.exp()
        small = ((concentration + 1).digamma() - y) / concentration
        usual = torch._standard_gamma_grad(concentration, x) / x
        return gradient * torch.where(x < _TINY, small, usual), None


def log_standard_gamma(concentration: Tensor, level: Tensor) -> Tensor:
    """The logarithm of the x with P(α, x) = u, for u in (0, 1); broadcast, in float64.

    A logarithm, since at small α most of the quantiles are below the smallest number.
    """
    concentration, level = torch.broadcast_tensors(concentration.double(), level.double())
    result: Tensor = _LogStandardGamma.apply(concentration, level)
    return result


def standard_gamma(concentration: Tensor, level: Tensor) -> Tensor:
    """The x with P(α, x) = u, the smallest normal number at least."""
    x = log_standard_gamma(concentration, level).to(concentration.dtype).exp()
    return x.clamp(torch.finfo(concentration.dtype).tiny)


def _solved(concentration: Tensor, level: Tensor) -> Tensor:
    y = _started(concentration, level)
    for above in (False, True):
        here = ((level > 0.5) == above) & (concentration < _LARGE)
        y[here] = _refined(y[here], concentration[here], level[here], above)
    return y


def _started(concentration: Tensor, level: Tensor) -> Tensor:
    """Wilson and Hilferty's cube, or the power law of the lower tail where α is small."""
    tail = (level.log() + (concentration + 1).lgamma()) / concentration
    third = 1 / (9 * concentration)
    root = 1 - third + torch.special.ndtri(level) * third.sqrt()
    cube = concentration.log() + 3 * root.clamp(min=0.1).log()
    return torch.where((concentration > 0.3) & (root > 0.1), cube, tail)


def _refined(y: Tensor, concentration: Tensor, level: Tensor, above: bool) -> Tensor:
    """Halley's method on g = log P below the median, on g = log Q above it, both concave in y = log x."""
    target = (1 - level if above else level).log()
    log_gamma, sign = concentration.lgamma(), -1.0 if above else 1.0
    scale = torch.where(concentration > 1, concentration.rsqrt(), 1 / concentration)  # about the sd of y
    limit = 2.0 * scale.clamp(min=1.0)
    for _ in range(_STEPS):
        x = y.exp()
        if above:
            value = torch.special.gammaincc(concentration, x).log()
        else:
            power = concentration * y - (concentration + 1).lgamma() - concentration * x / (concentration + 1)
            value = torch.where(x < _TINY, power, torch.special.gammainc(concentration, x).log())
        slope = (concentration * y - x - log_gamma - value).exp()  # |g′|, the density of y over P or Q
        newton = sign * (target - value) / slope
        bend = 1 + 0.5 * newton * (concentration - x - sign * slope)  # g″ / g′ = α − x ∓ |g′|
        step = (newton / bend.clamp(0.5, 2.0)).nan_to_num(nan=-1.0)
        y = y + torch.minimum(torch.maximum(step, -limit), limit)
        if bool((step.abs() <= _LAST * scale).all()):
            break
    return y
