"""Standard normal noise that is a function of integers, so that it is drawn again rather than kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["mixed", "noise_numbers", "normal_like"]

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


def normal_like(template: Tensor, key: int) -> Tensor:
    """ε ~ N(0, 1) in the shape, dtype and device of `template`; the same for the same key, whatever the strides."""
    generator = torch.Generator(device=template.device)
    generator.manual_seed(key)
    return torch.randn(template.shape, generator=generator, dtype=template.dtype, device=template.device)


def noise_numbers(group: Mapping[str, Any], number: int) -> tuple[int, ...]:
    """What the noise of draw `number` in a step is a function of, beside the parameter's place."""
    return group["seed"], group["draws"], number
