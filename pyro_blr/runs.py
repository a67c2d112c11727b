"""Running until done: exact bounds by their extrapolated gain, estimates by tests that know their noise."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from pyro_blr.accuracy import ERROR, MonteCarloError, Optima
from pyro_blr.ascent import Ascent
from pyro_blr.climbs import Climb, climb, moved_nats
from pyro_blr.diagnostics import Restart
from pyro_blr.draws import Draws, fresh_seed
from pyro_blr.gradients import ParameterUpdate
from pyro_blr.newton import newton_start
from pyro_blr.program import Program
from pyro_blr.renewal import renewed
from pyro_blr.steps import take_step
from pyro_blr.stopping import has_levelled, remaining_gain

__all__ = ["Run"]

CALM_SWEEPS = 10  # consecutive sweeps that the remaining gain must stay small for
LEVELS = (64, 256, 1024, 4096, 16384)  # draws; each level starts from the optimum of the one before
REPLAYED_LEVELS = (64, 256)  # the same where every draw runs the model again
ENOUGH = 4096  # draws, beyond which only the error of a mean or sd asks for more, not that of the bound
WORK = 2 * 10**9
CLIMB = 5e-5  # nats that a climb on fixed draws may end from its optimum: 0.01 sd of one mean
LEVEL_STEPS = 100  # sweeps at most on every level


class Run:
    """One ascent from one start, and why it ended."""

    def __init__(
        self,
        ascent: Ascent,
        commit: Callable[[Ascent], None],
        *,
        max_steps: int,
        tol: float,
        progress: bool,
        first_step: int = 0,
        given: Collection[str] = (),
    ):
        self.ascent, self.max_steps, self.tol, self.first_step = ascent, max_steps, tol, first_step
        self.commit, self.given = commit, given
        self.history: list[float] = []
        self.num_steps, self.converged, self.stop_reason = 0, False, ""
        self._bar = tqdm(total=max_steps, disable=not progress, leave=False)

    @property
    def program(self) -> Program:
        return self.ascent.program

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

    def go(self, again: Callable[[], Ascent], parameters: ParameterUpdate) -> None:
        """Runs to the end; `again` runs the model once more (minibatches, changed parameters)."""
        try:
            if self.program.is_subsampled or parameters.found(self.program):
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

    def _tick(self, bound: float) -> None:
        self.history.append(bound)
        self.num_steps += 1
        self._bar.update(1)
        if self.num_steps % 10 == 0:
            self._bar.set_postfix(elbo=f"{bound:.4f}", refresh=False)

    # -- exact -----------------------------------------------------------------------------------------------

    def _exact(self) -> None:
        calm, single = 0, self.ascent.bound_kind == "exact evidence"
        if self.first_step == 0 and self.given:
            renewed(self.ascent, self.given)
        while self.num_steps < self.max_steps:
            before = self.history[-1] if self.history else None
            self.ascent.sweep()
            bound = self.ascent.bound_before()
            self._tick(bound)
            if single:
                self._stop("one exact update: the posterior is exact")
                return
            if before is not None:
                self._refuse_fall(before, bound)
            calm = calm + 1 if remaining_gain(self.history) < self.tol else 0
            if calm >= CALM_SWEEPS:
                self._stop(f"the bound's remaining gain stayed below tol={self.tol:g} nats for {CALM_SWEEPS} sweeps")
                return

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
        """Newton-like steps on a bound without noise, from a mode."""
        if self.first_step == 0:
            newton_start(self.ascent)
        tol = min(self.tol, 1e-6)
        while True:  # climbs on few random points go as far as these can tell
            noise = self.program.messages.quadrature_noise
            climbed = climb(self.ascent, None, max(tol, 0.01 * noise), self.max_steps - self.num_steps, self._tock)
            if not climbed.converged or self.num_steps >= self.max_steps or not self.program.messages.refine():
                break
        if climbed.converged:
            self._stop(f"the remaining distance to the optimum of the bound is below {tol:g} nats")
        elif self.num_steps < self.max_steps:
            self.stop_reason = f"the steps did not settle: {climbed.last:.2g} nats apart, expected {tol:g}"
            self.ascent.refuse_improper(0, 0, settled=False)
        self.ascent.bound_before()

    # -- sampled ---------------------------------------------------------------------------------------------

    def _sampled(self) -> None:
        """Newton-like steps on draws that stay fixed, four times as many draws at every level, until these no
        longer matter: to the bound, and to any mean or sd.
        """
        seed, tol = fresh_seed(), max(self.tol, 1e-6)
        if self.first_step == 0:
            newton_start(self.ascent)
        replayed = any(plan.replayed for plan in self.program.plans.values())
        levels = REPLAYED_LEVELS if replayed else self._affordable()
        optima, failed = Optima(), ""
        for level, size in enumerate(levels):
            before = self.ascent.beliefs
            climbed = climb(self.ascent, Draws(seed + level, size), min(tol, CLIMB), LEVEL_STEPS, self._tock)
            optima.add(self.ascent.beliefs, size)
            if self.num_steps >= self.max_steps and not climbed.converged:
                failed = ""
                break
            failed = _unfinished(climbed, optima.error(), size, tol)
            apart = moved_nats(self.ascent, before)
            if not failed and (apart < tol or size >= ENOUGH or level == len(levels) - 1):
                self._stop(
                    f"the optima on {levels[level - 1]} and on {size} fixed draws are {apart:.2g} nats apart (tol={tol:g}), "
                    f"their Monte-Carlo error is {optima.error().size:.1g} sd"
                )
                break
            if self.num_steps >= self.max_steps:
                break
        self.stop_reason = self.stop_reason or failed
        many = min(levels[-1], ENOUGH)
        if self.num_steps < self.max_steps:
            self.ascent.refuse_improper(seed, many, self.converged)
        self.ascent.measure(Draws(fresh_seed(), many))

    def _affordable(self) -> tuple[int, ...]:
        """The levels whose sweep costs at most `WORK` numbers, the first one twice where it is the only one: large data
        determine their posterior from few draws.
        """
        messages = self.program.messages
        factors = [name for name, plan in self.program.plans.items() if not plan.exact]
        drawn = {name for factor in factors for name in self.program.plans[factor].sampled}
        cost = messages.elements(factors) * max((self.program.blocks[name].num_directions for name in drawn), default=1)
        return LEVELS[:1] + (tuple(size for size in LEVELS[1:] if size * cost <= WORK) or LEVELS[:1])

    def _tock(self, bound: float) -> bool:
        self._tick(bound)
        return self.num_steps < self.max_steps

    # -- minibatches and parameters --------------------------------------------------------------------------

    def _stochastic(self, again: Callable[[], Ascent], parameters: ParameterUpdate) -> None:
        """Steps on fresh runs of the model, until the running mean of the bound has stopped rising beyond its
        noise.
        """
        window = 50
        for number in range(self.max_steps):
            take_step(self.ascent, self.first_step + number)
            self.commit(self.ascent)
            parameters.step(self.program, self.ascent)
            self._tick(self.ascent.bound_before())
            if number + 1 < self.max_steps:
                self.ascent = again()
            if (
                self.num_steps >= 4 * window
                and self.num_steps % 10 == 0
                and has_levelled(self.history, window, self.tol)
            ):
                self._stop(f"the running mean of the bound over {window} steps no longer rises beyond its noise")
                return


def _unfinished(climbed: Climb, error: MonteCarloError, size: int, tol: float) -> str:
    """Why an optimum on `size` fixed draws is not good enough; nothing where it is."""
    if not climbed.converged and climbed.last >= tol:
        return f"the steps on {size} draws did not settle: {climbed.last:.2g} nats apart, tol={tol:g}"
    if error.size < ERROR:
        return ""
    return f"the Monte-Carlo error in {error.block!r} is {error.size:.2g} sd on {size} draws, expected {ERROR:g}"
