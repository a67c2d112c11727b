"""Gaussian priors of a network's parameters: what the user says, laid out by parameter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

__all__ = ["Assigned", "Prior", "PriorLike", "assign", "laid_out"]


@dataclass(frozen=True)
class Prior:
    """N(mean, 1 / precision) for every element of a parameter; numbers, or tensors that broadcast to it.

    A precision may be a value of another site (a Gamma for each layer, or of shape (units, 1) for each row of a weight).
    """

    mean: Any = 0.0
    precision: Any = 1.0

    def __post_init__(self) -> None:
        for name, value in (("mean", self.mean), ("precision", self.precision)):
            if isinstance(value, bool) or not isinstance(value, (int, float, Tensor)):
                raise TypeError(f"prior {name}: found {type(value).__name__}, expected a number or a tensor")
            if isinstance(value, (int, float)) and not math.isfinite(value):
                raise ValueError(f"prior {name}: found {value!r}, expected a finite number")
        if isinstance(self.precision, (int, float)) and self.precision <= 0:
            raise ValueError(
                f"prior precision: found {self.precision!r}, expected a positive number: it is one over the prior variance"
            )

    @property
    def is_number(self) -> bool:
        """Whether it is the same numbers throughout, known before the model runs."""
        return not isinstance(self.mean, Tensor) and not isinstance(self.precision, Tensor)


PriorLike = float | Tensor | Prior | Mapping[str, Any] | Callable[[str, Tensor], Any]


@dataclass(frozen=True)
class Assigned:
    """Parameters that have one prior, all elements alike if there are several; `key` says which in words."""

    key: str
    names: tuple[str, ...]
    prior: Prior


def as_prior(said: Any) -> Prior:
    """A number or tensor is a precision, about zero."""
    return said if isinstance(said, Prior) else Prior(precision=said)


def assign(layers: Iterable[PriorLike | None], parameters: Mapping[str, Tensor]) -> list[Assigned]:
    """The prior of each parameter: of the first of `layers` that speaks of it.

    A mapping speaks by patterns of names (`fnmatch`), the first that matches; anything else of all parameters. Parameters of equal
    priors, the same for all elements, come together.

    Raises ValueError for a pattern without a parameter, a parameter without a prior, and a shape that does not fit.
    """
    layers = [layer for layer in layers if layer is not None]
    for layer in layers:
        for pattern in layer if isinstance(layer, Mapping) else ():
            if not any(fnmatchcase(name, pattern) for name in parameters):
                raise ValueError(
                    f"prior: found pattern {pattern!r}, expected one that some exposed parameter matches: {sorted(parameters)}"
                )
    found: dict[Any, tuple[str, list[str], Prior]] = {}
    for name, parameter in parameters.items():
        key, prior = _prior_of(name, parameter, layers)
        same: Any = tuple(id(x) if isinstance(x, Tensor) else float(x) for x in (prior.mean, prior.precision))
        if any(isinstance(x, Tensor) and x.numel() > 1 for x in (prior.mean, prior.precision)):
            key, same = name, name
        found.setdefault(same, (key, [], prior))[1].append(name)
    return [Assigned(key, tuple(names), prior) for key, names, prior in found.values()]


def _prior_of(name: str, parameter: Tensor, layers: Iterable[Any]) -> tuple[str, Prior]:
    for layer in layers:
        if isinstance(layer, Mapping):
            for pattern, said in layer.items():
                if fnmatchcase(name, pattern):
                    return pattern, as_prior(said)
        elif callable(layer) and not isinstance(layer, Tensor):
            said = layer(name, parameter)
            if said is not None:
                return name, as_prior(said)
        else:
            return "*", as_prior(layer)
    raise ValueError(
        f"prior: found none for parameter {name!r}, expected a pattern that it matches; '*' as the last one matches all"
    )


def laid_out(value: Any, parameter: Tensor, name: str, batch: torch.Size) -> Tensor:
    """A mean or precision for every element of one parameter, (*batch, numel); `batch` is that of enclosing plates."""
    value = torch.as_tensor(value, dtype=_float_of(parameter), device=parameter.device)
    if batch and value.shape in (batch, batch[: value.dim()]) and value.dim() > 0:
        return value.unsqueeze(-1).expand(*value.shape, parameter.numel())
    try:
        return value.expand(parameter.shape).reshape(-1)
    except RuntimeError:
        raise ValueError(
            f"prior of parameter {name!r}: found shape {tuple(value.shape)}, expected one that broadcasts to {tuple(parameter.shape)}"
        ) from None


def _float_of(parameter: Tensor) -> torch.dtype:
    """float32 at least, as q has it."""
    return torch.promote_types(parameter.dtype, torch.float32)
