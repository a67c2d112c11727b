"""The Monte-Carlo error of an optimum on fixed draws, from how far optima on independent draws lie apart."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_blr.beliefs import Beliefs
from pyro_blr.blocks import Block, is_gaussian

__all__ = ["ERROR", "MonteCarloError", "Optima"]

ERROR = 0.02  # sds of a mean, and of a log sd: what is left of the draws in a result
_PAIRS = 2  # of optima that an error is estimated from
_SHARED = 3.0  # weight of the block's mean square beside a scalar's own: few degrees of freedom apart, many together


@dataclass(frozen=True)
class MonteCarloError:
    """The largest standard error of all means (in sds) and log sds, and the block that it is in."""

    size: float
    block: str


class Optima:
    """Optima on independent sets of n₁, n₂, … draws.

    Where the squared error e² of an optimum falls as 1/n, the squared distance of the optima j − 1 and j has the expectation
    e_j² (1 + n_j / n_{j−1}).  The error on low-discrepancy draws falls faster: this is then more than it is.
    """

    def __init__(self) -> None:
        self._last: Beliefs | None = None
        self._sizes: list[int] = []
        self._squares: list[dict[str, Tensor]] = []  # of each pair, e_j² scalar by scalar
        self.share = 1.0  # of the last pair's squared distance that is the last optimum's own error

    def copy(self) -> Optima:
        """An independent copy."""
        other = Optima()
        other._last, other._sizes, other._squares = self._last, list(self._sizes), self._squares
        other.share = self.share
        return other

    def add(self, beliefs: Beliefs, size: int) -> None:
        """The next optimum."""
        if self._last is not None:
            self.share = 1 / (1 + size / self._sizes[-1])
            squares = {
                name: self.share * _distances(block, name, beliefs, self._last) ** 2
                for name, block in beliefs.blocks.items()
            }
            self._squares = [*self._squares[1 - _PAIRS :], squares]
        self._sizes.append(size)
        self._last = beliefs.copy()

    def error(self) -> MonteCarloError:
        """Of the last optimum; infinite where there is no other to compare it with."""
        if not self._squares:
            return MonteCarloError(math.inf, next(iter(self._last.blocks), "") if self._last else "")
        found = MonteCarloError(0.0, "")
        sizes = self._sizes[-len(self._squares) :]
        for name in self._squares[-1]:
            pairs = [pair[name] * (size / sizes[-1]) for pair, size in zip(self._squares, sizes, strict=True)]
            own = torch.stack(pairs).mean(0)
            weight = len(pairs) / (len(pairs) + _SHARED)
            size = float((weight * own + (1 - weight) * own.mean()).max().sqrt())
            if not size <= found.size:
                found = MonteCarloError(size, name)
        return found


def _distances(block: Block, name: str, new: Beliefs, old: Beliefs) -> Tensor:
    """Distances of means in sds, and of log sds, (n); for families with no location √(2 KL / n) of an element with n pairs
    of parameters, which is the same on average.
    """
    if is_gaussian(block.family):
        (mean, sd), (mean_before, sd_before) = (_mean_and_sd(beliefs, name) for beliefs in (new, old))
        return torch.cat([((mean - mean_before) / sd).abs().flatten(), (sd / sd_before).log().abs().flatten()])
    nats = block.family.kl(new.naturals[name], old.naturals[name]).clamp_min(0.0)
    return (2 * nats / max(1.0, block.family.num_parameters / 2)).sqrt().flatten()


def _mean_and_sd(beliefs: Beliefs, name: str) -> tuple[Tensor, Tensor]:
    moments = beliefs.wide[name]
    variance = moments["variance"] if "variance" in moments else moments["covariance"].diagonal(dim1=-2, dim2=-1)
    return moments["mean"], variance.sqrt()
