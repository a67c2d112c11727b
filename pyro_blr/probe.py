"""Numerical evidence: an expression evaluated in float64 at chosen points of its sites' supports.

A probe works on a few rows of large data: inputs and latents whose dims are those of a large plate are cut to its first rows, when
the program still runs on them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_blr.blocks import Block
from pyro_blr.families import (
    Beta,
    Dirichlet,
    ExponentialFamily,
    Gamma,
    InverseGamma,
    LogNormal,
    MultivariateNormal,
    Normal,
    TransformedNormal,
    Wishart,
)
from pyro_blr.graph import FactorGraph, generic_value, isolated_random_state

__all__ = ["Probe", "close", "leaf_point", "leaf_shape"]

_ROWS = 12  # rows of a large plate that are enough to see a form
_LARGE = 64  # plates beyond this size are cut


def close(a: Tensor, b: Tensor) -> bool:
    """Equal up to rounding, relative to the largest entry; float32 inside the program shows in the result's dtype."""
    if a.shape != b.shape:
        a, b = torch.broadcast_tensors(a, b)
    if a.numel() == 0:
        return True
    tolerance = 1e-8 if a.dtype == b.dtype == torch.float64 else 2e-4
    if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        return False
    scale = torch.maximum(a.abs().max(), b.abs().max()).clamp_min(1e-30)
    return bool((a - b).abs().max() <= tolerance * scale)


def leaf_shape(block: Block) -> tuple[int, ...]:
    """The shape of the block's own variable."""
    if isinstance(block.family, TransformedNormal):
        return (*block.batch_shape, *block.family.base.event_shape)
    return (*block.batch_shape, *block.family.event_shape)


def leaf_point(family: ExponentialFamily, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """A random value of the block's own variable, float64, away from the boundary of its support."""
    normal = torch.randn(tuple(shape), generator=generator, dtype=torch.float64)
    if isinstance(family, (Normal, MultivariateNormal, LogNormal, TransformedNormal)):
        return normal
    if isinstance(family, (Gamma, InverseGamma)):
        return (0.7 * normal).exp()
    if isinstance(family, Beta):
        return torch.sigmoid(normal)
    if isinstance(family, Dirichlet):
        return torch.softmax(normal, -1)
    if isinstance(family, Wishart):
        d = shape[-1]
        return normal @ normal.mT / d + 0.5 * torch.eye(d, dtype=torch.float64)
    raise TypeError(f"{type(family).__name__} has no continuous values")


class Probe:
    """Evaluates expressions of a graph at points given block by block, in float64, on a few rows."""

    def __init__(self, graph: FactorGraph, blocks: Mapping[str, Block]):
        self.graph, self.blocks = graph, blocks
        self.generator = torch.Generator().manual_seed(20230717)
        self._cuts = self._possible_cuts()
        self._inputs: dict[tuple[str, ...], list[Tensor]] = {}

    def _possible_cuts(self) -> list[dict[str, int]]:
        """Sets of plates to cut, most thorough first; {plate: size in this run}."""
        large = {p.name: p.subsample_size for p in self.graph.plates.values() if p.subsample_size > _LARGE}
        ordered = sorted(large.items(), key=lambda item: -item[1])
        cuts = [dict(ordered)] + [dict([item]) for item in ordered] if len(ordered) > 1 else [dict(ordered)]
        return [cut for cut in cuts if cut] + [{}]

    def leaf_shape(self, block: Block) -> tuple[int, ...]:
        return leaf_shape(block)

    def point(self, block: Block) -> Tensor:
        return leaf_point(block.family, self.leaf_shape(block), self.generator)

    def site_values(self, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Values for every site: from the given leaves, generic ones for the others."""
        values: dict[str, Tensor] = {}
        for name, block in self.blocks.items():
            if name in leaves:
                values.update(block.values(leaves[name]))
            elif block.is_discrete:
                for site in block.sites:
                    value = generic_value(site.name, site.distribution)
                    values[site.name] = value.double() if value.is_floating_point() else value
            else:
                fixed = leaf_point(block.family, self.leaf_shape(block), torch.Generator().manual_seed(len(name)))
                values.update(block.values(fixed))
        return values

    def evaluate(self, ref: Any, leaves: Mapping[str, Tensor]) -> Tensor:
        """The expression at the leaves (full shapes); its rows are cut when the program allows it."""
        values = self.site_values(leaves)
        while True:
            cut = self._cuts[0]
            try:
                with isolated_random_state(0), torch.no_grad():
                    return self.graph.tape.evaluate([ref], self._cut_values(values, cut), self._cut_inputs(cut))[0]
            except (RuntimeError, IndexError, ValueError, TypeError):
                if not cut:
                    raise
                self._cuts.pop(0)

    def _cut_values(self, values: Mapping[str, Tensor], cut: Mapping[str, int]) -> dict[str, Tensor]:
        result = {}
        for name, value in values.items():
            site = self.graph.sites[name]
            for plate in site.plates:
                if plate.name in cut:
                    dim = plate.dim - site.distribution.event_dim
                    value = value.narrow(dim, 0, _ROWS)
            result[name] = value.to(site.device)
        return result

    def _cut_inputs(self, cut: Mapping[str, int]) -> list[Tensor]:
        key = tuple(sorted(cut))
        if key not in self._inputs:
            sizes = set(cut.values())
            inputs = []
            for tensor in self.graph.tape.inputs:
                for dim, size in enumerate(tensor.shape):
                    if size in sizes:
                        tensor = tensor.narrow(dim, 0, _ROWS)
                inputs.append(tensor.detach().double() if tensor.is_floating_point() else tensor.detach())
            self._inputs[key] = inputs
        return self._inputs[key]
