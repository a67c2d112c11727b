"""What there is to say about a fit, and what to do where it should not be trusted: in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ._psis import FEW, GOOD, MODEST, NEGLIGIBLE, POOR

__all__ = ["Facts", "Restart", "rivals_among", "warnings_about"]

LARGE_ERROR = 1.0  # nats: two models or starts that differ by it are told apart by a Bayes factor of e
NEAR = 5.0  # nats below the best bound: beyond, an optimum holds less than a hundredth of the mass
APART = 1.0  # nats of KL between optima beyond which they are not one

_NUTS = (
    "run NUTS from this start: NUTS(model, init_strategy=init_to_value(values=posterior.sample())), with pyro.infer.autoguide's "
    "init_to_value"
)


class Restart(NamedTuple):
    """Where one start of `run` ended: its bound, and KL(kept q ‖ this one's q) in nats."""

    elbo: float
    elbo_se: float
    converged: bool
    distance: float


@dataclass(frozen=True)
class Facts:
    """What is known about a fit; `factors` are the independent parts of q, `unavailable` says why k̂ is NaN,
    `shifted` which scalar the weights move most, where they move one much; `heavy` is the largest k̂ of the
    weights of a variance, and whose it is.
    """

    converged: bool
    stop_reason: str
    elbo: float
    elbo_se: float
    khat: float
    most_error: float = math.inf
    shifted: str = ""
    heavy: tuple[float, str] = (-math.inf, "")
    unavailable: str = ""
    factors: Sequence[str] = ()
    restarts: Sequence[Restart] = ()
    is_saddle: bool = False


def warnings_about(facts: Facts) -> list[str]:
    """Each begins with what was found, and ends with what to do; none where there is no reason to doubt."""
    found = [*_of_the_run(facts), *_of_the_weights(facts)]
    if facts.is_saddle:
        found.append(
            "The bound has no maximum here: its Hessian has a direction that gains. Start elsewhere (init, init_loc_fn, "
            "num_restarts), since exchangeable sites may have started alike"
        )
    return [*found, *_of_the_starts(facts)]


def _of_the_run(facts: Facts) -> list[str]:
    found = []
    if not facts.converged:
        reason = facts.stop_reason or "it was not run to the end: step was called by hand"
        found.append(
            f"Not converged: {reason}. Continue (run again goes on from here, with a larger max_steps) before reading the table"
        )
    if facts.elbo_se > LARGE_ERROR:
        found.append(
            f"The bound's standard error is {facts.elbo_se:.2g} nats: differences between models below {2 * facts.elbo_se:.2g} nats say "
            "nothing. It is noise of the estimate, often from q being too wide where the density falls steeply; see k-hat"
        )
    return found


def _of_the_weights(facts: Facts) -> list[str]:
    if math.isnan(facts.khat):
        return [f"No k-hat, so nothing says how close q is: {facts.unavailable}"] if facts.unavailable else []
    if facts.most_error < NEGLIGIBLE:
        return []
    few = facts.khat >= GOOD and FEW <= facts.most_error < math.inf
    poor = facts.khat >= POOR and facts.most_error >= MODEST
    if poor or few:
        of = "above 0.7" if facts.khat >= POOR else "of few effective draws"
        return [
            f"Do not trust this posterior: Pareto k-hat is {facts.khat:.2f}, {of}, so q lacks mass where the posterior has some. "
            "What helps: " + _what_helps(facts)
        ]
    if facts.heavy[0] >= POOR:
        return [
            f"Do not trust the spread of {facts.heavy[1]}: the k-hat of its weighted variance is {facts.heavy[0]:.2f}, above 0.7, so q "
            "lacks part of a tail. Read mean_is and sd_is instead of mean and sd where they stand: they recover some of it. What "
            "helps: " + _what_helps(facts)
        ]
    if facts.shifted:
        return [
            f"q differs from its own draws, weighed: {facts.shifted}. Read mean_is and sd_is instead of mean and sd; "
            "posterior.psis().resample() gives such draws"
        ]
    if facts.khat >= GOOD and facts.most_error >= MODEST:
        return [
            f"Pareto k-hat is {facts.khat:.2f}, between 0.5 and 0.7: read mean_is and sd_is, which weigh the draws of q, instead of mean "
            "and sd; posterior.psis().resample() gives such draws"
        ]
    return []


def _what_helps(facts: Facts) -> str:
    steps = []
    if len(facts.factors) > 1 or any(" " in name for name in facts.factors):
        some = ", ".join(facts.factors[:3]) + (", ..." if len(facts.factors) > 3 else "")
        steps.append(
            f'let what depends on each other share a factor of q, which holds {some} independent (blocks=[[...]], or "sites"; '
            "compare sd with sd_lr)"
        )
    steps.append(
        "reparameterise (poutine.reparam with LocScaleReparam for scales above groups, a logarithm for a heavy tail)"
    )
    return "; or ".join([*steps, _NUTS])


def rivals_among(restarts: Sequence[Restart]) -> list[Restart]:
    """Converged starts that ended away from the q that is kept, with a bound as good or better."""
    ended = [one for one in restarts if one.converged]
    best = max((one.elbo for one in ended), default=math.nan)
    return [one for one in ended if one.distance > APART and best - one.elbo < NEAR + 2 * one.elbo_se]


def _of_the_starts(facts: Facts) -> list[str]:
    ended = [one for one in facts.restarts if one.converged]
    rivals = rivals_among(ended)
    found = []
    if rivals:
        bounds = ", ".join(f"{one.elbo:.4g}" for one in sorted(ended, key=lambda one: -one.elbo)[:5])
        found.append(
            f"Several modes: of {len(ended)} converged starts {len(rivals)} ended elsewhere with a bound as good (bounds {bounds}), and q "
            "describes one mode. Harmless if these are relabellings of exchangeable components; otherwise order or tie them in the model, "
            "or " + _NUTS
        )
    poorer = len([one for one in ended if one.distance > APART]) - len(rivals)
    if poorer > 0 and not rivals:
        found.append(
            f"Local optima: {poorer} of {len(ended)} converged starts ended at bounds more than {NEAR:g} nats lower; the best was kept. "
            "More restarts may find a better one still"
        )
    return found
