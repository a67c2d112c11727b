"""Draws of the blocks' own variables that stay fixed while steps are judged."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyro_blr.arguments import mean_leaf
from pyro_blr.beliefs import Beliefs
from pyro_blr.blocks import Block, is_gaussian
from pyro_blr.estimators import gaussian_leaves
from pyro_blr.running import isolated_random_state
from pyro_blr.sequences import balanced, standard_normals, uniform_levels

__all__ = ["Draws", "fresh_seed", "unit_width"]


def fresh_seed() -> int:
    """A seed from torch's global generator."""
    return int(torch.randint(2**31 - 1, ()).item())


@dataclass
class Draws:
    """`size` draws a block, a function of q and one seed; none (`size` 0) is the delta method, everything at
    its mean.

    The continuous blocks of a model share one low-discrepancy sequence of levels in (0, 1), small blocks first.  A draw is
    smooth in λ at its levels: Gaussian quantiles, or the family's own `at_levels`.  `balanced` normals have unit second
    moments, for optima on draws that stay fixed; averages over seeds want them as they fall.
    """

    seed: int
    size: int
    balanced: bool = False
    _noise: dict[str, Tensor] = field(default_factory=dict)  # normals of Gaussian blocks, levels of others
    _last: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # λ and the draws there

    def leaves(
        self, blocks: Mapping[str, Block], names: Sequence[str], beliefs: Beliefs, every: Sequence[str]
    ) -> dict[str, Tensor]:
        """(size, *leaf) draws of the named blocks; `every` names all that are ever drawn together."""
        return {name: self._leaf(blocks, name, beliefs, every) for name in names}

    def path(
        self, blocks: Mapping[str, Block], name: str, beliefs: Beliefs, every: Sequence[str]
    ) -> Callable[[Tensor], Tensor]:
        """λ ↦ the block's (size, *leaf) draws, differentiable: where λ takes each of them, its levels fixed."""
        family = blocks[name].family
        if family.num_levels:
            levels = self._noise_of(blocks, name, beliefs, every)
            return lambda natural: family.at_levels(natural, levels)

        def rejected(natural: Tensor) -> Tensor:
            with isolated_random_state((self.seed + zlib.crc32(name.encode())) % (2**31)):
                return family.to_distribution(natural).rsample((self.size,))

        return rejected

    def _leaf(self, blocks: Mapping[str, Block], name: str, beliefs: Beliefs, every: Sequence[str]) -> Tensor:
        block, moments = blocks[name], beliefs.moments[name]
        if is_gaussian(block.family):
            if self.size == 0:
                return moments["mean"].unsqueeze(0)
            return gaussian_leaves(moments, self._noise_of(blocks, name, beliefs, every))
        if block.is_discrete:
            with isolated_random_state((self.seed + zlib.crc32(name.encode())) % (2**31)):
                return block.family.to_distribution(beliefs.naturals[name]).sample((max(self.size, 1),))
        if self.size == 0:
            return mean_leaf(block, moments).unsqueeze(0)
        natural, found = self._last.get(name, (None, None))
        if found is None or natural is not beliefs.naturals[name]:
            natural = beliefs.naturals[name]
            with torch.no_grad():
                found = _rounded(self.path(blocks, name, beliefs, every)(natural), block.dtype)
            self._last[name] = natural, found
        return found

    def _noise_of(self, blocks: Mapping[str, Block], name: str, beliefs: Beliefs, every: Sequence[str]) -> Tensor:
        shape = _noise_shape(blocks[name], beliefs, name)
        if name not in self._noise or self._noise[name].shape[1:] != shape:
            self._draw_noise(blocks, beliefs, every)
        return self._noise[name]

    def _draw_noise(self, blocks: Mapping[str, Block], beliefs: Beliefs, every: Sequence[str]) -> None:
        shapes = {name: _noise_shape(blocks[name], beliefs, name) for name in every if not blocks[name].is_discrete}
        order = sorted(shapes, key=lambda name: shapes[name].numel())
        joint = uniform_levels(self.size, sum(shape.numel() for shape in shapes.values()), self.seed)
        levels = dict(zip(order, joint.split([shapes[name].numel() for name in order], -1), strict=True))
        gaussian = [name for name in order if is_gaussian(blocks[name].family)]
        if gaussian:
            normals = standard_normals(torch.cat([levels[name] for name in gaussian], -1))
            if self.balanced:
                normals = balanced(normals[: self.size // 2])
            parts = normals.split([shapes[name].numel() for name in gaussian], -1)
            levels.update(zip(gaussian, parts, strict=True))
        for name, noise in levels.items():
            like = beliefs.moments[name]["mean"] if name in gaussian else beliefs.naturals[name]
            self._noise[name] = noise.reshape(self.size, *shapes[name]).to(like)


def _rounded(draws: Tensor, dtype: torch.dtype) -> Tensor:
    """Draws in the dtype of their site; what would round to 0 or 1 stays on its side of it, where log x and log (1 − x) are finite."""
    found, limits = draws.to(dtype), torch.finfo(dtype)
    if found.dtype == draws.dtype:
        return found
    found = torch.where((found == 0) & (draws > 0), limits.tiny, found)
    return torch.where((found == 1) & (draws < 1), 1 - limits.eps, found)


def _noise_shape(block: Block, beliefs: Beliefs, name: str) -> torch.Size:
    """One draw's normals or levels: (*batch, d)."""
    if is_gaussian(block.family):
        return beliefs.moments[name]["mean"].shape
    return torch.Size([*beliefs.naturals[name].shape[:-1], block.family.num_levels])


def unit_width(moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A unit variance of the moments' shape."""
    if "variance" in moments:
        return {"variance": torch.ones_like(moments["variance"])}
    eye = torch.eye(moments["mean"].shape[-1], dtype=moments["mean"].dtype, device=moments["mean"].device)
    return {"covariance": eye.expand_as(moments["covariance"])}
