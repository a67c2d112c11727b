"""Refusals: what cannot be inferred is said before anything changes, with the site, what was found, what was expected, what to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_blr.blocks import Block
from pyro_blr.expressions import Ref
from pyro_blr.graph import Factor, FactorGraph

__all__ = ["ImproperPosteriorError", "check_graph", "check_natural"]


class ImproperPosteriorError(ValueError):
    """The messages to a site add up to no distribution of its family."""


def check_graph(graph: FactorGraph) -> None:
    """Raises ValueError for a model that has nothing to infer, or data that its likelihood cannot have produced."""
    if not graph.sites:
        observed = sorted(name for name, factor in graph.factors.items() if factor.is_observed)
        raise ValueError(
            f"the model has no latent sample site (observed: {observed}): there is nothing to infer. "
            "Write unknowns as pyro.sample(name, prior) without obs"
        )
    for plate in graph.plates.values():
        if plate.subsample_size == 0 or plate.size == 0:
            raise ValueError(
                f"plate {plate.name!r} is empty: found size {plate.size}, expected at least one element. "
                "Check the data that its size is taken from"
            )
    for factor in graph.factors.values():
        if factor.is_observed and not isinstance(factor.value, Ref):
            _check_data(factor)


def _check_data(factor: Factor) -> None:
    value, base = factor.value, factor.distribution
    if not isinstance(value, Tensor):
        return
    mask = _mask_of(factor)
    if value.is_floating_point():
        bad = ~torch.isfinite(value)
        if mask is not None:
            bad = bad & _aligned(mask, value, base.event_dim)
        if bool(bad.any()):
            first = tuple(int(i) for i in bad.nonzero()[0])
            raise ValueError(
                f"observed site {factor.name!r}: found {int(bad.sum())} values that are NaN or infinite (first at index {first}), "
                "expected finite data. Remove them, or mask them with obs_mask or poutine.mask"
            )
    inside = _inside_support(factor, value)
    if inside is None:
        return
    if mask is not None:
        inside = inside | ~torch.as_tensor(mask, dtype=torch.bool, device=inside.device)
    if not bool(inside.all()):
        outside = (~inside).nonzero()
        where = tuple(int(i) for i in outside[0]) if outside.numel() else ()
        raise ValueError(
            f"observed site {factor.name!r}: found {int((~inside).sum())} values outside the support {base.support} of its "
            f"{type(base).__name__} (first at index {where}); expected data that the distribution can produce"
        )


def _inside_support(factor: Factor, value: Tensor) -> Tensor | None:
    try:
        return factor.distribution.support.check(value)
    except (NotImplementedError, AttributeError, RuntimeError, ValueError):
        return None


def _mask_of(factor: Factor) -> Tensor | None:
    inner = factor.constructed.mask if factor.constructed is not None else None
    masks = [torch.as_tensor(m, dtype=torch.bool) for m in (factor.mask, inner) if m is not None and not isinstance(m, Ref)]
    if not masks or any(m.dim() > len(factor.batch_shape) for m in masks):
        return masks[0] if len(masks) == 1 and masks[0].dim() <= len(factor.batch_shape) else None
    result = masks[0]
    for mask in masks[1:]:
        result = result & mask
    return result


def _aligned(mask: Tensor, value: Tensor, event_dim: int) -> Tensor:
    return mask.reshape(mask.shape + (1,) * event_dim).to(value.device)


def check_natural(block: Block, natural: Tensor, culprits: Mapping[str, Any] | None = None) -> None:
    """Raises ImproperPosteriorError where λ is outside the family's domain."""
    if block.is_discrete and bool(torch.isfinite(natural.sum())):
        return  # every finite λ is inside, and a sum is finite only where its terms are
    inside = block.family.contains(natural)
    if bool(inside.all()):
        return
    sites = " and ".join(repr(name) for name in block.site_names)
    bad = (~inside).nonzero()
    where = f" (first at index {tuple(int(i) for i in bad[0])})" if inside.dim() else ""
    found = "NaN or infinite values" if not bool(torch.isfinite(natural).all()) else "no proper distribution"
    blame = f"; non-finite messages come from {sorted(culprits)}" if culprits else ""
    raise ImproperPosteriorError(
        f"site {sites}: its factors add up to {found} of the family {type(block.family).__name__} at {int((~inside).sum())} of "
        f"{max(inside.numel(), 1)} elements{where}{blame}. Expected a proper posterior: give the site a proper prior, or data that determine it"
    )
