"""`Judge`: abstract interpretation of a tape, one site at a time."""

from __future__ import annotations

import operator
from collections.abc import Callable, Container
from dataclasses import replace
from typing import Any

from pyro_blr.kinds._arithmetic import ARITHMETIC_RULES
from pyro_blr.kinds._calls import Broken, Bundle, Call, Rule
from pyro_blr.kinds._joins import JOIN_RULES
from pyro_blr.kinds._matrices import MATRIX_RULES
from pyro_blr.kinds._values import Form, Kind, Sort, Value, shared_dims
from pyro_blr.kinds._views import VIEW_RULES, pick
from pyro_blr.tape import Latent, Node, Ref, Tape, refs_in

__all__ = ["Judge", "kind_of"]

RULES: dict[str, Rule] = {**VIEW_RULES, **JOIN_RULES, **ARITHMETIC_RULES, **MATRIX_RULES}


class Judge:
    """`kind_of` for many expressions of one tape, each node judged once for a site.

    Nodes may be appended meanwhile, and inputs; a recursion of 200 steps has a thousand nodes, any of which may be asked about.
    """

    def __init__(self, tape: Tape):
        self.tape = tape
        self._values: dict[tuple[str, Sort], dict[int, Value | Bundle]] = {}
        self._assumes: dict[tuple[str, Sort], dict[int, frozenset[int]]] = {}  # of a node and those before it

    def kind_of(self, ref: Any, site: str, sort: Sort) -> Kind:
        """What the expression `ref` of the tape is as a function of `site`, all other latents held.

        A claim holds for every value of the site and of the other latents.  An operation without a rule
        is `OTHER`, never an error.
        """
        if site not in self.tape.latents_of(ref):
            return Kind(Form.CONSTANT)
        values = self._values.setdefault((site, sort), {})
        assumes = self._assumes.setdefault((site, sort), {})
        for index in self._unjudged(ref, site, values):
            node, own = self.tape.nodes[index], set[int]()
            values[index] = _value_of(Call(self.tape, site, sort, index, node, values, own))
            before = (assumes.get(found.index, frozenset()) for found in refs_in((node.args, node.kwargs)))
            assumes[index] = frozenset(own).union(*before)
        value = values[ref.index]
        assert isinstance(value, Value), "a tuple is no expression"
        return value.kind(sort, assumes[ref.index])

    def _unjudged(self, ref: Ref, site: str, values: Container[int]) -> list[int]:
        """The nodes between the site and `ref` that have no value yet, in order."""
        wanted, stack = set[int](), [ref.index]
        while stack:
            index = stack.pop()
            if index in wanted or index in values or site not in self.tape.latents_of(Ref(index)):
                continue
            wanted.add(index)
            node = self.tape.nodes[index]
            stack.extend(found.index for found in refs_in((node.args, node.kwargs)))
        return sorted(wanted)


def kind_of(tape: Tape, ref: Any, site: str, sort: Sort) -> Kind:
    """`Judge.kind_of` of one expression."""
    return Judge(tape).kind_of(ref, site, sort)


def _value_of(call: Call) -> Value | Bundle:
    node, step = call.node, call.step
    if isinstance(node.function, Latent):
        return _leaf(call)
    if node.dtype is not None and not node.dtype.is_floating_point:
        return _first_broken(call) or step.other()
    rule = pick if node.function is operator.getitem else RULES.get(_rule_name(node))
    if not _is_torch(node.function):
        rule = None
    if rule is None:
        return _first_broken(call) or step.other()
    try:
        result = rule(call)
    except Broken as broken:
        return broken.value
    except (ArithmeticError, AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError):
        return step.other()  # arguments in an order no rule foresaw
    return _signed(call, result) if isinstance(result, Value) else result


def _leaf(call: Call) -> Value:
    shape, sort = call.step.shape, call.sort
    if sort is Sort.MATRIX:
        return Value(Form.MATRIX, shape, "site")
    shared = shared_dims(shape)
    return Value(Form.MONOMIAL, shape, "site", coefficient=1.0, shared=shared, is_whole=True)


def _rule_name(node: Node) -> str:
    """`add` for `torch.add`, `Tensor.__add__` and `Tensor.add_`."""
    return node.name if node.name.startswith("_") else node.name.rstrip("_")


def _is_torch(function: Callable) -> bool:
    module = getattr(function, "__module__", None)
    return module is None or module.split(".")[0] in ("torch", "pyro_blr", "_operator")


def _first_broken(call: Call) -> Value | None:
    for ref in refs_in((call.args, call.node.kwargs)):
        value = call.values.get(ref.index)
        if isinstance(value, Value) and value.form is Form.OTHER:
            return value
    return None


def _signed(call: Call, value: Value) -> Value:
    """`value` with the operation that gave it its form: this one, or the one an operand had it from."""
    if value.operation or value.form is Form.OTHER:
        return value
    for ref in refs_in((call.args, call.node.kwargs)):
        operand = call.values.get(ref.index)
        if isinstance(operand, Value) and (operand.form, operand.power) == (value.form, value.power):
            if operand.is_selection == value.is_selection:
                return replace(value, operation=operand.operation, source=operand.source)
    if isinstance(call.node.function, Latent):
        return value
    return replace(value, operation=call.step.operation, source=call.node.source)
