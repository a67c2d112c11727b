"""Each program with its constructor replaced ends with at least SVI's final ELBO, and without its guide too.

SVI's ends (`svi.json`) come from its published settings: `PYTHONPATH=tests python tests/benchmarks/programs.py --record`. Both
guides are judged by the program's own loss under Pyro, in float32 as published.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from acceptance.programs import PROGRAMS, recorded
from acceptance.scripts import Fit, Program, by_steps, without_guide

ENDS = recorded()
QUICK = 3.0  # processor seconds of SVI's: beyond them a program is for the night


def marked(program: Program) -> object:
    marks: list[pytest.MarkDecorator] = [pytest.mark.nightly] if ENDS[program.name]["seconds"] > QUICK else []
    if program.worse:
        marks.append(pytest.mark.xfail(reason=program.worse, strict=True))
    return pytest.param(program, id=program.name, marks=marks)


def among(programs: list[Program]) -> list:
    return [marked(program) for program in programs if program.name in ENDS]


@pytest.fixture(autouse=True)
def as_published() -> Iterator[None]:
    torch.set_default_dtype(torch.float32)
    yield


def assert_as_good(fit: Fit, program: Program) -> None:
    """Within four standard errors of the two judgements together, and float32's rounding of the bound."""
    end = ENDS[program.name]
    rounding = 1e-5 * max(1.0, abs(end["elbo"]))
    assert fit.elbo >= end["elbo"] - 4 * math.hypot(fit.error, end["error"]) - rounding


@pytest.mark.parametrize("program", among(PROGRAMS))
def test_step_for_step(program: Program) -> None:
    assert_as_good(by_steps(program), program)


@pytest.mark.parametrize("program", among([program for program in PROGRAMS if program.alone and not program.points]))
def test_without_its_guide(program: Program) -> None:
    assert_as_good(without_guide(program), program)
