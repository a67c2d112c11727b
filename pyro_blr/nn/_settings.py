"""What the optimizer is told, checked: what was found, what was expected, what to do."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_blr.nn._ranks import check_shards, is_sharded, world_size

__all__ = [
    "NO_DRAW",
    "NO_GRADIENT",
    "TWO_DRAWS",
    "OWN_NOISE",
    "check_group",
    "check_samples",
    "check_seed",
    "check_shared",
]

NO_GRADIENT = (
    "the closure left no gradient; expected it to call backward() on the mean loss and return it, or to return (distribution, labels) "
    "and leave backward to the optimizer"
)
NO_DRAW = (
    "step() without a closure found no gradient at drawn weights; expected backward() inside a block `with optimizer.sampled():` since "
    "the last step or zero_grad(): put the forward pass and backward() in one"
)
TWO_DRAWS = (
    "gradients of another draw wait for step(); expected one draw a step: call step(), or zero_grad() before the block to drop them; "
    "for several draws use step(closure) with samples=..., for predictions torch.no_grad()"
)

CURVATURES = ("auto", "labels", "hessian", "examples", "price")
OWN_NOISE = (
    "noise='own' with Price's curvature, which would need each process's gradient before they are averaged; expected noise='shared', or a "
    "closure that returns (distribution, labels)"
)

NOISES = ("shared", "own")
SHARDED = {"curvature": ("auto", "price"), "metric": ("auto", "diagonal"), "noise": ("shared",)}
METRICS = ("auto", "diagonal", "joint")


def check_group(group: Mapping[str, Any]) -> None:
    """Raises ValueError where a setting of a parameter group has no meaning."""
    data = group["num_data"]
    if not is_number(data) or not 0 < data < math.inf:
        raise ValueError(
            f"num_data is {data!r}; expected the number of data that the mean loss stands for, above zero: "
            "pass len(dataset) (for a language model the number of tokens)"
        )
    for name in ("prior_precision", "prior_mean"):
        values, parameters = group[name], group.get("params")
        if isinstance(values, (list, tuple)) and isinstance(parameters, list) and len(values) != len(parameters):
            raise ValueError(
                f"{name} is a list of {len(values)}; expected one for each of {len(parameters)} parameters"
            )
    precisions = each(group["prior_precision"])
    for precision in precisions:
        if not torch.is_tensor(precision) and not (is_number(precision) and 0 <= precision < math.inf):
            raise ValueError(
                f"prior_precision is {precision!r}; expected a finite number, zero or more: it is one over the prior variance "
                "(weight decay times num_data)"
            )
    for mean in each(group["prior_mean"]):
        if not torch.is_tensor(mean) and not (is_number(mean) and math.isfinite(mean)):
            raise ValueError(f"prior_mean is {mean!r}; expected a finite number")
    within(group, "lr", 0, math.inf, "1 is the natural gradient itself")
    within(group, "momentum", 0, 1, "the weight of past gradients, below 1")
    within(group, "decay", 0, math.inf, "the steps at rest after which the rate has halved; 0 keeps rates constant")
    within(group, "curvature_rate", 0, 1, "the weight of one measurement")
    if group["curvature"] not in CURVATURES:
        raise ValueError(f"curvature is {group['curvature']!r}; expected one of {', '.join(map(repr, CURVATURES))}")
    for name, known in (("metric", METRICS), ("noise", NOISES)):
        if group[name] not in known:
            raise ValueError(f"{name} is {group[name]!r}; expected one of {', '.join(map(repr, known))}")
    every = group["curvature_every"]
    if every is not None and (not isinstance(every, int) or every < 1):
        raise ValueError(f"curvature_every is {every!r}; expected a number of steps, one or more, or None")
    if group["trust"] is not None:
        within(group, "trust", 0, math.inf, "None does not clip")
    first = group["initial_curvature"]
    if first is not None and not (is_number(first) and 0 <= first < math.inf):
        raise ValueError(
            f"initial_curvature is {first!r}; expected a number, zero or more, or None to take it from the data"
        )
    if first == 0 and any(is_number(precision) and precision == 0 for precision in precisions):
        raise ValueError(
            "initial_curvature and prior_precision are both 0: q would have no scale; give one of them a value"
        )


def each(value: Any) -> list[Any]:
    """A value for all parameters of a group, or one for each."""
    return list(value) if isinstance(value, (list, tuple)) else [value]


def within(group: Mapping[str, Any], name: str, low: float, high: float, meaning: str) -> None:
    """Raises ValueError unless low ≤ group[name] < high."""
    value = group[name]
    if not is_number(value) or not low <= value < high:
        raise ValueError(f"{name} is {value!r}; expected a number in [{low}, {high}): {meaning}")


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_samples(samples: int, antithetic: bool) -> None:
    """Raises ValueError where a number of draws has no meaning."""
    if samples < 1 or (antithetic and samples % 2):
        raise ValueError(f"samples is {samples!r}; expected one or more, and an even number with antithetic=True")


def check_seed(seed: int | None) -> None:
    """Raises ValueError where processes would draw different noise without saying so."""
    if seed is None and world_size() > 1:
        raise ValueError("seed is None among several processes; expected the same number in all of them: pass seed=0")


def check_shared(group: Mapping[str, Any], parameters: Iterable[Tensor]) -> None:
    """Raises ValueError where parameters are sharded in a way, or with settings, that the rule is not known for."""
    sharded = [parameter for parameter in parameters if is_sharded(parameter)]
    for parameter in sharded:
        check_shards(parameter)
    asked = [name for name, known in SHARDED.items() if group[name] not in known]
    if sharded and asked:
        found = ", ".join(f"{name}={group[name]!r}" for name in asked)
        raise ValueError(
            f"{found} on sharded parameters; expected curvature='price', metric='diagonal' and noise='shared': gradients at sampled labels "
            "never reach the shards, whose gradients fully_shard makes in backward() alone"
        )
