"""Random generators of the process: seeded and put back."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable, Iterator

import numpy as np
import torch

__all__ = ["devices_in_use", "isolated_torch_state", "seed_generators"]


def devices_in_use() -> list[int]:
    """The CUDA devices, where the process has begun to use them."""
    return list(range(torch.cuda.device_count())) if torch.cuda.is_available() and torch.cuda.is_initialized() else []


def seed_generators(seed: int, devices: Iterable[int]) -> None:
    """Seeds what is put back afterwards, and nothing else: `torch.manual_seed` would leave its seed behind for every kind of
    device that is not in use yet, and formats the call stack (a millisecond) to say where from."""
    random.seed(seed)
    np.random.seed(seed)
    for generator in _generators(devices):
        generator.manual_seed(seed)


@contextlib.contextmanager
def isolated_torch_state(seed: int) -> Iterator[None]:
    """Whatever is drawn inside from torch leaves its global generators as they were; a tenth of a millisecond less than for all."""
    generators = _generators(devices_in_use())
    states = [generator.get_state() for generator in generators]
    try:
        for generator in generators:
            generator.manual_seed(seed)
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def _generators(devices: Iterable[int]) -> list[torch.Generator]:
    return [torch.default_generator, *(torch.cuda.default_generators[device] for device in devices)]
