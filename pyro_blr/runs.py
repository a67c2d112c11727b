"""Running until done: exact bounds by their extrapolated gain, estimates by tests that know their noise."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from tqdm.auto import tqdm

from pyro_blr.accuracy import ERROR, MonteCarloError
from pyro_blr.ascent import Ascent
from pyro_blr.climbs import Climb, climb
from pyro_blr.diagnostics import Restart
from pyro_blr.draws import Draws, fresh_seed
from pyro_blr.estimators import standard_error
from pyro_blr.generators import GeneratorStates
from pyro_blr.gradients import ParameterUpdate
from pyro_blr.halts import Halt, Place
from pyro_blr.interrupts import uninterrupted
from pyro_blr.leaps import Leaps, Step, moved_nats
from pyro_blr.levels import levels_of
from pyro_blr.newton import newton_start
from pyro_blr.portfolio import climb_from_the_better
from pyro_blr.program import Program
from pyro_blr.renewal import renewed
from pyro_blr.steps import take_step
from pyro_blr.stopping import has_levelled, remaining_gain

__all__ = ["Run", "is_stochastic"]

CALM_SWEEPS = 10  # consecutive sweeps that the remaining gain must stay small for
ENOUGH = 4096  # draws, beyond which only the error of a mean or sd asks for more, not that of the bound
CLIMB = 5e-5  # nats that a climb on fixed draws may end from its optimum: 0.01 sd of one mean
NEAR = 1e-4  # nats from the optimum, as rough quadrature sees it, from where on fine quadrature goes on
LEVEL_STEPS = 100  # sweeps at most on every level


class Run:
    """One ascent from one start, and why it ended.

    After every sweep it is kept as it is; what cuts a sweep short takes it back there, and `go` goes on from there.
    """

    def __init__(
        self,
        ascent: Ascent,
        *,
        max_steps: int,
        tol: float,
        progress: bool,
        first_step: int = 0,
        given: Collection[str] = (),
    ):
        self.ascent, self.max_steps, self.tol, self.first_step = ascent, max_steps, tol, first_step
        self.commit: Callable[[Ascent], None] = lambda ascent: None  # told of every step on a new run of the model
        self.given = given
        self.check: Callable[[], None] = lambda: None  # raises an interrupt that waits for the end of a sweep
        self.history: list[float] = []
        self.converged, self.stop_reason, self.is_over = False, "", False
        self.place, self._progress = Place(), progress
        self._keep(GeneratorStates())

    @property
    def program(self) -> Program:
        return self.ascent.program

    @property
    def num_steps(self) -> int:
        return len(self.history)

    @property
    def elbo(self) -> float:
        return self.ascent.bound_before()

    def outcome(self, runs: Sequence[Run] = ()) -> dict[str, Any]:
        """What a posterior says of its run; `runs` are all starts, this one among them."""
        return {
            "restarts": [
                Restart(r.elbo, r.ascent.bound_se, r.converged, moved_nats(self.ascent, r.ascent.beliefs)) for r in runs
            ],
            "elbo": self.elbo,
            "elbo_kind": self.ascent.bound_kind,
            "elbo_se": self.ascent.bound_se,
            "converged": self.converged,
            "stop_reason": self.stop_reason,
        }

    def unfinished(self, reason: str) -> dict[str, Any]:
        """The same where it was cut short, of what is at hand."""
        halt, ascent = self.place.halt, self.ascent
        error = standard_error(halt.values) if halt is not None and halt.values is not None else ascent.bound_se
        known: dict[str, Any] = {"elbo": self.history[-1], "elbo_kind": ascent.bound_kind, "elbo_se": error}
        return known | {"converged": False, "stop_reason": reason}

    def go(self, again: Callable[[], Ascent], parameters: ParameterUpdate) -> None:
        """Runs to the end; `again` runs the model once more (minibatches, changed parameters)."""
        self._bar = tqdm(total=self.max_steps, initial=self.num_steps, disable=not self._progress, leave=False)
        try:
            if is_stochastic(self.program, parameters):
                self._stochastic(again, parameters)
            elif self.program.is_exact:
                self._exact()
            elif self.program.is_deterministic:
                self._integrated()
            else:
                self._sampled()
        finally:
            self._bar.close()
        if not self.converged and not self.stop_reason:
            self.stop_reason = f"max_steps={self.max_steps} reached before the bound converged"
        self.is_over = True

    def rewind(self) -> None:
        """Back to where the last whole sweep ended, generators too."""
        self.place, self.ascent, restore, steps, generators = self._kept
        restore()
        del self.history[steps:]
        self.converged, self.stop_reason = False, ""
        generators.restore()

    @property
    def kept_steps(self) -> int:
        """Whole sweeps, which nothing takes away."""
        return self._kept[3]

    def _keep(self, generators: GeneratorStates) -> None:
        self._kept = self.place, self.ascent, self.ascent.saved(), len(self.history), generators

    def _tick(self, bound: float, halt: Halt | None = None, calm: int = 0, draws: bool = True) -> None:
        """The end of a sweep: from here on it is not lost.  What `draws` nothing leaves the generators alone, whose state is dear."""
        self.history.append(bound)
        self.place = replace(self.place, halt=halt, calm=calm)
        self._keep(GeneratorStates() if draws else self._kept[-1])
        self._bar.update(1)
        if self.num_steps % 10 == 0:
            self._bar.set_postfix(elbo=f"{bound:.4f}", refresh=False)
        self.check()

    # -- exact -----------------------------------------------------------------------------------------------

    def _exact(self) -> None:
        single = self.ascent.bound_kind == "exact evidence"
        if self.first_step == self.num_steps == 0 and self.given:
            renewed(self.ascent, self.given)
        while self.num_steps < self.max_steps and not (single and self.history) and self.place.calm < CALM_SWEEPS:
            leaps = self.place.leaps or Leaps.of(self.ascent)
            if self.history:
                _, leaps = leaps.leap(self.ascent, None, 1.0, self.history[-1])
            start = dict(self.ascent.beliefs.naturals)
            self.ascent.sweep()
            bound = self.ascent.bound_before()
            if self.history:
                self._refuse_fall(self.history[-1], bound)
            gain = remaining_gain([*self.history[-2:], bound])
            ends = self.ascent.beliefs.naturals
            step = None if leaps.is_waiting else Step.between(self.program.blocks, start, ends)
            self.place = replace(self.place, leaps=leaps.after(step))
            self._tick(bound, draws=False, calm=self.place.calm + 1 if gain < self.tol else 0)
        if single:
            self._stop("one exact update: the posterior is exact")
        elif self.place.calm >= CALM_SWEEPS:
            self._stop(f"the bound's remaining gain stayed below tol={self.tol:g} nats for {CALM_SWEEPS} sweeps")

    def _refuse_fall(self, before: float, bound: float) -> None:
        coarse = any(block.dtype == torch.float32 for block in self.program.blocks.values())
        slack = (1e-4 if coarse else 1e-8) * max(1.0, abs(before))
        if bound < before - slack:
            raise RuntimeError(
                f"the exact bound fell from {before!r} to {bound!r} in sweep {self.num_steps}: "
                "an update that is called exact is not. "
                "Please report the model; engine.explain says which updates these are"
            )

    def _stop(self, reason: str) -> None:
        self.converged, self.stop_reason = True, reason

    # -- quadrature ------------------------------------------------------------------------------------------

    def _integrated(self) -> None:
        """Newton-like steps on a bound without noise, from a mode: roughly integrated until they are near its optimum."""
        self._start()
        tol, messages = min(self.tol, 1e-6), self.program.messages
        while True:  # climbs on few random points go as far as these can tell
            if self.place.halt is None:
                least = NEAR if self.place.is_rough else tol
                self.place = replace(self.place, tol=max(tol, least, 0.01 * messages.quadrature_noise))
            place, limit = self.place, self._limit()
            with messages.rough() if place.is_rough else contextlib.nullcontext():
                climbed = climb_from_the_better(self.ascent, place.centre, place.tol, limit, self._tick, place.halt)
            if place.is_rough and self.num_steps < self.max_steps:
                self.place = replace(self.place, is_rough=False, halt=None, centre=None)
                continue
            if not climbed.converged or self.num_steps >= self.max_steps or not messages.refine():
                break
            self.place = replace(self.place, halt=None, centre=None)
        if climbed.converged:
            self._stop(f"the remaining distance to the optimum of the bound is below {self.place.tol:.1g} nats")
        elif self.num_steps < self.max_steps:
            self.stop_reason = f"the steps did not settle: {climbed.last:.2g} nats apart, expected {tol:g}"
            self.ascent.refuse_improper(0, 0, settled=False)
        self.ascent.bound_before()

    def _start(self) -> None:
        """Once: a seed where one is needed, and Newton's method from where the first of all sweeps begins."""
        if self.place.has_started:
            return
        seed = 0 if self.program.is_deterministic else fresh_seed()
        centre = self.ascent.beliefs.copy() if self.first_step == 0 else None
        if self.first_step == 0:
            with self.program.messages.rough():
                newton_start(self.ascent)
        self.place = replace(self.place, has_started=True, seed=seed, before=self.ascent.beliefs, centre=centre)

    def _limit(self) -> int:
        """Sweeps that the present climb may have, those behind it included."""
        return self.max_steps - self.num_steps + (self.place.halt.number if self.place.halt is not None else 0)

    # -- sampled ---------------------------------------------------------------------------------------------

    def _sampled(self) -> None:
        """Newton-like steps on draws that stay fixed, four times as many draws at every level, until these no
        longer matter: to the bound, and to any mean or sd.
        """
        self._start()
        tol, levels, failed = max(self.tol, 1e-6), levels_of(self.program), ""
        for level in range(self.place.level, len(levels)):
            size, limit, place = levels[level], min(LEVEL_STEPS, self._limit()), self.place
            draws = Draws(place.seed + level, size, balanced=True)
            climbed = climb(self.ascent, draws, min(tol, CLIMB), limit, self._tick, place.halt, place.factor)
            optima, before = self.place.optima.copy(), self.place.before or self.ascent.beliefs
            optima.add(self.ascent.beliefs, size)
            if self.num_steps >= self.max_steps and not climbed.converged:
                failed = ""
                break
            failed = _unfinished(climbed, optima.error(), size, tol)
            apart = moved_nats(self.ascent, before)
            if not failed and (optima.share * apart < tol or size >= ENOUGH or level == len(levels) - 1):
                self._stop(
                    f"the optima on {levels[level - 1]} and on {size} fixed draws are {apart:.2g} nats apart (tol={tol:g}), "
                    f"their Monte-Carlo error is {optima.error().size:.1g} sd"
                )
                break
            if self.num_steps >= self.max_steps:
                break
            place = replace(self.place, level=level + 1, halt=None, factor=climbed.factor)
            self.place = replace(place, before=self.ascent.beliefs, optima=optima)
        self.stop_reason = self.stop_reason or failed
        if self.num_steps < self.max_steps and (climbed.astray or not self.converged):
            self.ascent.refuse_improper(self.place.seed, min(levels[-1], ENOUGH), self.converged)
        self._measure(size, min(levels[-1], ENOUGH), tol)

    def _measure(self, size: int, most: int, tol: float) -> None:
        """The bound on draws of its own: as many as the optimum was found on, four times as many while it is not known to 10 `tol`."""
        while True:
            self.ascent.measure(Draws(fresh_seed(), size))
            if size >= most or self.ascent.bound_se <= 10 * tol:
                return
            size = min(4 * size, most)

    # -- minibatches and parameters --------------------------------------------------------------------------

    def _stochastic(self, again: Callable[[], Ascent], parameters: ParameterUpdate) -> None:
        """Steps on fresh runs of the model, until the running mean of the bound has stopped rising beyond its
        noise.
        """
        while not self._has_levelled(window := 50):
            if self.num_steps >= self.max_steps:
                return
            if self.history:
                self.ascent = again()
            take_step(self.ascent, self.first_step + self.num_steps)
            bound = self.ascent.bound_before()
            with uninterrupted():  # q, parameters and what is kept of the run belong together
                parameters.step(self.program, self.ascent)
                self.commit(self.ascent)
                self._tick(bound)
        self._stop(f"the running mean of the bound over {window} steps no longer rises beyond its noise")

    def _has_levelled(self, window: int) -> bool:
        is_due = self.num_steps >= 4 * window and self.num_steps % 10 == 0
        return is_due and has_levelled(self.history, window, self.tol)


def is_stochastic(program: Program, parameters: ParameterUpdate) -> bool:
    """Whether steps run the model anew: minibatches, or parameters that move."""
    return program.is_subsampled or bool(parameters.found(program))


def _unfinished(climbed: Climb, error: MonteCarloError, size: int, tol: float) -> str:
    """Why an optimum on `size` fixed draws is not good enough; nothing where it is."""
    if not climbed.converged and climbed.last >= tol:
        return f"the steps on {size} draws did not settle: {climbed.last:.2g} nats apart, tol={tol:g}"
    if error.size < ERROR:
        return ""
    return f"the Monte-Carlo error in {error.block!r} is {error.size:.2g} sd on {size} draws, expected {ERROR:g}"
