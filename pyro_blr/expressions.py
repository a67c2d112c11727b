"""Recording: what a torch program did to some tensors, written on a tape.

A model runs once with each latent value replaced by a `Recorded` tensor.  Every torch function that touches one leaves
a `Node` on a `Tape`; what does not depend on a latent is computed as usual and enters as an input.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.overrides import TorchFunctionMode

from pyro_blr.callers import asked_by_the_program, source_line
from pyro_blr.memory import Written, as_strided, base_of, out_of_place, place_in
from pyro_blr.recorded import Recorded, alike, held, plain
from pyro_blr.tape import Departure, Latent, Node, Ref, Tape
from pyro_blr.vocabulary import ALIASES, FORM, SIZES, VALUES, function_name, identity, nested_stack, writes

__all__ = ["Recording"]


class Recording(TorchFunctionMode):
    """Writes a tape while it is entered; it may be entered again, to go on.

    It follows, besides `Recorded` tensors, plain ones that a latent was written into (`x[i] = z`).

    Args:
        watched: latents that stand in another shape than the program's own.
    """

    def __init__(self, watched: frozenset[str] = frozenset()):
        super().__init__()
        self.tape, self.watched, self.is_open = Tape(), watched, False
        self.measured: set[str] = set()  # watched latents whose shape, or that of what follows, the program asked for
        self._values: dict[int, Tensor] = {}
        self._owners: dict[int, tuple[Any, int]] = {}
        self._written = Written()
        self._place = ""

    def __enter__(self) -> Recording:
        self.is_open = True
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self.is_open = False
        super().__exit__(*error)

    @contextmanager
    def again(self, place: str) -> Iterator[None]:
        """Recording goes on, with calls of the package itself that stand for the user's line `place`."""
        self._place = place
        try:
            with self:
                yield
        finally:
            self._place = ""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self._written:
            args, kwargs = self.recognise(args), self.recognise(kwargs)
        operands = list(held((args, kwargs), Recorded))
        if operands:
            return self.call(func, args, kwargs, operands)
        target = kwargs.get("out", args[0] if args and writes(function_name(func)) else None)
        if isinstance(target, Tensor):
            self.tape.forget_input(target)
        return func(*args, **kwargs)

    def latent(self, name: str, value: Tensor) -> Recorded:
        """A leaf: the value of the latent `name`, to be followed from here on."""
        return self._own(value, self._append(Latent(name), (), {}, value, frozenset([name])))

    def record(self, function: Callable, args: tuple, kwargs: dict, result: Tensor) -> Recorded:
        index = self._append(
            function, self._skeleton(args), self._skeleton(kwargs), result, self._union((args, kwargs))
        )
        return self._own(plain(result), index)

    def _append(
        self, function: Callable | Latent, args: tuple, kwargs: dict, like: Tensor, latents: frozenset[str]
    ) -> int:
        """The index of a new node, whose value is a tensor as `like` is."""
        return self.tape.append(Node(function, args, kwargs, self._here(), tuple(like.shape), like.dtype), latents)

    def _here(self) -> str:
        return self._place or source_line()

    def _own(self, value: Tensor, index: int) -> Recorded:
        self._owners[id(value)] = (weakref.ref(value), index)
        return Recorded.wrap(value, self, index)

    def record_tuple(self, function: Callable, args: tuple, kwargs: dict, result: Sequence) -> Any:
        latents = self._union((args, kwargs))
        whole = Node(function, self._skeleton(args), self._skeleton(kwargs), self._here())
        ref = Ref(self.tape.append(whole, latents))
        items = [
            self._own(plain(item), self._append(operator.getitem, (ref, position), {}, item, latents))
            if isinstance(item, Tensor)
            else item
            for position, item in enumerate(result)
        ]
        return alike(result, items)

    def call(self, function: Callable, args: tuple, kwargs: dict, operands: list[Recorded]) -> Any:
        """Runs `function` on the values of its operands and records what it did."""
        name = function_name(function)
        if writes(name):
            return self._record_write(function, args, kwargs)
        if function is torch.tensor:
            return self.record(nested_stack, args, kwargs, function(*plain(args), **plain(kwargs)))
        result = function(*plain(args), **plain(kwargs))
        if any(is_functorch_wrapped_tensor(plain(tensor)) for tensor in held((args, kwargs, result), Tensor)):
            self.depart(f"{name.strip('_')} inside a function transform", operands)
            return result
        if kwargs.get("out") is not None:
            return self._record_out(function, args, kwargs)
        if name == "broadcast_tensors":
            return self._record_broadcast(args, result)
        if isinstance(result, Tensor):
            return self.record(identity if name in ALIASES else function, args, kwargs, result)
        if isinstance(result, (tuple, list)) and any(isinstance(item, Tensor) for item in result):
            return self.record_tuple(function, args, kwargs, result)
        if name not in FORM:
            self.depart(name, operands)
        elif self.watched and name in SIZES and asked_by_the_program():
            self.measured.update(self._union(operands) & self.watched)
        return result

    def _record_broadcast(self, args: tuple, result: Sequence[Tensor]) -> tuple:
        """Each result comes from its own operand alone."""
        operands = args[0] if len(args) == 1 and isinstance(args[0], (tuple, list)) else args
        return tuple(
            self.record(torch.Tensor.expand, (operand, tuple(item.shape)), {}, item)
            if isinstance(operand, Recorded)
            else item
            for operand, item in zip(operands, result, strict=True)
        )

    def _record_write(self, function: Callable, args: tuple, kwargs: dict) -> Any:
        """A write is a new value of the memory written to, of a plain tensor or a recorded one."""
        name, target = function_name(function), plain(args[0])
        if name == "__set__":
            name = getattr(getattr(function, "__self__", None), "__name__", name)
            if name not in VALUES:
                return function(*plain(args), **plain(kwargs))
        if name in ("data", "set_") and isinstance(args[-1], Recorded):
            return self._record_assignment(function, args)
        base = self._base_of(args[0])
        place = place_in(base, target)
        ref = self._content_of(base, args[0])
        skeletons = self._skeleton((ref, *args[1:])), self._skeleton(kwargs)
        latents = self._union((args[1:], kwargs)) | self.tape.latents_of(ref)
        result = function(*plain(args), **plain(kwargs))
        self._written.put(base, self._append(out_of_place(function, place), *skeletons, base, latents))
        self.recognise(args[0])
        return args[0] if result is not None else None

    def _record_assignment(self, function: Callable, args: tuple) -> Any:
        """`x.data = z`: from here on x reads the memory of z."""
        source = args[-1]
        result = function(*plain(args))
        if isinstance(args[0], Recorded):
            args[0]._index = source._index
        base = self._base_of(source)
        content = self._content_of(base, source)
        if isinstance(content, Ref):
            self._written.put(base, content.index)
        return args[0] if result is not None else None

    def _base_of(self, target: Tensor) -> Tensor:
        memory = self._written.of(plain(target))
        if memory is not None:
            return memory.base
        base = base_of(plain(target))
        if isinstance(target, Recorded) and base is not target._value and self._owner(base) is None:
            return target._value
        return base

    def _content_of(self, base: Tensor, target: Tensor) -> Any:
        """What the memory of `base` holds before a write."""
        memory = self._written.of(base)
        if memory is not None:
            return Ref(memory.index)
        owner = target._index if isinstance(target, Recorded) and target._value is base else self._owner(base)
        return self.tape.input(base.clone()) if owner is None else Ref(owner)

    def _owner(self, base: Tensor) -> int | None:
        """The node that computed a tensor."""
        alive, index = self._owners.get(id(base), (None, -1))
        return index if alive is not None and alive() is base else None

    def _record_out(self, function: Callable, args: tuple, kwargs: dict) -> Any:
        out = plain(kwargs["out"])
        rest = {key: value for key, value in kwargs.items() if key != "out"}
        recorded = self.record(function, args, rest, out)
        if base_of(out) is out:
            self._written.put(out, recorded._index)
        else:
            self._record_write(torch.Tensor.copy_, (out, recorded), {})
        return recorded

    def recognise(self, tree: Any) -> Any:
        """The same tree with the tensors whose memory latents were written into recorded."""
        if isinstance(tree, Tensor):
            return self._recognised(tree) if self._written else tree
        if isinstance(tree, (tuple, list)) and not hasattr(tree, "_fields"):
            return type(tree)(self.recognise(item) for item in tree)
        if isinstance(tree, dict):
            return {key: self.recognise(item) for key, item in tree.items()}
        return tree

    def _recognised(self, tensor: Tensor) -> Tensor:
        value = plain(tensor)
        memory = self._written.of(value)
        if memory is None or (isinstance(tensor, Recorded) and tensor._index >= memory.index):
            return tensor
        place, index = place_in(memory.base, value), memory.index
        if place is not None:
            index = self._append(as_strided, (Ref(index), *place), {}, value, self.tape.latents_of(Ref(index)))
        if isinstance(tensor, Recorded):
            tensor._index = index
            return tensor
        return Recorded.wrap(value, self, index)

    def depart(self, operation: str, operands: list[Recorded]) -> None:
        self.tape.departures.append(Departure(operation.strip("_"), self._union(operands), self._here()))

    def recorded(self, ref: Any) -> Any:
        """A tensor that was referred to, recorded again; other values unchanged."""
        return Recorded.wrap(self._values[ref.index], self, ref.index) if isinstance(ref, Ref) else ref

    def reference(self, value: Any) -> Any:
        """`Ref` of a recorded tensor, whose value is kept; other values unchanged."""
        value = self.recognise(value)
        if isinstance(value, Recorded):
            self._values[value._index] = value._value
            return Ref(value._index)
        if isinstance(value, (tuple, list)):
            return type(value)(self.reference(item) for item in value)
        return value

    def _union(self, tree: Any) -> frozenset[str]:
        return frozenset().union(*(self.tape.latents_of(Ref(operand._index)) for operand in held(tree, Recorded)))

    def _skeleton(self, tree: Any) -> Any:
        if isinstance(tree, Recorded):
            return Ref(tree._index)
        if isinstance(tree, Tensor):
            return self.tape.input(tree)
        if isinstance(tree, tuple) and not hasattr(tree, "_fields"):
            return tuple(self._skeleton(item) for item in tree)
        if isinstance(tree, list):
            return [self._skeleton(item) for item in tree]
        if isinstance(tree, dict):
            return {key: self._skeleton(item) for key, item in tree.items()}
        if isinstance(tree, slice):
            return slice(self._skeleton(tree.start), self._skeleton(tree.stop), self._skeleton(tree.step))
        return tree
