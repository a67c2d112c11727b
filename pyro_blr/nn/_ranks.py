"""Several processes that train one network: what they agree on, and the shards that each holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

try:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
except ImportError:  # torch was built without torch.distributed
    DTensor = None  # type: ignore[assignment, misc]

__all__ = [
    "any_rank",
    "check_shards",
    "is_sharded",
    "local",
    "mean_over",
    "rank",
    "sharded_like",
    "start_of",
    "sum_over",
    "world_size",
]


def world_size() -> int:
    """How many processes torch.distributed joins; all of them are taken to train one network on parts of the data."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def any_rank(said: bool, device: torch.device) -> bool:
    """Whether a process says so; the same answer in all."""
    if world_size() == 1:
        return said
    flag = torch.tensor(float(said), device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag.item())


def sum_over(tensors: Sequence[Tensor]) -> None:
    """Each tensor ← its sum over processes."""
    if world_size() > 1:
        for pending in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
            pending.wait()


def is_sharded(tensor: Tensor) -> bool:
    return DTensor is not None and isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds, sharing its memory; the tensor itself where it is whole. Under no_grad."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def check_shards(parameter: Tensor) -> None:
    """Raises ValueError where the shards of a parameter are not runs of rows."""
    if not is_sharded(parameter):
        return
    for placement in parameter.placements:  # type: ignore[attr-defined]
        if not (placement.is_replicate() or (type(placement).__name__ == "Shard" and placement.dim == 0)):
            raise ValueError(
                f"a parameter is placed as {placement}; expected shards of its first dimension, as fully_shard makes them, or replicas: "
                "noise that is the same as unsharded is known for these only"
            )


def start_of(parameter: Tensor) -> int:
    """The first element, in the logical order of the whole parameter, of the rows that this process holds."""
    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, mesh, placements)
    if not shape or 0 in shape:
        return 0
    return int(offset[0] * (parameter.numel() // parameter.shape[0]))


def sharded_like(value: Tensor, parameter: Tensor) -> Tensor:
    """A local part as a tensor with the shards of a parameter."""
    if not is_sharded(parameter):
        return value
    known: Any = parameter
    return DTensor.from_local(
        value, known.device_mesh, known.placements, run_check=False, shape=known.shape, stride=known.stride()
    )


def mean_over(value: Tensor, parameter: Tensor) -> float:
    """The mean of all elements, of which `value` holds those of this process."""
    if not is_sharded(parameter):
        return float(value.mean())
    shards: Any = sharded_like(value, parameter)
    return float(shards.sum().full_tensor()) / parameter.numel()
