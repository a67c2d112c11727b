"""q restricted to one run of the model: λ and the expectations of every block, kept together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from pyro_blr.blocks import Block
from pyro_blr.initial import moments_at

__all__ = ["Beliefs"]


class Beliefs:
    """λ and the moments that messages are differentiated in, in float64 (`wide`) and in the model's own precision (`moments`).

    A block in `points` stands for a value T(z) until its first update (`init`).  Moments are computed when they are asked for.
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
        self.wide = _Moments(self, narrow=False)
        self.moments = _Moments(self, narrow=True)

    def update(self, name: str, natural: Tensor) -> None:
        """Replaces one block's λ; where q cannot be everything in its family, by the nearest that it can be."""
        within, natural = (
            self.blocks[name].within,
            natural.detach(),
        )  # the model's parameters, which have a gradient, may be in it
        self.naturals[name] = natural if within is None else within(natural, self.naturals[name])
        self.points.pop(name, None)
        self.wide.forget(name)
        self.moments.forget(name)

    def set_moments(self, name: str, moments: Mapping[str, Tensor]) -> None:
        """Replaces one block's expectations, its λ apart, until its next update."""
        self.wide.known[name] = _cast(moments, torch.float64)
        self.moments.forget(name)

    def copy(self) -> Beliefs:
        """An independent copy; the tensors are shared, since none is written into."""
        other = Beliefs(self.blocks, self.naturals, self.points)
        other.wide.known.update(self.wide.known)
        other.moments.known.update(self.moments.known)
        return other


class _Moments(Mapping[str, dict[str, Tensor]]):
    """Block -> named expectations, made on first use."""

    def __init__(self, beliefs: Beliefs, narrow: bool):
        self.beliefs, self.narrow = beliefs, narrow
        self.known: dict[str, dict[str, Tensor]] = {}

    def __getitem__(self, name: str) -> dict[str, Tensor]:
        found = self.known.get(name)
        if found is None:
            found = self.known[name] = self._make(name)
        return found

    def _make(self, name: str) -> dict[str, Tensor]:
        beliefs = self.beliefs
        block = beliefs.blocks[name]
        if self.narrow:
            return _cast(beliefs.wide[name], block.dtype)
        if name in beliefs.points:
            return _cast(moments_at(block, beliefs.points[name]), torch.float64)
        return _cast(block.family.moments(beliefs.naturals[name]), torch.float64)

    def forget(self, name: str) -> None:
        self.known.pop(name, None)

    def __iter__(self) -> Iterator[str]:
        return iter(self.beliefs.blocks)

    def __len__(self) -> int:
        return len(self.beliefs.blocks)


def _cast(moments: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {key: value.to(dtype) for key, value in moments.items()}
