"""Parameters that are updated by the same numbers, a bounded amount at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_blr.nn._noise import mixed, normal_like

__all__ = ["Bucket", "Entry", "buckets", "state_dtype"]

# Elements that one call of torch._foreach takes: what it allocates on the way is a multiple of it, not of the network.
BUCKET_ELEMENTS = 1 << 22


def state_dtype(parameter: Tensor) -> torch.dtype:
    """float32 at least: a bfloat16 mean would not feel a step below 1/256 of it."""
    return torch.promote_types(parameter.dtype, torch.float32)


@dataclass(frozen=True)
class Entry:
    """A parameter, its state, its place among all parameters, and that in its group."""

    parameter: Tensor
    state: dict[str, Any]
    index: int
    place: int


@dataclass(frozen=True)
class Bucket:
    """Entries of one group, device and dtype, with as many steps and measurements behind them.

    Precisions are s = N h + δ, with h (`curvature`) the expected second derivative of the mean loss, N the number of data
    and δ the prior precision.
    """

    group: dict[str, Any]
    entries: list[Entry] = field(default_factory=list)

    @property
    def parameters(self) -> list[Tensor]:
        return [entry.parameter for entry in self.entries]

    @property
    def gradients(self) -> list[Tensor]:
        """What autograd left at the parameters, all of which have a gradient here."""
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]

    def of_state(self, name: str) -> list[Tensor]:
        """mean, momentum or curvature of every entry."""
        return [entry.state[name] for entry in self.entries]

    def prior(self, name: str) -> Any:
        """The group's prior_precision or prior_mean: a number, or one for each entry; all of them tensors where one is."""
        value = self.group[name]
        if not isinstance(value, (list, tuple)):
            return value
        own = [value[entry.place] for entry in self.entries]
        if any(torch.is_tensor(one) for one in own):
            own = [torch.as_tensor(x).to(mean) for x, mean in zip(own, self.of_state("mean"), strict=True)]
        return own

    def noise(self, *numbers: int) -> list[Tensor]:
        """ε of every entry, (*shape) each, from `numbers` and its index."""
        return [normal_like(entry.state["mean"], mixed(*numbers, entry.index)) for entry in self.entries]

    def precision(self) -> list[Tensor]:
        """s = N h + δ, (*shape) each; never zero."""
        precision = torch._foreach_mul(self.of_state("curvature"), float(self.group["num_data"]))
        torch._foreach_add_(precision, self.prior("prior_precision"))
        torch._foreach_clamp_min_(precision, 1e-30)
        return list(precision)

    def scale(self) -> list[Tensor]:
        """σ = s^−½, (*shape) each."""
        scale = torch._foreach_sqrt(self.precision())
        torch._foreach_reciprocal_(scale)
        return list(scale)

    @torch.no_grad()
    def remember(self) -> None:
        """The mean is what the parameters hold, also where another hand wrote it."""
        for entry in self.entries:
            adopt(entry.state["mean"], entry.parameter)

    @torch.no_grad()
    def perturb(self, noise: Sequence[Tensor], sign: float) -> None:
        """θ = m ± σ ε, written into the parameters."""
        values = self.scale()
        torch._foreach_mul_(values, list(noise))
        torch._foreach_mul_(values, sign)
        torch._foreach_add_(values, self.of_state("mean"))
        torch._foreach_copy_(self.parameters, values)

    @torch.no_grad()
    def restore(self) -> None:
        """θ = m, bit for bit what `remember` found."""
        torch._foreach_copy_(self.parameters, self.of_state("mean"))


def adopt(mean: Tensor, parameter: Tensor) -> None:
    """mean ← parameter, except where the parameter is that mean in fewer digits."""
    if mean.dtype == parameter.dtype:
        mean.copy_(parameter)
    else:
        mean.copy_(torch.where(mean.to(parameter.dtype) == parameter, mean, parameter.to(mean.dtype)))


def buckets(group: dict[str, Any], entries: Iterable[Entry]) -> Iterator[Bucket]:
    """The entries of one group in buckets."""
    open_buckets: dict[tuple[Any, ...], Bucket] = {}
    sizes: dict[tuple[Any, ...], int] = {}
    for entry in entries:
        parameter, state = entry.parameter, entry.state
        key = (parameter.device, parameter.dtype, state["step"], state["measurements"])
        if key in open_buckets and sizes[key] + parameter.numel() > BUCKET_ELEMENTS:
            yield open_buckets.pop(key)
            sizes[key] = 0
        open_buckets.setdefault(key, Bucket(group)).entries.append(entry)
        sizes[key] = sizes.get(key, 0) + parameter.numel()
    yield from open_buckets.values()
