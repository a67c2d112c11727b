"""Steps without the model's Python: once two steps ran a model alike, the next ones replay what was captured of them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_blr.ascent import Ascent
from pyro_blr.fusing import fused
from pyro_blr.generators import GeneratorStates
from pyro_blr.program import Program
from pyro_blr.sameness import Call
from pyro_blr.steps import is_at_rest
from pyro_blr.transactions import AllOrNothing

__all__ = ["CompiledSteps"]

_CHECKS = 2  # steps that are taken both ways before the captured one is trusted
_PLAIN = 3  # steps in a row that something stood in the way of, before it is said aloud


class CompiledSteps:
    """The steps of an engine on arguments that stay the same (`Call`), for a model that is a function of its arguments.

    That it is one is believed after two steps in which it made the same run, and drew nothing.  From then on a sweep over exact blocks
    is one program, λ ↦ (λ, bound), and a step at the optimum is nothing.  Other arguments, tensors written into, and data that the
    statements hold written into, lead to plain steps, and after two of these to another capture.
    """

    def __init__(self, wanted: bool) -> None:
        self.wanted = wanted
        self._last: tuple[Call, Program] | None = None  # the step before, where it was a plain one
        self._captured: tuple[Call, Program] | None = None
        self._sweep: Callable[..., tuple[Tensor, ...]] | None = None
        self._hopeless: Program | None = None
        self._checks, self._plain, self._has_warned = 0, 0, False
        self._how = ""  # the captured sweep runs
        self._state, self._obstacle = "not yet: that takes two steps with the same arguments", ""

    def notes(self) -> list[str]:
        """Whether steps are compiled, and if not why."""
        return [f"compile=True: {self._said()}"] if self.wanted else []

    def _said(self) -> str:
        return f"steps run uncompiled: {self._obstacle}" if self._obstacle else self._state

    # -- plain steps --------------------------------------------------------------------------------------------------

    def watch(self, program: Program, args: tuple, kwargs: Mapping[str, Any], before: GeneratorStates) -> None:
        """Sees a plain step after it ran the model; `before` are the random generators' states before that."""
        if not self.wanted:
            return
        call, last = Call(args, kwargs), self._last
        self._last = call, program
        if program is self._hopeless or (self._captured is not None and self._captured[1] is program):
            return
        self._captured = self._sweep = None
        self._obstacle = _obstacle(program, call) or _difference(last, program, args, kwargs, before)
        self._plain = self._plain + 1 if self._obstacle else 0
        if self._plain == _PLAIN:
            self._warn()
        elif not self._obstacle and last is not None:
            self._captured, self._checks = self._last, 0

    def refuse(self, obstacle: str) -> None:
        """Steps of another kind are taken, which are never compiled."""
        if self.wanted:
            self._obstacle = obstacle
            self._warn()

    def _warn(self) -> None:
        if not self._has_warned:
            self._has_warned = True  # first: the warning may be an error
            warnings.warn(f"compile=True: {self._said()}", stacklevel=4)

    # -- compiled steps -----------------------------------------------------------------------------------------------

    def step(self, engine: Any, args: tuple, kwargs: Mapping[str, Any]) -> float | None:
        """The loss of a step that was taken without running the model; None where that cannot be, and nothing has changed."""
        if self._captured is None or engine._seen is not self._captured[1]:
            return None
        call, program = self._captured
        if program.written or not call.is_repeated(args, kwargs):
            return None
        if engine._settled is program:
            self._state = "steps are settled: they do nothing, and the model is not run"
            engine._num_steps += 1
            engine._history.append(engine._history[-1])
            return -float(engine._history[-1])
        if not program.is_exact:
            self._state = "steps run the model until they settle: messages by quadrature or draws choose their steps by what they find"
            return None
        if engine._bound is None or engine._bound[0] is not program or engine._points:
            return None
        return self._exact(engine, program)

    def _exact(self, engine: Any, program: Program) -> float | None:
        """A sweep over exact blocks; the first ones are taken both ways and compared."""
        ascent = engine._ascent(program)
        names, before = list(ascent.beliefs.naturals), list(ascent.beliefs.naturals.values())
        if self._sweep is None:
            try:
                one = fused(ascent.pure_sweep, before)
            except Exception as error:  # whatever the tracer objects to
                self._give_up(program, f"they cannot be captured ({type(error).__name__}: {error})")
                return None
            self._sweep = one.call
            self._how = f"steps are {one.how}" + f"; {one.shortfall}" * bool(one.shortfall)
            self._state = self._how
            if one.shortfall:
                self._warn()
        self._state = self._how
        *naturals, last = self._sweep(*before)
        bound = float(last)
        if not math.isfinite(bound):
            return None  # the plain step says which site left its domain
        if self._checks < _CHECKS:
            ascent.sweep()
            if not _agree(ascent, naturals, bound):
                self._give_up(program, "what was captured of a step gave another result than the step")
                return None
            self._checks += 1
            naturals, bound = list(ascent.beliefs.naturals.values()), ascent.bound_before()
        loss, after = -float(engine._bound[1]), dict(zip(names, naturals, strict=True))
        is_last = is_at_rest(program, engine._q.naturals, after, engine._num_steps)
        with AllOrNothing(engine, draws=False):
            engine._q.naturals = after
            engine._bound = program, bound
            engine._settled = program if is_last else None
            engine._num_steps += 1
            engine._history.append(bound)
            engine._outcome = {"elbo": bound, "elbo_kind": ascent.bound_kind, "elbo_se": 0.0}
        return loss

    def _give_up(self, program: Program, obstacle: str) -> None:
        self._captured, self._sweep, self._hopeless = None, None, program
        self.refuse(obstacle)


def _obstacle(program: Program, call: Call) -> str:
    """Why steps of a program cannot be taken without running the model; empty where they can."""
    if call.unknown:
        return f"whether an argument of type {call.unknown} has changed cannot be told; pass tensors and numbers"
    if program.graph.params:
        return f"the model has parameters ({', '.join(sorted(program.graph.params))}), which move"
    if program.is_confined:
        return "the guide does not fill its families, and each looks for the nearest member that it has"
    if program.is_subsampled:
        return "each sees other rows of a subsampled plate"
    return ""


def _difference(
    last: tuple[Call, Program] | None, program: Program, args: tuple, kwargs: Mapping[str, Any], before: GeneratorStates
) -> str:
    """How the model's run differs from the one before; empty where it does not, or where there was none."""
    if last is None:
        return ""
    if not last[0].is_repeated(args, kwargs):
        return "their arguments are other ones every time"
    if last[1] is not program:
        return "the model's second run on the same arguments was another one, so it depends on something else"
    if before.have_moved():
        return "the model draws from a random generator"
    return ""


def _agree(ascent: Ascent, naturals: list[Tensor], bound: float) -> bool:
    """Whether λ and the bound are those of a sweep, to rounding."""
    coarse = any(block.dtype == torch.float32 for block in ascent.program.blocks.values())
    slack = 1e-4 if coarse else 1e-8
    expected = ascent.beliefs.naturals.values()
    same = all(
        float((x - y).abs().max()) <= slack * float(y.abs().max()) for x, y in zip(naturals, expected, strict=True)
    )
    return same and abs(bound - ascent.bound_before()) <= slack * max(1.0, abs(bound))
