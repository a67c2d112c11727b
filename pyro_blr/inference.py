"""`BLRInference`: the Bayesian learning rule behind SVI's face."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import cache, partial
from typing import Any

from torch import Tensor

from pyro_blr.ascent import Ascent
from pyro_blr.attempts import Attempts
from pyro_blr.autoguides import read_guide
from pyro_blr.beliefs import Beliefs
from pyro_blr.checks import check_loss_of_data, check_plates, check_same_block, check_same_sites
from pyro_blr.compilation import CompiledSteps
from pyro_blr.diagnostics import linear_response
from pyro_blr.explain import Explanation
from pyro_blr.gradients import GuideFit, OrdinaryGradients, ParameterUpdate, reason_of
from pyro_blr.guides import AutoExponentialFamily
from pyro_blr.interrupts import patient, uninterrupted
from pyro_blr.mixed import guide_fit
from pyro_blr.own_fits import Listening, OwnFit, adopting
from pyro_blr.posterior import Posterior
from pyro_blr.program import Program, Programs
from pyro_blr.requests import (
    check_callable_guide,
    check_loss,
    check_optim,
    check_run_arguments,
    refuse_without_blocks,
)
from pyro_blr.running import isolated_random_state
from pyro_blr.runs import Run
from pyro_blr.searches import other_optima
from pyro_blr.settling import Settling
from pyro_blr.starts import apply_init
from pyro_blr.steps import first_targets, take_step
from pyro_blr.symmetry import broken_start
from pyro_blr.transactions import AllOrNothing, NothingKept

__all__ = ["BLRInference"]


class BLRInference:
    """λ_i ← (1 − ρ) λ_i + (ρ / s_i) Σ_f s_f ∇_{μ_i} E_q[log f]   (Khan and Rue 2023, eq. 3).

    Takes SVI's arguments in SVI's order.  Conjugate messages are exact and ρ is 1; others are estimated, and ρ is found.

    Args:
        model: a Pyro model.
        guide: nothing, an `AutoExponentialFamily`, one of Pyro's autoguides, or a guide of your own: it is read as the exponential
            families that it denotes, starts where it is, and its parameters hold the result; a guide of points takes Newton's
            method, and sites that denote no family the ordinary gradient of `loss` through `optim`, of which `explain` says why.
        optim: a Pyro optimiser for what is not a variational parameter; Adam where it is left out and there are any.
        loss: an ELBO of Pyro's (`Trace_ELBO`, `TraceMeanField_ELBO`, `TraceEnum_ELBO`, `TraceGraph_ELBO`).
        blocks: how q factorises: `"auto"`, `"sites"`, `"elements"`, or a list of groups of site names.
        init: site -> value (its T is that site's expectation until the first update) or distribution (sets λ).
        init_loc_fn: one of Pyro's `init_to_…`, for the sites that `init` leaves out.
        strict: refuse messages that are only verified numerically to be exact.
        compile: steps without the model's Python, once two have shown the model to be a function of its arguments: what else it
            reads (globals, files, a clock) must not change. Where that cannot be, a warning and `explain` say why.
    """

    def __init__(
        self,
        model: Callable,
        guide: Any = None,
        optim: Any = None,
        loss: Any = None,
        *,
        blocks: str | Sequence[Sequence[str]] = "auto",
        init: Mapping[str, Any] | None = None,
        init_loc_fn: Callable | None = None,
        strict: bool = False,
        compile: bool = False,
    ):
        if not callable(model):
            raise TypeError(f"model: found {type(model).__name__}, expected a callable Pyro model")
        check_loss(loss)
        check_optim(optim)
        self.model, self.optim, self.loss = model, optim, loss
        self.strict, self._init, self._init_loc_fn = strict, init, init_loc_fn
        self._ordinary: OrdinaryGradients | None = None
        if guide is None:
            guide = AutoExponentialFamily(model, blocks)
        self.guide, self._q = guide, guide
        if isinstance(guide, AutoExponentialFamily):
            self._programs: Programs | None = Programs(model, guide.factorisation)
            self._listening: Any = Listening()
        else:
            check_callable_guide(guide)
            refuse_without_blocks(blocks, init, init_loc_fn)
            self._programs, self._listening = None, nullcontext()  # the guide is read at the first call
        self._parameters = ParameterUpdate(model, optim)
        self._compiled = CompiledSteps(compile)
        self._points: dict[str, dict[str, Tensor]] = {}
        self._last: list[str] = []
        self._seen: Program | None = None
        self._observed: set[str] = set()
        self._bound: tuple[Program, float] | None = None
        self._settled: Program | None = None
        self._settling = Settling()
        self._attempts: Attempts | None = None  # a run that was cut short
        self._ready, self._num_steps = False, 0
        self._history: list[float] = []
        self._outcome: dict[str, Any] = {}
        self._call: tuple[tuple, dict[str, Any]] = ((), {})

    # -- SVI's face ---------------------------------------------------------------------------------------------------

    @adopting
    def step(self, *args: Any, **kwargs: Any) -> float:
        """One sweep over all blocks; returns minus the ELBO before it, as `SVI.step` does."""
        ordinary = self._settle(args, kwargs)
        if ordinary is not None:
            return ordinary.step(*args, **kwargs)
        if (known := self._compiled.step(self, args, kwargs)) is not None:
            return known
        with AllOrNothing(self) as state:
            program = self._program(args, kwargs)
            self._compiled.watch(program, args, kwargs, state.generators)
            ascent = self._ascent(program)
            if self._settled is program:  # the same data at a converged q: another sweep changes nothing
                self._num_steps += 1
                self._history.append(self._history[-1])
                return -self._history[-1]
            loss = -ascent.bound_before()
            is_last = take_step(ascent, self._num_steps)
            self._commit(ascent)
            self._num_steps += 1
            self._history.append(ascent.bound_before())
            # what a run before this step said of its end is no longer so
            self._outcome = {"elbo": self._history[-1], "elbo_kind": ascent.bound_kind, "elbo_se": ascent.bound_se}
            self._bound = program, self._history[-1]
            if is_last and not self._parameters.found(program):
                self._settled = program
            elif self._num_steps == self._settling.due:
                self._settle_down(program)
            with uninterrupted():  # last: nothing after it can fail
                self._parameters.step(program, ascent)
                state.done()
        return loss

    def _settle_down(self, program: Program) -> None:
        """Draws on full data: a script that goes on for thousands of steps gets its optimum now, and pays no more for it."""
        if program.is_exact or program.is_subsampled or self._parameters.found(program):
            return
        run = self._run_from_here(program, max_steps=100, tol=1e-3, progress=False)
        run.go(lambda: self._ascent(program), self._parameters)
        self._commit(run.ascent)
        self._history[-1] = run.elbo
        if run.converged or self._settling.gains_nothing(program, run.elbo, run.ascent.bound_se):
            self._settled, self._outcome = program, run.outcome()
        self._settling = Settling(2 * self._num_steps, program, run.elbo)

    @adopting
    def evaluate_loss(self, *args: Any, **kwargs: Any) -> float:
        """Minus the ELBO; changes nothing."""
        ordinary = self._settle(args, kwargs)
        if ordinary is not None:
            return ordinary.evaluate_loss(*args, **kwargs)
        with NothingKept(self):
            return -self._ascent(self._program(args, kwargs)).bound_before()

    @adopting
    def run(
        self,
        *args: Any,
        max_steps: int = 1000,
        tol: float = 1e-3,
        num_restarts: int = 1,
        progress: bool = True,
        **kwargs: Any,
    ) -> Posterior | GuideFit:
        """Steps until the bound has converged to `tol` nats, and returns the posterior.

        A run that is cut short (Ctrl-C, an error in the model) leaves the posterior of its last whole sweep; the same call goes on
        from there, and ends bit for bit where it would have ended.  Ctrl-C waits for the end of a sweep, a second one does not.

        Args:
            max_steps: sweeps at most.
            tol: nats: an exact bound stops when its extrapolated remaining gain stays below it for ten sweeps.
            num_restarts: independent starts; the best bound is kept.
            progress: whether to show a progress bar.
        """
        check_run_arguments(self.model, max_steps, tol, num_restarts)
        ordinary = self._settle(args, kwargs)
        if ordinary is not None:
            return ordinary.run(args, kwargs, max_steps=max_steps, tol=tol, progress=progress)
        options = max_steps, tol, num_restarts
        with patient() as check, AllOrNothing(self) as state:
            attempts = self._attempts
            program = attempts.resumed(args, kwargs, options) if attempts is not None else None
            if attempts is None or program is None:
                attempts, program = Attempts(self, args, kwargs, options), self._program(args, kwargs)
            state.also(self._parameters.saved(program))
            attempts.go(program, progress, state, check)
        return self.posterior

    def _run_from_here(self, program: Program, **options: Any) -> Run:
        first, given = self._num_steps, self._given(program)
        return Run(self._ascent(program), first_step=first, given=given, **options)

    @adopting
    def explain(self, *args: Any, **kwargs: Any) -> Explanation:
        """Which (factor, site) pairs are exact, how, and why the others are not; leaves torch's generator untouched."""
        ordinary = self._settle(args, kwargs)
        if ordinary is not None:
            return ordinary.explain(*args, **kwargs)
        with NothingKept(self):
            program = self._program(args, kwargs)
            return Explanation(
                [verdict for plan in program.plans.values() for verdict in plan.verdicts],
                program.blocks,
                self._ascent(program).bound_kind,
                sorted(program.graph.params),
                notes=[*self._q.notes(), *program.notes(), *self._compiled.notes()],
            )

    @property
    def posterior(self) -> Posterior | GuideFit:
        """q at the present λ, with how it was found."""
        if self._ordinary is not None:
            return self._ordinary.posterior()
        if not self._ready:
            raise RuntimeError("there is no posterior yet: call step or run first")
        self._q.refresh()
        (args, kwargs), model = self._call, getattr(self._q, "read_model", self.model)
        outcome = {"history": self._history, "num_steps": self._num_steps, **self._outcome}
        if self._seen is not None and not self._seen.is_confined:
            outcome["response"] = partial(linear_response, self._seen, self._q.naturals)
            outcome["search"] = cache(partial(other_optima, self._seen, self._q.naturals))
        return Posterior(self._q.blocks, self._q.naturals, model=model, args=args, kwargs=kwargs, **outcome)

    # -- state ----------------------------------------------------------------------------------------------------------

    def _settle(self, args: tuple, kwargs: Mapping[str, Any]) -> OrdinaryGradients | None:
        """What fits a guide that is not read as families; None where λ is followed.  Decided at the first call."""
        if self._programs is None and (self._ordinary is None or not self._ordinary.has_run):
            try:
                with isolated_random_state():
                    q = read_guide(self.model, self.guide, args, kwargs, self.loss)
                    programs = Programs(q.model, q.factorisation)
                    program = programs.run(args, kwargs)
                    q.setup(program.graph)
                    q.check(program.messages, partial(first_targets, program, q.naturals))
                self._q, self._programs, self._ordinary = q, programs, None
            except Exception as error:  # what cannot be read runs as under SVI, which says what else is wrong
                reason = reason_of(error)
                self._ordinary = guide_fit(self.model, self.guide, self.optim, self.loss, reason, args, kwargs)
                self._compiled.refuse(f"the guide takes ordinary gradients ({reason})")
            else:
                check_plates(self.model, self.guide, args, kwargs)
        if self._ordinary is None and self._q.refresh():  # somebody else moved the guide's parameters
            self._bound = self._settled = self._attempts = None
        return self._ordinary

    def adopt(self, found: OwnFit) -> None:
        """A statement of the model brings the fit of all of it, which follows λ in a way of its own."""
        options = {"strict": self.strict, "init": self._init, "init_loc_fn": self._init_loc_fn}
        self._ordinary, self._programs = found.make(self.model, self.guide, self.optim, self.loss, **options), None
        self._compiled.refuse(str(found))

    def _program(self, args: tuple, kwargs: Mapping[str, Any]) -> Program:
        assert self._programs is not None
        with self._listening:
            program = self._programs.run(args, kwargs)
        self._call = (args, dict(kwargs))
        if self._ready and program is self._seen:
            return program
        self._q.follow(program.factorisation)
        check_loss_of_data(self._observed, program.graph)
        if self.strict:
            program.refuse_unproved()
        if not self._ready:
            self._start(program, 0)
        elif program is not self._seen:
            self._adapt(program)
        self._seen = program
        self._observed = {name for name, factor in program.graph.factors.items() if factor.is_observed}
        return program

    def _start(self, program: Program, restart: int) -> None:
        """λ at the prior, with `init`, and with exchangeable symmetries broken."""
        if not self._ready:
            check_same_sites(self._q.blocks, program.blocks, "the guide was made for other latent sites")
        loaded = {} if self._ready or self._q.blocks else dict(self._q.naturals)  # a saved guide goes on where it was
        self._q.naturals, self._q.blocks, self._bound = loaded, {}, None
        self._q.setup(program.graph)
        naturals = {name: natural.double() for name, natural in self._q.naturals.items()}
        given = (None, None) if loaded else (self._init, self._init_loc_fn)
        naturals, values = apply_init(program.graph, program.blocks, naturals, *given)
        self._q.naturals = {name: natural.double() for name, natural in naturals.items()}
        self._points = {
            name: {site: values[site] for site in block.site_names}
            for name, block in program.blocks.items()
            if all(site in values for site in block.site_names)
        }
        self._last = list(dict.fromkeys([*self._points, *self._given(program)]))
        if not self._init and not loaded and self._q is self.guide:  # a guide of the user's own starts where it is
            ascent = broken_start(self._ascent(program))
            self._commit(ascent)
            self._last = ascent.last
        self._ready, self._num_steps, self._history, self._settling = True, 0, [], Settling()

    def _given(self, program: Program) -> list[str]:
        """Blocks whose start `init` says."""
        return [name for name, block in program.blocks.items() if set(block.site_names) <= set(self._init or ())]

    def _adapt(self, program: Program) -> None:
        """Another minibatch, or other data: blocks keep their λ, for every element of the full plates."""
        check_same_sites(self._q.blocks, program.blocks, "the model's latent sites changed between steps")
        for name, block in program.blocks.items():
            check_same_block(self._q.blocks[name], block)
        before = self._q.naturals
        self._q.setup(program.graph)
        self._q.naturals = {
            name: before[name] if before[name].shape == natural.shape else natural.double()
            for name, natural in self._q.naturals.items()
        }

    def _ascent(self, program: Program) -> Ascent:
        subsamples = program.graph.subsamples
        naturals = {name: block.select(self._q.naturals[name], subsamples) for name, block in program.blocks.items()}
        ascent = Ascent(program, Beliefs(program.blocks, naturals, self._points), self._last)
        if self._bound is not None and self._bound[0] is program and program.is_exact and not self._points:
            ascent.take_bound(self._bound[1])
        return ascent

    def _commit(self, ascent: Ascent) -> None:
        self._bound = self._settled = self._attempts = None
        program = ascent.program
        subsamples = program.graph.subsamples
        self._q.naturals = {
            name: block.scatter(self._q.naturals[name], ascent.beliefs.naturals[name], subsamples)
            for name, block in program.blocks.items()
        }
        self._points = {name: dict(point) for name, point in ascent.beliefs.points.items()}
