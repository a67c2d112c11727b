"""Climbs and runs between two sweeps: how far they have come, and what the next one needs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from torch import Tensor

from pyro_blr.accuracy import Optima
from pyro_blr.ascent import Ascent
from pyro_blr.beliefs import Beliefs
from pyro_blr.draws import Draws
from pyro_blr.leaps import Leaps, Step, moved_nats

__all__ = ["Halt", "Place", "Sweep", "extrapolation"]

STUCK = 1e-2  # a step that covers so little of the way to its targets has met a fixed point of the retraction


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


@dataclass(frozen=True)
class Halt:
    """Where a climb on fixed draws stands between two sweeps: all that the next one needs besides q."""

    values: Tensor | None  # the bound's estimates
    number: int = 0  # of sweeps
    first: float = math.inf  # step, in nats
    distance: float = math.inf  # of the last sweep
    remaining: float = math.inf  # nats to the fixed point
    factor: float = 1.0
    rate: float = 1.0
    ceiling: float = 1.0
    last: Step | None = None
    astray: float = math.inf  # of the last sweep
    known: float = (
        math.inf
    )  # remaining distance in steps, of a climb on other draws: steps shrink here as they did there
    slowest: float = (
        1.0  # factor since leaps may be made: after one only this still tells how slowly sweeps come together
    )
    leaps: Leaps = field(default_factory=Leaps)

    def is_done(self, tol: float, draws: Draws | None) -> bool:
        """Whether what remains is below `tol`; on draws no sooner than after three sweeps, if how they shrink is not known."""
        told = draws is None or self.number > 2 or self.known < math.inf
        return (self.remaining < tol and told) or self.distance < 1e-3 * tol

    def after(self, moved: Sweep, step: Step, draws: Draws | None) -> Halt:
        """The halt after another sweep."""
        distance = max(moved.distance, moved.astray)
        # the first ratio of two steps shows the directions that end at once, not the one that lags: two ratios on draws
        factor = extrapolation(self.distance, distance)
        known = self.known if self.known < math.inf and self.number < 2 else 1.0
        slowest = self.slowest if self.leaps.is_waiting or math.isinf(factor) else max(factor, self.slowest)
        remaining = distance * (max(factor, slowest) if draws is None else max(factor, self.factor, known))
        overlap = step.overlap(self.last) if self.last is not None else 1.0
        growth = 2.0 if draws is not None and overlap > 0.5 else 1.2  # on draws leaps soon mend what overshoots
        ceiling = max(moved.rate / (1 - overlap), 1 / 64) if overlap < -0.2 else min(1.0, growth * self.ceiling)
        if moved.distance < STUCK * moved.astray:
            ceiling = moved.rate / 2
        first = distance if self.number == 0 else self.first
        rate = min(ceiling, 2 * moved.rate)
        state = (distance, remaining, factor, rate, ceiling, step, moved.astray, self.known)
        return Halt(moved.values, self.number + 1, first, *state, slowest, self.leaps.after(step))

    def leapt(self, ascent: Ascent, draws: Draws | None) -> Halt:
        """The halt after a leap of q, where one is made: its length beside that of the last sweep is what sweeps leave behind."""
        if self.values is None:
            return self
        start = ascent.beliefs
        values, leaps = self.leaps.leap(ascent, draws, self.rate, self.values)
        if values is None:
            return replace(self, leaps=leaps)
        factor = max(1.0, moved_nats(ascent, start) / self.distance) if self.distance > 0 else 1.0
        return replace(self, values=values, distance=math.inf, factor=factor, last=None, leaps=leaps)


@dataclass(frozen=True)
class Place:
    """How far a run has come, besides q and the bounds so far: what its next sweep needs."""

    has_started: bool = False
    calm: int = 0  # exact sweeps in a row after which little was left to gain
    seed: int = 0  # of the draws
    level: int = 0
    before: Beliefs | None = None  # q where the level began
    optima: Optima = field(default_factory=Optima)
    tol: float = 0.0  # of the present climb
    is_rough: bool = True  # the present climb by quadrature
    halt: Halt | None = None
    factor: float = math.inf  # of the climb before
    centre: Beliefs | None = None  # where Newton's method began, during the first climb
    leaps: Leaps | None = None  # over exact sweeps


def extrapolation(previous: float, distance: float) -> float:
    """(r / (1 − r))², at least 1, for steps that shrink by r: all steps to come together, in the units of the
    square of one.
    """
    if not math.isfinite(previous):
        return 1.0
    ratio = math.sqrt(distance / previous) if previous > 0 else 0.0
    return max(1.0, (ratio / (1 - ratio)) ** 2) if ratio < 1 else math.inf
