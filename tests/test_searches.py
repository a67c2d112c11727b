"""Other optima of the bound, sought from scattered starts: found where there are some, none where there are none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hard_targets import TARGETS, Target

from pyro_blr import BLRInference
from pyro_blr.diagnostics import rivals_among

BY_NAME = {target.name: target for target in TARGETS}
SEVERAL = [
    "two modes, far",
    "two modes, one small",
    "five modes on a circle",
    "mixture, labels exchanged",
    "mixture, labels exchanged, enumerated",
    "spike and slab",
    "sum with a square",
]
ONE = ["logistic regression", "Student regression", "location and scale", "Weibull, scale and shape", "wide rate"]


def posterior_of(target: Target) -> Any:
    return BLRInference(target.model).run(progress=False)


@pytest.mark.parametrize("name", SEVERAL)
def test_modes_that_q_lacks_are_found_and_told(name: str) -> None:
    posterior = posterior_of(BY_NAME[name])
    kept, *others = posterior.other_optima()
    assert kept.distance == 0 and kept.converged and rivals_among([kept, *others])
    assert any(warning.startswith("Several modes") for warning in posterior.summary(200).warnings)


@pytest.mark.parametrize("name", ONE)
def test_no_others_are_found_where_there_are_none(name: str) -> None:
    posterior = posterior_of(BY_NAME[name])
    ends = posterior.other_optima()
    assert len(ends) > 3 and max(end.distance for end in ends) < 0.1
    assert not rivals_among(ends)


def test_nothing_is_sought_where_q_is_the_posterior() -> None:
    assert posterior_of(BY_NAME["coin"]).other_optima() == []


def test_the_search_draws_from_a_generator_of_its_own() -> None:
    posterior = posterior_of(BY_NAME["two modes, far"])
    state = torch.get_rng_state()
    first = posterior.other_optima()
    assert torch.equal(torch.get_rng_state(), state)
    again = BLRInference(BY_NAME["two modes, far"].model)
    torch.manual_seed(0)
    assert [end.converged for end in again.run(progress=False).other_optima()] == [end.converged for end in first]


def test_a_posterior_without_its_engine_seeks_nothing(tmp_path: Any) -> None:
    posterior = posterior_of(BY_NAME["two modes, far"])
    posterior.save(tmp_path / "q.safetensors")
    assert type(posterior).load(tmp_path / "q.safetensors").other_optima() == ()
