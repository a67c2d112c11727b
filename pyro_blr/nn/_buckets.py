"""Parameters that are updated by the same numbers, a bounded amount at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pyro_blr.nn._noise import block_elements, mixed, normal_like, normal_part
from pyro_blr.nn._ranks import is_sharded, local, start_of

__all__ = ["Bucket", "Entry", "buckets", "state_dtype"]

# Elements that one call of torch._foreach takes on an accelerator: what it allocates on the way is a multiple of it, not of the
# network. On a CPU it is a block of noise, whose mean, momentum, curvature and gradient stay in the cache from one operation to the next.
BUCKET_ELEMENTS = 1 << 22


def state_dtype(parameter: Tensor) -> torch.dtype:
    """float32 at least: a bfloat16 mean would not feel a step below 1/256 of it."""
    return torch.promote_types(parameter.dtype, torch.float32)


@dataclass(frozen=True)
class Entry:
    """A parameter, its state, its place among all parameters, and that in its group; or elements start … stop − 1 of one."""

    parameter: Tensor
    state: dict[str, Any]
    index: int
    place: int
    part: tuple[int, int] | None = None

    def cut(self, tensor: Tensor) -> Tensor:
        """The part, held by this process, of a tensor in the parameter's shape; a view of it where it is contiguous. Under no_grad."""
        return local(tensor) if self.part is None else tensor.reshape(-1)[self.part[0] : self.part[1]]

    @property
    def count(self) -> int:
        """How many elements of it this process holds."""
        return local(self.parameter.detach()).numel() if self.part is None else self.part[1] - self.part[0]

    def noise(self, *numbers: int) -> Tensor:
        """ε, as the mean, from `numbers` and the place."""
        mean, key = self.state["mean"], mixed(*numbers, self.index)
        if is_sharded(mean):
            own, start = local(mean), start_of(mean)
            return normal_part(own, key, start, start + own.numel(), mean.numel()).view(own.shape)
        if self.part is None:
            return normal_like(mean, key)
        return normal_part(mean, key, *self.part, mean.numel())


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
        return [entry.cut(entry.parameter) for entry in self.entries]

    @property
    def gradients(self) -> list[Tensor]:
        """What autograd left at the parameters, all of which have a gradient here."""
        return [entry.cut(entry.parameter.grad) for entry in self.entries if entry.parameter.grad is not None]

    def of_state(self, name: str) -> list[Tensor]:
        """mean, momentum or curvature of every entry."""
        return [entry.cut(entry.state[name]) for entry in self.entries]

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
        return [entry.noise(*numbers) for entry in self.entries]

    def total(self) -> list[Tensor]:
        """s / N = h + δ/N, (*shape) each; never zero."""
        ridge = self.ridge()
        total = torch._foreach_add(self.of_state("curvature"), ridge)
        if isinstance(ridge, list) or ridge == 0:
            torch._foreach_clamp_min_(total, 1e-30 / float(self.group["num_data"]))
        return list(total)

    def ridge(self) -> Any:
        """δ / N, a number or one for each entry."""
        data, prior = float(self.group["num_data"]), self.prior("prior_precision")
        return [one / data for one in prior] if isinstance(prior, list) else prior / data

    def pull(self) -> list[Tensor]:
        """δ (m − m₀) / N, (*shape) each."""
        mean, origin = self.of_state("mean"), self.prior("prior_mean")
        if isinstance(origin, list) or origin:
            mean = list(torch._foreach_sub(mean, origin))
        return list(torch._foreach_mul(mean, self.ridge()))

    def precision(self) -> list[Tensor]:
        """s = N h + δ, (*shape) each; never zero."""
        precision = self.total()
        torch._foreach_mul_(precision, float(self.group["num_data"]))
        return precision

    def scale(self) -> list[Tensor]:
        """σ = s^−½, (*shape) each."""
        scale = self.precision()
        torch._foreach_rsqrt_(scale)
        return scale

    @torch.no_grad()
    def remember(self) -> None:
        """The mean is what the parameters hold, also where another hand wrote it."""
        for mean, parameter in zip(self.of_state("mean"), self.parameters, strict=True):
            adopt(mean, parameter)

    @torch.no_grad()
    def perturb(self, noise: Sequence[Tensor], sign: float) -> None:
        """θ = m ± σ ε, written into the parameters, after `remember`."""
        scale, factor = self.total(), sign / float(self.group["num_data"]) ** 0.5
        torch._foreach_rsqrt_(scale)
        means, parameters = self.of_state("mean"), self.parameters
        if means[0].dtype == parameters[0].dtype:  # that hold the mean
            torch._foreach_addcmul_(parameters, scale, list(noise), value=factor)
        else:
            torch._foreach_copy_(parameters, torch._foreach_addcmul(means, scale, list(noise), value=factor))

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
    """The entries of one group in buckets, large ones in parts where they can be."""
    open_buckets: dict[tuple[Any, ...], Bucket] = {}
    sizes: dict[tuple[Any, ...], int] = {}
    for whole in entries:
        for entry in parts(group, whole):
            parameter, state = entry.parameter, entry.state
            count = entry.count
            key = (parameter.device, parameter.dtype, state["step"], state["measurements"])
            if key in open_buckets and sizes[key] + count > capacity(parameter.device):
                yield open_buckets.pop(key)
                sizes[key] = 0
            open_buckets.setdefault(key, Bucket(group)).entries.append(entry)
            sizes[key] = sizes.get(key, 0) + count
    yield from open_buckets.values()


def capacity(device: torch.device) -> int:
    """Elements of a bucket."""
    return block_elements(device) if device.type == "cpu" else BUCKET_ELEMENTS


def parts(group: dict[str, Any], entry: Entry) -> Iterator[Entry]:
    """A large entry on the CPU in blocks of noise, where all that belongs to it is contiguous and its prior a number."""
    parameter, size = entry.parameter, block_elements(entry.parameter.device)
    beside = [value for value in (parameter.grad, entry.state["mean"]) if value is not None]
    priors = [group[name] for name in ("prior_precision", "prior_mean")]
    own = [value[entry.place] if isinstance(value, (list, tuple)) else value for value in priors]
    if (
        parameter.device.type != "cpu"
        or is_sharded(parameter)
        or parameter.numel() <= size
        or any(torch.is_tensor(value) and value.numel() > 1 for value in own)
        or not all(t.is_contiguous() for t in (parameter, *beside))
    ):
        yield entry
        return
    for start in range(0, parameter.numel(), size):
        yield replace(entry, part=(start, min(start + size, parameter.numel())))
