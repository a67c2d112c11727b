"""What the distribution of the labels tells of the curvature of one group at one draw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_blr.nn._buckets import Bucket, Entry
from pyro_blr.nn._curvature import SMALL, elements, hessian, label_gradients, probes, squares
from pyro_blr.nn._evidence import Evidence, accumulate
from pyro_blr.nn._metric import gram_of, is_joint
from pyro_blr.nn._noise import mixed
from pyro_blr.nn._ranks import is_sharded, rank, world_size

__all__ = ["observe"]


def observe(
    group: dict[str, Any],
    entries: Sequence[Entry],
    evidence: Evidence,
    distribution: Distribution,
    loss: Tensor | None,
) -> None:
    """Adds the curvatures of a group, and its matrix where the mean moves in it, to the evidence; `loss` is that of the labels observed."""
    parameters, count = [entry.parameter for entry in entries], probes(group)
    if any(is_sharded(parameter) for parameter in parameters):
        return  # Price's curvature alone: what autograd differentiates here are not the shards
    # Labels of a process are those that one process would draw for this part of the batch.
    key = mixed(group["seed"], group["draws"], evidence.observations * world_size() + rank())
    begun = all(entry.state for entry in entries)
    by_hessian = begun and group["curvature"] == "hessian" and loss is not None
    if not by_hessian or is_joint(group):
        sets = max(1, count // 2) if by_hessian else count
        gradients = label_gradients(distribution, parameters, sets, key, group["curvature"] == "examples")
        if is_joint(group) and any(rows is not None for rows in gradients):
            accumulate(evidence.grams, parameters[0], gram_of(gradients, parameters))
        if not by_hessian:
            add(evidence, parameters, squares(gradients))
    if by_hessian and loss is not None:
        add(evidence, parameters, hessian(loss, parameters, Bucket(group, list(entries)).scale(), count, key))
    elif (
        group["curvature"] == "auto" and loss is not None and elements(group) <= SMALL and smooth(loss, parameters, key)
    ):
        evidence.smooth.add(parameters[0])


def add(evidence: Evidence, parameters: Sequence[Tensor], values: Sequence[Tensor | None]) -> None:
    """Adds curvatures of parameters, where there are any."""
    for parameter, value in zip(parameters, values, strict=True):
        if value is not None:
            accumulate(evidence.squares, parameter, value)


def smooth(loss: Tensor, parameters: Sequence[Tensor], key: int) -> bool:
    """Whether autograd differentiates the loss twice: some operations have no second derivative."""
    try:
        hessian(loss, parameters, [torch.ones_like(parameter) for parameter in parameters], 1, key)
    except RuntimeError:  # NotImplementedError is one
        return False
    return True
