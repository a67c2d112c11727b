"""`infer={"blr": {"copies": n}}`: one statement for n exchangeable ones, against the model with the statement n times."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO

from pyro_blr import BLRInference

WORDS = torch.tensor([0, 2, 1, 2])
COUNTS = torch.tensor([3.0, 1.0, 2.0, 4.0])
TOKENS = torch.repeat_interleave(torch.arange(4), COUNTS.long())
POINTS = torch.tensor([0.3, -1.2, 0.8, 2.0], dtype=torch.float64)


def topics(rows: torch.Tensor, counts: torch.Tensor | None) -> Callable[[], None]:
    """Words with topics; with counts, a row stands for that many tokens."""
    infer = {} if counts is None else {"blr": {"copies": counts}}

    def model() -> None:
        theta = pyro.sample("theta", dist.Dirichlet(torch.tensor([1.0, 2.0])))
        phi = pyro.sample("phi", dist.Dirichlet(torch.tensor([[1.0, 2.0, 3.0], [3.0, 1.0, 1.0]])).to_event(1))
        with pyro.plate("rows", len(rows)), poutine.scale(scale=torch.tensor(1.0) if counts is None else counts):
            z = pyro.sample("local", dist.Categorical(theta), infer=infer)
            pyro.sample("x", dist.Categorical(phi[z]), obs=WORDS[rows])

    return model


def effects(rows: torch.Tensor, counts: torch.Tensor | None) -> Callable[[], None]:
    """Gaussian effects of two elements each, around a common mean."""
    infer = {"block": "elements"} if counts is None else {"block": "elements", "copies": counts}

    def model() -> None:
        m = pyro.sample("m", dist.Normal(torch.tensor(0.0), 2.0))
        with pyro.plate("rows", len(rows)), poutine.scale(scale=torch.tensor(1.0) if counts is None else counts):
            z = pyro.sample("local", dist.Normal(m, torch.tensor([1.0, 0.5])).to_event(1), infer={"blr": infer})
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=POINTS[rows])

    return model


INITS: dict[Callable, dict[str, Any]] = {
    topics: {
        "theta": dist.Dirichlet(torch.tensor([3.0, 2.0])),
        "phi": dist.Dirichlet(torch.tensor([[1.0, 2.0, 3.0], [3.0, 1.0, 1.0]])).to_event(1),
    },
    effects: {"m": dist.Normal(torch.tensor(0.3), 1.0)},
}


@pytest.mark.parametrize("make", INITS, ids=lambda make: make.__name__)
def test_copies_are_the_statement_repeated(make: Callable):
    """Bound and λ, sweep by sweep."""
    counted = BLRInference(make(torch.arange(4), COUNTS), init=INITS[make], blocks="sites")
    repeated = BLRInference(make(TOKENS, None), init=INITS[make], blocks="sites")
    for _ in range(6):
        assert counted.step() == pytest.approx(repeated.step(), rel=1e-12)
    few, many = counted.posterior.natural, repeated.posterior.natural
    for name in few:
        rows = few[name][TOKENS] if name == "local" else few[name]
        assert torch.allclose(rows, many[name], rtol=1e-10, atol=1e-12)


def test_the_guide_counts_copies():
    """An independent estimate of the bound by Pyro, within five standard errors."""
    model = topics(torch.arange(4), COUNTS)
    engine = BLRInference(model)
    posterior = engine.run(progress=False)
    elbo = Trace_ELBO()
    values = torch.tensor([-elbo.loss(model, engine.guide) for _ in range(2000)])
    assert abs(float(values.mean()) - posterior.elbo) < 5 * float(values.std()) / 2000**0.5


def test_explain_says_copies():
    explanation = BLRInference(topics(torch.arange(4), COUNTS)).explain()
    assert explanation.exact
    assert "Categorical × 4, in copies" in " ".join(str(explanation).split())


@pytest.mark.parametrize(
    ("copies", "says"),
    [
        (-1.0, "found copies between -1 and -1, expected positive numbers. Leave out elements that occur never"),
        (torch.tensor([1.0, 0.0, 2.0, 1.0]), "found copies between 0 and 2, expected positive"),
        (float("nan"), "found copies between nan and nan, expected positive"),
        (float("inf"), "found copies between inf and inf, expected positive"),
        (
            torch.ones(3),
            r"found copies of shape \(3,\), expected a positive number, or one for each element: shape \(4,\)",
        ),
        (torch.ones(2, 4), r"found copies of shape \(2, 4\)"),
        ("three", "found copies of type str"),
    ],
)
def test_bad_copies(copies: Any, says: str):
    def model() -> None:
        with pyro.plate("rows", 4):
            z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2), infer={"blr": {"copies": copies}})
            pyro.sample("x", dist.Normal(z.double(), 1.0), obs=POINTS)

    with pytest.raises(ValueError, match=f"site 'z': {says}"):
        BLRInference(model).step()


def test_copies_in_a_group():
    model = effects(torch.arange(4), COUNTS)
    with pytest.raises(
        ValueError, match=r"site 'local': found copies for a site of the group \['m', 'local'\]; leave it out of groups"
    ):
        BLRInference(model, blocks=[["m", "local"]]).step()


def test_options_that_do_not_exist():
    def model() -> None:
        pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0), infer={"blr": {"copy": 2}})

    with pytest.raises(
        ValueError, match=r"site 'z': found \['copy'\] in infer=.*expected some of \['family', 'block', 'copies'\]"
    ):
        BLRInference(model).step()
