"""Quantiles of the distributions that a guide is made of, element by element."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_blr.distributions import PushedNormal, Reshaped, States, is_elementwise
from pyro_blr.running import isolated_random_state

__all__ = ["median", "quantile", "regularised_beta"]

NUM_DRAWS = 20_000  # where a marginal has no closed form


def quantile(distribution: Any, levels: Tensor) -> Tensor:
    """inf {x : P(X ≤ x) ≥ level} of every element's marginal: (L) in float64 -> (L, *batch, *event).

    Exact for Gaussians and elementwise pushforwards of them, Gamma, InverseGamma, Beta, Dirichlet and
    discrete laws; from fixed draws for a simplex or Cholesky factor pushed from a Gaussian and for a
    Wishart's off-diagonals.
    """
    shape = (-1, *(1 for _ in distribution.batch_shape), *(1 for _ in distribution.event_shape))
    level = levels.reshape(shape)
    if isinstance(distribution, torch.distributions.Independent):
        return quantile(distribution.base_dist, levels)
    if isinstance(distribution, Reshaped):
        return distribution.transforms[0](quantile(distribution.base_dist, levels))
    if isinstance(distribution, PushedNormal):
        return _quantile_of_pushforward(distribution, levels)
    for cls, rule in _RULES.items():
        if isinstance(distribution, cls):
            return rule(distribution, level)
    try:
        return distribution.icdf(level)
    except NotImplementedError:
        return _empirical(_draws(distribution), levels)


def median(distribution: Any, device: torch.device) -> Tensor:
    """A point of the support: the elements' medians, or what stands for them where the support ties elements.

    Dirichlet: the medians renormalised. One-hot: the likeliest state. A pushed Gaussian: the image of its
    centre. Wishart: the mean.
    """
    if isinstance(distribution, torch.distributions.Independent):
        return median(distribution.base_dist, device)
    if isinstance(distribution, PushedNormal):
        return distribution.push(distribution.base_dist.mean)
    if isinstance(distribution, torch.distributions.Wishart):
        return distribution.mean
    if isinstance(distribution, torch.distributions.OneHotCategorical):
        state = distribution.probs.argmax(-1)
        return torch.nn.functional.one_hot(state, distribution.probs.shape[-1]).to(distribution.probs.dtype)
    result = quantile(distribution, torch.tensor([0.5], dtype=torch.float64, device=device))[0]
    if isinstance(distribution, torch.distributions.Dirichlet):
        return result / result.sum(-1, keepdim=True)
    return result


def _quantile_of_pushforward(distribution: PushedNormal, levels: Tensor) -> Tensor:
    if not is_elementwise(distribution.transforms):
        return _empirical(distribution.draws(), levels)
    base = distribution.base_dist
    increasing, decreasing = (distribution.push(quantile(base, p)) for p in (levels, 1 - levels))
    centre, above = distribution.push(base.mean), distribution.push(base.mean + base.stddev)
    return torch.where(above >= centre, increasing, decreasing)


def _draws(distribution: Any) -> Tensor:
    with isolated_random_state(0), torch.no_grad():
        return distribution.sample((NUM_DRAWS,))


def _empirical(draws: Tensor, levels: Tensor) -> Tensor:
    """Quantiles of draws along their first dim, linear between order statistics."""
    position = levels.to(draws.dtype).clamp(0, 1) * (draws.shape[0] - 1)
    below = position.floor().long()
    ordered = draws.sort(0).values
    weight = (position - below).reshape(-1, *(1 for _ in draws.shape[1:]))
    return torch.lerp(ordered[below], ordered[(below + 1).clamp(max=draws.shape[0] - 1)], weight)


def _normal(distribution: Any, level: Tensor) -> Tensor:
    return distribution.mean + distribution.stddev * torch.special.ndtri(level)


def _gamma(distribution: Any, level: Tensor) -> Tensor:
    alpha, rate = distribution.concentration, distribution.rate
    return (_standard_gamma(alpha.double(), level.double()) / rate).to(rate.dtype)


def _inverse_gamma(distribution: Any, level: Tensor) -> Tensor:
    alpha, rate = distribution.concentration, distribution.rate
    return (rate / _standard_gamma(alpha.double(), 1 - level.double())).to(rate.dtype)


def _standard_gamma(alpha: Tensor, level: Tensor) -> Tensor:
    """The x with P(α, x) = level, by bisection on log x."""
    alpha, level = torch.broadcast_tensors(alpha, level)
    # P(α, x) ≤ x^α / Γ(α + 1) below, and a tail of 100 standard deviations above
    low = ((level.clamp(min=1e-300).log() + torch.lgamma(alpha + 1)) / alpha).clamp(max=700) - 1
    low = torch.minimum(low, alpha.log())
    high = (alpha + 100 * (alpha.sqrt() + 1)).log()
    x = _bisect(lambda y: torch.special.gammainc(alpha, y.exp()), level, low, high).exp()
    return torch.where(level <= 0, 0.0, torch.where(level >= 1, torch.inf, x))


def _beta(distribution: Any, level: Tensor) -> Tensor:
    a, b = distribution.concentration1, distribution.concentration0
    return _standard_beta(a.double(), b.double(), level.double()).to(a.dtype)


def _dirichlet(distribution: Any, level: Tensor) -> Tensor:
    """Marginals are Beta(α_k, Σα − α_k)."""
    alpha = distribution.concentration.double()
    rest = alpha.sum(-1, keepdim=True) - alpha
    return _standard_beta(alpha, rest, level.double()).to(distribution.concentration.dtype)


def _standard_beta(a: Tensor, b: Tensor, level: Tensor) -> Tensor:
    """The x with I_x(a, b) = level, by bisection on logit x."""
    a, b, level = torch.broadcast_tensors(a, b, level)
    low, high = torch.full_like(level, -700.0), torch.full_like(level, 700.0)
    x = _bisect(lambda y: regularised_beta(a, b, y), level, low, high).sigmoid()
    return torch.where(level <= 0, 0.0, torch.where(level >= 1, 1.0, x))


def regularised_beta(a: Tensor, b: Tensor, logit: Tensor) -> Tensor:
    """I_x(a, b) at x = σ(logit), by its continued fraction (DLMF 8.17.22) evaluated with Lentz's method."""
    flip = logit.sigmoid() > (a + 1) / (a + b + 2)
    first, second = torch.where(flip, b, a), torch.where(flip, a, b)
    y = torch.where(flip, -logit, logit)
    x, log_beta = y.sigmoid(), a.lgamma() + b.lgamma() - (a + b).lgamma()
    front = (
        first * torch.nn.functional.logsigmoid(y) + second * torch.nn.functional.logsigmoid(-y) - log_beta
    ).exp() / first
    c = torch.ones_like(x)
    d = 1 / (1 - (first + second) * x / (first + 1))
    fraction = d
    for m in range(1, 20_000):
        even = m * (second - m) * x / ((first + 2 * m - 1) * (first + 2 * m))
        odd = -(first + m) * (first + second + m) * x / ((first + 2 * m) * (first + 2 * m + 1))
        d, c = 1 / (1 + even * d), 1 + even / c
        fraction = fraction * c * d
        d, c = 1 / (1 + odd * d), 1 + odd / c
        fraction = fraction * c * d
        if bool(((c * d - 1).abs() < 1e-15).all()):
            break
    value = front * fraction
    return torch.where(flip, 1 - value, value)


def _bisect(cdf: Callable[[Tensor], Tensor], level: Tensor, low: Tensor, high: Tensor) -> Tensor:
    for _ in range(64):
        middle = 0.5 * (low + high)
        above = cdf(middle) >= level
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return 0.5 * (low + high)


def _bernoulli(distribution: Any, level: Tensor) -> Tensor:
    return (level > 1 - distribution.probs).to(distribution.probs.dtype)


def _categorical(distribution: Any, level: Tensor) -> Tensor:
    return _smallest_state(distribution.probs, level)


def _states(distribution: States, level: Tensor) -> Tensor:
    order = distribution.states.argsort()
    return distribution.states[order][_smallest_state(distribution.probs[..., order], level)]


def _smallest_state(probs: Tensor, level: Tensor) -> Tensor:
    rounding = 4 * torch.finfo(probs.dtype).eps
    return (probs.cumsum(-1)[..., :-1] < level.unsqueeze(-1) - rounding).sum(-1)


def _wishart(distribution: Any, level: Tensor) -> Tensor:
    """A diagonal element is V_kk χ²_ν, a Gamma; the others from draws."""
    result = _empirical(_draws(distribution), level.flatten()).clone()
    scale = distribution.covariance_matrix.diagonal(dim1=-2, dim2=-1)
    concentration = (distribution.df / 2).unsqueeze(-1).expand_as(scale)
    diagonal = _gamma(dist.Gamma(concentration, 0.5 / scale, validate_args=False), level.squeeze(-1))
    result.diagonal(dim1=-2, dim2=-1).copy_(diagonal)
    return result


# The classes of torch, which Pyro's are made of, and Pyro's own InverseGamma.
_RULES: dict[type, Callable[[Any, Tensor], Tensor]] = {
    torch.distributions.Normal: _normal,
    torch.distributions.MultivariateNormal: _normal,
    torch.distributions.Gamma: _gamma,
    dist.InverseGamma: _inverse_gamma,
    torch.distributions.Beta: _beta,
    torch.distributions.Dirichlet: _dirichlet,
    torch.distributions.Wishart: _wishart,
    torch.distributions.Bernoulli: _bernoulli,
    torch.distributions.OneHotCategorical: _bernoulli,
    torch.distributions.Categorical: _categorical,
    States: _states,
}
