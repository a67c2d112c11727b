"""What every head has: features with a column for the bias, statistics that keep their digits, weights as those of `Linear`."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["Head", "check_finite", "check_positive"]

# Numbers that one part of a batch takes in float64: what an update needs on the way does not grow with the batch.
PART_NUMBERS = 1 << 22


class Head(torch.nn.Module, abc.ABC):
    """A last layer f = W φ + b with a posterior over (W, b), in the place of `torch.nn.Linear`.

    Statistics are buffers: `state_dict` holds them, `.to(device)` moves them, and `.half()` or `.to(dtype)` leaves their digits alone.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, prior_precision: float) -> None:
        super().__init__()
        if min(in_features, out_features) < 1:
            raise ValueError(f"in_features is {in_features}, out_features {out_features}; expected one or more of each")
        self.in_features, self.out_features, self.has_bias = in_features, out_features, bias
        self.prior_precision = check_positive("prior_precision", prior_precision, "one over the prior variance")
        self._known: tuple[list[tuple[Tensor, int]], Any] | None = None

    @property
    def width(self) -> int:
        """Weights of one output: in_features, and one more for the bias."""
        return self.in_features + self.has_bias

    @property
    @abc.abstractmethod
    def mean(self) -> Tensor:
        """Posterior mean of the weights, (out_features, width), the bias last."""

    @property
    def weight(self) -> Tensor:
        """Posterior mean of W, (out_features, in_features)."""
        return self.mean[:, : self.in_features]

    @property
    def bias(self) -> Tensor | None:
        """Posterior mean of b, (out_features,), or None."""
        return self.mean[:, -1] if self.has_bias else None

    def forward(self, features: Tensor) -> Tensor:
        """f at the posterior mean, (..., out_features), in the dtype of `features` (..., in_features)."""
        weight, bias = self.weight.to(features.dtype), self.bias
        return torch.nn.functional.linear(features, weight, None if bias is None else bias.to(features.dtype))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.has_bias}"

    def _rows(self, features: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """features (..., in_features) as (n, width) in `dtype`, with a one for the bias last."""
        if features.shape[-1:] != (self.in_features,):
            raise ValueError(f"features have shape {tuple(features.shape)}; expected (..., {self.in_features})")
        rows = features.detach().reshape(-1, self.in_features).to(dtype)
        check_finite("features", rows)
        return torch.nn.functional.pad(rows, (0, 1), value=1.0) if self.has_bias else rows

    def _parts(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Tensors of n rows each, a bounded number of rows at once."""
        size = max(1, PART_NUMBERS // (self.width + self.out_features))
        return zip(*(tensor.split(size) for tensor in tensors), strict=True)

    def _once(self, buffers: Iterable[Tensor], compute: Callable[[], Any]) -> Any:
        """compute(), kept until one of these buffers is written into, moved or loaded."""
        now = list(buffers)
        if self._known is not None:
            seen, value = self._known
            if len(seen) == len(now) and all(
                old is new and version == new._version for (old, version), new in zip(seen, now, strict=True)
            ):
                return value
        value = compute()
        self._known = [(buffer, buffer._version) for buffer in now], value
        return value

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, buffer in list(self.named_buffers()):
            if buffer.dtype != before[name].dtype:
                self._buffers[name] = before[name].to(buffer.device)
        return self


def check_positive(name: str, value: float, meaning: str) -> float:
    """The value as a float; ValueError unless it is finite and above zero."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{name} is {value!r}; expected a finite number above zero: it is {meaning}")
    return float(value)


def check_finite(name: str, values: Tensor) -> None:
    """ValueError where a value is NaN or infinite, with the first row that has one."""
    if not torch.isfinite(values).all():
        row = int((~torch.isfinite(values)).reshape(len(values), -1).any(-1).nonzero()[0])
        raise ValueError(
            f"row {row} of the {name} has a NaN or an infinity; expected finite numbers: leave such rows out"
        )
