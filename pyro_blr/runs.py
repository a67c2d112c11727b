"""Running until done: exact bounds by their extrapolated gain, estimates by tests that know their noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from tqdm.auto import tqdm

from pyro_blr.ascent import Ascent
from pyro_blr.gradients import ParameterUpdate
from pyro_blr.program import Program
from pyro_blr.targets import Draws, fresh_seed

__all__ = ["Run"]

CALM_SWEEPS = 10  # consecutive sweeps that the remaining gain must stay small for
LEVELS = (64, 256, 1024)  # draws; each level starts from the optimum of the one before


class Run:
    """One ascent from one start, and why it ended."""

    def __init__(self, ascent: Ascent, commit: Callable[[Ascent], None], *, max_steps: int, tol: float, progress: bool, first_step: int = 0):
        self.ascent, self.max_steps, self.tol, self.first_step = ascent, max_steps, tol, first_step
        self.commit = commit
        self.history: list[float] = []
        self.num_steps, self.converged, self.stop_reason = 0, False, ""
        self._bar = tqdm(total=max_steps, disable=not progress, leave=False)

    @property
    def program(self) -> Program:
        return self.ascent.program

    @property
    def elbo(self) -> float:
        return self.ascent.bound_before()

    def outcome(self) -> dict[str, Any]:
        return {
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

    # -- exact ----------------------------------------------------------------------------------------------------------

    def _exact(self) -> None:
        calm, single = 0, self.ascent.bound_kind == "exact evidence"
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
                f"the exact bound fell from {before!r} to {bound!r} in sweep {self.num_steps}: an update that is called exact is not. "
                "Please report the model; engine.explain says which updates these are"
            )

    def _stop(self, reason: str) -> None:
        self.converged, self.stop_reason = True, reason

    # -- sampled --------------------------------------------------------------------------------------------------------

    def _sampled(self) -> None:
        """Newton-like steps on draws that stay fixed, more draws at every level; each step is halved while the bound falls."""
        seed = fresh_seed()
        self._climb(Draws(seed, 0), 1e-2, limit=30)
        for level, size in enumerate(LEVELS):
            if self.num_steps >= self.max_steps:
                return
            done = self._climb(Draws(seed + level, size), max(self.tol, 1e-6), limit=60)
        if done:
            self._stop(f"the bound on {LEVELS[-1]} fixed draws changed by less than {max(self.tol, 1e-6):g} nats in a sweep")

    def _climb(self, draws: Draws, tol: float, limit: int) -> bool:
        ascent = self.ascent
        self._first_updates(draws)
        bound = ascent.estimate(draws)[0]
        rate = 1.0
        for _ in range(limit):
            if self.num_steps >= self.max_steps:
                return False
            start, best = ascent.beliefs.copy(), -math.inf
            for _ in range(12):
                ascent.beliefs = start.copy()
                ascent.sweep(None, draws, rate)
                best = self._try_bound(draws)
                if best >= bound - 1e-9 * max(1.0, abs(bound)):
                    break
                rate *= 0.5
            else:
                ascent.beliefs = start
                self._tick(bound)
                return True
            self._tick(best)
            if abs(best - bound) < tol and rate == 1.0:
                return True
            bound, rate = best, min(1.0, rate * 2)
        return False

    def _first_updates(self, draws: Draws) -> None:
        for name in list(self.ascent.order):
            if name in self.ascent.beliefs.points:
                self.ascent.sweep([name], draws, 1.0)

    def _try_bound(self, draws: Draws) -> float:
        try:
            return self.ascent.estimate(draws)[0]
        except ValueError:  # not finite there: too long a step
            return -math.inf

    # -- minibatches and parameters -------------------------------------------------------------------------------------

    def _stochastic(self, again: Callable[[], Ascent], parameters: ParameterUpdate) -> None:
        """Steps on fresh runs of the model, until the running mean of the bound has stopped rising beyond its noise."""
        window = 50
        for number in range(self.max_steps):
            self.ascent.step(self.first_step + number)
            self.commit(self.ascent)
            parameters.step(self.program, self.ascent)
            self._tick(self.ascent.bound_before())
            if number + 1 < self.max_steps:
                self.ascent = again()
            if self.num_steps >= 4 * window and self.num_steps % 10 == 0 and has_levelled(self.history, window, self.tol):
                self._stop(f"the running mean of the bound over {window} steps no longer rises beyond its noise")
                return

def remaining_gain(history: list[float]) -> float:
    """Aitken's extrapolation of how much a linearly converging bound can still gain."""
    if len(history) < 3:
        return math.inf
    last, before = history[-1] - history[-2], history[-2] - history[-3]
    if abs(last) <= 1e-12 * max(1.0, abs(history[-1])):
        return 0.0
    if before <= 0:
        return abs(last)
    ratio = last / before
    return last * ratio / (1 - ratio) if ratio < 1 else math.inf


def has_levelled(history: list[float], window: int, tol: float) -> bool:
    """Whether the mean of the last `window` values exceeds that of the window before by less than noise or tol."""
    recent = torch.tensor(history[-window:], dtype=torch.float64)
    earlier = torch.tensor(history[-2 * window : -window], dtype=torch.float64)
    noise = float(((recent.var() + earlier.var()) / window).sqrt())
    return float(recent.mean() - earlier.mean()) < max(tol, noise)
