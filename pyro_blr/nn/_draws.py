"""Weights drawn from q, and the mean again."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_blr.nn._buckets import Bucket, Entry, buckets
from pyro_blr.nn._noise import noise_numbers
from pyro_blr.nn._ranks import world_size
from pyro_blr.nn._settings import NO_GRADIENT

__all__ = ["mean_loss", "perturbed"]


@contextlib.contextmanager
def perturbed(
    groups: Sequence[tuple[dict[str, Any], Sequence[Entry]]], number: int, sign: float, key: int | None
) -> Iterator[list[Bucket]]:
    """The weights at m ± σ ε inside, with ε from the step and `number`, or from `key`; at m outside, bit for bit, whatever happens.

    Yields what will be restored.
    """
    done: list[Bucket] = []
    try:
        for group, entries in groups:
            for bucket in buckets(group, [entry for entry in entries if entry.state]):
                bucket.remember()
                done.append(bucket)
                numbers = noise_numbers(group, number) if key is None else (key,)
                bucket.perturb(bucket.noise(*numbers), sign)
        torch.clear_autocast_cache()  # which holds weights of before in fewer digits
        yield done
    finally:
        for bucket in done:
            bucket.restore()
        torch.clear_autocast_cache()


def mean_loss(result: Any, observe: Callable[[Distribution, Tensor], None]) -> Any:
    """The mean loss that a closure returned, or that of the distribution and labels which it returned, after `observe` and backward."""
    if result is None:
        raise RuntimeError(NO_GRADIENT)
    if not isinstance(result, tuple):
        return result.detach() if torch.is_tensor(result) else result
    distribution, labels = result
    loss = -distribution.log_prob(labels).mean()
    finite = math.isfinite(loss.detach())
    if finite:
        observe(distribution, loss)
    if finite or world_size() > 1:  # others wait for this process's gradients
        loss.backward()
    return loss.detach()
