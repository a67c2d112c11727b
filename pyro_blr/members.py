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
    """One site inside a block: which entries of the block's vector are its own.

    `count`: it stands for so many like sites that follow each other in the vector; its site has a dim for them, left of its own.
    """

    site: Site
    start: int
    stop: int
    family: ExponentialFamily | None = None
    count: int = 0

    def _unconstrained(self, part: Tensor, batch: torch.Size) -> Tensor:
        """(*sample, *batch, entries) -> (*sample, *batch, [count,] *the site's other dims)."""
        assert self.family is not None
        many = (self.count,) if self.count else ()
        inner = self.site.batch_shape[len(many) + len(batch) :]
        event = self.family.base.event_shape if isinstance(self.family, TransformedNormal) else self.family.event_shape
        return part.reshape((*part.shape[:-1], *many, *inner, *event))

    def _in_place(self, value: Tensor, sample: int, batch: torch.Size) -> Tensor:
        """The dim of like sites left of the batch, where the site has it."""
        return value.movedim(sample + len(batch), sample) if self.count and batch else value

    def constrain(self, part: Tensor, batch: torch.Size) -> Tensor:
        """The site's value from its entries of a joint block's variable."""
        value, sample = self._unconstrained(part, batch), part.dim() - 1 - len(batch)
        if isinstance(self.family, TransformedNormal):
            value = self.family.constrain(value)
        return self._in_place(value, sample, batch).reshape((*part.shape[:sample], *self.site.shape))

    def unconstrained(self, part: Tensor, batch: torch.Size) -> Tensor:
        """The entries in the shape of the site, which is their image element by element."""
        return self._in_place(self._unconstrained(part, batch), 0, batch).reshape(self.site.shape)

    def log_jacobian(self, part: Tensor, batch: torch.Size) -> Tensor | None:
        if not isinstance(self.family, TransformedNormal):
            return None
        jacobian = self.family.log_abs_det_jacobian(self._unconstrained(part, batch))
        return jacobian.flatten(len(batch)).sum(-1) if jacobian.dim() > len(batch) else jacobian
