"""Weights drawn from q, and the mean again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from pyro_blr.nn._buckets import Bucket, Entry, buckets
from pyro_blr.nn._noise import noise_numbers

__all__ = ["perturbed"]


@contextlib.contextmanager
def perturbed(
    groups: Sequence[tuple[dict[str, Any], Sequence[Entry]]], number: int, sign: float, key: int | None
) -> Iterator[None]:
    """The weights at m ± σ ε inside, with ε from the step and `number`, or from `key`; at m outside, bit for bit, whatever happens."""
    done: list[Bucket] = []
    try:
        for group, entries in groups:
            for bucket in buckets(group, [entry for entry in entries if entry.state]):
                bucket.remember()
                done.append(bucket)
                numbers = noise_numbers(group, number) if key is None else (key,)
                bucket.perturb(bucket.noise(*numbers), sign)
        yield
    finally:
        for bucket in done:
            bucket.restore()
