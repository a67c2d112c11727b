"""Draws of the blocks' own variables that stay fixed while steps are judged."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyro_blr.arguments import mean_leaf
from pyro_blr.beliefs import Beliefs
from pyro_blr.blocks import Block, is_gaussian
from pyro_blr.estimators import gaussian_leaves, standard_normal_draws
from pyro_blr.running import isolated_random_state

__all__ = ["Draws", "fresh_seed", "unit_width"]


def fresh_seed() -> int:
    """A seed from torch's global generator."""
    return int(torch.randint(2**31 - 1, ()).item())


@dataclass
class Draws:
    """`size` draws a block, a function of q and one seed; none (`size` 0) is the delta method, everything at
    its mean.

    The Gaussian blocks of a model share one low-discrepancy sequence, small blocks first.
    """

    seed: int
    size: int
    _noise: dict[str, Tensor] = field(default_factory=dict)

    def leaves(
        self, blocks: Mapping[str, Block], names: Sequence[str], beliefs: Beliefs, every: Sequence[str]
    ) -> dict[str, Tensor]:
        """(size, *leaf) draws of the named blocks; `every` names all that are ever drawn together."""
        return {name: self._leaf(blocks, name, beliefs, every) for name in names}

    def seed_of(self, name: str) -> int:
        """The seed of one block's draws."""
        return (self.seed + zlib.crc32(name.encode())) % (2**31)

    def _leaf(self, blocks: Mapping[str, Block], name: str, beliefs: Beliefs, every: Sequence[str]) -> Tensor:
        block, moments = blocks[name], beliefs.moments[name]
        if is_gaussian(block.family):
            if self.size == 0:
                return moments["mean"].unsqueeze(0)
            shape = moments["mean"].shape
            if name not in self._noise or self._noise[name].shape[1:] != shape:
                self._draw_noise({n: beliefs.moments[n]["mean"] for n in every if is_gaussian(blocks[n].family)})
            return gaussian_leaves(moments, self._noise[name])
        if self.size == 0 and not block.is_discrete:
            return mean_leaf(block, moments).unsqueeze(0)
        with isolated_random_state(self.seed_of(name)):
            sample = block.family.to_distribution(beliefs.naturals[name]).sample((max(self.size, 1),))
        return sample if block.is_discrete else sample.to(block.dtype)

    def _draw_noise(self, means: Mapping[str, Tensor]) -> None:
        order = sorted(means, key=lambda name: means[name].numel())
        total = sum(mean.numel() for mean in means.values())
        joint = standard_normal_draws(self.size, total, self.seed, torch.float64, torch.device("cpu"))
        start = 0
        for name in order:
            mean = means[name]
            part = joint[:, start : start + mean.numel()]
            self._noise[name] = part.reshape(self.size, *mean.shape).to(mean)
            start += mean.numel()


def unit_width(moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A unit variance of the moments' shape."""
    if "variance" in moments:
        return {"variance": torch.ones_like(moments["variance"])}
    eye = torch.eye(moments["mean"].shape[-1], dtype=moments["mean"].dtype, device=moments["mean"].device)
    return {"covariance": eye.expand_as(moments["covariance"])}
