"""Climbing a bound that is estimated from draws: steps on draws that stay fixed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_blr.ascent import Ascent
from pyro_blr.beliefs import Beliefs
from pyro_blr.checks import ImproperPosteriorError
from pyro_blr.draws import Draws
from pyro_blr.estimators import standard_error

__all__ = ["Climb", "climb", "guarded_sweep", "moved_nats"]

_HALVINGS = 20
_SMALL = 1e-2  # nats of a step that is small beside the width of q
_STILL = 1e-9  # nats of a full step that is none: what the bound falls in it is rounding
_FINE, _COARSE = 1e-9, 1e-6  # relative rounding of a bound whose factors are in float64, and in less
_LONGEST = 100.0  # nats of a step for every unknown: a log density far out may be all rounding, and look like a gain
_STUCK = 1e-2  # a step that covers so little of the way to its targets has met a fixed point of the retraction


@dataclass(frozen=True)
class Climb:
    """How a climb on fixed draws went: `first` and `last` are its steps' remaining distances to the fixed
    point in nats.
    """

    converged: bool
    first: float
    last: float


@dataclass(frozen=True)
class Sweep:
    """The bound's estimates after a sweep, the Σ_i s_i KL of a full step, and the nats to targets outside the domain.

    The retraction of a Gaussian's precision S to Ŝ has a fixed point at Ŝ = (1 − 2/ρ) S besides the one at Ŝ = S: where the
    steps vanish and the targets stay away, another ρ moves on.
    """

    values: Tensor
    distance: float
    astray: float
    rate: float


def climb(ascent: Ascent, draws: Draws | None, tol: float, limit: int, tick: Callable[[float], bool]) -> Climb:
    """Sweeps on fixed draws until the extrapolated remaining distance, Σ_i s_i KL, is below `tol` nats.

    A sweep is halved while the bound falls by more than the draws' own noise.  `tick` is told the bound after
    every sweep, and says whether there may be another.
    """
    first, previous, rate, ceiling, factor = math.inf, math.inf, 1.0, 1.0, 1.0
    values: Tensor | None = None if ascent.beliefs.points else ascent.finite_estimates(draws)
    remaining, last = math.inf, None
    for number in range(limit):
        start = ascent.beliefs
        moved = guarded_sweep(ascent, draws, rate, values)
        if moved is None:
            return Climb(remaining < 10 * tol, min(first, remaining), remaining)
        values, rate = moved.values, moved.rate
        distance = max(moved.distance, moved.astray)
        # the first ratio of two steps shows the directions that end at once, not the one that lags: two ratios on draws
        slow, factor = factor, extrapolation(previous, distance)
        remaining = distance * (factor if draws is None else max(factor, slow))
        first = distance if number == 0 else first
        more = tick(float(values.mean()))
        if (remaining < tol and (draws is None or number > 1)) or distance < 1e-3 * tol:
            return Climb(True, first, remaining)
        if not more:
            break
        step = _Step.between(start, ascent.beliefs, rate)
        overlap = step.overlap(last) if last is not None else 1.0
        ceiling = max(rate / (1 - overlap), 1 / 64) if overlap < -0.2 else min(1.0, 1.2 * ceiling)
        if moved.distance < _STUCK * moved.astray:
            ceiling = rate / 2
        previous, last, rate = distance, step, min(ceiling, 2 * rate)
    return Climb(False, first, remaining)


@dataclass(frozen=True)
class _Step:
    """A full step's change of λ and of μ in every block."""

    natural: dict[str, Tensor]
    expectation: dict[str, Tensor]

    @staticmethod
    def between(start: Beliefs, end: Beliefs, rate: float) -> _Step:
        naturals, expectations = {}, {}
        for name, block in start.blocks.items():
            new, old = end.naturals[name], start.naturals[name]
            naturals[name] = block.scale * (new - old) / rate
            expectations[name] = (block.family.to_expectation(new) - block.family.to_expectation(old)) / rate
        return _Step(naturals, expectations)

    def overlap(self, before: _Step) -> float:
        """⟨this, before⟩ / ⟨before, before⟩ in the Fisher metric: negative where steps overshoot.

        Steps that shrink by q at rate ρ along one direction vanish at the rate ρ / (1 − q).
        """
        names = [name for name in self.natural if self.natural[name].shape == before.natural[name].shape]
        inner = sum(float((self.natural[n] * before.expectation[n]).sum()) for n in names)
        size = sum(float((before.natural[n] * before.expectation[n]).sum()) for n in names)
        ratio = inner / size if size > 0 else 1.0
        return ratio if math.isfinite(ratio) else 1.0


def extrapolation(previous: float, distance: float) -> float:
    """(r / (1 − r))², at least 1, for steps that shrink by r: all steps to come together, in the units of the
    square of one.
    """
    if not math.isfinite(previous):
        return 1.0
    ratio = math.sqrt(distance / previous) if previous > 0 else 0.0
    return max(1.0, (ratio / (1 - ratio)) ** 2) if ratio < 1 else math.inf


def guarded_sweep(
    ascent: Ascent, draws: Draws | None, rate: float, before: Tensor | None, names: list[str] | None = None
) -> Sweep | None:
    """A sweep at the rate, halved while the bound falls; None where none holds."""
    start = ascent.beliefs
    coarse = any(block.dtype != torch.float64 for block in ascent.program.blocks.values())
    rounding = _COARSE if coarse else _FINE
    longest = _LONGEST * sum(b.batch_shape.numel() * b.num_directions for b in ascent.program.blocks.values())
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
            noise = ascent.program.messages.quadrature_noise
            if before is None or still or (moved < longest and _holds(before, after, errors, noise, rounding)):
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


def moved_nats(ascent: Ascent, start: Beliefs) -> float:
    """Σ_i s_i KL(q_i ‖ q_i before)."""
    total = 0.0
    for name, block in ascent.program.blocks.items():
        new, old = ascent.beliefs.naturals[name], start.naturals[name]
        if new is not old:
            kl = float(block.scale * block.family.kl(new, old).sum(dtype=torch.float64))
            total += max(kl, 0.0) if math.isfinite(kl) else math.inf
    return total
