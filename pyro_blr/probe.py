"""Numerical evidence: an expression evaluated in float64 at chosen points of its sites' supports.

A probe works on a few rows of large data: inputs and latents whose dims are those of a large plate are cut to its first rows, when
the program still runs on them.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
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
    SparseNormal,
    TransformedNormal,
    Wishart,
)
from pyro_blr.generators import isolated_torch_state
from pyro_blr.graph import FactorGraph
from pyro_blr.running import generic_value

__all__ = ["Probe", "close", "leaf_point", "leaf_shape", "tolerance"]

_ROWS = 12  # rows of a large plate that are enough to see a form
_LARGE = 64  # plates beyond this size are cut
_STATES = 8  # states of a discrete site that are looked at one by one
_TURNS = 16  # joint states of several
_STEPS = (0.37, -0.8, 1.9)  # places on a line, from its first point to its second


def tolerance(*values: Tensor) -> float:
    """The relative difference that counts as rounding, by the least precise dtype."""
    return 1e-8 if all(value.dtype == torch.float64 for value in values) else 2e-4


def close(a: Tensor, b: Tensor) -> bool:
    """Equal up to rounding, relative to the largest entry; float32 inside the program shows in the result's dtype."""
    if a.shape != b.shape:
        a, b = torch.broadcast_tensors(a, b)
    if a.numel() == 0:
        return True
    if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        return False
    scale = torch.maximum(a.abs().max(), b.abs().max()).clamp_min(1e-30)
    return bool((a - b).abs().max() <= tolerance(a, b) * scale)


def leaf_shape(block: Block) -> tuple[int, ...]:
    """The shape of the block's own variable."""
    if isinstance(block.family, TransformedNormal):
        return (*block.batch_shape, *block.family.base.event_shape)
    return (*block.batch_shape, *block.family.event_shape)


def leaf_point(family: ExponentialFamily, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """A random value of the block's own variable, float64, away from the boundary of its support."""
    normal = torch.randn(tuple(shape), generator=generator, device="cpu", dtype=torch.float64)
    if isinstance(family, (Normal, MultivariateNormal, SparseNormal, LogNormal, TransformedNormal)):
        return normal
    if isinstance(family, (Gamma, InverseGamma)):
        return (0.7 * normal).exp()
    if isinstance(family, Beta):
        return torch.sigmoid(normal)
    if isinstance(family, Dirichlet):
        return torch.softmax(normal, -1)
    if isinstance(family, Wishart):
        d = shape[-1]
        return normal @ normal.mT / d + 0.5 * torch.eye(d, dtype=torch.float64, device=normal.device)
    raise TypeError(f"{type(family).__name__} has no continuous values")


class Probe:
    """Evaluates expressions of a graph at points given block by block, in float64, on a few rows."""

    def __init__(self, graph: FactorGraph, blocks: Mapping[str, Block]):
        self.graph, self.blocks = graph, blocks
        self._block_of = {site: name for name, block in blocks.items() for site in block.site_names}
        self.generator = torch.Generator().manual_seed(20230717)
        self._cuts = self._possible_cuts()
        self._inputs: dict[tuple[str, ...], list[Tensor]] = {}
        self._states: dict[str, tuple[int, int]] = {}
        self._assigned: dict[tuple[str, tuple[int, int] | None, int], Tensor] = {}
        self._draw = 0
        self._is_other = False

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

    def site_values(self, leaves: Mapping[str, Tensor], wanted: Collection[str]) -> dict[str, Tensor]:
        """Values for the sites that are wanted: from the given leaves, generic ones for the others."""
        values: dict[str, Tensor] = {}
        for name in dict.fromkeys(self._block_of[site] for site in self.graph.sites if site in wanted):
            block = self.blocks[name]
            if name in leaves:
                values.update(block.values(leaves[name].to(block.device), wanted))
            elif block.is_discrete:
                for site in block.sites:
                    value = self._state_of(block)
                    values[site.name] = value.double() if value.is_floating_point() else value
            else:
                fixed = leaf_point(block.family, self.leaf_shape(block), torch.Generator().manual_seed(len(name)))
                values.update(block.values(fixed.to(block.device), wanted))
        return values

    def assignments(self, ref: Any) -> Iterator[int]:
        """Sets the discrete sites of an expression to their joint states in turn, and to random ones; one turn where it has none.

        What holds at one state need not at another: `mu[j] + mu[k]` sees one element of mu where j = k, and two elsewhere.
        """
        names = self.graph.tape.latents_of(ref)
        discrete = [b for b in self.blocks.values() if b.is_discrete and any(site in names for site in b.site_names)]
        sizes = [min(block.num_states, _STATES) for block in discrete]
        joint = list(itertools.islice(itertools.product(*map(range, sizes)), _TURNS)) if discrete else []
        if math.prod(sizes) > _TURNS:  # too many: states that differ from site to site by every step
            joint = [tuple((t + i * (t // _STATES)) % n for i, n in enumerate(sizes)) for t in range(_TURNS)]
        try:
            yield 0
            strides = (0, 1) if any(block.batch_shape.numel() > 1 for block in discrete) else (0,)
            for turn, (states, stride) in enumerate(itertools.product(joint, strides), 1):
                self._states = {block.name: (state, stride) for block, state in zip(discrete, states, strict=True)}
                yield turn
            self._states = {}
            for self._draw in (1, 2, 3) if discrete else ():
                yield 2 * _TURNS + self._draw
        finally:
            self._states, self._draw, self._assigned = {}, 0, {}

    @contextlib.contextmanager
    def other_data(self) -> Iterator[None]:
        """Inputs of the same shapes, ranges and signs as the program's: its rows, or the next minibatch's, may be special
        (`mu[i] - mu[j]` where i = j, a product with zero, a branch that no row takes)."""
        self._is_other = True
        try:
            yield
        finally:
            self._is_other = False

    def _state_of(self, block: Block) -> Tensor:
        """Random states, or those of the turn: one for all elements, or counting on from element to element."""
        key = block.name, self._states.get(block.name), self._draw
        if key not in self._assigned:
            self._assigned[key] = self._assign(block)
        return self._assigned[key]

    def _assign(self, block: Block) -> Tensor:
        site = block.sites[0]
        generic = generic_value(site.name, site.distribution, self._draw)
        if block.name not in self._states or block.states is None:
            return generic
        state, stride = self._states[block.name]
        index = (state + stride * torch.arange(block.batch_shape.numel())) % block.num_states
        return block.states[index.to(block.states.device)].to(generic).reshape(generic.shape)

    def evaluate(self, ref: Any, leaves: Mapping[str, Tensor]) -> Tensor:
        """The expression at the leaves (full shapes); its rows are cut when the program allows it."""
        return self.evaluate_all([ref], leaves)[0]

    def evaluate_all(self, refs: Sequence[Any], leaves: Mapping[str, Tensor]) -> list[Any]:
        """Several expressions in one pass."""
        values = self.site_values(leaves, frozenset().union(*map(self.graph.tape.latents_of, refs)))
        while True:
            cut = self._cuts[0]
            try:
                with isolated_torch_state(0), torch.no_grad():
                    found = self.graph.tape.evaluate(refs, self._cut_values(values, cut), self._cut_inputs(cut))
                    return [value.cpu() if isinstance(value, Tensor) else value for value in found]
            except (RuntimeError, IndexError, ValueError, TypeError):
                if not cut or self._is_other:
                    raise
                self._cuts.pop(0)

    def are_on_lines(self, refs: Sequence[Any], blocks: Sequence[Block]) -> list[bool]:
        """Of each expression, whether its values lie on a line along a random line in all blocks' variables together."""
        a, b = ({block.name: self.point(block) for block in blocks} for _ in range(2))
        places = [a, b, *({name: (1 - t) * a[name] + t * b[name] for name in a} for t in _STEPS)]
        found = zip(*(self.evaluate_all(refs, place) for place in places), strict=True)
        return [
            all(close(m, (1 - t) * start + t * end) for t, m in zip(_STEPS, middles, strict=True))
            for start, end, *middles in found
        ]

    def _cut_values(self, values: Mapping[str, Tensor], cut: Mapping[str, int]) -> dict[str, Tensor]:
        result = {}
        for name, value in values.items():
            site = self.graph.sites[name]
            for plate in site.plates:
                dim = plate.dim - site.distribution.event_dim
                if plate.name in cut:
                    value = value.narrow(dim, 0, _ROWS)
                elif site.shared:
                    value = value.narrow(dim, 0, 1)
            result[name] = value.to(site.device)
        return result

    def _cut_inputs(self, cut: Mapping[str, int]) -> list[Tensor]:
        key = (*sorted(cut), str(self._is_other))
        if key not in self._inputs:
            sizes = set(cut.values())
            inputs = []
            for tensor in self.graph.tape.inputs:
                for dim, size in enumerate(tensor.shape):
                    if size in sizes:
                        tensor = tensor.narrow(dim, 0, _ROWS)
                if self._is_other:
                    tensor = _another(tensor, self.generator)
                inputs.append(tensor.detach().double() if tensor.is_floating_point() else tensor.detach())
            self._inputs[key] = inputs
        return self._inputs[key]


def _another(data: Tensor, generator: torch.Generator) -> Tensor:
    """Random data of the same range (integers, indices, bits; a permutation for a permutation) or signs."""
    if data.numel() == 0 or data.is_complex():
        return data
    if not data.is_floating_point() or bool((data == data.round()).all()):
        if data.dtype == torch.bool:
            return (torch.rand(tuple(data.shape), generator=generator, device="cpu") < 0.5).to(data.device)
        if torch.equal(data.flatten().sort().values.long(), torch.arange(data.numel(), device=data.device)):
            return torch.randperm(data.numel(), generator=generator).reshape(data.shape).to(data)
        low, high = int(data.min()), int(data.max())
        return torch.randint(low, high + 1, tuple(data.shape), generator=generator, device="cpu").to(data)
    noise = torch.randn(tuple(data.shape), generator=generator, device="cpu", dtype=torch.float64).to(data)
    if bool((data > 0).all()):
        return torch.sigmoid(noise) if bool((data < 1).all()) else (0.5 * noise).exp() * data.mean()
    return noise
