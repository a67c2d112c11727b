"""Masks of the rows that a guide's subsampled plates hold: the model says them, run on these rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_blr.blocks import Block
from pyro_blr.graph import Site
from pyro_blr.running import generic_value, isolated_random_state, run_model, unwrap

__all__ = ["row_masks"]


def row_masks(
    model: Callable,
    args: tuple,
    kwargs: Mapping[str, Any],
    blocks: Mapping[str, Block],
    known: Mapping[str, Any],
    plates: Mapping[str, Any],
) -> dict[str, Any]:
    """Site -> mask of the rows in `plates`, for the sites whose `known` mask is one of other rows; a run of the model if any is."""
    sites = [
        site for block in blocks.values() for site in block.sites if _is_of_rows(known.get(site.name), site, plates)
    ]
    if not sites:
        return {}
    indices = {name: plate._indices for name, plate in plates.items() if plate._indices is not None}
    with poutine.block(), isolated_random_state():
        trace = run_model(model, args, kwargs, generic_value, indices)
    found = {site.name: _mask_at(trace.nodes[site.name]) for site in sites}
    return {name: mask for name, mask in found.items() if mask is not None}


def _is_of_rows(mask: Any, site: Site, plates: Mapping[str, Any]) -> bool:
    return isinstance(mask, Tensor) and any(
        plates[p.name].subsample_size != plates[p.name].size and mask.dim() >= -p.dim and mask.shape[p.dim] > 1
        for p in site.plates
    )


def _mask_at(node: Any) -> Tensor | None:
    result: Tensor | None = None
    for mask in (node["mask"], unwrap(node["fn"])[2]):
        if mask is not None and torch.as_tensor(mask).dim() <= len(node["fn"].batch_shape):
            mask = torch.as_tensor(mask).bool()
            result = mask if result is None else result & mask
    return result
