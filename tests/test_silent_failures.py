"""A fit that is off says so, and one that is good is seldom doubted; references that the verdicts rest on."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hard_targets import TARGETS, Target, on_grid
from verdicts import Verdict, judge, problems

LONG = ("ring", "stiff Gaussian, a factor", "garch")  # more than a minute each
ON_GRIDS = [target for target in TARGETS if target.axes is not None]


@pytest.mark.parametrize("target", ON_GRIDS, ids=lambda target: target.name)
def test_half_the_nodes_of_a_grid_give_the_same(target: Target) -> None:
    """So neither the spacing nor the ends matter to what is asked of a fit."""
    coarse, fine = on_grid(target.model, target.axes or {}, target.scalars, every=2), target.reference()
    for name, (mean, sd) in fine.items():
        assert abs(coarse[name][0] - mean) < 0.01 * sd and coarse[name][1] == pytest.approx(sd, rel=0.01), name


def test_drawn_moments_are_those_of_forward_draws() -> None:
    """Closed forms of a banana, within four standard errors of draws of its program."""
    (target,) = (target for target in TARGETS if target.name == "banana")
    x = torch.randn(100_000)
    y = x**2 - 1 + 0.5 * torch.randn(100_000)
    for name, draws in {"x": x, "y": y}.items():
        mean, sd = target.reference()[name]
        assert abs(float(draws.mean()) - mean) < 4 * sd / math.sqrt(len(draws))
        assert abs(float(draws.var()) - sd**2) < 4 * float((draws - mean).square().std()) / math.sqrt(len(draws))


@pytest.fixture(scope="module")
def verdicts() -> list[tuple[str, Verdict]]:
    """Every target and every posterior of posteriordb, seed 1: no threshold was set on it."""
    torch.set_default_dtype(torch.float64)
    made = [make() for make in problems()]
    return [(problem.name, judge(problem, 1)) for problem in made if problem.name not in LONG]


@pytest.mark.nightly
def test_no_failure_is_silent(verdicts: Any) -> None:
    assert [name for name, verdict in verdicts if verdict.word == "SILENT"] == []


@pytest.mark.nightly
def test_good_fits_are_seldom_doubted(verdicts: Any) -> None:
    good = [(name, verdict) for name, verdict in verdicts if verdict.is_good]
    flagged = [name for name, verdict in good if verdict.is_flagged]
    assert len(good) >= 15 and len(flagged) <= 0.1 * len(good), flagged
