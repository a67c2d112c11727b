"""A site inside a block of q."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_blr.families import ExponentialFamily, TransformedNormal
from pyro_blr.graph import Site

__all__ = ["Member"]


@dataclass(frozen=True)
class Member:
    """One site inside a block: which entries of the block's vector are its own."""

    site: Site
    start: int
    stop: int
    family: ExponentialFamily | None = None

    def _unconstrained(self, part: Tensor, batch: torch.Size) -> Tensor:
        assert self.family is not None
        inner = self.site.batch_shape[len(batch) :]
        event = self.family.base.event_shape if isinstance(self.family, TransformedNormal) else self.family.event_shape
        return part.reshape((*part.shape[:-1], *inner, *event))

    def constrain(self, part: Tensor, batch: torch.Size) -> Tensor:
        """The site's value from its entries of a joint block's variable."""
        value = self._unconstrained(part, batch)
        if isinstance(self.family, TransformedNormal):
            value = self.family.constrain(value)
        return value.reshape((*part.shape[: part.dim() - 1 - len(batch)], *self.site.shape))

    def log_jacobian(self, part: Tensor, batch: torch.Size) -> Tensor | None:
        if not isinstance(self.family, TransformedNormal):
            return None
        jacobian = self.family.log_abs_det_jacobian(self._unconstrained(part, batch))
        return jacobian.flatten(len(batch)).sum(-1) if jacobian.dim() > len(batch) else jacobian
