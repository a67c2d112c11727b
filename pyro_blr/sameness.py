"""Whether two plain runs of a model are the same run, or two calls the same call, so that what was understood of the first still holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import BuiltinFunctionType, FunctionType
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.distributions.utils import lazy_property

__all__ = ["Call", "Written", "same_run", "writes_into"]


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


class _Watched(NamedTuple):
    tensor: Tensor
    writes: int


_VALUES = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_BY_IDENTITY = (FunctionType, BuiltinFunctionType, type)


class Call:
    """A model's arguments, watched: the same tensors, not written into, and equal Python values.

    `unknown` names the type of an argument of which that cannot be told; empty where there is none.
    """

    def __init__(self, args: tuple, kwargs: Mapping[str, Any]):
        self.unknown = ""
        self._args, self._kwargs = self._hold(args), self._hold(dict(kwargs))

    def is_repeated(self, args: tuple, kwargs: Mapping[str, Any]) -> bool:
        """Whether a call with these arguments is the same call."""
        return not self.unknown and _is_held(self._args, args) and _is_held(self._kwargs, kwargs)

    def _hold(self, item: Any) -> Any:
        if isinstance(item, Tensor):
            return _Watched(item, writes_into(item))
        if type(item) in (tuple, list, torch.Size):
            return type(item), [self._hold(part) for part in item]
        if type(item) is dict:
            return dict, {key: self._hold(part) for key, part in item.items()}
        if not isinstance(item, (*_VALUES, *_BY_IDENTITY)):
            self.unknown = self.unknown or type(item).__name__
        return item


def _is_held(held: Any, item: Any) -> bool:
    if type(held) is _Watched:
        return held.tensor is item and writes_into(item) == held.writes
    if type(held) is tuple:
        kind, parts = held
        if type(item) is not kind or len(item) != len(parts):
            return False
        if kind is dict:
            return all(key in item and _is_held(part, item[key]) for key, part in parts.items())
        return all(map(_is_held, parts, item))
    return held is item or (isinstance(held, _VALUES) and type(held) is type(item) and held == item)


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


def same_run(one: poutine.Trace, other: poutine.Trace, asked: bool = False) -> bool:
    """Whether two plain runs at the same latents made the same statements with equal arguments and data.

    The latents are generic, so that equal arguments mean equal inputs: whatever was computed from the first run still holds.  With
    `asked`, what a distribution of the first was asked for since (logits of probs) does not count.
    """
    if list(one.nodes) != list(other.nodes):
        return False
    node: Any
    mate: Any
    for name, node in one.nodes.items():
        mate = other.nodes[name]
        if node["type"] != mate["type"]:
            return False
        for key in _COMPARED.get(node["type"], ()):
            if node[key] is not mate[key] and not _same(node[key], mate[key], asked):
                return False
    return True


_COMPARED = {"sample": ("value", "scale", "mask", "cond_indep_stack", "fn"), "param": ("value",)}


def _same(a: Any, b: Any, asked: bool = False) -> bool:
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and bool(_equal_values(a, b))
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(x is y or _same(x, y, asked) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key], asked) for key in a)
    if isinstance(a, (torch.distributions.Distribution, torch.distributions.Transform)):
        if asked:
            return _same_origin(a, b)
        return _same(_contents(a), _contents(b))
    if isinstance(a, _Subsample):
        return (a.size, a.subsample_size) == (b.size, b.subsample_size)
    if isinstance(a, torch.distributions.constraints.Constraint):
        return True  # built from arguments that are compared themselves
    return bool(a == b)


def _contents(item: Any) -> dict:
    return {key: value for key, value in vars(item).items() if not _is_kept_aside(key)}


def _is_kept_aside(key: str) -> bool:
    return key.startswith("_cached") or key == "_inv"


def _same_origin(first: Any, second: Any) -> bool:
    """Whether two objects of a class were made of the same, whatever the first was asked for since."""
    a, b = vars(first), vars(second)
    for key, value in b.items():
        if not (key in a and a[key] is value) and not _is_kept_aside(key):
            if key not in a or not _same(a[key], value, asked=True):
                return False
    more = [key for key in a if key not in b and not _is_kept_aside(key)]
    return all(isinstance(getattr(type(first), key, None), lazy_property) for key in more)


def _equal_values(a: Tensor, b: Tensor) -> bool:
    if torch.equal(a, b):
        return True
    return a.is_floating_point() and bool(((a == b) | (a.isnan() & b.isnan())).all())
