"""The tensor that stands for a latent's value, and for what was computed from it, while a program is recorded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Recorded", "alike", "held", "plain"]


class Recorded(torch.Tensor):
    """A tensor that remembers the torch function and operands it came from (compare Pyro's `ProvenanceTensor`)."""

    _value: Tensor
    _recording: Any
    _index: int

    @staticmethod
    def wrap(value: Tensor, recording: Any, index: int) -> Recorded:
        recorded = value.detach().as_subclass(Recorded) if value.requires_grad else value.as_subclass(Recorded)
        recorded._value, recorded._recording, recorded._index = value, recording, index
        return recorded

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Recorded({self._value!r})"

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        operands = list(held((args, kwargs), Recorded))
        recording = next((operand._recording for operand in operands if operand._recording.is_open), None)
        if recording is None:
            return func(*plain(args), **plain(kwargs))
        args, kwargs = recording.recognise(args), recording.recognise(kwargs)
        return recording.call(func, args, kwargs, list(held((args, kwargs), Recorded)))


def held(tree: Any, kind: type) -> Iterator[Any]:
    """The tensors of a kind inside the arguments or the result of a call."""
    if isinstance(tree, kind):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from held(item, kind)
    elif isinstance(tree, dict):
        yield from held(list(tree.values()), kind)


def plain(tree: Any) -> Any:
    """The same tree with every recorded tensor replaced by its value."""
    if isinstance(tree, Recorded):
        return tree._value
    if isinstance(tree, (tuple, list)):
        return alike(tree, [plain(item) for item in tree])
    if isinstance(tree, dict):
        return {key: plain(item) for key, item in tree.items()}
    return tree


def alike(like: Sequence, items: list) -> Any:
    """The items in a list, a tuple, a named tuple, or what torch returns with names (`sort`, `max`, `slogdet`), as `like` is."""
    if isinstance(like, tuple) and hasattr(like, "_fields"):
        return type(like)(*items)
    return type(like)(items)  # type: ignore[call-arg]
