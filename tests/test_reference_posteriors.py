"""posteriordb's posteriors at default settings: errors of q's own draws against reference draws, in sds of the reference.

Linear regressions and their like meet their bar on every seed, the others on four of five; `Case.floor` is what the
best full-rank Gaussian can do (tests/benchmarks/floors.py).
"""

from __future__ import annotations

import pytest
from posteriors import CASES, Case, errors
from verdicts import NUM_DRAWS, fitted, judge, of_case

SEEDS = range(5)
CENTRED = "eight_schools (centred)"
QUICK = {"sblrc", "kilpisjarvi_mod", "eight_schools"}  # a second or so for each seed


def of_group(linear: bool) -> list:
    """Parameters; what takes longer runs by night."""
    chosen = [case for case in CASES if case.linear == linear and case.name != CENTRED]
    return [pytest.param(c, marks=[] if c.name in QUICK else [pytest.mark.nightly], id=c.name) for c in chosen]


def largest_error(case: Case, seed: int) -> float:
    """The larger of the errors of means and of sds over the scalars."""
    problem = of_case(case)
    posterior, _ = fitted(problem, seed)
    assert posterior.converged, posterior.stop_reason
    return max(errors(problem.scalars(posterior.sample((NUM_DRAWS,))), problem.reference))


@pytest.mark.parametrize("case", of_group(linear=True))
def test_linear_regressions_meet_their_bar_on_every_seed(case: Case) -> None:
    assert max(largest_error(case, seed) for seed in SEEDS) <= case.bar


@pytest.mark.parametrize("case", of_group(linear=False))
def test_the_others_meet_their_bar_on_four_of_five_seeds(case: Case) -> None:
    found = [largest_error(case, seed) for seed in SEEDS]
    assert sum(error <= case.bar for error in found) >= 4, found


@pytest.mark.nightly
def test_centred_eight_schools_has_its_means_or_is_flagged() -> None:
    (case,) = (case for case in CASES if case.name == CENTRED)
    for seed in SEEDS:
        found = judge(of_case(case), seed)
        assert found.mean <= 0.10 or found.is_flagged, found
