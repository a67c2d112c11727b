"""Plates of a guide's statements: rows of λ, masks, indices that the model chooses."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from pyro_blr.blocks import Block
from pyro_blr.graph import FactorGraph, Plate, Site
from pyro_blr.running import unwrap

__all__ = ["GivenIndices", "enter_plates", "frame_of", "mask_of", "masked", "rows_of"]


class GivenIndices(Messenger):
    """Collects the indices of plates that a program subsamples by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.indices: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if isinstance(msg["fn"], _Subsample) and msg["value"] is not None:
            self.indices[msg["name"]] = torch.as_tensor(msg["value"])


def rows_of(block: Block, natural: Tensor, plates: Mapping[str, Any]) -> Tensor:
    """λ of the elements that the guide's plates hold in this call."""
    for plate in block.plates:
        drawn = plates[plate.name]
        indices = drawn._indices
        if indices is not None and not _is_everything(indices, drawn.size):
            natural = natural.index_select(plate.dim - block.elements - 1, indices.to(natural.device))
    return natural


def _is_everything(indices: Tensor, size: int) -> bool:
    return len(indices) == size and torch.equal(indices, torch.arange(size, device=indices.device))


def enter_plates(stack: ExitStack, wanted: Iterable[Plate], plates: Mapping[str, Any]) -> None:
    for plate in wanted:
        stack.enter_context(plates[plate.name])


def mask_of(graph: FactorGraph, site: Site) -> Any:
    """The mask of a site's factor, a tensor over its batch; None where it has none or depends on a latent."""
    outer, inner = graph.factors[site.name].mask, unwrap(site.distribution)[2]
    result: Any = None
    for mask in (outer, inner):
        if isinstance(mask, bool):
            mask = torch.tensor(mask)
        if isinstance(mask, Tensor) and mask.dim() <= len(site.batch_shape):
            result = mask.bool() if result is None else result & mask.bool()
    return result


def masked(mask: Any, wanted: Iterable[Plate], plates: Mapping[str, Any]) -> Any:
    """`poutine.mask`, unless the mask holds rows of a subsample that this call may not have."""
    if mask is None:
        return contextlib.nullcontext()
    for plate in wanted:
        subsampled = plates[plate.name].subsample_size != plates[plate.name].size
        if subsampled and mask.dim() >= -plate.dim and mask.shape[plate.dim] > 1:
            return contextlib.nullcontext()
    return poutine.mask(mask=mask)


def frame_of(plate: Plate) -> Any:
    frame = poutine.indep_messenger.CondIndepStackFrame
    return frame(plate.name, plate.dim, plate.subsample_size, 0, plate.size)
