"""How far a fit is from its reference, and whether it says so: what the tables and the tests of silence are made of."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyro
import torch
from hard_targets import TARGETS
from posteriors import CASES, Case, Draws, errors, reference_of
from torch import Tensor

from pyro_blr import BLRInference, Posterior
from pyro_blr.checks import ImproperPosteriorError

NUM_DRAWS = 40_000
OFF_MEAN, OFF_SD = 0.5, 0.5  # errors that must be told: in sds of the reference, and relative
GOOD = 0.1  # all errors below it: not to be told
FLAGS = ("Do not trust", "Not converged", "Several modes", "The bound has no maximum", "Refused")
WEIGHED_DRAWS = 2000  # summary's own number


@dataclass(frozen=True)
class Problem:
    """A model, its arguments and the reference of its scalars."""

    name: str
    model: Callable[..., None]
    args: tuple[Any, ...]
    reference: Mapping[str, Mapping[str, float]]
    scalars: Callable[[Draws], dict[str, Tensor]]


@dataclass(frozen=True)
class Verdict:
    """Errors of q's own draws and of weighted ones, and what the fit says of itself."""

    mean: float
    sd: float
    weighted: tuple[float, float]
    khat: float
    most_error: float
    converged: bool
    warnings: tuple[str, ...]
    seconds: float
    ending: str

    @property
    def is_off(self) -> bool:
        return self.mean > OFF_MEAN or self.sd > OFF_SD

    @property
    def is_good(self) -> bool:
        return max(self.mean, self.sd) < GOOD

    @property
    def is_flagged(self) -> bool:
        """Whether the words say not to trust q: its weights, its run, or other starts."""
        return any(warning.startswith(FLAGS) for warning in self.warnings)

    @property
    def flags(self) -> str:
        """The first words of each warning."""
        return ", ".join(warning.split(":")[0].split(". ")[0][:40] for warning in self.warnings)

    @cached_property
    def word(self) -> str:
        if self.is_off:
            return "flagged" if self.is_flagged else "SILENT"
        if self.is_good:
            return "false flag" if self.is_flagged else "good"
        return "flagged" if self.is_flagged else "between"


def problems(only: str = "", posteriordb: bool = True) -> list[Callable[[], Problem]]:
    """Hard targets, and real data, whose name contains `only`; made when called."""
    found: list[Callable[[], Problem]] = [
        lambda t=target: Problem(
            t.name, t.model, (), {k: {"mean": m, "sd": s} for k, (m, s) in t.reference().items()}, t.scalars
        )
        for target in TARGETS
        if only in target.name
    ]
    return found + ([lambda c=case: of_case(c) for case in CASES if only in case.name] if posteriordb else [])


def of_case(case: Case) -> Problem:
    data, reference = reference_of(case)
    return Problem(case.name, case.model, (data,), reference, lambda draws: case.scalars(draws, data))


def fitted(problem: Problem, seed: int) -> tuple[Posterior, float]:
    """The posterior from one seed at default settings, and seconds."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    start = time.perf_counter()
    posterior = BLRInference(problem.model).run(*problem.args, progress=False)
    return posterior, time.perf_counter() - start


def judge(problem: Problem, seed: int) -> Verdict:
    """One fit, judged; a refusal counts as a flag, and its errors as infinite."""
    try:
        posterior, seconds = fitted(problem, seed)
    except ImproperPosteriorError as error:
        return Verdict(
            torch.inf, torch.inf, (torch.inf,) * 2, torch.nan, torch.nan, False, (f"Refused: {error}",), 0.0, "refused"
        )
    return judged(problem, posterior, seconds)


def judged(problem: Problem, posterior: Posterior, seconds: float = 0.0) -> Verdict:
    own = errors(problem.scalars(posterior.sample((NUM_DRAWS,))), problem.reference)
    told = posterior.summary(WEIGHED_DRAWS)
    weighted = (torch.nan, torch.nan)
    if told.psis is not None and not told.psis.summed_out:
        weighted = errors(problem.scalars(told.psis.draws), problem.reference, told.psis.weights)
    elif told.psis is not None:
        kept = {name: value for name, value in told.psis.draws.items() if name not in told.psis.summed_out}
        try:
            weighted = errors(problem.scalars(kept), problem.reference, told.psis.weights)
        except KeyError:  # a scalar of what was summed out
            pass
    ending = posterior.stop_reason if posterior.converged else f"NOT CONVERGED: {posterior.stop_reason}"
    return Verdict(
        *own,
        weighted,
        told.khat,
        told.psis.most_error if told.psis else torch.nan,
        posterior.converged,
        tuple(told.warnings),
        seconds,
        ending,
    )
