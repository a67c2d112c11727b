"""`BLRInference`: the Bayesian learning rule behind SVI's face."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import Any

import pyro
from torch import Tensor

from pyro_blr.ascent import Ascent
from pyro_blr.beliefs import Beliefs
from pyro_blr.checks import check_loss_of_data, check_same_block, check_same_sites
from pyro_blr.explain import Explanation
from pyro_blr.gradients import GuideFit, OrdinaryGradients, ParameterUpdate, check_loss, check_optim
from pyro_blr.guides import AutoExponentialFamily
from pyro_blr.posterior import Posterior
from pyro_blr.program import Program, Programs
from pyro_blr.runs import Run
from pyro_blr.starts import apply_init
from pyro_blr.steps import take_step
from pyro_blr.symmetry import broken_start

__all__ = ["BLRInference"]


class BLRInference:
    """λ_i ← (1 − ρ) λ_i + (ρ / s_i) Σ_f s_f ∇_{μ_i} E_q[log f]   (Khan and Rue 2023, eq. 3).

    Takes SVI's arguments in SVI's order.  Conjugate messages are exact and ρ is 1; others are estimated, and ρ is found.

    Args:
        model: a Pyro model.
        guide: nothing, or an `AutoExponentialFamily`; another guide takes the ordinary gradient of `loss` through `optim`.
        optim: a Pyro optimiser for what is not a variational parameter; Adam where it is left out and there are any.
        loss: an ELBO of Pyro's (`Trace_ELBO`, `TraceMeanField_ELBO`, `TraceEnum_ELBO`, `TraceGraph_ELBO`).
        blocks: how q factorises: `"auto"`, `"sites"`, `"elements"`, or a list of groups of site names.
        init: site -> value (its T is that site's expectation until the first update) or distribution (sets λ).
        init_loc_fn: one of Pyro's `init_to_…`, for the sites that `init` leaves out.
        strict: refuse messages that are only verified numerically to be exact.
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
        if compile:
            raise NotImplementedError("compile=True is not available yet; leave it out: steps run uncompiled")
        check_loss(loss)
        check_optim(optim)
        self.model, self.optim, self.loss = model, optim, loss
        self.strict, self._init, self._init_loc_fn = strict, init, init_loc_fn
        self._ordinary: OrdinaryGradients | None = None
        if guide is not None and not isinstance(guide, AutoExponentialFamily):
            _refuse_without_blocks(blocks, init, init_loc_fn)
            self._ordinary = OrdinaryGradients(model, guide, optim, loss)
            self.guide: Any = guide
            return
        factorisation = "sites" if blocks == "auto" else blocks
        self.guide = guide if guide is not None else AutoExponentialFamily(model, factorisation)
        self._programs = Programs(model, self.guide.factorisation)
        self._parameters = ParameterUpdate(model, optim)
        self._points: dict[str, dict[str, Tensor]] = {}
        self._last: list[str] = []
        self._seen: Program | None = None
        self._observed: set[str] = set()
        self._bound: tuple[Program, float] | None = None
        self._ready = False
        self._num_steps = 0
        self._history: list[float] = []
        self._outcome: dict[str, Any] = {}
        self._call: tuple[tuple, dict[str, Any]] = ((), {})

    # -- SVI's face ---------------------------------------------------------------------------------------------------

    def step(self, *args: Any, **kwargs: Any) -> float:
        """One sweep over all blocks; returns minus the ELBO before it, as `SVI.step` does."""
        if self._ordinary is not None:
            return self._ordinary.step(*args, **kwargs)
        with _all_or_nothing(self):
            program = self._program(args, kwargs)
            ascent = self._ascent(program)
            loss = -ascent.bound_before()
            take_step(ascent, self._num_steps)
            self._commit(ascent)
            self._num_steps += 1
            self._history.append(ascent.bound_before())
            self._bound = program, self._history[-1]
            self._parameters.step(program, ascent)  # last: nothing after it can fail
        return loss

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> float:
        """Minus the ELBO; changes nothing."""
        if self._ordinary is not None:
            return self._ordinary.evaluate_loss(*args, **kwargs)
        with _nothing_kept(self):
            return -self._ascent(self._program(args, kwargs)).bound_before()

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

        Args:
            max_steps: sweeps at most.
            tol: nats: an exact bound stops when its extrapolated remaining gain stays below it for ten sweeps.
            num_restarts: independent starts; the best bound is kept.
            progress: whether to show a progress bar.
        """
        _check_run_arguments(self.model, max_steps, tol, num_restarts)
        if self._ordinary is not None:
            return self._ordinary.run(args, kwargs, max_steps=max_steps, tol=tol, progress=progress)
        with _all_or_nothing(self) as state:
            program = self._program(args, kwargs)
            state.also(self._parameters.saved(program))
            best: Run | None = None
            for restart in range(num_restarts):
                if restart > 0 or num_restarts > 1:
                    self._start(program, restart)
                run = Run(
                    self._ascent(program),
                    self._commit,
                    max_steps=max_steps,
                    tol=tol,
                    progress=progress,
                    first_step=self._num_steps,
                )
                run.go(lambda: self._ascent_again(args, kwargs), self._parameters)
                if best is None or run.elbo > best.elbo:
                    best = run
            assert best is not None
            self._commit(best.ascent)
            self._num_steps += best.num_steps
            self._history += best.history
            self._outcome = best.outcome()
            self._call = (args, kwargs)
        return self.posterior

    def explain(self, *args: Any, **kwargs: Any) -> Explanation:
        """Which (factor, site) pairs are exact, how, and why the others are not; leaves torch's generator untouched."""
        if self._ordinary is not None:
            return self._ordinary.explain(*args, **kwargs)
        with _nothing_kept(self):
            program = self._program(args, kwargs)
            return Explanation(
                [verdict for plan in program.plans.values() for verdict in plan.verdicts],
                program.blocks,
                self._ascent(program).bound_kind,
                sorted(program.graph.params),
                notes=program.notes(),
            )

    @property
    def posterior(self) -> Posterior | GuideFit:
        """q at the present λ, with how it was found."""
        if self._ordinary is not None:
            return self._ordinary.posterior()
        if not self._ready:
            raise RuntimeError("there is no posterior yet: call step or run first")
        args, kwargs = self._call
        outcome = {"history": self._history, "num_steps": self._num_steps, **self._outcome}
        return Posterior(self.guide.blocks, self.guide.naturals, model=self.model, args=args, kwargs=kwargs, **outcome)

    # -- state ----------------------------------------------------------------------------------------------------------

    def _program(self, args: tuple, kwargs: Mapping[str, Any]) -> Program:
        program = self._programs.run(args, kwargs)
        check_loss_of_data(self._observed, program.graph)
        if self.strict:
            program.refuse_unproved()
        self._call = (args, dict(kwargs))
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
            check_same_sites(self.guide.blocks, program.blocks, "the guide was made for other latent sites")
        self.guide.naturals, self.guide.blocks, self._bound = {}, {}, None
        self.guide.setup(program.graph)
        naturals = {name: natural.double() for name, natural in self.guide.naturals.items()}
        naturals, values = apply_init(program.graph, program.blocks, naturals, self._init, self._init_loc_fn)
        self.guide.naturals = {name: natural.double() for name, natural in naturals.items()}
        self._points = {
            name: {site: values[site] for site in block.site_names}
            for name, block in program.blocks.items()
            if all(site in values for site in block.site_names)
        }
        self._last = list(self._points)
        if not self._init:
            ascent = broken_start(self._ascent(program))
            self._commit(ascent)
            self._last = ascent.last
        self._ready, self._num_steps, self._history = True, 0, []

    def _adapt(self, program: Program) -> None:
        """Another minibatch, or other data: blocks keep their λ, for every element of the full plates."""
        check_same_sites(self.guide.blocks, program.blocks, "the model's latent sites changed between steps")
        for name, block in program.blocks.items():
            check_same_block(self.guide.blocks[name], block)
        before = self.guide.naturals
        self.guide.setup(program.graph)
        self.guide.naturals = {
            name: before[name] if before[name].shape == natural.shape else natural.double()
            for name, natural in self.guide.naturals.items()
        }

    def _ascent(self, program: Program) -> Ascent:
        subsamples = program.graph.subsamples
        naturals = {name: block.select(self.guide.naturals[name], subsamples) for name, block in program.blocks.items()}
        ascent = Ascent(program, Beliefs(program.blocks, naturals, self._points), self._last)
        if self._bound is not None and self._bound[0] is program and program.is_exact and not self._points:
            ascent.take_bound(self._bound[1])
        return ascent

    def _ascent_again(self, args: tuple, kwargs: Mapping[str, Any]) -> Ascent:
        return self._ascent(self._program(args, kwargs))

    def _commit(self, ascent: Ascent) -> None:
        self._bound = None
        program = ascent.program
        subsamples = program.graph.subsamples
        self.guide.naturals = {
            name: block.scatter(self.guide.naturals[name], ascent.beliefs.naturals[name], subsamples)
            for name, block in program.blocks.items()
        }
        self._points = {name: dict(point) for name, point in ascent.beliefs.points.items()}


class _all_or_nothing:
    """A step that fails leaves λ, steps, parameters and the random generators as they were."""

    _attributes = (
        "_points",
        "_last",
        "_seen",
        "_observed",
        "_ready",
        "_num_steps",
        "_history",
        "_outcome",
        "_call",
        "_bound",
    )

    def __init__(self, engine: BLRInference):
        self.engine = engine
        self.others: list[Callable[[], None]] = []

    def __enter__(self) -> _all_or_nothing:
        engine = self.engine
        self.guide = dict(engine.guide.naturals), dict(engine.guide.blocks)
        self.saved = {key: getattr(engine, key) for key in self._attributes}
        self.length = len(engine._history)
        self.generators = pyro.util.get_rng_state()
        return self

    def also(self, restore: Callable[[], None]) -> None:
        """Something else to put back: parameters, and what their optimiser remembers."""
        self.others.append(restore)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is not None:
            self.restore()

    def restore(self) -> None:
        engine = self.engine
        engine.guide.naturals, engine.guide.blocks = self.guide
        for key, value in self.saved.items():
            setattr(engine, key, value)
        del engine._history[self.length :]
        pyro.util.set_rng_state(self.generators)
        for restore in self.others:
            restore()


class _nothing_kept(_all_or_nothing):
    """A look at the model that changes nothing, whether it fails or not; the first one keeps its start."""

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is not None or self.saved["_ready"]:
            self.restore()
        else:
            pyro.util.set_rng_state(self.generators)


def _refuse_without_blocks(blocks: Any, init: Any, init_loc_fn: Any) -> None:
    given = [
        name
        for name, value in (("blocks", blocks), ("init", init), ("init_loc_fn", init_loc_fn))
        if value not in (None, "auto")
    ]
    if given:
        raise ValueError(
            f"{' and '.join(given)}: found beside a guide of your own, expected without one: the guide says how q factorises and where it "
            "starts. Leave the guide out, or start it where you want"
        )


def _check_run_arguments(model: Callable, max_steps: int, tol: float, num_restarts: int) -> None:
    try:
        taken = {"max_steps", "tol", "num_restarts", "progress"} & set(signature(model).parameters)
    except (TypeError, ValueError):
        taken = set()
    if taken:
        raise ValueError(
            f"the model's own arguments {sorted(taken)} are also arguments of run: rename them in the model, or call step in a loop"
        )
    if max_steps < 1:
        raise ValueError(f"max_steps: found {max_steps}, expected at least 1")
    if not tol > 0:
        raise ValueError(f"tol: found {tol}, expected a positive number of nats")
    if num_restarts < 1:
        raise ValueError(f"num_restarts: found {num_restarts}, expected at least 1")
