"""A model's run made ready for inference: its graph, the blocks of q, how each factor is averaged; reused while it still holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pyro import poutine
from torch import Tensor

from pyro_blr.arbiter import replayed_log_probs, unfaithful_factors
from pyro_blr.blocks import Block
from pyro_blr.capture import capture
from pyro_blr.checks import check_graph
from pyro_blr.conjugacy import analyse
from pyro_blr.enumeration import misaligned_factors
from pyro_blr.graph import FactorGraph
from pyro_blr.groupings import Grouping, blocks_of
from pyro_blr.groups import choose_groups
from pyro_blr.loops import woven
from pyro_blr.lowering import lowered
from pyro_blr.messages import Messages
from pyro_blr.plans import PROVED, FactorPlan
from pyro_blr.predictors import with_quadrature
from pyro_blr.running import generic_value, run_model, run_sharing, subsample_values
from pyro_blr.sameness import Call, Written, same_run, writes_into
from pyro_blr.sharing import treats_elements_alike

__all__ = ["Program", "Programs"]


_Latents = Mapping[str, frozenset[str]]  # factor -> latents


class Sweeps:
    """Counts the sweeps over a small exact model, and flattens them once they are many."""

    MANY = 100
    SMALL = 20_000  # numbers in the largest factor: beyond, the time goes into the operations themselves

    def __init__(self, suited: bool):
        self.suited, self.count = suited, 0
        self.moved = 0.0  # nats that the last sweep whose length was taken moved a block
        self._flat: dict[tuple[str, ...], Callable] = {}

    def ready(self, sweep: Callable, order: tuple[str, ...], naturals: list[Tensor]) -> Callable | None:
        """The flat sweep, made after `MANY` calls; None before, and where the model is not suited."""
        self.count += 1
        if not self.suited or self.count < self.MANY:
            return None
        if order not in self._flat:
            try:
                self._flat[order] = lowered(sweep, naturals)
            except Exception:  # whatever the tracer objects to: the sweep runs as it did before
                self.suited = False
                return None
        return self._flat[order]


@dataclass(frozen=True)
class Program:
    """One run of a model, understood."""

    trace: poutine.Trace
    written: Written
    graph: FactorGraph
    blocks: Mapping[str, Block]
    plans: Mapping[str, FactorPlan]
    messages: Messages
    sweeps: Sweeps
    factorisation: str | Sequence[Sequence[str]] | Grouping
    orders: dict[
        str, int
    ]  # block -> how many derivatives of its sampled factors are to be believed, once that was seen

    @property
    def is_exact(self) -> bool:
        return all(plan.exact for plan in self.plans.values())

    @property
    def is_deterministic(self) -> bool:
        """Whether no factor needs draws."""
        return all(plan.deterministic for plan in self.plans.values())

    @property
    def is_subsampled(self) -> bool:
        return self.graph.is_subsampled

    @property
    def is_confined(self) -> bool:
        """Whether some block's q cannot be everything in its family."""
        return any(block.within is not None for block in self.blocks.values())

    def notes(self) -> list[str]:
        """What a user should know about the run besides verdicts."""
        found = [
            f"{d.operation} on {' and '.join(sorted(d.latents))} ({d.source}): a latent leaves torch there"
            for d in self.graph.tape.departures
        ]
        if isinstance(self.factorisation, Grouping):
            found += self.factorisation.notes
        if self.graph.failure is not None:
            found.append(f"the model cannot be recorded ({self.graph.failure}): it is run again for every draw")
        return list(dict.fromkeys(found))

    def refuse_unproved(self) -> None:
        """Raises where exactness rests on numbers alone (`strict=True`)."""
        unproved = [v for plan in self.plans.values() for v in plan.verdicts if v.exact and v.how != PROVED]
        if unproved:
            first = unproved[0]
            raise ValueError(
                f"strict=True: site {first.site!r} in factor {first.factor!r} is {first.how}, expected a proof from its expression. "
                "Write the argument with plain torch operations, or leave strict out"
            )

    def local_blocks(self) -> list[str]:
        """Blocks inside a subsampled plate: their λ is theirs alone, so they move to their optimum at every step."""
        return [
            name
            for name, block in self.blocks.items()
            if any(plate.subsample_size != plate.size for plate in block.plates)
        ]


class Programs:
    """Makes programs, and reuses what the plain run of a step shows to be unchanged.

    The model runs plainly at every call.  Equal arguments and data at the same generic latents: the whole program is reused.
    Other data in the same structure: the verdicts are.  Otherwise the model is judged anew.
    """

    def __init__(self, model: Callable, blocks: str | Sequence[Sequence[str]] | Grouping):
        self.model, self.blocks = model, blocks
        self._chosen: tuple[frozenset[str], Grouping] | None = None  # under `"auto"`, for these sites
        self._last: Program | None = None
        self._call: Call | None = None  # the arguments of its run
        self._judged: dict[Any, tuple[Mapping[str, FactorPlan], _Latents, _Latents]] = {}
        self._generic: dict[str, tuple[Tensor, int]] = {}  # with the writes into it when it was made
        self._orders: dict[Any, dict[str, int]] = {}
        self._shares = True  # large discrete sites stand in one state throughout, as far as is known

    def run(self, args: tuple, kwargs: Mapping[str, Any]) -> Program:
        """The program of the model's run on these arguments; draws subsample indices from torch's generator."""
        trace = self._trace(args, kwargs)
        if self._last is not None and not self._last.written:
            repeated = self._call is not None and self._call.is_repeated(args, kwargs)
            if same_run(self._last.trace, trace, asked=repeated):
                self._call = Call(args, kwargs)
                return self._last
        program = self._understand(trace, args, kwargs)
        if program is None:  # one state for all elements is not what the program says: from now on a state an element
            self._shares = False
            trace = run_model(self.model, args, kwargs, self._choose, subsample_values(trace))
            program = self._understand(trace, args, kwargs)
        assert program is not None
        self._last, self._call = program, Call(args, kwargs)
        return program

    def learnt(self) -> Callable[[], None]:
        """Forgets what is learnt of the model from here on: data that fail may have been judged by what is wrong with them."""
        judged, generic, orders = dict(self._judged), dict(self._generic), {k: dict(v) for k, v in self._orders.items()}
        chosen, shares = self._chosen, self._shares

        def restore() -> None:
            self._judged, self._generic, self._orders = judged, generic, orders
            self._chosen, self._shares = chosen, shares

        return restore

    def saved(self) -> Callable[[], None]:
        """What makes the present program the last one again."""
        last, call = self._last, self._call

        def restore() -> None:
            self._last, self._call = last, call

        return restore

    def _trace(self, args: tuple, kwargs: Mapping[str, Any]) -> poutine.Trace:
        if not self._shares:
            return run_model(self.model, args, kwargs, self._choose)
        trace, self._shares = run_sharing(self.model, args, kwargs, self._choose)
        return trace

    def _choose(self, name: str, distribution: Any) -> Tensor:
        value, version = self._generic.get(name, (None, 0))
        shape = distribution.batch_shape + distribution.event_shape
        if value is None or value.shape != shape or writes_into(value) != version:
            value = generic_value(name, distribution)
            self._generic[name] = value, writes_into(value)
        return value

    def _understand(self, trace: poutine.Trace, args: tuple, kwargs: Mapping[str, Any]) -> Program | None:
        """The program of a plain run; None where that shared states among elements which the model tells apart."""
        written = Written(trace)
        graph = capture(self.model, args, kwargs, trace)
        if graph.shared and not treats_elements_alike(graph):
            return None
        check_graph(graph)
        key = _structure(graph)
        unfaithful = (
            self._judged[key][1] if key in self._judged else unfaithful_factors(self.model, args, kwargs, graph)
        )
        factorisation = self._factorisation(graph, unfaithful)

        def replay(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return replayed_log_probs(self.model, args, kwargs, graph, values)

        messages = self._messages(key, graph, blocks_of(graph, factorisation), unfaithful, replay)
        if graph.shared and any(plan.replayed for plan in messages.plans.values()):
            return None
        orders, sweeps = self._orders.setdefault(key, {}), Sweeps(_suits_flattening(messages))
        blocks, plans = blocks_of(graph, factorisation), self._judged[key][0]
        return Program(trace, written, graph, blocks, plans, messages, sweeps, factorisation, orders)

    def _factorisation(self, graph: FactorGraph, unfaithful: _Latents) -> str | Sequence[Sequence[str]] | Grouping:
        """What was asked for; `"auto"` is decided once for a model's sites, so that λ keeps its meaning."""
        if self.blocks != "auto":
            return self.blocks
        if self._chosen is None or self._chosen[0] != frozenset(graph.sites):
            self._chosen = frozenset(graph.sites), choose_groups(graph, unfaithful)
        return self._chosen[1]

    def _messages(
        self, key: Any, graph: FactorGraph, blocks: Mapping[str, Block], unfaithful: _Latents, replay: Callable
    ) -> Messages:
        """Messages under the verdicts of an earlier run of the same structure, or under new ones."""
        if key in self._judged:
            judged, unfaithful, misaligned = self._judged[key]
            plans = analyse(graph, blocks, unfaithful, misaligned, judged)
            plans = with_quadrature(graph, blocks, plans, judged=True)
            self._judged[key] = plans, unfaithful, misaligned
            return Messages(*woven(graph, blocks, plans), replay)
        known = self._chosen[1].plans_of(graph) if self._chosen is not None else None
        found = known or with_quadrature(graph, blocks, analyse(graph, blocks, unfaithful), judged=False)
        messages = Messages(*woven(graph, blocks, found), replay)
        misaligned = misaligned_factors(messages.graph, messages.blocks, messages.plans, messages.averages)
        if misaligned:
            found = with_quadrature(graph, blocks, analyse(graph, blocks, unfaithful, misaligned), judged=False)
            messages = Messages(*woven(graph, blocks, found), replay)
        self._judged[key] = found, unfaithful, misaligned
        return messages


def _suits_flattening(messages: Messages) -> bool:
    """Small, exact, continuous, unmasked: nothing in a sweep branches on data."""
    return (
        all(plan.exact for plan in messages.plans.values())
        and not any(
            block.is_discrete or block.within or messages.is_coupled(name) for name, block in messages.blocks.items()
        )
        and not any(messages.masked(name) is not None for name in messages.blocks)
        and not any(value.requires_grad for value in messages.graph.params.values())
        and not messages.graph.is_subsampled
        and all(factor.batch_shape.numel() <= Sweeps.SMALL for factor in messages.graph.factors.values())
    )


def _structure(graph: FactorGraph) -> tuple:
    """What verdicts depend on: statements, expressions, shapes and plates, but not the values of data."""
    factors = []
    for name, factor in graph.factors.items():
        made = factor.constructed
        outputs = [factor.value, factor.scale, factor.mask]
        described: Any = type(factor.distribution).__name__
        if made is not None:
            outputs += [*made.arguments.values(), made.mask]
            described = (
                made.distribution_class,
                tuple(map(_form, made.arguments.items())),
                made.batch_shape,
                made.reinterpreted,
            )
        factors.append(
            (
                name,
                described,
                graph.tape.structure(outputs),
                tuple(map(_form, enumerate(outputs))),
                factor.plates,
                factor.is_observed,
            )
        )
    sites = tuple((name, site.shape, site.dtype, site.device) for name, site in graph.sites.items())
    return tuple(factors), sites, graph.failure


def _form(item: tuple) -> Any:
    key, value = item
    if isinstance(value, Tensor):
        return key, "tensor", tuple(value.shape), value.dtype, value.device
    return (key, value) if isinstance(value, (int, bool, str)) else (key, type(value).__name__, repr(value)[:80])
