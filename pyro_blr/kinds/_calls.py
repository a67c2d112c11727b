"""One recorded operation as the rules see it: its arguments as abstract values."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_blr.kinds._values import Form, Shape, Sort, Step, Value
from pyro_blr.tape import Input, Node, Ref, Tape, refs_in

__all__ = ["Broken", "Bundle", "Call", "Rule"]


class Broken(Exception):
    """An operand is OTHER already; `value` says which operation broke the form first."""

    def __init__(self, value: Value):
        super().__init__(value.operation)
        self.value = value


@dataclass(frozen=True)
class Bundle:
    """A tuple of results: `pick(step, position)` is the value of one of them."""

    pick: Callable[[Step, int], Value]


Rule = Callable[["Call"], "Value | Bundle"]


def word_for(node: Node) -> str:
    """What a user calls it: `sub` for `__rsub__`, `linalg.inv` for `linalg_inv`, `add` for `add_`."""
    name = node.name.rstrip("_").replace("linalg_", "linalg.")
    reflected = {f"r{word}": word for word in ("add", "sub", "mul", "div", "truediv", "pow", "matmul", "floordiv")}
    return reflected.get(name, name)


@dataclass
class Call:
    """A node on its way to a value; `values`: those of the nodes before it, `assumes`: the inputs read."""

    tape: Tape
    site: str
    sort: Sort
    index: int
    node: Node
    values: Mapping[int, Value | Bundle]
    assumes: set[int]

    @property
    def args(self) -> tuple:
        return self.node.args

    @property
    def step(self) -> Step:
        node = self.node
        return Step(self.sort, word_for(node), node.source, node.shape or (), self.index, self.read)

    @property
    def first(self) -> Any:
        """The operand that a view or a method is of."""
        return self.argument(0, "input", "self")

    def argument(self, position: int, *names: str, default: Any = None) -> Any:
        """The argument at `position`, or by one of its keyword `names`."""
        if position < len(self.args):
            return self.args[position]
        return next((self.node.kwargs[name] for name in names if name in self.node.kwargs), default)

    def depends(self, tree: Any) -> bool:
        """Whether the site is anywhere in an argument."""
        return any(self.site in self.tape.latents_of(ref) for ref in refs_in(tree))

    def others_depend(self) -> bool:
        """Whether the site is in any argument but the first."""
        return self.depends((self.args[1:], {k: v for k, v in self.node.kwargs.items() if k not in ("input", "self")}))

    def value(self, argument: Any) -> Value:
        """The abstract value of an argument; raises `Broken` where that is OTHER."""
        if isinstance(argument, Ref) and argument.index in self.values:
            value = self.values[argument.index]
            if not isinstance(value, Value):
                raise Broken(self.step.other())
            if value.form is Form.OTHER:
                raise Broken(value)
            return value
        if isinstance(argument, Ref):
            return Value(Form.CONSTANT, self.shape_of(argument), argument)
        if isinstance(argument, Input):
            return Value(Form.CONSTANT, self.shape_of(argument), argument)
        if isinstance(argument, (bool, int, float)):
            return Value(Form.CONSTANT, (), argument, coefficient=float(argument))
        raise Broken(self.step.other())

    def shape_of(self, argument: Any) -> Shape:
        if isinstance(argument, Input):
            return tuple(self.tape.inputs[argument.index].shape)
        if isinstance(argument, Ref):
            return self.tape.nodes[argument.index].shape or ()
        return ()

    def tensor(self, argument: Any) -> Tensor | None:
        """The tensor that a constant is, if the tape holds it; whoever rests a claim on it calls `assume`."""
        return self.tape.inputs[argument.index] if isinstance(argument, Input) else None

    def assume(self, *arguments: Any) -> None:
        self.assumes.update(argument.index for argument in arguments if isinstance(argument, Input))

    def read(self, value: Value) -> float | None:
        """The number that all elements of a constant are; None where they differ or are unknown."""
        if value.coefficient is not None:
            return value.coefficient
        tensor = self.tensor(value.token)
        if tensor is None or tensor.numel() == 0 or tensor.is_complex():
            return None
        flat = tensor.detach().reshape(-1)
        number = flat[0]
        if bool(number != flat[-1]) or not bool((flat == number).all()):
            return None
        self.assume(value.token)
        return float(number)

    def frozen(self, tree: Any) -> Hashable:
        """An argument as a part of a token: its own token if it depends on the site, else the constant."""
        if isinstance(tree, Ref) and tree.index in self.values:
            value = self.values[tree.index]
            return ("value", value.token, value.shape) if isinstance(value, Value) else ("bundle", tree.index)
        if isinstance(tree, (tuple, list)):
            return (type(tree).__name__, *(self.frozen(item) for item in tree))
        if isinstance(tree, Mapping):
            return ("kwargs", *((key, self.frozen(tree[key])) for key in sorted(tree)))
        if isinstance(tree, slice):
            return ("slice", self.frozen(tree.start), self.frozen(tree.stop), self.frozen(tree.step))
        if isinstance(tree, (Ref, Input, bool, int, float, str, type(None), type(Ellipsis), torch.dtype, torch.device)):
            return (type(tree).__name__, tree)
        return ("object", id(tree))

    @property
    def token(self) -> Hashable:
        """Equal for two calls that take the same elements of the site to the same places."""
        return (self.node.name, self.frozen(self.args), self.frozen(self.node.kwargs), self.node.shape)

    @property
    def own_token(self) -> Hashable:
        return ("node", self.index)
