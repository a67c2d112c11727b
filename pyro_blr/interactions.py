"""How the outputs of an affine argument combine a block's indices, and several blocks, as its values show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_blr.blocks import Block
from pyro_blr.forms import for_any_data
from pyro_blr.likelihoods import Vector
from pyro_blr.plans import Argument
from pyro_blr.probe import Probe, tolerance

__all__ = ["mixed_dims", "products_of"]


def mixed_dims(probe: Probe, argument: Argument, block: Block) -> tuple[int, ...]:
    """The dims of the block's variable that single outputs combine several indices of, in any state and for any data."""
    found = for_any_data(probe, argument.ref, lambda: _mixed_dims_here(probe, argument, block))
    return tuple(sorted({dim for dims in found for dim in dims}))


def _mixed_dims_here(probe: Probe, argument: Argument, block: Block) -> tuple[int, ...]:
    """`mixed_dims` at the present states (negative, counted from the right).

    Along the other dims every output sees one index, so that one tangent serves all of them.  Seen with a generic tangent r
    and signs s along one dim: |J r s| = |J r| where an output has one index there.  The signs are the binary digits of the
    indices, so that any two differ in one.  Entries of a vector, correlated with each other, count as one output.
    """
    shape = probe.leaf_shape(block)
    point = probe.point(block)
    base = probe.evaluate(argument.ref, {block.name: point})
    rounding = base.abs().sum(-1) if argument.role is Vector else base.abs()

    def moved(tangent: Tensor) -> Tensor:
        change = probe.evaluate(argument.ref, {block.name: point + tangent}) - base
        return ((change * contraction).sum(-1) if argument.role is Vector else change).abs()

    def generic(*sizes: int) -> Tensor:
        return torch.rand(sizes, generator=probe.generator, device="cpu", dtype=torch.float64) + 0.5

    contraction = generic(*base.shape[-1:])
    mixed = []
    for dim in range(-len(shape), 0):
        tangent, size = generic(*shape), shape[dim]
        straight = moved(tangent)
        for digit in range((size - 1).bit_length()):
            signs = 1.0 - 2.0 * (torch.arange(size, device="cpu") >> digit & 1)
            turned = moved(tangent * signs.reshape(size, *[1] * (-dim - 1)))
            scale = (
                torch.maximum(straight, turned) + rounding
            )  # each output by its own size: rows of data may differ much
            if not bool(((straight - turned).abs() <= tolerance(straight, turned) * scale).all()):
                mixed.append(dim)
                break
    return tuple(mixed)


def products_of(probe: Probe, argument: Argument, blocks: Sequence[Block]) -> tuple[tuple[str, ...], ...]:
    """The sets of two or more Gaussian blocks that the argument multiplies with each other."""
    found: list[tuple[str, ...]] = []
    pairs = [(a, b) for i, a in enumerate(blocks) for b in blocks[i + 1 :]]
    for a, b in pairs:
        if _interacts(probe, argument.ref, (a, b)):
            found.append((a.name, b.name))
    if len(found) >= 3:
        names = sorted({name for pair in found for name in pair})
        triples = [
            (x, y, z) for i, x in enumerate(names) for j, y in enumerate(names[i + 1 :], i + 1) for z in names[j + 1 :]
        ]
        by_name = {block.name: block for block in blocks}
        found += [t for t in triples if _interacts(probe, argument.ref, [by_name[name] for name in t])]
    return tuple(found)


def _interacts(probe: Probe, ref: Any, blocks: Sequence[Block]) -> bool:
    """Whether the mixed difference over the blocks is non-zero in some state, for some data."""
    return any(for_any_data(probe, ref, lambda: _interacts_here(probe, ref, blocks)))


def _interacts_here(probe: Probe, ref: Any, blocks: Sequence[Block]) -> bool:
    low = {block.name: probe.point(block) for block in blocks}
    high = {block.name: probe.point(block) for block in blocks}
    total, size = torch.zeros((), device="cpu"), torch.zeros((), device="cpu")
    for corner in range(2 ** len(blocks)):
        bits = [(corner >> i) & 1 for i in range(len(blocks))]
        leaves = {block.name: (high if bit else low)[block.name] for block, bit in zip(blocks, bits, strict=True)}
        value = probe.evaluate(ref, leaves)
        sign = (-1) ** (len(blocks) - sum(bits))
        total, size = total + sign * value, size + value.abs()
    return bool((total.abs() > 1e-9 * size.max().clamp_min(1e-30)).any())
