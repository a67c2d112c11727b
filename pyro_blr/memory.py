"""Which tensors share memory that a latent was written into: `row = x[1]; row[0] = z` is a write into x."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Memory", "Place", "Written", "as_strided", "base_of", "out_of_place", "place_in"]


class Place(NamedTuple):
    """Where a view lies in the memory of its base."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass
class Memory:
    """The tensor that owns some memory, and the node that holds its present content."""

    base: Tensor
    index: int


@dataclass
class Written:
    """Memory that a latent was written into, by address; its owners are kept alive, so that addresses stay theirs."""

    _memories: dict[int, Memory] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self._memories)

    def of(self, tensor: Tensor) -> Memory | None:
        """The memory that a plain tensor reads."""
        address = _address(tensor)
        return None if address is None else self._memories.get(address)

    def put(self, base: Tensor, index: int) -> None:
        """From here on the memory of `base` holds what node `index` computed."""
        address = _address(base)
        if address is not None:
            self._memories[address] = Memory(base, index)


def _address(tensor: Tensor) -> int | None:
    try:
        return tensor.untyped_storage().data_ptr() or None
    except (RuntimeError, NotImplementedError):  # sparse, or inside a function transform: no memory to speak of
        return None


def base_of(tensor: Tensor) -> Tensor:
    """The tensor whose memory this one reads, where it lies densely in it; else the tensor itself."""
    base = tensor._base if tensor._is_view() else None
    if base is None or not base.is_contiguous() or _address(base) is None:
        return tensor
    return base


def place_in(base: Tensor, tensor: Tensor) -> Place | None:
    """Where `tensor` lies in `base`; None where it is all of it."""
    place = Place(tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset() - base.storage_offset()))
    if place == Place(tuple(base.shape), base.stride(), 0) and tensor.dtype == base.dtype:
        return None
    return place


def as_strided(x: Tensor, size: tuple[int, ...], stride: tuple[int, ...], offset: int) -> Tensor:
    """What a view of x reads that lies there in its memory."""
    return x.contiguous().as_strided(size, stride, offset)


def out_of_place(function: Callable, place: Place | None) -> Callable:
    """`x.add_(y)` as a function of values: the result of the write on a copy of x, all of it or a view."""

    def write(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format) if place is not None else x.clone()
        function(x if place is None else x.as_strided(place.size, place.stride, place.offset), *args, **kwargs)
        return x

    write.__name__ = getattr(function, "__name__", "write") if place is None else "write into a view"
    return write
