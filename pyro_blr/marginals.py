"""What q says about the sites of a model: the marginal of each, and their values from a block's variable."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints, transforms
from pyro.distributions.util import sum_rightmost
from torch import Tensor

from pyro_blr.blocks import Block
from pyro_blr.distributions import IndexCategorical, InverseGammaWithMoments, PushedNormal, Reshaped, States
from pyro_blr.families import (
    Categorical,
    Dirichlet,
    GaussianField,
    InverseGamma,
    LogNormal,
    MultivariateNormal,
    Normal,
    SparseNormal,
    TransformedNormal,
    pushforward_family,
)
from pyro_blr.graph import Site
from pyro_blr.members import Member

__all__ = [
    "bijection_of",
    "draws_of",
    "event_shape_of",
    "gaussian_moments",
    "log_prob_of",
    "marginal",
    "member_values",
    "site_distribution",
    "unconstrain",
    "variable_distribution",
]


def event_shape_of(site: Site) -> torch.Size:
    return site.shape[len(site.batch_shape) :]


def bijection_of(site: Site) -> tuple[Any, torch.Size]:
    """(transform or None on ℝ, shape of one unconstrained event) of a site inside a joint Gaussian."""
    family = pushforward_family(site.support, event_shape_of(site))
    if isinstance(family, TransformedNormal) and not _is_real(site.support):
        return family.transform, family.unconstrained_shape
    return None, event_shape_of(site)


def _is_real(support: Any) -> bool:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support is constraints.real


def site_distribution(block: Block, natural: Tensor) -> Any:
    """q of a block's only site at λ (*batch, *elements, p): batch and event shapes are the model's."""
    site, family = block.sites[0], block.family
    if block.is_joint:
        raise ValueError(f"block {block.name!r} is joint over {block.site_names}: ask `marginal` for one")
    distribution = variable_distribution(block, natural)
    if isinstance(family, MultivariateNormal) and not block.elements:
        return _reshaped(distribution, event_shape_of(site))
    if isinstance(distribution, dist.Categorical) and block.states is not None:
        distribution = _over_states(block.states, distribution.logits, site.support)
    if isinstance(family, TransformedNormal):
        return PushedNormal(distribution.base_dist, distribution.transforms, site.support)
    if isinstance(family, InverseGamma):
        concentration, rate = distribution.concentration, distribution.rate
        distribution = InverseGammaWithMoments(concentration, rate, validate_args=False)
    return distribution.to_event(block.elements)


def variable_distribution(block: Block, natural: Tensor) -> Any:
    """q of the block's own variable in the precision of its sites; matrices are factored in that of λ."""
    site, family = block.sites[0], block.family
    dtype = site.dtype if site.dtype.is_floating_point else natural.dtype
    matrix = len(family.event_shape) > 0 and not isinstance(family, Dirichlet | Categorical)
    if natural.dtype == dtype or not matrix:
        return family.to_distribution(natural.to(dtype))
    distribution = family.to_distribution(natural)
    if isinstance(family, TransformedNormal):
        base = _in_precision(distribution.base_dist, dtype)
        return PushedNormal(base, distribution.transforms, site.support)
    return _in_precision(distribution, dtype)


def _in_precision(distribution: Any, dtype: torch.dtype) -> Any:
    """The same Gaussian or Wishart with its arguments rounded, not its λ."""
    if isinstance(distribution, torch.distributions.Independent):
        return _in_precision(distribution.base_dist, dtype).to_event(distribution.reinterpreted_batch_ndims)
    if isinstance(distribution, dist.Normal):
        return dist.Normal(distribution.loc.to(dtype), distribution.scale.to(dtype), validate_args=False)
    if isinstance(distribution, GaussianField):
        return distribution.in_precision(dtype)
    scale_tril = distribution.scale_tril.to(dtype)
    if isinstance(distribution, dist.MultivariateNormal):
        return dist.MultivariateNormal(distribution.loc.to(dtype), scale_tril=scale_tril, validate_args=False)
    return type(distribution)(distribution.df.to(dtype), scale_tril=scale_tril, validate_args=False)


def _over_states(states: Tensor, logits: Tensor, support: Any) -> Any:
    states = states.to(logits.device)
    if states.dim() == 1 and not states.is_floating_point():
        if torch.equal(states, torch.arange(len(states), device=states.device)):
            return IndexCategorical(logits=logits, validate_args=False)
    return States(states, logits, support)


def _reshaped(distribution: Any, event_shape: torch.Size) -> Any:
    if distribution.event_shape == event_shape:
        return distribution
    reshape = transforms.ReshapeTransform(distribution.event_shape, event_shape)
    return Reshaped(distribution, [reshape], validate_args=False)


def marginal(block: Block, name: str, natural: Tensor) -> Any:
    """q of one site at λ, the other sites of its block integrated out.

    A site with batch dimensions of its own in a joint block keeps, of each batch element, the marginal.
    """
    if not block.is_joint:
        return site_distribution(block, natural)
    member = next(member for member in block.members if member.site.name == name)
    bijection, shape = bijection_of(member.site)
    own = member.site.batch_shape[len(block.batch_shape) :]
    index = slice(member.start, member.stop)
    if isinstance(block.family, SparseNormal):
        mean, covariance = _sparse_moments(block.family, member, natural, own.numel())
        mean, covariance = mean.reshape(*own, -1), covariance.reshape(*own, shape.numel(), shape.numel())
    else:
        mean, covariance = gaussian_moments(block, natural)
        mean, covariance = mean[..., index], covariance[..., index, index]
    if own and not isinstance(block.family, SparseNormal):
        mean = mean.reshape(*own, shape.numel())
        covariance = covariance.reshape(own.numel(), shape.numel(), own.numel(), shape.numel())
        covariance = covariance.diagonal(dim1=0, dim2=2).movedim(-1, 0).reshape(*mean.shape, shape.numel())
    if not shape:
        scale = covariance.squeeze(-1).squeeze(-1).sqrt()
        base: Any = dist.Normal(mean.squeeze(-1), scale, validate_args=False)
    else:
        base = dist.MultivariateNormal(mean, covariance, validate_args=False)
    base = _in_precision(base, member.site.dtype)
    if bijection is None:
        return _reshaped(base, shape)
    reshape = [] if base.event_shape == shape else [transforms.ReshapeTransform(base.event_shape, shape)]
    return PushedNormal(base, [*reshape, bijection], member.site.support)


def _sparse_moments(family: SparseNormal, member: Member, natural: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean (count, d) and covariance (count, d, d) of the values of a site that is `count` values of d numbers."""
    moments, device = family.moments(natural), natural.device
    entries = torch.arange(member.start, member.stop, device=device).reshape(count, -1)
    spread = torch.cat([moments["variance"], moments["entries"]], -1)
    if entries.shape[-1] == 1:
        return moments["mean"][..., entries], spread[..., entries].unsqueeze(-1)
    try:
        places = family.places(entries.unsqueeze(-1), entries.unsqueeze(-2))
    except ValueError:  # values whose own entries are not coupled: their covariances are solved for
        law = family.to_distribution(natural)
        return moments["mean"][..., entries], torch.stack([law.covariance(one) for one in entries])
    return moments["mean"][..., entries], spread[..., places]


def gaussian_moments(block: Block, natural: Tensor, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean (*batch, d) and covariance (*batch, d, d) of a Gaussian block's flat unconstrained variable, or of some entries of it."""
    if isinstance(block.family, SparseNormal):
        law = block.family.to_distribution(natural)
        index = torch.arange(block.family.dimension, device=natural.device) if index is None else index
        return law.loc[..., index], law.covariance(index)
    if index is not None:
        mean, covariance = gaussian_moments(block, natural)
        return mean[..., index], covariance[..., index, :][..., index]
    moments = block.family.moments(natural)
    mean = moments["mean"]
    if "covariance" not in moments and mean.dim() == natural.dim():  # independent elements of one event
        covariance = moments["variance"].diag_embed()
    elif "covariance" not in moments:
        mean, covariance = mean.unsqueeze(-1), moments["variance"][..., None, None]
    else:
        covariance = moments["covariance"]
    if not block.elements:
        return mean, covariance
    batch, size = mean.shape[: mean.dim() - 1 - block.elements], mean.shape[-1]
    count = mean.shape[len(batch) : -1].numel()
    covariance = covariance.reshape(*batch, count, size, size).movedim(-3, -1).diag_embed()
    covariance = covariance.movedim(-2, -4).movedim(-1, -2)  # (*batch, count, size, count, size)
    return mean.reshape(*batch, count * size), covariance.reshape(*batch, count * size, count * size)


def member_values(block: Block, leaf: Tensor) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Site -> (value, unconstrained value or None on ℝ) at a value (*batch, d) of a joint block's variable.

    A site with batch dimensions of its own takes them from the right of `leaf`'s, which are 1 there.
    """
    return {member.site.name: _member_value(block, member, leaf) for member in block.members}


def draws_of(block: Block, natural: Tensor, sample_shape: torch.Size) -> dict[str, Tensor]:
    """Site -> draws from q, (*sample_shape, *batch, *event)."""
    if not block.is_joint:
        return {block.name: site_distribution(block, natural).sample(sample_shape)}
    leaf = variable_distribution(block, natural).sample(sample_shape)
    result = {}
    for member in block.members:
        own = len(member.site.batch_shape) - len(block.batch_shape)
        spread = leaf.reshape(*leaf.shape[:-1], *(1 for _ in range(own)), leaf.shape[-1])
        result[member.site.name] = _member_value(block, member, spread)[0]
    return result


def log_prob_of(block: Block, natural: Tensor, values: Mapping[str, Tensor]) -> Tensor:
    """log q of a block at its sites' values, summed over the block's batch."""
    if not block.is_joint:
        distribution = site_distribution(block, natural)
        result = distribution.log_prob(values[block.name])
        return sum_rightmost(result, len(distribution.batch_shape))
    leaf = unconstrain(block, values)
    result = sum_rightmost(variable_distribution(block, natural).log_prob(leaf), len(block.batch_shape))
    for site in block.sites:
        bijection, _ = bijection_of(site)
        if bijection is not None:
            value = values[site.name]
            jacobian = bijection.log_abs_det_jacobian(bijection.inv(value), value)
            result = result - sum_rightmost(jacobian, jacobian.dim() - value.dim() + len(site.shape))
    return result


def _member_value(block: Block, member: Member, leaf: Tensor) -> tuple[Tensor, Tensor | None]:
    bijection, shape = bijection_of(member.site)
    part, own = leaf[..., member.start : member.stop], member.site.batch_shape[len(block.batch_shape) :]
    lead = part.shape[:-1]
    if own:
        u = part.reshape(torch.broadcast_shapes(lead + (1,) * len(shape), own + shape))
    else:
        u = part.reshape(lead + shape)
    return (u, None) if bijection is None else (bijection(u), u)


def unconstrain(block: Block, values: Mapping[str, Tensor]) -> Tensor:
    """The value (*batch, d) of a Gaussian block's unconstrained variable at the sites' values, flattened."""
    parts = []
    for site in block.sites:
        value = values[site.name]
        if isinstance(block.family, LogNormal):
            value, shape = value.log(), event_shape_of(site)
        elif isinstance(block.family, Normal):
            shape = event_shape_of(site)
        else:
            bijection, shape = bijection_of(site)
            value = value if bijection is None else bijection.inv(value)
        dims = len(shape) + len(site.batch_shape) - len(block.batch_shape) + block.elements
        parts.append(value.reshape(*value.shape[: value.dim() - dims], -1))
    return torch.cat(parts, -1)
