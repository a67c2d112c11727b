"""Which expressions are alike: what a loop's statements compute again and again, from other leaves.

Two expressions are alike where they are the same steps on leaves that q treats alike.  What was judged of one then holds for the other,
as it does for the same statement of the next minibatch; a loop of T statements is judged once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from pyro_blr.blocks import Block
from pyro_blr.graph import FactorGraph
from pyro_blr.tape import Input, Latent, Ref

__all__ = ["Alike", "Outline"]

_LONGEST = 200  # steps of an expression beyond which likeness is not looked for: a recursion's statements have none
_COMPARED = 64  # numbers at most whose values are compared
# Steps whose form in a site is the same whatever numbers they take, but for zeros and ones.
_INDIFFERENT = frozenset(
    "add radd sub rsub mul rmul div rdiv truediv rtruediv true_divide multiply divide subtract matmul rmatmul mm mv dot inner bmm "
    "linear addmm addmv baddbmm einsum tensordot cat stack".split()
)

_T = TypeVar("_T")


@dataclass(frozen=True)
class Outline:
    """The steps of some expressions, in order.  Where two have the same key, `nodes` and `tensors` correspond place by place."""

    key: Hashable
    nodes: tuple[int, ...]
    tensors: tuple[Tensor, ...]


class Alike:
    """Remembers what was found of an expression for those that are like it."""

    def __init__(self, graph: FactorGraph, blocks: Mapping[str, Block]):
        self.graph, self.blocks = graph, blocks
        self.block_of = {site: name for name, block in blocks.items() for site in block.site_names}
        self.members = {member.site.name: member for block in blocks.values() for member in block.members}
        self._found: dict[Hashable, Any] = {}

    def once(
        self,
        key: tuple,
        outputs: Sequence[Any],
        names: Sequence[str],
        find: Callable[[], _T],
        is_general: Callable[[_T], bool] = lambda _: True,
    ) -> _T:
        """`find()`, or what it gave for outputs that are alike over the blocks `names`, in their order.

        `is_general`: whether something found holds for other data of any size, and so for those.
        """
        outline = self.outline(outputs, names)
        if outline is None:
            return find()
        whole = (key, outline.key)
        if whole in self._found:
            return self._found[whole]
        found = find()
        if is_general(found):
            self._found[whole] = found
        return found

    def outline(self, outputs: Sequence[Any], names: Sequence[str], values: bool = True) -> Outline | None:
        """The outline of expressions over some blocks; None where they are too long.

        `values`: whether what is special about the data (zeros, ones, which index, an exponent) is a part of it, as it may be of a
        verdict, and the line of the program, which a verdict names.
        """
        tape = self.graph.tape
        needed = tape.needed(outputs)
        if len(needed) > _LONGEST:
            return None
        place = {index: position for position, index in enumerate(needed)}
        tensors: list[Tensor] = []

        def described(item: Any, is_indifferent: bool = True) -> Any:
            if isinstance(item, Ref):
                return "node", place[item.index]
            if isinstance(item, Input):
                return described(tape.inputs[item.index], is_indifferent)
            if isinstance(item, Tensor):
                tensors.append(item)
                form = "tensor", tuple(item.shape), item.dtype, item.device, item.requires_grad
                return (*form, _special(item) if is_indifferent else _numbers(item)) if values else form
            if isinstance(item, (tuple, list)):
                return tuple(described(each, is_indifferent) for each in item)
            if isinstance(item, Mapping):
                return tuple(sorted((key, described(value, is_indifferent)) for key, value in item.items()))
            if isinstance(item, slice):
                return "slice", described((item.start, item.stop, item.step))
            return repr(item) if getattr(type(item), "__hash__", None) is None else (type(item), item)

        rows = []
        for index in needed:
            node = tape.nodes[index]
            if isinstance(node.function, Latent):
                rows.append(self._leaf(node.function.name, names))
            else:
                taken = (described(tree, node.name in _INDIFFERENT) for tree in (node.args, node.kwargs))
                rows.append((node.function, *taken, node.shape, node.dtype, node.source if values else ""))
        return Outline((tuple(rows), described(list(outputs))), needed, tuple(tensors))

    def _leaf(self, site: str, names: Sequence[str]) -> tuple:
        """What q knows of a site: its block's place among `names`, and how it stands there."""
        name, member = self.block_of[site], self.members[site]
        block, here = self.blocks[name], member.site
        place = names.index(name) if name in names else -1
        states = block.num_states if block.states is not None else 0
        q = block.family, member.family, block.plates, block.batch_shape, block.elements, states
        return "leaf", place, *q, here.shape, here.dtype, here.device, here.plates, here.shared


def _special(tensor: Tensor) -> Hashable:
    """What of the data might make an expression another one: zeros, ones, which whole numbers."""
    if tensor.layout is not torch.strided:
        return id(tensor)
    if tensor.is_floating_point():
        return bool((tensor == 0).all()), bool((tensor == 1).all())
    return _numbers(tensor)


def _numbers(tensor: Tensor) -> Hashable:
    """All of a tensor: its numbers, or which one it is."""
    if tensor.layout is not torch.strided or tensor.numel() > _COMPARED:
        return id(tensor)
    return tuple(tensor.flatten().tolist())
