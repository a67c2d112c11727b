"""Improper posteriors under improper priors: a log density that never falls is seen far out, before any step is taken."""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_blr.ascent import Ascent
from pyro_blr.beliefs import Beliefs
from pyro_blr.blocks import Block, is_gaussian
from pyro_blr.checks import ImproperPosteriorError
from pyro_blr.families import TransformedNormal
from pyro_blr.graph import Site
from pyro_blr.running import unwrap

__all__ = ["refuse_flat_tails"]

_FAR_REAL = (1e10, 1e15)
_FAR_PUSHED = (40.0, 80.0)  # exp of it is a float32, and its square's reciprocal too
_SLOWEST = 1.05  # p(u) must fall faster than 1/u to have an integral
_MOST = 64  # elements looked at; the others of a plate are like these


@torch.no_grad()
def refuse_flat_tails(ascent: Ascent) -> None:
    """Raises where log p(u, x | others), u unconstrained, falls more slowly than −log |u| under an improper prior.

    The others are held at two places, and both must agree: in one alone a coefficient may be zero by chance.
    """
    places = None
    for name, block in ascent.program.blocks.items():
        if ascent.program.messages.is_exact(name) or not is_gaussian(block.family):
            continue
        for site, entries in _improper(block, ascent.beliefs.wide[name]["mean"]):
            places = places or [ascent.beliefs, _elsewhere(ascent)]
            for entry in entries[:_MOST].tolist():
                for sign in (1.0, -1.0):
                    drops = [_drop(ascent, place, name, site, entry, sign) for place in places]
                    if all(drop is not None for drop in drops):
                        _refuse(site, block, sign, min(drop for drop in drops if drop is not None))


def _improper(block: Block, mean: Tensor) -> list[tuple[Site, Tensor]]:
    """Sites of improper prior, and their entries in the block's flattened means."""
    entries = torch.arange(mean.numel()).reshape(mean.shape)
    return [
        (m.site, (entries[..., m.start : m.stop] if len(block.members) > 1 else entries).flatten())
        for m in block.members
        if isinstance(unwrap(m.site.distribution)[0], dist.ImproperUniform)
    ]


def _elsewhere(ascent: Ascent) -> Beliefs:
    """q with the means of Gaussian blocks moved by about a standard deviation, one at most."""
    moved, generator = ascent.beliefs.copy(), torch.Generator().manual_seed(5)
    for name, block in ascent.program.blocks.items():
        if is_gaussian(block.family):
            moments = moved.wide[name]
            wide = moments["covariance"].diagonal(dim1=-2, dim2=-1) if "covariance" in moments else moments["variance"]
            noise = torch.randn(wide.shape, generator=generator, dtype=wide.dtype).to(wide.device)
            moved.set_moments(name, {**moments, "mean": moments["mean"] + wide.clamp(max=1.0).sqrt() * noise})
    return moved


def _drop(ascent: Ascent, place: Beliefs, name: str, site: Site, entry: int, sign: float) -> float | None:
    """How far the log density falls between two far points; None where that is enough, or cannot be said."""
    block = ascent.program.blocks[name]
    member = next(m for m in block.members if m.site is site)
    near, far = _FAR_PUSHED if isinstance(member.family or block.family, TransformedNormal) else _FAR_REAL
    moments, heights = place.wide[name], []
    for distance in (near, far):
        mean = moments["mean"].flatten().clone()
        mean[entry] = sign * distance
        there = place.copy()
        there.set_moments(name, {**moments, "mean": mean.reshape(moments["mean"].shape)})
        heights.append(ascent.targets.at_mean(name, there))
    drop = heights[0] - heights[1]
    return drop if math.isfinite(drop) and drop < _SLOWEST * math.log(far / near) else None


def _refuse(site: Site, block: Block, sign: float, drop: float) -> None:
    pushed = any(isinstance(m.family or block.family, TransformedNormal) for m in block.members if m.site is site)
    where = "a bound of its support" if pushed and sign < 0 else "the end of its support" if pushed else "infinity"
    raise ImproperPosteriorError(
        f"site {site.name!r}: its prior {type(unwrap(site.distribution)[0]).__name__} is improper, and the data do not make up for it: "
        f"found a log density that falls by no more than {max(drop, 0.0):.2g} nats on the way to {where}, expected a proper posterior. "
        "Give the site a proper prior, or data that determine it"
    )
