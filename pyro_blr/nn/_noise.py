"""Standard normal noise that is a function of integers, so that it is drawn again rather than kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_blr.nn._ranks import rank

__all__ = ["block_elements", "mixed", "noise_numbers", "normal_like", "normal_part"]

_WORD = (1 << 64) - 1


def mixed(*numbers: int) -> int:
    """One 63-bit integer of several: the finaliser of SplitMix64 (Steele, Lea and Flood 2014), number by number."""
    state = 0
    for number in numbers:
        state = (state ^ (number & _WORD)) + 0x9E3779B97F4A7C15 & _WORD
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _WORD
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _WORD
        state ^= state >> 31
    return state >> 1


def block_elements(device: torch.device) -> int:
    """How many elements of a tensor, in its logical order, share one seed; a part of the tensor needs only the blocks it meets."""
    return 1 << 17 if device.type == "cpu" else 1 << 22


def normal_like(template: Tensor, key: int) -> Tensor:
    """ε ~ N(0, 1) in the shape, dtype and device of `template`; the same for the same key, whatever the strides."""
    count = template.numel()
    return normal_part(template, key, 0, count, count).view(template.shape)


def normal_part(template: Tensor, key: int, start: int, stop: int, count: int) -> Tensor:
    """Elements start … stop − 1, in the logical order, of the noise of a tensor of `count`, (stop − start,), as `template` otherwise."""
    size, generator = block_elements(template.device), torch.Generator(device=template.device)
    noise = torch.empty(stop - start, dtype=template.dtype, device=template.device)
    for block in range(start // size, -(-stop // size)):
        generator.manual_seed(mixed(key, block))
        first, last = block * size, min(count, (block + 1) * size)
        low, high = max(start, first), min(stop, last)
        target = noise[low - start : high - start]
        if (low, high) == (first, last):
            target.normal_(generator=generator)
        else:
            whole = torch.empty(last - first, dtype=noise.dtype, device=noise.device).normal_(generator=generator)
            target.copy_(whole[low - first : high - first])
    return noise


def noise_numbers(group: Mapping[str, Any], number: int) -> tuple[int, ...]:
    """What the noise of draw `number` in a step is a function of, beside the parameter's place; the process, where each has its own."""
    own = (rank(),) if group["noise"] == "own" else ()
    return group["seed"], group["draws"], number, *own
