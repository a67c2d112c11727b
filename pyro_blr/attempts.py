"""The starts of one call of `run`, what is left of them where it is cut short, and how the same call goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pyro_blr.ascent import Ascent
from pyro_blr.checks import ImproperPosteriorError
from pyro_blr.interrupts import cut_short, uninterrupted
from pyro_blr.program import Program
from pyro_blr.runs import Run, is_stochastic
from pyro_blr.sameness import Call
from pyro_blr.transactions import AllOrNothing

__all__ = ["Attempts"]


class Attempts:
    """Runs from so many starts, one after the other.

    What cuts them short leaves the engine at the last whole sweep of the best one.  That a posterior is found to be improper is no
    interruption: no sweep before was a step towards one, and all is undone.
    """

    def __init__(self, engine: Any, args: tuple, kwargs: Mapping[str, Any], options: tuple[int, float, int]):
        self.engine, self.args, self.kwargs = engine, args, kwargs
        self.options = options  # of `run`: max_steps, tol, num_restarts
        self.call = Call(args, kwargs)
        self.runs: list[Run] = []
        self.before = 0, 0  # steps and length of the history

    def resumed(self, args: tuple, kwargs: Mapping[str, Any], options: tuple) -> Program | None:
        """The program, where these attempts were cut short in the same call on the same data: they go on from there."""
        engine, run = self.engine, self.runs[-1]
        program = run.program
        if options != self.options or not self.call.is_repeated(args, kwargs):
            return None
        if not self._is_stochastic and engine._program(args, kwargs) is not program:
            return None
        engine._num_steps, engine._history = self.before[0], engine._history[: self.before[1]]
        run.rewind()
        return program

    @property
    def _is_stochastic(self) -> bool:
        return is_stochastic(self.runs[-1].program, self.engine._parameters)

    def go(self, program: Program, progress: bool, state: AllOrNothing, check: Callable[[], None]) -> None:
        """Leaves the engine at the best run, or where it was cut short; `state` is done then.  `check` is called after every sweep."""
        engine, good = self.engine, AllOrNothing(self.engine)
        if not self.runs:
            self.before = engine._num_steps, len(engine._history)
        good.take()

        def commit(ascent: Ascent) -> None:
            engine._commit(ascent)
            good.take()

        try:
            for restart in range(self.options[-1]):
                if restart == len(self.runs):
                    self._begin(program, restart, progress)
                run = self.runs[restart]
                if not run.is_over:
                    run.commit, run.check = commit, check
                    run.go(lambda: engine._ascent(engine._program(self.args, self.kwargs)), engine._parameters)
            best = max(self.runs, key=lambda run: run.elbo)
            self._leave(best, best.outcome(self.runs if len(self.runs) > 1 else ()), state)
        except BaseException as error:
            if not state.is_done:
                self._cut(error, good, state)
            raise

    def _begin(self, program: Program, restart: int, progress: bool) -> None:
        engine, (max_steps, tol, number) = self.engine, self.options
        if number > 1:
            engine._start(program, restart)
            self.before = 0, 0
        self.runs.append(engine._run_from_here(program, max_steps=max_steps, tol=tol, progress=progress))

    def _leave(self, run: Run, outcome: dict[str, Any], state: AllOrNothing) -> None:
        engine = self.engine
        with uninterrupted():
            engine._commit(run.ascent)
            engine._num_steps = self.before[0] + run.num_steps
            engine._history = [*engine._history[: self.before[1]], *run.history]
            engine._outcome, engine._call = outcome, (self.args, self.kwargs)
            state.done()

    def _cut(self, error: BaseException, good: AllOrNothing, state: AllOrNothing) -> None:
        """Leaves the last whole sweep of the best run, if there is one."""
        whole = [run for run in self.runs if run.kept_steps]
        if not whole or (isinstance(error, ImproperPosteriorError) and not self._is_stochastic):
            return
        with uninterrupted():
            good.restore()
            good.forget()
            if not self.runs[-1].is_over:
                self.runs[-1].rewind()
            best = max(whole, key=lambda run: run.history[-1])
            self._leave(best, best.unfinished(cut_short(error, best.num_steps)), state)
            self.engine._attempts = self
