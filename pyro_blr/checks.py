"""Refusals: what cannot be inferred is said before anything changes, with the site, what was found, what was expected, what to do."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.infer.util import is_validation_enabled
from torch import Tensor

from pyro_blr.blocks import Block
from pyro_blr.graph import Factor, FactorGraph
from pyro_blr.running import generic_value, isolated_random_state, run_model, site_value, subsample_values, unwrap
from pyro_blr.shapes import broadcast_shape
from pyro_blr.tape import Ref

__all__ = [
    "ImproperPosteriorError",
    "check_graph",
    "check_loss_of_data",
    "check_natural",
    "check_plates",
    "check_same_block",
    "check_same_sites",
]


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
            _check_data(graph, factor)


def _check_data(graph: FactorGraph, factor: Factor) -> None:
    value, base = factor.value, factor.distribution
    if not isinstance(value, Tensor):
        return
    _check_shape(factor, value)
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
    if not bool(inside.all()) and not _support_moves(graph, factor):
        outside = (~inside).nonzero()
        where = tuple(int(i) for i in outside[0]) if outside.numel() else ()
        raise ValueError(
            f"observed site {factor.name!r}: found {int((~inside).sum())} values outside the support {base.support} of its "
            f"{type(base).__name__} (first at index {where}); expected data that the distribution can produce"
        )


def _check_shape(factor: Factor, value: Tensor) -> None:
    expected = torch.Size(factor.distribution.batch_shape) + torch.Size(factor.distribution.event_shape)
    event = torch.Size(factor.distribution.event_shape)
    try:
        fits = broadcast_shape(value.shape, expected) == expected and value.shape[value.dim() - len(event) :] == event
    except RuntimeError:
        fits = False
    if not fits and value.dim() > 0:
        raise ValueError(
            f"observed site {factor.name!r}: found data of shape {tuple(value.shape)}, expected {tuple(expected)}, the shape of its "
            f"{type(factor.distribution).__name__}. Check the plates around it (pyro.plate), and .to_event for dims that are no plate's"
        )


def _support_moves(graph: FactorGraph, factor: Factor) -> bool:
    """Whether the support's bounds depend on latents: then no single draw of them says what data can be."""
    made = factor.constructed
    if made is None or not any(isinstance(argument, Ref) for argument in made.arguments.values()):
        return made is None and factor.distribution.support is not type(factor.distribution).support
    values = {site.name: site_value(site, 1) for site in graph.sites.values()}
    bounds = [_bounds(made.rebuild(graph.tape, latents).support) for latents in (graph.values, values)]
    return any(not torch.equal(*map(torch.as_tensor, pair)) for pair in zip(*bounds, strict=True))


def _bounds(support: Any) -> list[Any]:
    return [bound for bound in vars(support).values() if isinstance(bound, (Tensor, int, float))]


def _inside_support(factor: Factor, value: Tensor) -> Tensor | None:
    """Which data the distribution can produce; None where it cannot say, or its own `validate_args=False` says not to look."""
    base = unwrap(factor.distribution)[0]
    if (
        type(base)._validate_args and not base._validate_args
    ):  # validation that is off everywhere says nothing of these data
        return None
    try:
        return factor.distribution.support.check(value)
    except (NotImplementedError, AttributeError, RuntimeError, ValueError):
        return None


def _mask_of(factor: Factor) -> Tensor | None:
    inner = factor.constructed.mask if factor.constructed is not None else None
    masks = [
        torch.as_tensor(m, dtype=torch.bool) for m in (factor.mask, inner) if m is not None and not isinstance(m, Ref)
    ]
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
        f"{max(inside.numel(), 1)} elements{where}{blame}. "
        "Expected a proper posterior: give the site a proper prior, or data that determine it"
    )


def check_loss_of_data(observed: set[str], graph: FactorGraph) -> None:
    """Raises where a site that had data is a latent one now."""
    lost = sorted(observed & set(graph.sites))
    if lost:
        raise ValueError(
            f"observed site {lost[0]!r}: found no data (obs=None) in this step, expected data as in the steps before. "
            "Pass its data; to predict it, use Predictive(model, guide=engine.guide)"
        )


def check_plates(model: Callable, guide: Callable, args: tuple, kwargs: Mapping[str, Any]) -> None:
    """Warns of plates that a guide has and its model has not, as `SVI` does and in its words, while validation is on."""
    if not is_validation_enabled():
        return
    with isolated_random_state(0), poutine.block(), torch.no_grad():
        ours = subsample_values(poutine.trace(guide).get_trace(*args, **kwargs))
        theirs = subsample_values(run_model(model, args, kwargs, generic_value))
    foreign = sorted(set(ours) - set(theirs))
    if foreign:
        warnings.warn(
            f"Found plate statements in guide but not model: {foreign} (the model's plates: {sorted(theirs)}); they share no indices "
            "where they are subsampled. Give a plate the same name in both",
            stacklevel=4,
        )


def check_same_sites(known: Mapping[str, Block], blocks: Mapping[str, Block], what: str) -> None:
    """Raises where λ belongs to other sites."""
    if known and set(known) != set(blocks):
        raise ValueError(
            f"{what}: found {sorted(blocks)}, expected {sorted(known)}. Make a new BLRInference for another model"
        )


def check_same_block(known: Block, block: Block) -> None:
    """Raises where a site's λ is of another family, shape or number of plate elements."""
    sites = " and ".join(repr(name) for name in block.site_names)
    before = {plate.name: plate.size for plate in known.plates}
    for plate in block.plates:
        if before.get(plate.name, plate.size) != plate.size:
            raise ValueError(
                f"site {sites}: found plate {plate.name!r} of size {plate.size} in this step, expected {before[plate.name]} as in the "
                f"steps before: q has a factor for each of its elements. Say the full size, "
                f"pyro.plate({plate.name!r}, {before[plate.name]}, "
                "subsample=indices), or make a new BLRInference for other data"
            )
    if (known.family, known.full_shape) != (block.family, block.full_shape):
        found, expected = (f"{b.family} of batch shape {tuple(b.full_shape)}" for b in (block, known))
        raise ValueError(
            f"site {sites} changed between steps: found {found}, expected {expected}. Make a new BLRInference for another model"
        )
