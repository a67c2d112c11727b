"""Starts that the user gives: values and distributions of sites, and Pyro's `init_to_…` functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import biject_to

from pyro_blr.blocks import Block, is_gaussian
from pyro_blr.families import (
    Bernoulli,
    Beta,
    Dirichlet,
    Gamma,
    InverseGamma,
    LogNormal,
    TransformedNormal,
    Wishart,
)
from pyro_blr.graph import FactorGraph, Site
from pyro_blr.initial import WIDTH, diagonal_natural, joint_natural, moments_at, natural_of, to_full
from pyro_blr.running import unwrap

__all__ = ["apply_init", "point_natural"]


@torch.no_grad()
def point_natural(block: Block, values: Mapping[str, Tensor]) -> Tensor:
    """λ (*block.batch_shape, p) of a narrow member of the family around the sites' values."""
    family = block.family
    if block.is_joint:
        return joint_natural(block, values)
    moments = moments_at(block, values)
    if is_gaussian(family):
        mean = moments["mean"]
        if isinstance(family, LogNormal):
            scale = torch.full_like(mean, WIDTH)
            return family.from_distribution(dist.LogNormal(mean, scale, validate_args=False))
        base = family.base if isinstance(family, TransformedNormal) else family
        return diagonal_natural(base, mean, torch.full_like(mean, WIDTH**2))
    count = WIDTH**-2
    if isinstance(family, Gamma):
        rate = count / moments["mean"]
        return family.from_distribution(dist.Gamma(torch.full_like(rate, count), rate, validate_args=False))
    if isinstance(family, InverseGamma):
        rate = count / moments["inverse"]
        narrow = dist.InverseGamma(torch.full_like(rate, count), rate, validate_args=False)
        return family.from_distribution(narrow)
    if isinstance(family, Beta):
        return count * torch.stack([moments["log"], moments["log_complement"]], -1).exp()
    if isinstance(family, Dirichlet):
        return count * family.event_shape[0] * moments["log"].exp()
    if isinstance(family, Wishart):
        degrees = torch.full_like(moments["logdet"], count + family.dimension)
        scale = moments["mean"] / degrees[..., None, None]
        return family.from_distribution(dist.Wishart(degrees, covariance_matrix=scale, validate_args=False))
    logits = (moments["probs"] * (1 - WIDTH**2) + WIDTH**2 / moments["probs"].shape[-1]).log()
    if isinstance(family, Bernoulli):
        return logits[..., 1:] - logits[..., :1]
    return logits[..., :-1] - logits[..., -1:]


def apply_init(
    graph: FactorGraph,
    blocks: Mapping[str, Block],
    naturals: Mapping[str, Tensor],
    init: Mapping[str, Any] | None = None,
    init_loc_fn: Callable[[dict], Any] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(λ of every block, site -> value): `init` and, at continuous sites, `init_loc_fn` applied.

    A distribution sets λ. A value sets λ to a narrow member around it and is returned: T(value) are the
    site's expectations (`moments_at`) until its first update.
    """
    given = dict(init or {})
    unknown = sorted(set(given) - set(graph.sites))
    if unknown:
        raise ValueError(f"init names {unknown}, expected latent sites of the model: {sorted(graph.sites)}")
    for name, site in graph.sites.items():
        if init_loc_fn is not None and name not in given and not site.support.is_discrete:
            given[name] = init_loc_fn(_message(site, graph.values[name]))
    given = {name: _checked(graph.sites[name], start) for name, start in given.items() if start is not None}
    result = dict(naturals)
    for name, block in blocks.items():
        starts = {site: given[site] for site in block.site_names if site in given}
        if starts:
            result[name] = to_full(block, _started(block, starts))
    return result, {name: start for name, start in given.items() if isinstance(start, Tensor)}


def _started(block: Block, starts: Mapping[str, Any]) -> Tensor:
    if block.is_joint:
        return joint_natural(block, starts)
    ((name, start),) = starts.items()
    if isinstance(start, Tensor):
        return point_natural(block, starts)
    natural = natural_of(block, start)
    if natural is None:
        found = f"{type(unwrap(start)[0]).__name__} of shape {tuple(start.shape())}"
        expected = f"one of the family {type(block.family).__name__} and shape {tuple(block.sites[0].shape)}"
        raise ValueError(
            f"init of site {name!r}: found {found}, expected {expected}; give such a distribution, or a value"
        )
    if not bool(block.family.contains(natural).all()):
        raise ValueError(f"init of site {name!r}: found an improper distribution, expected a proper one")
    return natural


def _checked(site: Site, start: Any) -> Any:
    """A distribution as it is; a value as a tensor of the site's shape, dtype and device, in its support."""
    if isinstance(start, torch.distributions.Distribution):
        return start
    value = torch.as_tensor(start, device=site.device).detach().to(site.dtype)
    try:
        value = value.expand(site.shape)
    except RuntimeError:
        found, expected = tuple(value.shape), tuple(site.shape)
        raise ValueError(f"init of site {site.name!r}: found shape {found}, expected {expected}") from None
    if value.is_floating_point() and not bool(value.isfinite().all()):
        raise ValueError(f"init of site {site.name!r}: found NaN or infinite values, expected finite ones")
    if not bool(torch.as_tensor(site.support.check(value)).all()):
        raise ValueError(f"init of site {site.name!r}: found a value outside its support {site.support}")
    if not site.support.is_discrete and not bool(biject_to(site.support).inv(value).isfinite().all()):
        raise ValueError(
            f"init of site {site.name!r}: found a value on the boundary of its support {site.support}, expected one inside"
        )
    return value.clone()


def _message(site: Site, value: Tensor) -> dict:
    """The site as Pyro's `init_to_…` functions expect it."""
    return {
        "type": "sample",
        "name": site.name,
        "fn": site.distribution,
        "value": value,
        "is_observed": False,
        "infer": dict(site.infer),
        "args": (),
        "kwargs": {},
        "cond_indep_stack": (),
        "scale": 1.0,
        "mask": None,
        "done": False,
        "stop": False,
        "continuation": None,
    }
