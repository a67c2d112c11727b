"""A portfolio of starts: Newton's mode and, where the climb from there is slow, the centre of the prior."""

from __future__ import annotations

from collections.abc import Callable

import torch

from pyro_blr.ascent import Ascent
from pyro_blr.beliefs import Beliefs
from pyro_blr.checks import ImproperPosteriorError
from pyro_blr.climbs import Climb, climb
from pyro_blr.halts import Halt
from pyro_blr.leaps import Leaps

__all__ = ["climb_from_the_better"]

TRIAL = 12  # sweeps from a start: most models have settled then, and nothing is tried


def climb_from_the_better(
    ascent: Ascent,
    centre: Beliefs | None,
    tol: float,
    limit: int,
    tick: Callable[[float, Halt], None],
    halt: Halt | None = None,
) -> Climb:
    """`climb` by quadrature; where it has not settled after `TRIAL` sweeps, from `centre` if the bound is then higher there.

    `tick` is not told of sweeps from there before it is chosen: a climb that was cut short meanwhile tries it again.
    """
    last = halt

    def note(bound: float, reached: Halt) -> None:
        nonlocal last
        last = reached
        tick(bound, reached)

    if centre is not None and (halt is None or halt.number <= TRIAL):
        climbed = climb(ascent, None, tol, min(TRIAL, limit), note, halt)
        if climbed.converged or limit <= TRIAL:
            return climbed
        last = _from_another_start(ascent, centre, tol) or last
    return climb(ascent, None, tol, limit, tick, last)


def _from_another_start(ascent: Ascent, centre: Beliefs, tol: float) -> Halt | None:
    """Moves q to where `TRIAL` sweeps from `centre` end, if the bound is higher there; None where it stays.

    A mode is in the neck of a funnel, where a Gaussian is as narrow as the neck and creeps out of it; q as wide as the prior sees
    the whole of it.
    """
    other = Ascent(ascent.program, centre.copy(), ascent.last)
    try:
        climb(other, None, tol, TRIAL, lambda bound, halt: None)
    except (ImproperPosteriorError, torch.linalg.LinAlgError):
        return None
    values, present = other.finite_estimates(None), ascent.finite_estimates(None)
    if values is None or (present is not None and float(values.mean()) <= float(present.mean())):
        return None
    ascent.beliefs = other.beliefs
    return Halt(values, number=TRIAL, leaps=Leaps.of(ascent, patience=0))
