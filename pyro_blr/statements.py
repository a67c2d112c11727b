"""Hand-written guides read statement by statement: distributions whose arguments are the guide's own parameters."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.distributions import biject_to
from torch.distributions.transforms import ComposeTransform

from pyro_blr.blocks import Block
from pyro_blr.families import ExponentialFamily, LogNormal, Normal, TransformedNormal, family_of
from pyro_blr.initial import diagonal_natural
from pyro_blr.links import Argument, Rows, find_argument, shared_parameters
from pyro_blr.parameters import Slot, nudged, remembered, statement_slot
from pyro_blr.readings import Part, UnreadableGuide, independent_gaussian
from pyro_blr.running import isolated_random_state, unwrap

__all__ = [
    "Law",
    "Statements",
    "found_arguments",
    "is_latent",
    "is_weighted",
    "law_of",
    "pyro_class",
    "survey_statements",
]


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
        family = self.statements[name].family
        if family is None:
            return {"family": independent_gaussian, "block": "elements"}
        if family.is_discrete:
            return {}
        return {"family": family, **({"block": "elements"} if isinstance(family, Normal) else {})}

    def read(self, blocks: Mapping[str, Block]) -> dict[str, Tensor]:
        result = {}
        for name, statement in self.statements.items():
            block, made = blocks[name], statement.made()
            if statement.family is None:
                natural = _pushed_natural(block, made, statement.transform)
            elif family_of(made) != block.family:
                raise UnreadableGuide(
                    f"its {type(made).__name__} at {name} does not have the states that the model gives it"
                )
            else:
                natural = block.family.from_distribution(made)
            if natural.shape[:-1] != block.full_shape:
                raise UnreadableGuide(
                    f"its distribution at {name} has batch shape {tuple(natural.shape[:-1])}, the model's site {tuple(block.full_shape)}"
                )
            result[name] = natural
        return result

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


def _pushed_natural(block: Block, made: Any, transform: Any) -> Tensor:
    """λ of Normals pushed onto a site's support by the bijection that `biject_to` knows for it."""
    u = made.loc + made.scale
    if not torch.allclose(transform(u), biject_to(block.sites[0].support)(u)):
        raise UnreadableGuide(f"it pushes Normals by another bijection than {block.name}'s support has")
    base = block.family.base if isinstance(block.family, TransformedNormal) else block.family
    shape = (*block.full_shape, *base.event_shape)
    if made.loc.numel() != torch.Size(shape).numel():
        raise UnreadableGuide(
            f"its parameters at {block.name} have shape {tuple(made.loc.shape)}, expected {tuple(shape)}"
        )
    mean, scale = made.loc.reshape(shape), made.scale.reshape(shape)
    if isinstance(base, LogNormal):
        return base.from_distribution(dist.LogNormal(mean, scale, validate_args=False))
    return diagonal_natural(base, mean, scale.square())


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
            statements.append(statement)
        except UnreadableGuide as error:
            reasons[name] = str(error)
    reasons |= shared_parameters([(s.site, argument) for s in statements for argument in s.arguments])
    return [statement for statement in statements if statement.site not in reasons], reasons


def is_latent(node: Mapping[str, Any]) -> bool:
    """Whether a node of a trace is a sample statement without data."""
    return node["type"] == "sample" and not node["is_observed"] and not isinstance(node["fn"], _Subsample)


def is_weighted(node: Mapping[str, Any]) -> bool:
    """Whether a statement counts otherwise than its plates say: its entropy then weighs as the program likes, at every step anew."""
    scale = math.prod(frame.full_size / max(frame.size, 1) for frame in node["cond_indep_stack"] if frame.full_size)
    found = torch.as_tensor(node["scale"], dtype=torch.float64)
    return not bool(torch.isclose(found, torch.tensor(scale, dtype=torch.float64, device=found.device)).all())


class Law(NamedTuple):
    """A distribution of the guide, as it was in one run."""

    base: Any  # the distribution that has the arguments, below Independent and a pushforward
    transform: Any  # of the pushforward
    family: ExponentialFamily | None
    arguments: dict[str, Tensor]


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
    return Statement(name, pyro_class(laws[0]), laws[0].family, laws[0].transform, tuple(arguments))


def _refuse_held(statement: Statement, distribution: Any) -> None:
    """Raises for a parameter that the guide cuts off from gradients, which no other way of fitting would move either."""
    base = _inner(statement.site, distribution)[0]
    for argument in statement.arguments if torch.is_grad_enabled() else ():
        if not torch.as_tensor(getattr(base, argument.name)).requires_grad:
            raise UnreadableGuide(
                f"{argument.name} of its distribution at {statement.site} takes no gradient: its parameter is held"
            )


def found_arguments(
    name: str,
    laws: Sequence[Law],
    slots: Mapping[str, Slot],
    values: Sequence[Mapping[str, Tensor]],
    rows: Sequence[Sequence[Rows]] | None = None,
) -> list[Argument]:
    """Which parameter each argument of a site is, the laws seen at these values of all parameters; raises where one is none."""
    arguments = []
    for names in _grouped(laws[0].arguments):
        tried = [find_argument(name, n, [law.arguments[n] for law in laws], slots, values, rows) for n in names]
        found = [argument for argument in tried if not isinstance(argument, str)]
        if not found:
            raise UnreadableGuide(str(tried[0]))
        arguments.append(found[0])
    return arguments


def pyro_class(law: Law) -> type:
    """The class that makes the distribution from its arguments."""
    return next(c for c in type(law.base).__mro__ if issubclass(c, TorchDistributionMixin))


def _grouped(names: Iterable[str]) -> list[list[str]]:
    """Arguments of which each is needed, alternatives together."""
    names = list(names)
    groups = [[name for name in names if name in group] for group in _ALTERNATIVES]
    alone = [[name] for name in names if not any(name in group for group in groups)]
    return [*alone, *(group for group in groups if group)]


def _law_or_reason(name: str, distribution: Any) -> Law | str:
    try:
        return law_of(name, distribution)
    except UnreadableGuide as error:
        return str(error)


def law_of(name: str, distribution: Any) -> Law:
    """A statement's distribution with its arguments; raises where it is no exponential family."""
    base, family = _inner(name, distribution)
    # copies: an argument may be the parameter itself, which moves on
    arguments = {n: torch.as_tensor(getattr(base, n)).detach().clone() for n in _argument_names(base)}
    transforms = getattr(unwrap(distribution)[0], "transforms", []) if family is None else []
    return Law(base, ComposeTransform(list(transforms)), family, arguments)


def _inner(name: str, distribution: Any) -> tuple[Any, ExponentialFamily | None]:
    """(distribution with the arguments, its family or None for pushed Normals)."""
    base, _, mask = unwrap(distribution)
    if mask is not None:
        raise UnreadableGuide(f"its distribution at {name} is masked")
    if isinstance(base, dist.Delta):
        raise UnreadableGuide(f"it is a point at {name}, which has no natural parameters")
    family = family_of(base)
    if family is not None:
        return base, family
    if isinstance(base, torch.distributions.TransformedDistribution):
        inner = unwrap(base.base_dist)[0]
        if isinstance(inner, torch.distributions.Normal):
            return inner, None
    raise UnreadableGuide(f"its {type(base).__name__} at {name} is no exponential family")


_ALTERNATIVES = ({"probs", "logits"}, {"scale_tril", "covariance_matrix", "precision_matrix"})


def _argument_names(base: Any) -> list[str]:
    """The arguments that a distribution has; one of several alternatives may have been made from another."""
    unused = {
        name for group in _ALTERNATIVES for name in group if name not in vars(base)
    }  # lazy: asking would make them
    return [name for name in base.arg_constraints if name not in unused]
