"""Guides of which some sites are families with parameters of their own and others are not: both rules in one step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from pyro_blr.ascent import Ascent
from pyro_blr.autoguides import survey
from pyro_blr.beliefs import Beliefs
from pyro_blr.checks import check_same_block, check_same_sites
from pyro_blr.explain import Explanation
from pyro_blr.gradients import OrdinaryGradients, check_guide, unconstrained
from pyro_blr.interrupts import undone_by, uninterrupted
from pyro_blr.parameters import remembered
from pyro_blr.parts import Part, UnreadableGuide
from pyro_blr.points import ordinary_fit
from pyro_blr.program import Program, Programs
from pyro_blr.readings import ReadGuide
from pyro_blr.remainder import HeldModel, Substituted, rest_of
from pyro_blr.rules import RobbinsMonro
from pyro_blr.running import isolated_random_state, unwrap
from pyro_blr.sameness import same_run
from pyro_blr.steps import first_targets, take_step

__all__ = ["MixedFit", "guide_fit"]

_OPTIM = "ordinary gradient of loss through optim, as under SVI"
_VALUES = 5  # draws of a site among which two differ
_VECTORISED = 10  # draws at most where `loss` vectorises its particles: each is a run here


def guide_fit(
    model: Any, guide: Any, optim: Any, loss: Any, reason: str, args: tuple, kwargs: Mapping[str, Any]
) -> OrdinaryGradients:
    """What fits a guide that is not families throughout: by site where some are, else all of it in one way."""
    # sites that are linear in each other are one Gaussian, and others need not fill their family, where that can be
    for options in ({}, {"curved": False}, {"joint": False}, {"joint": False, "curved": False}):
        try:
            with isolated_random_state():
                return MixedFit(model, guide, optim, loss, reason, args, kwargs, **options)
        except Exception:  # no site is read, or the guide fails: its first step says what is wrong with it
            continue
    return ordinary_fit(model, guide, optim, loss, reason, args, kwargs)


@dataclass(frozen=True)
class Division:
    """The parts of a guide that take natural gradients, and why every other site does not."""

    parts: tuple[Part, ...]
    reasons: Mapping[str, str]
    follows: bool  # whether the rest of the guide depends on values of the parts' sites
    is_random: bool  # whether the rest is more than points
    auxiliary: frozenset[str]  # statements that are the parts' own, and no site of the model

    @property
    def read(self) -> frozenset[str]:
        return frozenset(name for part in self.parts for name in part.sites)


class _Divider:
    """Finds which sites of a guide can take natural gradients beside the rest of it."""

    def __init__(self, model: Callable, guide: Callable, args: tuple, kwargs: Mapping[str, Any]):
        self.model, self.guide, self.args, self.kwargs = model, guide, args, kwargs
        self.of_guide = self._run(guide, {}, 0)
        nodes: Mapping[str, Any] = self.of_guide.nodes
        drawn = {name: node["value"] for name, node in nodes.items() if node["type"] == "sample"}
        self.of_model = self._run(model, drawn, 0)
        self.read: set[str] = set()
        self.auxiliary: frozenset[str] = frozenset()
        self.order = {name: place for place, name in enumerate(self.of_model.nodes)}

    def _run(self, program: Callable, values: Mapping[str, Tensor], seed: int) -> poutine.Trace:
        with isolated_random_state(seed), poutine.block(), torch.no_grad():
            with poutine.trace() as tracer, Substituted(values):
                program(*self.args, **self.kwargs)
        return tracer.trace

    def divide(self, **options: bool) -> Division:
        parts, reasons, self.auxiliary = survey(self.guide, self.args, self.kwargs, **options)
        taken = {name for name, node in self.of_model.nodes.items() if node["type"] == "param"}
        kept: list[Part] = []
        following: list[Part] = []
        self.read = {name for part in parts for name in part.sites}
        for part in parts:
            reason, follows = self._obstacle(part, taken)
            if reason:
                reasons |= dict.fromkeys(part.sites, reason)
            else:
                (following if follows else kept).append(part)
        division = Division((*kept, *following), reasons, bool(following), self._is_random(), self.auxiliary)
        if not division.parts:
            raise UnreadableGuide("no site of it can be told from the others")
        return division

    def _obstacle(self, part: Part, taken: set[str]) -> tuple[str, bool]:
        """(why a part cannot take natural gradients, empty where it can; whether the rest of the guide follows its values)."""
        missing = [name for name in part.sites if name not in self.order]
        if missing:
            return "the model has no such site", False
        shared = [slot.name for slot in part.slots if slot.name in taken]
        if shared:
            return f"the model has its parameter {shared[0]!r} too", False
        values = self._values(0)
        base = self._run(self.guide, values, 1)
        restore = remembered(part.slots)
        try:
            with torch.no_grad():
                for slot in part.slots:
                    slot.leaf.add_(0.1)
            users = self._changed(base, self._run(self.guide, values, 1))
        finally:
            restore()
        if users:
            return f"{users[0]} has its parameters too", False
        followers = self._followers(part, values, base)
        for name in followers:
            law: Any = self.of_guide.nodes[name]["fn"]
            if not law.has_rsample and not isinstance(unwrap(law)[0], dist.Delta):
                return f"{name} depends on it and is not reparameterised", True
            if name in self.order and self.order[name] < max(self.order[site] for site in part.sites):
                return f"{name}, which the model samples before it, depends on it in the guide", True
        return "", bool(followers)

    def _values(self, seed: int) -> dict[str, Tensor]:
        nodes: Mapping[str, Any] = self._run(self.guide, {}, seed).nodes
        return {name: nodes[name]["value"] for name in self.read}

    def _followers(self, part: Part, values: Mapping[str, Tensor], base: poutine.Trace) -> list[str]:
        """Other sites of the guide whose distributions or values change with those of a part."""
        found: dict[str, None] = {}
        for seed in range(1, _VALUES):
            others = self._values(seed)
            moved = {**values, **{name: others[name] for name in part.sites}}
            found |= dict.fromkeys(self._changed(base, self._run(self.guide, moved, 1)))
        return list(found)

    def _changed(self, one: poutine.Trace, other: poutine.Trace) -> list[str]:
        mine = self.read | self.auxiliary
        ours, theirs = dict(rest_of(one, mine)), dict(rest_of(other, mine))
        names = dict.fromkeys([*ours, *theirs])
        return [name for name in names if name not in ours or name not in theirs or not _same(ours[name], theirs[name])]

    def _is_random(self) -> bool:
        values = self._values(0)
        return bool(self._changed(self._run(self.guide, values, 1), self._run(self.guide, values, 2)))


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    traces = []
    for node in (one, other):
        trace = poutine.Trace()
        trace.add_node("site", **{**node, "name": "site"})
        traces.append(trace)
    return same_run(traces[0], traces[1])


class MixedFit(OrdinaryGradients):
    """λ_e ← (1 − ρ) λ_e + (ρ / s_e) E_r Σ_f s_f ∇_{μ_e} E_{q_e}[log f] for the sites e that are families with parameters of their
    own, r the rest of the guide; the gradient of `loss` through `optim` for every other parameter.

    E_r is the average over `loss.num_particles` draws (vectorised: ten at most), given which messages are exact where they are in
    a model whose sites r are data. ρ is 1 where r are points and nothing else is random; else it shrinks: draws average out.
    """

    schedule = RobbinsMonro(delay=1.0, decay=0.6)

    def __init__(
        self,
        model: Any,
        guide: Any,
        optim: Any,
        loss: Any,
        reason: str,
        args: tuple,
        kwargs: Mapping[str, Any],
        **options: bool,
    ):
        super().__init__(model, guide, optim, loss, reason)
        check_guide(model, guide, args, kwargs)
        self.division = _Divider(model, guide, args, kwargs).divide(**options)
        self._held = HeldModel(model, guide, self.division.read, self.division.auxiliary, self.division.follows)
        title = getattr(guide, "__name__", type(guide).__name__)
        self._q = ReadGuide(self._held, self.division.parts, title)
        self._programs = Programs(self._q.model, self._q.factorisation)
        self._count = 0
        self._seen: Program | None = None
        program = self._program(args, kwargs)
        self._q.check(program.messages, partial(first_targets, program, self._q.naturals))

    def step(self, *args: Any, **kwargs: Any) -> float:
        generators = pyro.util.get_rng_state()
        undo = [self._q.saved(), self._programs.saved(), self._programs.learnt()]
        undo += [partial(setattr, self, "_seen", self._seen), partial(pyro.util.set_rng_state, generators)]
        with undone_by(*undo) as pending:
            loss, leaves = self.gradient(args, kwargs)
            pending.append(partial(pyro.infer.util.zero_grads, leaves.values()))
            naturals = self._natural_step(args, kwargs)
            with uninterrupted():
                self._q.naturals = naturals
                pending.clear()
                self.move([leaf for leaf in leaves.values() if id(leaf) not in self._own()])
                pyro.infer.util.zero_grads(leaves.values())
                self.has_run, self._count = True, self._count + 1
                self.history.append(-loss)
        return loss

    # -- natural gradients ---------------------------------------------------------------------------------------------

    def _natural_step(self, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """λ after the step: the rule's own where nothing is random, else a part ρ of the way there, averaged over draws of the rest."""
        self._q.refresh()
        count = self.loss.num_particles if self.division.is_random else 1
        count = min(count, _VECTORISED) if self.loss.vectorize_particles else count
        ends = []
        for _ in range(count):
            program = self._program(args, kwargs)
            ends.append(self._end(program))
        held, rate = self._q.naturals, self._rate(program)
        return {x: torch.lerp(held[x], torch.stack([end[x] for end in ends]).mean(0), rate) for x in held}

    def _program(self, args: tuple, kwargs: Mapping[str, Any]) -> Program:
        """The model's program at a fresh draw of the rest of the guide, λ ready for it."""
        self._held.draw(args, kwargs)
        program = self._programs.run(args, kwargs)
        if program is not self._seen:
            if self._q.blocks:
                check_same_sites(self._q.blocks, program.blocks, "the model's latent sites changed between steps")
                for name, block in program.blocks.items():
                    check_same_block(self._q.blocks[name], block)
            self._q.setup(program.graph)
            self._seen = program
        return program

    def _end(self, program: Program) -> dict[str, Tensor]:
        """λ where the rule takes it, given the draw of the rest."""
        indices, held = program.graph.subsamples, self._q.naturals
        naturals = {name: block.select(held[name], indices) for name, block in program.blocks.items()}
        ascent = Ascent(program, Beliefs(program.blocks, naturals))
        take_step(ascent, self._count if program.is_subsampled else min(self._count, 1))
        return {
            name: block.scatter(held[name], ascent.beliefs.naturals[name], indices)
            for name, block in program.blocks.items()
        }

    def _rate(self, program: Program) -> float:
        is_noisy = self.division.is_random or not program.is_deterministic
        return self.schedule.rate(self._count) if is_noisy and not program.is_subsampled else 1.0

    # -- words ---------------------------------------------------------------------------------------------------------

    def explain(self, *args: Any, **kwargs: Any) -> Explanation:
        undo, seen = [self._q.saved(), self._programs.saved()], self._seen
        with isolated_random_state(0), poutine.block():
            leaves = self._parameters(args, kwargs)
            try:
                program = self._program(args, kwargs)
            finally:
                self._seen = seen
                for restore in undo:
                    restore()
        return Explanation(
            [verdict for plan in program.plans.values() for verdict in plan.verdicts],
            program.blocks,
            "estimate ± standard error",
            sorted(name for name, leaf in leaves.items() if id(leaf) not in self._own()),
            {name: f"{reason}: {_OPTIM}" for name, reason in self.division.reasons.items()},
            [
                f"of the guide, {self._q.title}, the sites with a family take natural gradients, given "
                f"{'draws' if self.division.is_random else 'the values'} of its others; its parameters hold the result",
                *program.notes(),
            ],
        )

    def _own(self) -> set[int]:
        """The parameters that hold λ."""
        return {id(slot.leaf) for part in self.division.parts for slot in part.slots}

    def _parameters(self, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Name -> unconstrained parameter of guide and model."""
        with poutine.trace(param_only=True) as params, torch.no_grad():
            trace = poutine.trace(self.guide).get_trace(*args, **kwargs)
            poutine.replay(self.model, trace=trace)(*args, **kwargs)
        return unconstrained(params.trace)
