"""The `sample` statements of a model, as an export sees them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import ExpandedDistribution
from torch import Tensor

from pyro_blr.graph import Plate
from pyro_blr.running import unwrap

__all__ = ["Statement", "log_density"]


@dataclass(frozen=True)
class Statement:
    """A `sample` statement: its kind ("latent", "observed", "derived", "factor"), where it stands, and whether it
    stands for several exchangeable copies (`infer={"blr": {"copies": ...}}`).
    """

    name: str
    kind: str
    plates: tuple[Plate, ...]
    shape: torch.Size
    batch_shape: torch.Size
    is_several: bool = False

    def select(self, value: Tensor, subsamples: Mapping[str, Tensor]) -> Tensor:
        """Of a value (draws, *full plates, *event) the elements that are in the run."""
        event_dim = len(self.shape) - len(self.batch_shape)
        for plate in self.plates:
            axis = value.dim() - event_dim + plate.dim
            if plate.name in subsamples and value.shape[axis] == plate.size != plate.subsample_size:
                value = value.index_select(axis, subsamples[plate.name].to(value.device))
        return value

    @classmethod
    def of(cls, name: str, node: Mapping[str, Any]) -> Statement:
        """From its node in the trace of a single run."""
        value, base = node["value"], unwrap(node["fn"])[0]
        plates = []
        for frame in node["cond_indep_stack"]:
            if frame.vectorized:
                size = frame.size if frame.full_size is None else frame.full_size
                plates.append(Plate(frame.name, frame.dim, size, frame.size))
        if node["infer"].get("_deterministic") or isinstance(base, dist.Delta):
            return cls(name, "derived", tuple(plates), value.shape, _batch_of(value.shape, plates))
        kind = "factor" if isinstance(base, dist.Unit) else "observed" if node["is_observed"] else "latent"
        is_several = node["infer"].get("blr", {}).get("copies") is not None
        return cls(name, kind, tuple(plates), value.shape, log_density(node)[0].shape, is_several)


def _batch_of(shape: torch.Size, plates: Sequence[Plate]) -> torch.Size:
    """The part of a derived value's shape that stands for its plates: as far right as their sizes allow."""
    for stop in range(len(shape), 0, -1):
        fits = (-plate.dim <= stop and shape[stop + plate.dim] == plate.subsample_size for plate in plates)
        if plates and all(fits):
            return shape[:stop]
    return torch.Size()


def log_density(node: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """(unscaled log density of each element of the batch, where it counts)."""
    distribution = node["fn"]
    log_prob = distribution.log_prob(node["value"])
    mask = torch.ones((), dtype=torch.bool, device=log_prob.device)
    if node["mask"] is not None:
        mask = mask & torch.as_tensor(node["mask"], device=log_prob.device)
    while isinstance(distribution, (dist.MaskedDistribution, ExpandedDistribution)):
        if isinstance(distribution, dist.MaskedDistribution):
            mask = mask & torch.as_tensor(distribution._mask, device=log_prob.device)
        distribution = distribution.base_dist
    shape = torch.broadcast_shapes(log_prob.shape, mask.shape, node["fn"].batch_shape)
    return log_prob.expand(shape), mask.expand(shape)
