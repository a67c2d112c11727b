"""Hand-written guides read statement by statement: distributions whose arguments are the guide's own parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import constraints

from pyro_blr.blocks import Block
from pyro_blr.families import ExponentialFamily
from pyro_blr.laws import Law, grouped, inner_of, is_latent, is_weighted, law_of, natural_in, options_of_law
from pyro_blr.links import Argument, Rows, find_argument, shared_parameters
from pyro_blr.parameters import Slot, nudged, remembered, statement_slot
from pyro_blr.parts import Part, UnreadableGuide
from pyro_blr.running import isolated_random_state

__all__ = ["Statements", "found_arguments", "survey_statements"]


@dataclass(frozen=True)
class Statement:
    """A sample statement of a guide: its distribution's class, below Independent, and arguments."""

    site: str
    distribution_class: type
    family: ExponentialFamily | None  # None: Normals pushed onto the site's support
    transform: Any
    arguments: tuple[Argument, ...]

    def made(self) -> Any:
        return self.distribution_class(**{a.name: a.value for a in self.arguments}, validate_args=False)


class Statements(Part):
    """Sites whose distributions in the guide are exponential families with their own parameters."""

    def __init__(self, statements: list[Statement]):
        self.statements = {statement.site: statement for statement in statements}
        self.sites = tuple(self.statements)

    @property
    def slots(self) -> list[Slot]:
        return [argument.slot for statement in self.statements.values() for argument in statement.arguments]

    def options(self, name: str) -> dict[str, Any]:
        return options_of_law(self.statements[name].family)

    def read(self, blocks: Mapping[str, Block]) -> dict[str, Tensor]:
        return {
            name: natural_in(blocks[name], name, statement.family, statement.made(), statement.transform)
            for name, statement in self.statements.items()
        }

    def write(self, blocks: Mapping[str, Block], naturals: Mapping[str, Tensor]) -> None:
        for name, statement in self.statements.items():
            if name not in naturals:
                continue
            block = blocks[name]
            if statement.family is None:
                moments = block.family.moments(naturals[name])
                values: Any = dist.Normal(moments["mean"], moments["variance"].sqrt(), validate_args=False)
            else:
                values = block.family.to_distribution(naturals[name])
            for argument in statement.arguments:
                argument.assign(getattr(values, argument.name))


# --------------------------------------------------------------------------------------------------------
# Which parameter each argument is


def survey_statements(guide: Any, args: tuple, kwargs: Mapping[str, Any]) -> tuple[list[Statement], dict[str, str]]:
    """The statements of a guide that are families with parameters of their own, and why each other site is not one.

    All parameters are moved a little: an argument that equals a parameter, or a link of it, at generic values of all
    parameters is that parameter, and depends neither on other latents nor on data.
    """
    trace = poutine.trace(guide).get_trace(*args, **kwargs)
    slots = {n: statement_slot(n, node) for n, node in trace.nodes.items() if node["type"] == "param"}
    names = [n for n, node in trace.nodes.items() if is_latent(node)]
    if not names:
        raise UnreadableGuide("it has no sample statement")
    restore = remembered(list(slots.values()))
    try:
        observed = [_observed(guide, args, kwargs, slots, names, seed) for seed in (1, 2)]
    finally:
        restore()
    statements, reasons = [], {}
    for name in names:
        if is_weighted(trace.nodes[name]):
            reasons[name] = f"poutine.scale weighs its statement at {name}"
            continue
        try:
            statement = _statement(name, slots, observed)
            _refuse_held(statement, trace.nodes[name]["fn"])
            _refuse_narrow(statement)
            statements.append(statement)
        except UnreadableGuide as error:
            reasons[name] = str(error)
    reasons |= shared_parameters([(s.site, argument) for s in statements for argument in s.arguments])
    return [statement for statement in statements if statement.site not in reasons], reasons


class _Seen(NamedTuple):
    values: dict[str, Tensor]  # parameter -> constrained value
    laws: dict[str, Law | str]  # or why there is none
    rows: dict[str, list[Rows]]  # of each site, in its subsampled plates


def _observed(guide: Any, args: tuple, kwargs: Mapping[str, Any], slots: Mapping, names: list[str], seed: int) -> _Seen:
    """Values of parameters and distributions of sites with every parameter moved a little further."""
    nudged(slots.values(), seed)
    with isolated_random_state(seed), torch.no_grad():
        trace = poutine.trace(guide).get_trace(*args, **kwargs)
    missing = [name for name in names if name not in trace.nodes]
    if missing:
        raise UnreadableGuide(f"it samples {missing[0]} in some runs only")
    values = {name: slot.value.clone() for name, slot in slots.items()}
    laws = {name: _law_or_reason(name, trace.nodes[name]["fn"]) for name in names}
    return _Seen(values, laws, {name: _rows(trace, name) for name in names})


def _rows(trace: poutine.Trace, name: str) -> list[Rows]:
    nodes: Mapping[str, Any] = trace.nodes
    frames = [frame for frame in nodes[name]["cond_indep_stack"] if frame.vectorized and frame.full_size != frame.size]
    return [Rows(frame.full_size, nodes[frame.name]["value"]) for frame in frames if frame.name in nodes]


def _statement(name: str, slots: Mapping[str, Slot], observed: list[_Seen]) -> Statement:
    values, laws = [seen.values for seen in observed], []
    for seen in observed:
        law = seen.laws[name]
        if isinstance(law, str):
            raise UnreadableGuide(law)
        laws.append(law)
    arguments = found_arguments(name, laws, slots, values, [seen.rows[name] for seen in observed])
    return Statement(name, laws[0].distribution_class, laws[0].family, laws[0].transform, tuple(arguments))


def _refuse_held(statement: Statement, distribution: Any) -> None:
    """Raises for a parameter that the guide cuts off from gradients, which no other way of fitting would move either."""
    base = inner_of(statement.site, distribution)[0]
    for argument in statement.arguments if torch.is_grad_enabled() else ():
        if not torch.as_tensor(getattr(base, argument.name)).requires_grad:
            raise UnreadableGuide(
                f"{argument.name} of its distribution at {statement.site} takes no gradient: its parameter is held"
            )


def _refuse_narrow(statement: Statement) -> None:
    """Raises for a parameter whose constraint leaves out some of what its argument can be: the rule may move there."""
    for argument in statement.arguments:
        low, high = _bounds(argument.slot.constraint)
        least, most = _bounds(statement.distribution_class.arg_constraints[argument.name])  # type: ignore[attr-defined]
        if argument.link.name in ("square", "sqrt", "reciprocal", "normalised"):
            least, most = 0.0, math.inf
        elif argument.link.name != "itself":
            least, most = -math.inf, math.inf
        if low > least or high < most:
            raise UnreadableGuide(
                f"the constraint on {argument.slot.name!r} leaves out some values of {argument.name} at {statement.site}"
            )


def _bounds(constraint: Any) -> tuple[float, float]:
    """Between which numbers every element is, as far as an interval says so."""
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    low, high = getattr(constraint, "lower_bound", -math.inf), getattr(constraint, "upper_bound", math.inf)
    return float(torch.as_tensor(low).max()), float(torch.as_tensor(high).min())


def found_arguments(
    name: str,
    laws: Sequence[Law],
    slots: Mapping[str, Slot],
    values: Sequence[Mapping[str, Tensor]],
    rows: Sequence[Sequence[Rows]] | None = None,
) -> list[Argument]:
    """Which parameter each argument of a site is, the laws seen at these values of all parameters; raises where one is none."""
    arguments = []
    for names in grouped(laws[0].arguments):
        tried = [find_argument(name, n, [law.arguments[n] for law in laws], slots, values, rows) for n in names]
        found = [argument for argument in tried if not isinstance(argument, str)]
        if not found:
            raise UnreadableGuide(str(tried[0]))
        arguments.append(found[0])
    return arguments


def _law_or_reason(name: str, distribution: Any) -> Law | str:
    try:
        return law_of(name, distribution)
    except UnreadableGuide as error:
        return str(error)
