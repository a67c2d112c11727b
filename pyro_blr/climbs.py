"""Climbing a bound that is estimated from draws: steps on draws that stay fixed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_blr.ascent import Ascent
from pyro_blr.checks import ImproperPosteriorError
from pyro_blr.draws import Draws
from pyro_blr.estimators import standard_error
from pyro_blr.halts import Halt, Sweep
from pyro_blr.leaps import PATIENCE, SOON, Leaps, Step, longest, moved_nats

__all__ = ["Climb", "climb", "guarded_sweep"]

_HALVINGS = 20
_SMALL = 1e-2  # nats of a step that is small beside the width of q
_STILL = 1e-9  # nats of a full step that is none: what the bound falls in it is rounding
_FINE, _COARSE = 1e-9, 1e-6  # relative rounding of a bound whose factors are in float64, and in less


@dataclass(frozen=True)
class Climb:
    """How a climb on fixed draws went: `first` and `last` are its steps' remaining distances to the fixed
    point in nats, `factor` times as long as the last step, which missed targets outside the domain by `astray`.
    """

    converged: bool
    first: float
    last: float
    factor: float = math.inf
    astray: float = math.inf


def climb(
    ascent: Ascent,
    draws: Draws | None,
    tol: float,
    limit: int,
    tick: Callable[[float, Halt], None],
    halt: Halt | None = None,
    known: float = math.inf,
) -> Climb:
    """Sweeps on fixed draws until the extrapolated remaining distance, Σ_i s_i KL, is below `tol` nats.

    A sweep is halved while the bound falls by more than the draws' own noise.  `tick` is told the bound and
    the halt after every sweep; a climb that was cut short goes on from its last `halt`.  `known` is the `factor` of a climb
    on other draws.
    """
    if halt is None:
        values = None if ascent.beliefs.points else ascent.finite_estimates(draws)
        halt = Halt(values, known=known, leaps=Leaps.of(ascent, PATIENCE if draws is None else SOON))
    while not halt.is_done(tol, draws):
        if halt.number >= limit:
            return Climb(False, halt.first, halt.remaining)
        halt = halt.leapt(ascent, draws)
        start = ascent.beliefs
        moved = guarded_sweep(ascent, draws, halt.rate, halt.values)
        if moved is None:
            return Climb(halt.remaining < 10 * tol, min(halt.first, halt.remaining), halt.remaining)
        halt = halt.after(moved, Step.between(start.blocks, start.naturals, ascent.beliefs.naturals, moved.rate), draws)
        tick(float(moved.values.mean()), halt)
    factor = halt.remaining / halt.distance if halt.distance > 0 else 1.0
    return Climb(True, halt.first, halt.remaining, factor, halt.astray)


def guarded_sweep(
    ascent: Ascent, draws: Draws | None, rate: float, before: Tensor | None, names: list[str] | None = None
) -> Sweep | None:
    """A sweep at the rate, halved while the bound falls; None where none holds."""
    start = ascent.beliefs
    coarse = any(block.dtype != torch.float64 for block in ascent.program.blocks.values())
    rounding = _COARSE if coarse else _FINE
    farthest = longest(ascent)
    noise = ascent.program.messages.quadrature_noise  # here: where a step has gone too far it is as large as the fall
    for _ in range(_HALVINGS):
        ascent.beliefs, ascent.astray = start.copy(), 0.0
        try:
            _sweep(ascent, names, draws, rate)
            after = ascent.finite_estimates(draws)
        except (ImproperPosteriorError, torch.linalg.LinAlgError):
            if before is None:
                ascent.beliefs = start
                ascent.estimate(draws)  # raises, and says more, where the bound was not finite to begin with
                raise
            after = None
        if after is not None:
            moved = moved_nats(ascent, start)
            errors = 3.0 if moved < _SMALL else 1.0
            still = max(moved, ascent.astray) < _STILL * rate**2
            if before is None or still or (moved < farthest and _holds(before, after, errors, noise, rounding)):
                return Sweep(after, moved / rate**2, ascent.astray, rate)
        rate *= 0.5
    ascent.beliefs = start
    return None


def _sweep(ascent: Ascent, names: list[str] | None, draws: Draws | None, rate: float) -> None:
    """On full data exact blocks take full steps."""
    program = ascent.program
    for name in ascent.order if names is None else names:
        whole = program.messages.is_exact(name) and not program.is_subsampled
        ascent.sweep([name], draws, 1.0 if whole else rate)


def _holds(before: Tensor, after: Tensor, errors: float, noise: float, rounding: float) -> bool:
    """Whether the bound has not fallen by more than so many standard errors of its gain, what integrals by points leave, and a
    relative rounding.

    Messages from draws vanish near the maximum of the same draws' bound, as near as one such error says, not at it: small steps
    need room, or they end short of where messages vanish.
    """
    gain = after - before if after.shape == before.shape else after.mean() - before.mean().unsqueeze(0)
    slack = errors * standard_error(gain) + noise + rounding * max(1.0, abs(float(before.mean())))
    return float(gain.mean()) >= -slack
