"""Expressions: what a torch program did to some tensors, as data.

A model runs once with each latent value replaced by a `Recorded` tensor.  Every torch function that touches one leaves
a `Node` on a `Tape`; what does not depend on a latent is computed as usual and enters as an input.  A tape is a pure function
of (latents, inputs): it is evaluated, differentiated and batched by `torch.func` like any other.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.overrides import TorchFunctionMode

from pyro_blr.callers import asked_by_the_program, source_line
from pyro_blr.memory import Written, as_strided, base_of, out_of_place, place_in

__all__ = ["Departure", "Input", "Latent", "Node", "Recorded", "Recording", "Ref", "Tape", "plain", "source_line"]


@dataclass(frozen=True)
class Ref:
    """The value of node `index` of a tape."""

    index: int


@dataclass(frozen=True)
class Input:
    """The tensor `index` of a tape's inputs: data, parameters, indices, anything that depends on no latent."""

    index: int


@dataclass(frozen=True)
class Latent:
    """Stands as the `function` of a leaf node: the value of the latent called `name`."""

    name: str


@dataclass(frozen=True)
class Node:
    """One call of a torch function: `function(*args, **kwargs)` with `Ref`s and `Input`s for tensors."""

    function: Callable | Latent
    args: tuple
    kwargs: Mapping[str, Any]
    source: str
    shape: tuple[int, ...] | None = None  # of the result, when it ran; None for a tuple of results
    dtype: torch.dtype | None = None

    @property
    def name(self) -> str:
        """The word a user knows the operation by."""
        if isinstance(self.function, Latent):
            return self.function.name
        name = getattr(self.function, "__name__", str(self.function))
        if name == "__get__":
            name = getattr(getattr(self.function, "__self__", None), "__name__", name)
        return name.strip("_") if name.startswith("__") else name


@dataclass(frozen=True)
class Departure:
    """A latent left torch: `.item()`, `if z > 0`, `.numpy()`, an in-place write.  The tape cannot follow it."""

    operation: str
    latents: frozenset[str]
    source: str


# Queries of a tensor's form, not of its value: answering them is no departure from the tape.
_FORM = frozenset(
    "dim size shape numel nelement ndim dtype device layout stride is_floating_point is_complex is_contiguous "
    "requires_grad is_leaf is_cuda is_sparse is_quantized is_meta is_mkldnn is_mps is_nested names storage_offset "
    "grad grad_fn _version retains_grad is_signed element_size data_ptr get_device __len__ __repr__ __format__ __hash__ "
    "ndimension type is_inference is_conj is_neg _is_view is_shared is_pinned itemsize nbytes has_names "
    "is_same_size can_cast result_type is_tensor is_storage get_default_dtype output_nr _base __dir__ __deepcopy__ "
    "is_cpu is_xla is_ipu is_xpu is_vulkan is_maia is_mtia is_sparse_csr real_if_close register_hook _backward_hooks".split()
)
_SIZES = frozenset("shape size numel nelement __len__ stride is_same_size nbytes".split())
_ALIASES = frozenset({"detach", "data", "requires_grad_", "retain_grad", "contiguous"})


def _identity(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x


def _stack(items: Any, **options: Any) -> Tensor:
    """`torch.tensor` of a nested list of scalar tensors, followed by derivatives as torch's is not."""
    options.pop("requires_grad", None)
    if isinstance(items, (tuple, list)):
        return torch.stack([_stack(item, **options) for item in items])
    return torch.as_tensor(items, **options)


def _function_name(function: Callable) -> str:
    name = getattr(function, "__name__", "")
    if name == "__get__":
        return getattr(getattr(function, "__self__", None), "__name__", name)
    return name


# Attributes of a tensor whose setting changes its value.
_VALUES = frozenset({"data", "real", "imag"})


def _writes(name: str) -> bool:
    if name in ("__setitem__", "__set__"):
        return True
    if name.startswith("__i") and name.endswith("__"):
        return name not in ("__invert__", "__int__", "__index__", "__iter__")
    return name.endswith("_") and not name.endswith("__") and name not in _ALIASES


class Recorded(torch.Tensor):
    """A tensor that remembers the torch function and operands it came from (compare Pyro's `ProvenanceTensor`)."""

    _value: Tensor
    _tape: Tape
    _index: int

    @staticmethod
    def wrap(value: Tensor, tape: Tape, index: int) -> Recorded:
        recorded = value.detach().as_subclass(Recorded) if value.requires_grad else value.as_subclass(Recorded)
        recorded._value, recorded._tape, recorded._index = value, tape, index
        return recorded

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Recorded({self._value!r})"

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        operands = list(_recorded_in((args, kwargs)))
        tape = next((operand._tape for operand in operands if not operand._tape.closed), None)
        if tape is None:
            return func(*plain(args), **plain(kwargs))
        args, kwargs = tape.recognise(args), tape.recognise(kwargs)
        return tape.call(func, args, kwargs, list(_recorded_in((args, kwargs))))


class Recording(TorchFunctionMode):
    """Follows, besides `Recorded` tensors, plain ones that a latent was written into (`x[i] = z`)."""

    def __init__(self, tape: Tape):
        super().__init__()
        self.tape = tape

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.tape.written:
            args, kwargs = self.tape.recognise(args), self.tape.recognise(kwargs)
        operands = list(_recorded_in((args, kwargs)))
        if operands:
            return self.tape.call(func, args, kwargs, operands)
        target = kwargs.get("out", args[0] if args and _writes(_function_name(func)) else None)
        if isinstance(target, Tensor):
            self.tape.forget_input(target)
        return func(*args, **kwargs)


def _recorded_in(tree: Any) -> Iterator[Recorded]:
    if isinstance(tree, Recorded):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from _recorded_in(item)
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from _recorded_in(item)


def _tensors_in(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield plain(tree)
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from _tensors_in(item)
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from _tensors_in(item)


def plain(tree: Any) -> Any:
    """The same tree with every recorded tensor replaced by its value."""
    if isinstance(tree, Recorded):
        return tree._value
    if isinstance(tree, (tuple, list)):
        return _alike(tree, [plain(item) for item in tree])
    if isinstance(tree, dict):
        return {key: plain(item) for key, item in tree.items()}
    return tree


def _alike(like: Sequence, items: list) -> Any:
    """The items in a list, a tuple, a named tuple, or what torch returns with names (`sort`, `max`, `slogdet`), as `like` is."""
    if isinstance(like, tuple) and hasattr(like, "_fields"):
        return type(like)(*items)
    return type(like)(items)  # type: ignore[call-arg]


@dataclass
class Tape:
    """Nodes in the order they ran, and the tensors they took from outside."""

    nodes: list[Node] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    departures: list[Departure] = field(default_factory=list)
    closed: bool = False
    place: str = ""  # the user's line that calls of the package itself stand for, while there is one
    written: Written = field(default_factory=Written)
    _owners: dict[int, tuple[Any, int]] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)
    watched: frozenset[str] = frozenset()  # latents that stand in another shape than the program's own
    measured: set[str] = field(
        default_factory=set
    )  # those of them whose shape, or that of what follows, the program asked for
    _input_index: dict[int, int] = field(default_factory=dict)
    _latents: list[frozenset[str]] = field(default_factory=list)
    _needed: dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[int, ...]] = field(default_factory=dict)

    def _here(self) -> str:
        return self.place or source_line()

    def latent(self, name: str, value: Tensor) -> Recorded:
        """A leaf: the value of the latent `name`, to be followed from here on."""
        node = Node(Latent(name), (), {}, self._here(), tuple(value.shape), value.dtype)
        self._append(node, frozenset([name]))
        return self._own(value)

    def record(self, function: Callable, args: tuple, kwargs: dict, result: Tensor) -> Recorded:
        skeletons = self._skeleton(args), self._skeleton(kwargs)
        node = Node(function, *skeletons, self._here(), tuple(result.shape), result.dtype)
        self._append(node, self._union((args, kwargs)))
        return self._own(plain(result))

    def _own(self, value: Tensor) -> Recorded:
        index = len(self.nodes) - 1
        self._owners[id(value)] = (weakref.ref(value), index)
        return Recorded.wrap(value, self, index)

    def record_tuple(self, function: Callable, args: tuple, kwargs: dict, result: Sequence) -> Any:
        whole = Node(function, self._skeleton(args), self._skeleton(kwargs), self._here())
        self._append(whole, self._union((args, kwargs)))
        ref = Ref(len(self.nodes) - 1)
        items = []
        for position, item in enumerate(result):
            if isinstance(item, Tensor):
                node = Node(operator.getitem, (ref, position), {}, whole.source, tuple(item.shape), item.dtype)
                self._append(node, self._latents[ref.index])
                item = self._own(plain(item))
            items.append(item)
        return _alike(result, items)

    def call(self, function: Callable, args: tuple, kwargs: dict, operands: list[Recorded]) -> Any:
        """Runs `function` on the values of its operands and records what it did."""
        name = _function_name(function)
        if _writes(name):
            return self._record_write(function, args, kwargs)
        if function is torch.tensor:
            return self.record(_stack, args, kwargs, function(*plain(args), **plain(kwargs)))
        result = function(*plain(args), **plain(kwargs))
        if any(map(is_functorch_wrapped_tensor, _tensors_in((args, kwargs, result)))):
            self.depart(f"{name.strip('_')} inside a function transform", operands)
            return result
        if kwargs.get("out") is not None:
            return self._record_out(function, args, kwargs)
        if name == "broadcast_tensors":
            return self._record_broadcast(args, result)
        if isinstance(result, Tensor):
            return self.record(_identity if name in _ALIASES else function, args, kwargs, result)
        if isinstance(result, (tuple, list)) and any(isinstance(item, Tensor) for item in result):
            return self.record_tuple(function, args, kwargs, result)
        if name not in _FORM:
            self.depart(name, operands)
        elif self.watched and name in _SIZES and asked_by_the_program():
            self.measured.update(*(self._latents[operand._index] & self.watched for operand in operands))
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
        name, target = _function_name(function), plain(args[0])
        if name == "__set__":
            name = getattr(getattr(function, "__self__", None), "__name__", name)
            if name not in _VALUES:
                return function(*plain(args), **plain(kwargs))
        if name in ("data", "set_") and isinstance(args[-1], Recorded):
            return self._record_assignment(function, args)
        base = self._base_of(args[0])
        place = place_in(base, target)
        ref = self._content_of(base, args[0])
        skeletons = self._skeleton((ref, *args[1:])), self._skeleton(kwargs)
        latents = self._union((args[1:], kwargs)) | self.latents_of(ref)
        result = function(*plain(args), **plain(kwargs))
        node = Node(out_of_place(function, place), *skeletons, self._here(), tuple(base.shape), base.dtype)
        self._append(node, latents)
        self.written.put(base, len(self.nodes) - 1)
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
            self.written.put(base, content.index)
        return args[0] if result is not None else None

    def _base_of(self, target: Tensor) -> Tensor:
        memory = self.written.of(plain(target))
        if memory is not None:
            return memory.base
        base = base_of(plain(target))
        if isinstance(target, Recorded) and base is not target._value and self._owner(base) is None:
            return target._value
        return base

    def _content_of(self, base: Tensor, target: Tensor) -> Any:
        """What the memory of `base` holds before a write."""
        memory = self.written.of(base)
        if memory is not None:
            return Ref(memory.index)
        owner = target._index if isinstance(target, Recorded) and target._value is base else self._owner(base)
        return self.input(base.clone()) if owner is None else Ref(owner)

    def _owner(self, base: Tensor) -> int | None:
        """The node that computed a tensor."""
        alive, index = self._owners.get(id(base), (None, -1))
        return index if alive is not None and alive() is base else None

    def _record_out(self, function: Callable, args: tuple, kwargs: dict) -> Any:
        out = plain(kwargs["out"])
        rest = {key: value for key, value in kwargs.items() if key != "out"}
        recorded = self.record(function, args, rest, out)
        if base_of(out) is out:
            self.written.put(out, recorded._index)
        else:
            self._record_write(torch.Tensor.copy_, (out, recorded), {})
        return recorded

    def recognise(self, tree: Any) -> Any:
        """The same tree with the tensors whose memory latents were written into recorded."""
        if isinstance(tree, Tensor):
            return self._recognised(tree) if self.written else tree
        if isinstance(tree, (tuple, list)) and not hasattr(tree, "_fields"):
            return type(tree)(self.recognise(item) for item in tree)
        if isinstance(tree, dict):
            return {key: self.recognise(item) for key, item in tree.items()}
        return tree

    def _recognised(self, tensor: Tensor) -> Tensor:
        value = plain(tensor)
        memory = self.written.of(value)
        if memory is None or (isinstance(tensor, Recorded) and tensor._index >= memory.index):
            return tensor
        place, index = place_in(memory.base, value), memory.index
        if place is not None:
            node = Node(as_strided, (Ref(index), *place), {}, self._here(), tuple(value.shape), value.dtype)
            self._append(node, self._latents[index])
            index = len(self.nodes) - 1
        if isinstance(tensor, Recorded):
            tensor._index = index
            return tensor
        return Recorded.wrap(value, self, index)

    def forget_input(self, tensor: Tensor) -> None:
        """A tensor that was an input is about to be overwritten: what it was stays."""
        index = self._input_index.pop(id(tensor), None)
        if index is not None:
            self.inputs[index] = tensor.clone()

    def depart(self, operation: str, operands: Iterable[Recorded]) -> None:
        latents = frozenset().union(*(self._latents[operand._index] for operand in operands))
        self.departures.append(Departure(operation.strip("_"), latents, self._here()))

    def latents_of(self, ref: Any) -> frozenset[str]:
        """The latents an expression (a `Ref`, or anything that depends on none) was computed from."""
        return self._latents[ref.index] if isinstance(ref, Ref) else frozenset()

    def reference(self, value: Any) -> Any:
        """`Ref` of a recorded tensor, whose value is kept; other values unchanged."""
        value = self.recognise(value)
        if isinstance(value, Recorded):
            self.values[value._index] = value._value
            return Ref(value._index)
        if isinstance(value, (tuple, list)):
            return type(value)(self.reference(item) for item in value)
        return value

    def evaluate(
        self,
        outputs: Sequence[Any],
        latents: Mapping[str, Tensor],
        inputs: Sequence[Tensor] | None = None,
        known: Mapping[int, Tensor] | None = None,
    ) -> list[Any]:
        """The values of `outputs` (`Ref`s; anything else is returned as it is) at `latents`; a pure function.

        `known` holds values of nodes that are taken as given.
        """
        inputs = self.inputs if inputs is None else inputs
        values: dict[int, Any] = dict(known or {})

        def fill(skeleton: Any) -> Any:
            if isinstance(skeleton, Ref):
                return values[skeleton.index]
            if isinstance(skeleton, Input):
                return inputs[skeleton.index]
            if isinstance(skeleton, (tuple, list)):
                return type(skeleton)(fill(item) for item in skeleton)
            if isinstance(skeleton, dict):
                return {key: fill(item) for key, item in skeleton.items()}
            if isinstance(skeleton, slice):
                return slice(fill(skeleton.start), fill(skeleton.stop), fill(skeleton.step))
            return skeleton

        for index in self.needed(outputs, tuple(values)):
            node = self.nodes[index]
            if isinstance(node.function, Latent):
                values[index] = latents[node.function.name]
            else:
                values[index] = node.function(*fill(node.args), **fill(node.kwargs))
        return [values[output.index] if isinstance(output, Ref) else output for output in outputs]

    def needed(self, outputs: Sequence[Any], known: tuple[int, ...] = ()) -> tuple[int, ...]:
        """The nodes that `outputs` depend on, in order, but for those that are known."""
        roots = tuple(sorted({output.index for output in outputs if isinstance(output, Ref)}))
        if (roots, known) not in self._needed:
            wanted, stack = set(), list(roots)
            while stack:
                index = stack.pop()
                if index not in wanted and index not in known:
                    wanted.add(index)
                    stack.extend(ref.index for ref in refs_in((self.nodes[index].args, self.nodes[index].kwargs)))
            self._needed[roots, known] = tuple(sorted(wanted))
        return self._needed[roots, known]

    def inputs_of(self, outputs: Sequence[Any]) -> list[Tensor]:
        """The tensors from outside that `outputs` are computed from."""
        found = self.inputs_at(self.needed(outputs))
        return [*found, *(output for output in outputs if isinstance(output, Tensor))]

    def inputs_at(self, nodes: Iterable[int]) -> list[Tensor]:
        """The tensors from outside that some nodes take."""
        found = {}
        for index in nodes:
            for item in _inputs_in((self.nodes[index].args, self.nodes[index].kwargs)):
                found[item.index] = self.inputs[item.index]
        return list(found.values())

    def design_matrix(self, ref: Any, latent: str) -> Tensor | None:
        """X where the expression is X @ z, up to added terms without z, with z the vector `latent` itself; None elsewhere."""
        if not isinstance(ref, Ref):
            return None
        node = self.nodes[ref.index]
        if node.shape is None or len(node.shape) != 1:
            return None
        if node.name in ("matmul", "mv") and len(node.args) == 2:
            left, right = node.args
            if isinstance(left, Input) and isinstance(right, Ref) and self.inputs[left.index].dim() == 2:
                leaf = self.nodes[right.index]
                if (
                    isinstance(leaf.function, Latent)
                    and leaf.function.name == latent
                    and leaf.shape
                    and len(leaf.shape) == 1
                ):
                    return self.inputs[left.index]
        if node.name in ("add", "sub") and len(node.args) == 2 and not node.kwargs:
            left, right = (latent in self.latents_of(side) for side in node.args)
            if left and not right:
                return self.design_matrix(node.args[0], latent)
            if right and not left and node.name == "add":
                return self.design_matrix(node.args[1], latent)
        return None

    def structure(self, outputs: Sequence[Any]) -> tuple:
        """A hashable description of how `outputs` are computed: everything but the values of the inputs."""
        rows = []
        for index in self.needed(outputs):
            node = self.nodes[index]
            function = node.function if isinstance(node.function, Latent) else _stable(node.function)
            rows.append((index, function, self._describe(node.args), self._describe(node.kwargs)))
        return tuple(rows)

    def _describe(self, skeleton: Any) -> Any:
        if isinstance(skeleton, Input):
            tensor = self.inputs[skeleton.index]
            return ("input", tuple(tensor.shape), tensor.dtype, tensor.device)
        if isinstance(skeleton, (tuple, list)):
            return tuple(self._describe(item) for item in skeleton)
        if isinstance(skeleton, dict):
            return tuple(sorted((key, self._describe(item)) for key, item in skeleton.items()))
        if isinstance(skeleton, slice):
            return (
                "slice",
                self._describe(skeleton.start),
                self._describe(skeleton.stop),
                self._describe(skeleton.step),
            )
        return repr(skeleton) if getattr(type(skeleton), "__hash__", None) is None else skeleton

    def _append(self, node: Node, latents: frozenset[str]) -> None:
        self.nodes.append(node)
        self._latents.append(latents)

    def _union(self, tree: Any) -> frozenset[str]:
        return frozenset().union(*(self._latents[operand._index] for operand in _recorded_in(tree)))

    def _skeleton(self, tree: Any) -> Any:
        if isinstance(tree, Recorded):
            return Ref(tree._index)
        if isinstance(tree, Tensor):
            return self.input(tree)
        if isinstance(tree, tuple) and not hasattr(tree, "_fields"):
            return tuple(self._skeleton(item) for item in tree)
        if isinstance(tree, list):
            return [self._skeleton(item) for item in tree]
        if isinstance(tree, dict):
            return {key: self._skeleton(item) for key, item in tree.items()}
        if isinstance(tree, slice):
            return slice(self._skeleton(tree.start), self._skeleton(tree.stop), self._skeleton(tree.step))
        return tree

    def input(self, tensor: Tensor) -> Input:
        """The input that stands for `tensor`, one for each tensor object."""
        index = self._input_index.get(id(tensor))
        if index is None:
            index = self._input_index[id(tensor)] = len(self.inputs)
            self.inputs.append(tensor)
        return Input(index)


def _stable(function: Callable) -> Any:
    """A name for `function` that is the same in the next recording."""
    return (getattr(function, "__module__", None), getattr(function, "__qualname__", None), _function_name(function))


def _inputs_in(tree: Any) -> Iterator[Input]:
    if isinstance(tree, Input):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from _inputs_in(item)
    elif isinstance(tree, Mapping):
        for item in tree.values():
            yield from _inputs_in(item)
    elif isinstance(tree, slice):
        yield from _inputs_in((tree.start, tree.stop, tree.step))


def refs_in(tree: Any) -> Iterator[Ref]:
    """The `Ref`s inside the arguments of a node."""
    if isinstance(tree, Ref):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from refs_in(item)
    elif isinstance(tree, Mapping):
        for item in tree.values():
            yield from refs_in(item)
    elif isinstance(tree, slice):
        yield from refs_in((tree.start, tree.stop, tree.step))
