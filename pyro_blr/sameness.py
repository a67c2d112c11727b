"""Whether two plain runs of a model are the same run, so that what was understood of the first still holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

__all__ = ["Written", "same_run", "writes_into"]


class Written:
    """The data of a run, watched: a tensor that is written into is the same object, and other data."""

    def __init__(self, trace: poutine.Trace):
        nodes: Any = trace.nodes.values()
        seen: dict[int, tuple[Tensor, int]] = {}
        for node in nodes:
            if node["type"] == "sample":
                parts = [node["fn"], node["scale"], node["mask"], node["value"] if node["is_observed"] else None]
                seen.update((id(x), (x, writes_into(x))) for x in _tensors(parts) if not x.requires_grad)
        self.versions = list(seen.values())

    def __bool__(self) -> bool:
        return any(writes_into(tensor) != version for tensor, version in self.versions)


def writes_into(tensor: Tensor) -> int:
    """How often a tensor's memory was written into; tensors of `torch.inference_mode` do not count it."""
    return 0 if tensor.is_inference() else tensor._version


def _tensors(item: Any) -> Iterator[Tensor]:
    if isinstance(item, Tensor):
        yield item
    elif isinstance(item, (tuple, list)):
        for part in item:
            yield from _tensors(part)
    elif isinstance(item, dict):
        yield from _tensors(list(item.values()))
    elif isinstance(item, (torch.distributions.Distribution, torch.distributions.Transform)):
        yield from _tensors(_contents(item))


def same_run(one: poutine.Trace, other: poutine.Trace) -> bool:
    """Whether two plain runs at the same latents made the same statements with equal arguments and data.

    The latents are generic, so that equal arguments mean equal inputs: whatever was computed from the first run still holds.
    """
    if list(one.nodes) != list(other.nodes):
        return False
    node: Any
    mate: Any
    for name, node in one.nodes.items():
        mate = other.nodes[name]
        if node["type"] != mate["type"]:
            return False
        if node["type"] in ("sample", "param"):
            keys = ("fn", "value", "scale", "mask", "cond_indep_stack") if node["type"] == "sample" else ("value",)
            if not all(_same(node[key], mate[key]) for key in keys):
                return False
    return True


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and bool(_equal_values(a, b))
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (torch.distributions.Distribution, torch.distributions.Transform)):
        return _same(_contents(a), _contents(b))
    if isinstance(a, _Subsample):
        return (a.size, a.subsample_size) == (b.size, b.subsample_size)
    if isinstance(a, torch.distributions.constraints.Constraint):
        return True  # built from arguments that are compared themselves
    return bool(a == b)


def _contents(item: Any) -> dict:
    return {key: value for key, value in vars(item).items() if not key.startswith("_cached") and key != "_inv"}


def _equal_values(a: Tensor, b: Tensor) -> bool:
    if torch.equal(a, b):
        return True
    return a.is_floating_point() and bool(((a == b) | (a.isnan() & b.isnan())).all())
