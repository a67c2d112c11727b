"""q restricted to one run of the model: λ and the expectations of every block, kept together."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pyro_blr.blocks import Block
from pyro_blr.initial import moments_at

__all__ = ["Beliefs"]


class Beliefs:
    """λ and the moments that messages are differentiated in, in float64 (`wide`) and in the model's own precision (`moments`).

    A block in `points` stands for a value T(z) until its first update (`init`).
    """

    def __init__(
        self,
        blocks: Mapping[str, Block],
        naturals: Mapping[str, Tensor],
        points: Mapping[str, Mapping[str, Tensor]] | None = None,
    ):
        self.blocks = blocks
        self.naturals = dict(naturals)
        self.points = dict(points or {})
        self.wide: dict[str, dict[str, Tensor]] = {}
        self.moments: dict[str, dict[str, Tensor]] = {}
        for name, block in blocks.items():
            if name in self.points:
                self.set_moments(name, moments_at(block, self.points[name]))
            else:
                self._refresh(name)

    def update(self, name: str, natural: Tensor) -> None:
        """Replaces one block's λ."""
        self.naturals[name] = natural
        self.points.pop(name, None)
        self._refresh(name)

    def _refresh(self, name: str) -> None:
        self.set_moments(name, self.blocks[name].family.moments(self.naturals[name]))

    def set_moments(self, name: str, moments: Mapping[str, Tensor]) -> None:
        """Replaces one block's expectations, its λ apart."""
        self.wide[name] = _cast(moments, torch.float64)
        self.moments[name] = _cast(moments, self.blocks[name].dtype)

    def copy(self) -> Beliefs:
        other = Beliefs.__new__(Beliefs)
        other.blocks, other.naturals = self.blocks, dict(self.naturals)
        other.points, other.moments, other.wide = dict(self.points), dict(self.moments), dict(self.wide)
        return other


def _cast(moments: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {key: value.to(dtype) for key, value in moments.items()}
