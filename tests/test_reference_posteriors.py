"""posteriordb's posteriors at default settings: errors of q's own draws against reference draws, in sds of the reference.

Linear regressions and their like meet their bar on every seed, the others on four of five; `Case.floor` is what the
best full-rank Gaussian can do (tests/benchmarks/floors.py).
"""

from __future__ import annotations

import pytest
from posteriors import CASES, Case
from verdicts import Verdict, judge, of_case

SEEDS = range(5)
LONG = {"arma", "garch", "gp_pois_regr", "hmm_example", "hmm_example (enumerated)", "low_dim_gauss_mix"}
CENTRED = "eight_schools (centred)"


def cases(names: list[Case], marks: bool = True) -> list:
    """Parameters, those that take minutes marked."""
    return [
        pytest.param(case, id=case.name, marks=[pytest.mark.nightly] if marks and case.name in LONG else [])
        for case in names
    ]


def verdicts(case: Case, seeds: range = SEEDS) -> list[Verdict]:
    return [judge(of_case(case), seed) for seed in seeds]


@pytest.mark.parametrize("case", cases([case for case in CASES if case.linear]))
def test_linear_regressions_meet_their_bar_on_every_seed(case: Case) -> None:
    for found in verdicts(case):
        assert max(found.mean, found.sd) <= case.bar and found.converged, found


@pytest.mark.parametrize("case", cases([c for c in CASES if not c.linear and c.name != CENTRED]))
def test_the_others_meet_their_bar_on_four_of_five_seeds(case: Case) -> None:
    found = verdicts(case)
    assert sum(max(one.mean, one.sd) <= case.bar for one in found) >= 4, found


@pytest.mark.nightly
def test_centred_eight_schools_has_its_means_or_is_flagged() -> None:
    (case,) = (case for case in CASES if case.name == CENTRED)
    for found in verdicts(case):
        assert found.mean <= 0.10 or found.is_flagged, found
