"""Guides whose distributions take elements of a parameter: `loc[0]`, `b[:, 1]`."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

from pyro_blr import BLRInference

positive = constraints.positive
X = torch.tensor([[1.0, 0.3], [1.0, -1.2], [1.0, 2.0], [1.0, 0.7]], dtype=torch.float64)
Y = torch.tensor([0.4, -0.3, 2.2, 1.5], dtype=torch.float64)
BITS = torch.tensor([1.0, 1.0, 0.0, 1.0])


def line() -> None:
    a = pyro.sample("a", dist.Normal(0.0, 2.0))
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 4):
        pyro.sample("y", dist.Normal(a + b * X[:, 1], 1.0), obs=Y)


def coins() -> None:
    with pyro.plate("coins", 2):
        p = pyro.sample("p", dist.Beta(1.0, 1.0))
    with pyro.plate("data", 4):
        pyro.sample("y", dist.Bernoulli(p[0]), obs=BITS)


def test_two_sites_of_one_parameter() -> None:
    def guide() -> None:
        loc = pyro.param("loc", lambda: torch.zeros(2))
        scale = pyro.param("scale", lambda: torch.ones(2), constraint=positive)
        pyro.sample("a", dist.Normal(loc[1], scale[0]))
        pyro.sample("b", dist.Normal(loc[0], scale[1]))

    engine = BLRInference(line, guide)
    for _ in range(100):
        engine.step()
    precision = X.mT @ X + torch.diag(torch.tensor([0.25, 1.0]))
    best = torch.linalg.solve(precision, X.mT @ Y)  # of the best factorised Gaussian, whose precisions are the diagonal
    assert torch.allclose(pyro.param("loc").detach().double(), best.flip(0), atol=1e-6)
    assert torch.allclose(pyro.param("scale").detach().double(), precision.diagonal().rsqrt(), atol=1e-6)


def test_columns_of_one_parameter() -> None:
    def guide() -> None:
        both = pyro.param("both", lambda: torch.tensor([[2.0, 3.0], [4.0, 5.0]]), constraint=positive)
        with pyro.plate("coins", 2):
            pyro.sample("p", dist.Beta(both[:, 1], both[:, 0]))

    BLRInference(coins, guide).step()
    assert torch.allclose(pyro.param("both").detach(), torch.tensor([[2.0, 4.0], [1.0, 1.0]]), atol=1e-6)


def one_for_both() -> None:
    a = pyro.param("a", lambda: torch.tensor([2.0, 3.0]), constraint=positive)
    with pyro.plate("coins", 2):
        pyro.sample("p", dist.Beta(a, a))


def a_rest() -> None:
    a = pyro.param("a", lambda: torch.tensor([2.0, 3.0, 4.0]), constraint=positive)
    with pyro.plate("coins", 2):
        pyro.sample("p", dist.Beta(a[:2], pyro.param("b", lambda: torch.ones(2), constraint=positive)))


@pytest.mark.parametrize("guide", [one_for_both, a_rest])
def test_parameters_that_do_not_fill_the_family(guide: Callable) -> None:
    """λ cannot go where the rule moves it: it goes as near as the guide has (tests/test_curved.py), and explain says so."""
    engine = BLRInference(coins, guide)
    engine.step()
    assert "need not give every member of its family" in str(engine.explain().to_dict())
