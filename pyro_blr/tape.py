"""A program as data: calls of torch functions in the order they ran, and the tensors they took from outside.

A tape is a pure function of (latents, inputs): it is evaluated, differentiated and batched by `torch.func` like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_blr.vocabulary import function_name

__all__ = ["Departure", "Input", "Latent", "Node", "Ref", "Tape", "refs_in"]


_MOVES = frozenset(
    "getitem expand expand_as broadcast_tensors broadcast_to reshape view view_as flatten unflatten squeeze unsqueeze permute "
    "transpose movedim moveaxis swapaxes swapdims t T mT contiguous clone identity index_select gather take_along_dim unbind "
    "chunk split flip roll stack cat".split()
)


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


@dataclass
class Tape:
    """Nodes in the order they ran, and the tensors they took from outside."""

    nodes: list[Node] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    departures: list[Departure] = field(default_factory=list)
    _input_index: dict[int, int] = field(default_factory=dict)
    _latents: list[frozenset[str]] = field(default_factory=list)
    _needed: dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[int, ...]] = field(default_factory=dict)

    def append(self, node: Node, latents: frozenset[str]) -> int:
        """The index of the node, computed from `latents`."""
        self.nodes.append(node)
        self._latents.append(latents)
        return len(self.nodes) - 1

    def input(self, tensor: Tensor) -> Input:
        """The input that stands for `tensor`, one for each tensor object."""
        index = self._input_index.get(id(tensor))
        if index is None:
            index = self._input_index[id(tensor)] = len(self.inputs)
            self.inputs.append(tensor)
        return Input(index)

    def forget_input(self, tensor: Tensor) -> None:
        """A tensor that was an input is about to be overwritten: what it was stays."""
        index = self._input_index.pop(id(tensor), None)
        if index is not None:
            self.inputs[index] = tensor.clone()

    def latents_of(self, ref: Any) -> frozenset[str]:
        """The latents an expression (a `Ref`, or anything that depends on none) was computed from."""
        return self._latents[ref.index] if isinstance(ref, Ref) else frozenset()

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
            for item in _held((self.nodes[index].args, self.nodes[index].kwargs), Input):
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

    def only_moves(self, ref: Any) -> bool:
        """Whether an expression only moves entries of latents about, no constant among them, so that it commutes with every
        elementwise function."""
        return all(_only_moves(self.nodes[index]) for index in self.needed([ref]))

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


def _only_moves(node: Node) -> bool:
    if node.name in ("stack", "cat"):
        return all(isinstance(part, Ref) for part in (*node.args, *node.kwargs.values())[0])
    return isinstance(node.function, Latent) or node.name in _MOVES


def _stable(function: Callable) -> Any:
    """A name for `function` that is the same in the next recording."""
    return (getattr(function, "__module__", None), getattr(function, "__qualname__", None), function_name(function))


def refs_in(tree: Any) -> Iterator[Ref]:
    """The `Ref`s inside the arguments of a node."""
    return _held(tree, Ref)


def _held(tree: Any, kind: type) -> Iterator[Any]:
    if isinstance(tree, kind):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from _held(item, kind)
    elif isinstance(tree, Mapping):
        yield from _held(list(tree.values()), kind)
    elif isinstance(tree, slice):
        yield from _held((tree.start, tree.stop, tree.step), kind)
