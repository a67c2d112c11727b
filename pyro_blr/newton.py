"""Where a climb starts: Gaussian blocks at a mode of their log density and its curvature, exact blocks at their optimum given these."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_blr.ascent import Ascent
from pyro_blr.beliefs import Beliefs
from pyro_blr.blocks import is_gaussian
from pyro_blr.checks import ImproperPosteriorError
from pyro_blr.concave import uphill
from pyro_blr.draws import Draws
from pyro_blr.families import SparseNormal
from pyro_blr.tails import refuse_flat_tails

__all__ = ["newton_start"]

_HALVINGS = 20
_NEWTON_STEPS = 30  # twice as many from a saddle
_NEWTON_ROUNDS = 3
_FEW = 16  # draws that tell whether a search was of use
_RUNAWAY_STEPS = 20  # and _RUNAWAY_NATS: how long and how far a search must have gone to be called endless
_RUNAWAY_NATS = 1e6
_SLOW = 0.01  # of the best step's gain: less is next to nothing
_NEAR = 1e-3  # nats that the last of them gains
_NEAR_ENOUGH = 0.1  # the same where the steps after them are as good, and without noise


def newton_start(ascent: Ascent) -> None:
    """Gaussian blocks to a mode of E[log f | their mean] and its curvature, exact blocks to their optimum
    given these.

    E_q of an exponential under a vague prior overflows; at the mean it does not.
    """
    messages = ascent.program.messages
    refuse_flat_tails(ascent)
    sampled = [n for n in ascent.order if not messages.is_exact(n) and is_gaussian(ascent.program.blocks[n].family)]
    if not sampled:
        return
    for _ in range(_NEWTON_ROUNDS if len(ascent.order) > 1 else 1):
        for name in ascent.order:
            if messages.is_exact(name):
                ascent.sweep([name])
            elif name in sampled:
                _newton_if_better(ascent, name)


def _newton_if_better(ascent: Ascent, name: str) -> None:
    """Newton's search, unless the bound is lower where it ends: given others at one point a scale's log density may have no mode."""
    start, before = ascent.beliefs, _bound(ascent)
    _newton(ascent, name)
    after = _bound(ascent)
    if before > -math.inf and after < before - _NEAR_ENOUGH:
        ascent.beliefs = start


def _bound(ascent: Ascent) -> float:
    """The bound from a few draws, always the same levels; −∞ where it is not finite, or not known."""
    if ascent.beliefs.points:
        return -math.inf
    try:
        values = ascent.finite_estimates(None if ascent.program.is_deterministic else Draws(0, _FEW))
    except (ImproperPosteriorError, torch.linalg.LinAlgError):
        values = None
    return float(values.mean()) if values is not None else -math.inf


def _newton(ascent: Ascent, name: str) -> None:
    """m ← m + ρ (−H)⁻¹ ∇ on one block's mean, ρ halved while the log density there falls, at most
    `_NEWTON_STEPS` times.

    ρ shortens the step in m, not in λ: under a vague prior λ would have to move by less than one part in 1 /
    its variance.
    """
    height = _height(ascent, name)
    enough = _NEAR if ascent.program.messages.sampled_factors(name) else _NEAR_ENOUGH
    nudged, heights = False, [height]
    for number in range(2 * _NEWTON_STEPS):
        if number >= _NEWTON_STEPS and not nudged:
            break
        start = ascent.beliefs
        try:
            target = ascent.target_at_mean(name)
        except ImproperPosteriorError:
            return
        if not bool(torch.isfinite(target).all()):
            return
        whole = start.copy()
        ascent.beliefs = whole
        ascent.move(name, target, 1.0)
        here, family = start.wide[name]["mean"], ascent.program.blocks[name].family
        inside = bool(family.contains(target).all())
        ways = [whole.wide[name]["mean"]]
        if not inside and not isinstance(family, SparseNormal):  # |S| of a sparse S is not sparse
            ways.append(uphill(family, here, target.to(here)))
        if not nudged and not inside and all(_stays(here, there) for there in ways):
            nudged, ascent.beliefs = True, start.copy()
            ascent.beliefs.update(name, ascent.targets.with_mean(name, whole, here + _spread(whole, name)))
            height = _height(ascent, name)
            continue
        found = [_shortened(ascent, name, whole, here, there, height) for there in ways]
        held = [step for step in found if step is not None]
        if not held:
            ascent.beliefs = start
            break
        reached, halvings, ascent.beliefs = _preferred(held, height)
        if abs(reached - height) < enough and not halvings:
            return
        height = reached
        heights.append(reached)
    _refuse_runaway(ascent, name, heights)


def _shortened(
    ascent: Ascent, name: str, whole: Beliefs, here: Tensor, there: Tensor, height: float
) -> tuple[float, int, Beliefs] | None:
    """(height, halvings, q) where the step from here, halved while the log density falls, holds; None where none does."""
    for halvings in range(_HALVINGS):
        ascent.beliefs = whole.copy()
        mean = here + 0.5**halvings * (there - here)
        ascent.beliefs.update(name, ascent.targets.with_mean(name, whole, mean))
        reached = _height(ascent, name)
        if reached >= height - 1e-9 * abs(height) or not math.isfinite(height):
            return reached, halvings, ascent.beliefs
    return None


def _preferred(held: list[tuple[float, int, Beliefs]], height: float) -> tuple[float, int, Beliefs]:
    """The last of them, the step uphill, unless it gains next to nothing beside the best, or is far behind it.

    A bent step gains at once what steps uphill gain later, and ends where the search creeps.  Far out a step uphill divides what is
    left by about e, so that from there the search would take more of them than it has.
    """
    best = max(held, key=lambda step: step[0])
    last = held[-1]
    is_slow = last[0] - height < _SLOW * (best[0] - height) or best[0] - last[0] > math.exp(_NEWTON_STEPS)
    return best if is_slow else last


def _refuse_runaway(ascent: Ascent, name: str, heights: list[float]) -> None:
    """Raises where many steps have gained more and more: a search that comes to a mode gains less and less."""
    if len(heights) <= _RUNAWAY_STEPS:
        return
    rise, last = heights[-1] - heights[0], heights[-1] - heights[-2]
    if rise > _RUNAWAY_NATS and last > 0.1 * rise:
        sites = " and ".join(map(repr, ascent.program.blocks[name].site_names))
        raise ImproperPosteriorError(
            f"site {sites}: found a log density that rose by {rise:.2g} nats in {len(heights)} steps, faster and faster, expected a mode. "
            "Give the site a prior that falls faster than its other factors rise, or data that determine it"
        )


def _stays(here: Tensor, there: Tensor) -> bool:
    """Whether the mean does not move: where the log density is not concave it is between modes, by symmetry."""
    return bool(((there - here).abs() <= 1e-6 * there.abs().clamp_min(1e-6)).all())


def _spread(beliefs: Beliefs, name: str) -> Tensor:
    """Noise of about a standard deviation, one at most, from torch's generator."""
    moments = beliefs.wide[name]
    wide = moments["covariance"].diagonal(dim1=-2, dim2=-1) if "covariance" in moments else moments["variance"]
    return wide.clamp(max=1.0).sqrt() * torch.randn(wide.shape, dtype=wide.dtype).to(wide.device)


def _height(ascent: Ascent, name: str) -> float:
    """The log density at a block's mean; −∞ where it overflows, or a matrix of the model has no factor: no step is to end there."""
    try:
        value = ascent.targets.at_mean(name, ascent.beliefs)
    except torch.linalg.LinAlgError:
        return -math.inf
    return value if math.isfinite(value) else -math.inf
