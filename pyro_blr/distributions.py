"""Distributions over a site's own support whose mean and variance are always defined."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints, transforms
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions.utils import lazy_property

from pyro_blr.families.transformed_normal import Pushforward

__all__ = [
    "IndexCategorical",
    "InverseGammaWithMoments",
    "PushedNormal",
    "Reshaped",
    "States",
    "affine_of_exp",
    "is_elementwise",
]


class IndexCategorical(dist.Categorical):
    """Categorical(p) over 0 … K − 1 whose moments are those of the index (torch's are NaN)."""

    @property
    def mean(self) -> Tensor:
        return (self.probs * _indices(self.probs)).sum(-1)

    @property
    def variance(self) -> Tensor:
        return (self.probs * (_indices(self.probs) - self.mean.unsqueeze(-1)).square()).sum(-1)


def _indices(probs: Tensor) -> Tensor:
    return torch.arange(probs.shape[-1], dtype=probs.dtype, device=probs.device)


class States(TorchDistribution):
    """P(x = states[k]) = p_k over a finite list of numbers, (K)."""

    arg_constraints: dict[str, Any] = {}
    has_enumerate_support = True

    def __init__(self, states: Tensor, logits: Tensor, support: Any) -> None:
        self.states, self._support = states, support
        self._index = dist.Categorical(logits=logits, validate_args=False)
        super().__init__(self._index.batch_shape, validate_args=False)

    @constraints.dependent_property(is_discrete=True)
    def support(self) -> Any:
        return self._support

    @property
    def probs(self) -> Tensor:
        return self._index.probs

    def expand(self, batch_shape: Any, _instance: Any = None) -> States:
        logits = self._index.logits
        return States(self.states, logits.expand(*batch_shape, logits.shape[-1]), self._support)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return self.states[self._index.sample(torch.Size(sample_shape))]

    def log_prob(self, value: Tensor) -> Tensor:
        logits = self._index.logits
        same = value.unsqueeze(-1) == self.states
        matching = torch.where(same, logits, torch.full_like(logits, -torch.inf))
        return matching.amax(-1)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        states = self.states.reshape(-1, *(1 for _ in self.batch_shape))
        return states.expand(-1, *self.batch_shape) if expand else states

    @property
    def mean(self) -> Tensor:
        return self.probs @ self.states.to(self.probs.dtype)

    @property
    def variance(self) -> Tensor:
        states = self.states.to(self.probs.dtype)
        return (self.probs * (states - self.mean.unsqueeze(-1)).square()).sum(-1)


class InverseGammaWithMoments(dist.InverseGamma):
    """InverseGamma(α, β) with its mean β / (α − 1) and variance, infinite where the integrals are."""

    @property
    def mean(self) -> Tensor:
        excess = self.concentration - 1
        return torch.where(excess > 0, self.rate / excess, torch.inf)

    @property
    def variance(self) -> Tensor:
        excess = self.concentration - 1
        return torch.where(excess > 1, (self.rate / excess).square() / (excess - 1), torch.inf)


class Reshaped(dist.TransformedDistribution):
    """A distribution over ℝᵈ, read as one over arrays of d elements."""

    @property
    def mean(self) -> Tensor:
        return self.transforms[0](self.base_dist.mean)

    @property
    def variance(self) -> Tensor:
        return self.transforms[0](self.base_dist.variance)


class PushedNormal(Pushforward):
    """x = t(u), u Gaussian, with the moments of x.

    a + b exp u has closed forms. Other elementwise t: the trapezoidal rule on u = m + s z, whose error falls
    as exp(−2π²/(s h)) for the logistic function; the spacing h follows s (Gauss–Hermite nodes step over a
    steep t). A t that mixes elements (simplex, Cholesky factor): 8192 points of a scrambled Sobol sequence,
    always the same.
    """

    @lazy_property
    def moments(self) -> tuple[Tensor, Tensor]:
        if not is_elementwise(self.transforms):
            draws = self.draws()
            return draws.mean(0), draws.var(0, unbiased=False)
        mean, variance = self.base_dist.mean, self.base_dist.variance
        exponential = affine_of_exp(self.transforms)
        if exponential is not None:
            loc, scale = exponential
            level = scale * (mean + 0.5 * variance).exp()
            return self._shaped(loc + level), self._shaped(level.square() * variance.expm1())
        return self._integrate(mean.double(), variance.double().sqrt(), mean.dtype)

    @property
    def mean(self) -> Tensor:
        return self.moments[0]

    @property
    def variance(self) -> Tensor:
        return self.moments[1]

    def _shaped(self, u: Tensor) -> Tensor:
        return u.reshape(self.batch_shape + self.event_shape)

    def push(self, u: Tensor) -> Tensor:
        for transform in self.transforms:
            u = transform(u)
        return u

    def draws(self, num_points: int = 8192) -> Tensor:
        """Quasi-random draws, (num_points, *batch, *event), equal from call to call."""
        loc = self.base_dist.mean
        sobol = torch.quasirandom.SobolEngine(loc.shape[-1], scramble=True, seed=0)
        points = sobol.draw(num_points, dtype=torch.float64).clamp(1e-12, 1 - 1e-12)
        z = torch.special.ndtri(points).to(loc)
        z = z.reshape(num_points, *(1 for _ in loc.shape[:-1]), loc.shape[-1])
        if isinstance(self.base_dist, torch.distributions.Independent):
            return self.push(loc + self.base_dist.stddev * z)
        return self.push(loc + (self.base_dist.scale_tril @ z.unsqueeze(-1)).squeeze(-1))

    def _integrate(self, mean: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """E t and Var t by nodes z of spacing h; the mass of a t like exp is up to 2 s away from 0."""
        widest = scale.max().item() if scale.numel() else 0.0
        spacing = min(0.25, max(0.5 / max(widest, 1e-300), 20 / 4096))
        last = math.ceil((10 + min(2 * widest, 28)) / spacing)
        z = spacing * torch.arange(-last, last + 1, dtype=torch.float64, device=mean.device)
        weights = torch.softmax(-0.5 * z.square(), 0)
        chunk = max(1, 2**20 // max(mean.numel(), 1))
        first = second = torch.zeros((), dtype=torch.float64, device=mean.device)
        origin = self.push(mean)
        for nodes, share in zip(z.split(chunk), weights.split(chunk), strict=True):
            shape = (-1, *(1 for _ in mean.shape))
            x = self.push(mean + scale * nodes.reshape(shape)) - origin
            first = first + torch.tensordot(share, x, 1)
            second = second + torch.tensordot(share, x.square(), 1)
        variance = (second - first.square()).clamp(min=0)
        return (origin + first).to(dtype), variance.to(dtype)


def is_elementwise(bijections: list[Any]) -> bool:
    """Whether each element of t(u) is a function of one element of u."""
    return all(_is_elementwise(bijection) for bijection in bijections)


def _is_elementwise(bijection: Any) -> bool:
    if isinstance(bijection, transforms.IndependentTransform):
        return _is_elementwise(bijection.base_transform)
    if isinstance(bijection, transforms.ComposeTransform):
        return is_elementwise(bijection.parts)
    if isinstance(bijection, transforms.ReshapeTransform):
        return True
    return bijection.domain.event_dim == 0 and bijection.codomain.event_dim == 0


def affine_of_exp(bijections: list[Any]) -> tuple[Any, Any] | None:
    """(a, b) where t(u) = a + b exp u; None where t is another function."""
    parts = [part for item in bijections for part in _parts(item)]
    if not parts or len(parts) > 2 or not isinstance(parts[0], transforms.ExpTransform):
        return None
    if len(parts) == 1:
        return 0.0, 1.0
    affine = parts[1]
    return (affine.loc, affine.scale) if isinstance(affine, transforms.AffineTransform) else None


def _parts(bijection: Any) -> list[Any]:
    if isinstance(bijection, transforms.ReshapeTransform):
        return []
    if isinstance(bijection, transforms.IndependentTransform):
        return _parts(bijection.base_transform)
    if isinstance(bijection, transforms.ComposeTransform):
        return [part for item in bijection.parts for part in _parts(item)]
    return [bijection]
