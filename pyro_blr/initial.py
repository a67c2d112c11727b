"""Where λ starts: at the prior where that is of the family and proper, else at a unit Gaussian."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_blr.blocks import Block, is_gaussian
from pyro_blr.families import (
    Bernoulli,
    Beta,
    Categorical,
    DiagonalNormal,
    Dirichlet,
    Gamma,
    InverseGamma,
    LogNormal,
    MultivariateNormal,
    Normal,
    SparseNormal,
    TransformedNormal,
    Wishart,
    family_of,
    pushforward_family,
)
from pyro_blr.graph import Site
from pyro_blr.marginals import bijection_of, event_shape_of, unconstrain
from pyro_blr.running import unwrap

__all__ = [
    "WIDTH",
    "diagonal_natural",
    "initial_natural",
    "joint_natural",
    "moments_at",
    "natural_of",
    "to_full",
]

WIDTH = 0.1  # standard deviation, absolute of a Gaussian and relative of others, of a start at a point


def initial_natural(block: Block) -> Tensor:
    """λ (*block.full_shape, p) of this run's prior; a unit one where that is improper or not of the family.

    Rows of a subsampled plate that this run did not see repeat the ones that it did.
    """
    if block.is_joint:
        return to_full(block, joint_natural(block, {}))
    fallback = _unit_natural(block)
    prior = natural_of(block, block.sites[0].distribution)
    if prior is None:
        return to_full(block, fallback)
    proper = block.family.contains(prior).unsqueeze(-1)
    return to_full(block, torch.where(proper, prior, fallback))


def to_full(block: Block, tensor: Tensor, trailing: int = 1) -> Tensor:
    """Repeats the rows of this run until every subsampled plate is full; `trailing` dims follow the batch."""
    for plate in block.plates:
        if plate.subsample_size != plate.size:
            rows = torch.arange(plate.size, device=tensor.device) % max(plate.subsample_size, 1)
            tensor = tensor.index_select(plate.dim - block.elements - trailing, rows)
    return tensor.contiguous()


# --------------------------------------------------------------------------------------------------------
# From a distribution


@torch.no_grad()
def natural_of(block: Block, distribution: Any) -> Tensor | None:
    """λ (*block.batch_shape, p) of a distribution over the block's only site; None if not of the family."""
    base = unwrap(distribution)[0]
    try:
        natural = _natural_in_family(block, base, distribution)
        if natural is None:
            return None
        natural = natural.to(dtype=block.dtype, device=block.device)
        return natural.expand(*block.batch_shape, block.family.num_parameters).clone()
    except (NotImplementedError, RuntimeError, ValueError):  # another shape, no closed form
        return None


def _natural_in_family(block: Block, base: Any, distribution: Any) -> Tensor | None:
    family = block.family
    if block.states is not None:
        states = block.states.reshape(-1, *(1 for _ in base.batch_shape), *base.event_shape)
        floor = math.log(torch.finfo(block.dtype).tiny)
        logits = base.log_prob(states.to(block.device)).clamp(min=floor).movedim(0, -1)
        if isinstance(family, Bernoulli):
            return logits[..., 1:] - logits[..., :1]
        return logits[..., :-1] - logits[..., -1:]
    if isinstance(family, TransformedNormal):
        return _natural_of_pushforward(block, family, base, distribution)
    own = family_of(base)
    if own == family:
        return family.from_distribution(base)
    shape = block.batch_shape + family.event_shape
    if isinstance(own, MultivariateNormal) and isinstance(family, Normal):
        return diagonal_natural(family, base.mean.expand(shape), base.variance.expand(shape))
    if isinstance(own, Normal) and isinstance(family, MultivariateNormal):
        full = block.batch_shape + event_shape_of(block.sites[0])
        mean, variance = (moment.expand(full).reshape(shape) for moment in (base.mean, base.variance))
        return diagonal_natural(family, mean, variance)
    return None


def _natural_of_pushforward(block: Block, family: Any, base: Any, distribution: Any) -> Tensor | None:
    """λ of the family's own pushforward, or of one that a program writes element by element."""
    try:
        return family.from_distribution(distribution)
    except ValueError:
        element = pushforward_family(base.support, base.event_shape)
        if not isinstance(element, TransformedNormal) or not isinstance(element.base, Normal):
            return None
        moments = element.moments(element.from_distribution(base))
        full = block.batch_shape + family.unconstrained_shape
        flat = block.batch_shape + family.base.event_shape
        mean, variance = (moments[name].expand(full).reshape(flat) for name in ("mean", "variance"))
        return diagonal_natural(family.base, mean, variance)


def diagonal_natural(family: Any, mean: Tensor, variance: Tensor) -> Tensor:
    """λ of independent Gaussians, in a Normal, DiagonalNormal, MultivariateNormal or SparseNormal family."""
    if isinstance(family, SparseNormal):
        return family.independent(mean, variance)
    if isinstance(family, DiagonalNormal):
        return family.natural_of(mean, variance)
    first, second = mean / variance, -0.5 / variance
    if not isinstance(family, MultivariateNormal):
        return torch.stack([first, second], -1)
    index = torch.arange(family.dimension, device=mean.device)
    packed = mean.new_zeros(*mean.shape[:-1], family.num_parameters)
    packed[..., : family.dimension] = first
    packed[..., family.dimension + index * (index + 1) // 2 + index] = second
    return packed


# --------------------------------------------------------------------------------------------------------
# Without one


def _unit_natural(block: Block) -> Tensor:
    """λ of a Gaussian with the prior's mean and variance, or 0 and 1; of another family, a vague member."""
    family, site = block.family, block.sites[0]
    base = family.base if isinstance(family, TransformedNormal) else family
    options: dict[str, Any] = {"dtype": block.dtype, "device": block.device}
    shape = (*block.batch_shape, *base.event_shape)
    if is_gaussian(family):
        mean, variance = torch.zeros(shape, **options), torch.ones(shape, **options)
        if isinstance(family, LogNormal):
            return family.from_distribution(dist.LogNormal(mean, variance, validate_args=False))
        if not isinstance(family, TransformedNormal):
            mean, variance = _moments_of_prior(site, mean, variance)
        return diagonal_natural(base, mean, variance)
    ones = torch.ones(shape, **options)
    if isinstance(family, Gamma):
        return family.from_distribution(dist.Gamma(ones, ones, validate_args=False))
    if isinstance(family, InverseGamma):
        return family.from_distribution(dist.InverseGamma(2 * ones, ones, validate_args=False))
    if isinstance(family, Wishart):
        degrees = torch.full(tuple(block.batch_shape), family.dimension + 1.0, **options)
        precision = degrees[..., None, None] * torch.eye(family.dimension, **options)
        vague = dist.Wishart(degrees, precision_matrix=precision, validate_args=False)
        return family.from_distribution(vague)
    # Beta(1, 1), Dirichlet(1, …, 1), equal probabilities: λ = 0 is a member
    return torch.zeros(*block.batch_shape, family.num_parameters, **options)


def _moments_of_prior(site: Site, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """The prior's own mean and variance where they are finite (Student-t, Laplace), else the ones given."""
    try:
        prior = unwrap(site.distribution)[0]
        moments = (prior.mean.detach(), prior.variance.detach())
        found = [moment.expand(site.shape).reshape(mean.shape).to(mean) for moment in moments]
    except (NotImplementedError, AttributeError, RuntimeError):
        return mean, variance
    usable = found[0].isfinite() & found[1].isfinite() & (found[1] > 0)
    return torch.where(usable, found[0], mean), torch.where(usable, found[1], variance)


def joint_natural(block: Block, given: Mapping[str, Any]) -> Tensor:
    """λ of a joint Gaussian of independent members: each at what is `given` for it, else at its prior."""
    if isinstance(block.family, SparseNormal):
        return _sparse_natural(block, block.family, given)
    size = block.family.event_shape[0]
    options: dict[str, Any] = {"dtype": block.dtype, "device": block.device}
    mean = torch.zeros(*block.batch_shape, size, **options)
    precision = torch.ones(*block.batch_shape, size, **options).diag_embed()
    for member in block.members:
        site, rows = member.site, slice(member.start, member.stop)
        bijection, shape = bijection_of(site)
        own = site.batch_shape[len(block.batch_shape) :]
        start = given.get(site.name, site.distribution)
        if isinstance(start, Tensor):
            u = start if bijection is None else bijection.inv(start)
            mean[..., rows] = u.reshape(*block.batch_shape, (own + shape).numel())
            precision[..., rows, rows] /= WIDTH**2
        elif bijection is None:
            base = unwrap(start)[0]
            if isinstance(family_of(base), MultivariateNormal) and not own and len(shape) == 1:
                mean[..., rows], precision[..., rows, rows] = base.loc, base.precision_matrix
            else:
                ones = torch.ones_like(mean[..., rows])
                located = _moments_of_prior(_with(site, start), mean[..., rows], ones)
                mean[..., rows], precision[..., rows, rows] = located[0], located[1].reciprocal().diag_embed()
    gaussian = dist.MultivariateNormal(mean, precision_matrix=precision, validate_args=False)
    return block.family.from_distribution(gaussian)


def _sparse_natural(block: Block, family: SparseNormal, given: Mapping[str, Any]) -> Tensor:
    """The same, of independent entries: no prior within an event is kept but its variances."""
    means, variances = [], []
    for member in block.members:
        site, bijection = member.site, bijection_of(member.site)[0]
        start = given.get(site.name, site.distribution)
        options: dict[str, Any] = {"dtype": torch.float64, "device": block.device}
        mean, variance = (torch.full((member.stop - member.start,), value, **options) for value in (0.0, 1.0))
        if isinstance(start, Tensor):
            mean = (start if bijection is None else bijection.inv(start)).reshape(-1).to(mean)
            variance = torch.full_like(variance, WIDTH**2)
        elif bijection is None:
            mean, variance = _moments_of_prior(_with(site, start), mean, variance)
        means.append(mean)
        variances.append(variance)
    return family.independent(torch.cat(means), torch.cat(variances))


def _with(site: Site, distribution: Any) -> Site:
    return replace(site, distribution=distribution)


# --------------------------------------------------------------------------------------------------------
# From a value


def moments_at(block: Block, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`family.moments` of a point mass at the sites' values, in the model's shapes: E T(z) = T(z)."""
    family = block.family
    if is_gaussian(family):
        u = unconstrain(block, values)
        base = family.base if isinstance(family, TransformedNormal) else family
        u = u.reshape((*u.shape[: u.dim() - 1 - block.elements], *_elements_of(block), *base.event_shape))
        if isinstance(base, MultivariateNormal):
            return {"mean": u, "covariance": u.new_zeros(*u.shape, u.shape[-1])}
        if isinstance(base, SparseNormal):
            rest = u.new_zeros(*u.shape[:-1], base.elimination.size - base.dimension)
            return {"mean": u, "variance": torch.zeros_like(u), "entries": rest}
        return {"mean": u, "variance": torch.zeros_like(u)}
    value = values[block.sites[0].name]
    if isinstance(family, Gamma):
        return {"log": value.log(), "mean": value}
    if isinstance(family, InverseGamma):
        return {"log": value.log(), "inverse": value.reciprocal()}
    if isinstance(family, Beta):
        return {"log": value.log(), "log_complement": (-value).log1p()}
    if isinstance(family, Dirichlet):
        return {"log": value.log()}
    if isinstance(family, Wishart):
        return {"logdet": torch.linalg.slogdet(value)[1], "mean": value}
    return {"probs": _one_hot(block, value)}


def _elements_of(block: Block) -> torch.Size:
    return block.batch_shape[len(block.batch_shape) - block.elements :]


def _one_hot(block: Block, value: Tensor) -> Tensor:
    """(*batch, K), one at the state that the value is."""
    if isinstance(block.family, Categorical) and block.family.one_hot:
        return value.to(block.dtype)
    states = block.states
    if states is None:
        states = torch.arange(getattr(block.family, "num_categories", 2))
    return (value.unsqueeze(-1) == states.to(value.device)).to(block.dtype)
