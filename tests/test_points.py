"""Guides that are points reach the mode by Newton's method."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoDelta, AutoLaplaceApproximation, init_to_value
from pyro.optim import Adam
from torch import Tensor
from torch.distributions import constraints

from pyro_blr import BLRInference


def engine_of(model: Any, guide: Any, loss: Any = None) -> BLRInference:
    return BLRInference(model, guide, Adam({"lr": 0.01}), loss or Trace_ELBO())


def test_the_mode_of_a_gaussian_takes_one_step() -> None:
    x, y = torch.randn(20, 3), torch.randn(20)

    def model() -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 2.0).to_event(1))
        with pyro.plate("rows", 20):
            pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)

    guide = AutoDelta(model)
    engine_of(model, guide).step()
    expected = torch.linalg.solve(4 * x.mT @ x + torch.eye(3) / 4, 4 * x.mT @ y)
    np.testing.assert_allclose(guide.median()["w"], expected, rtol=1e-9)
    assert "AutoDelta.w" in pyro.get_param_store()


def coin() -> None:
    f = pyro.sample("f", dist.Beta(3.0, 2.0))
    with pyro.plate("tosses", 10):
        pyro.sample("y", dist.Bernoulli(f), obs=torch.tensor([1.0] * 6 + [0.0] * 4))


def test_a_mode_in_constrained_space_has_no_jacobian() -> None:
    """AutoDelta's: (α − 1 + k) / (α + β − 2 + n).  AutoLaplaceApproximation's is one in unconstrained space."""
    guide = AutoDelta(coin)
    fit = engine_of(coin, guide).run(progress=False)
    assert fit.converged and fit.num_steps < 20
    assert guide.median()["f"].item() == pytest.approx(8 / 13, rel=1e-5)
    laplace = AutoLaplaceApproximation(coin)
    engine_of(coin, laplace).run(progress=False)
    assert laplace()["f"].item() == pytest.approx(9 / 15, rel=1e-5)
    curvature = 15 * (9 / 15) * (6 / 15)
    assert laplace.laplace_approximation().scale.item() == pytest.approx(curvature**-0.5, rel=1e-4)


def test_a_point_of_the_users_own() -> None:
    def guide() -> None:
        pyro.sample("f", dist.Delta(pyro.param("f_", torch.tensor(0.5), constraint=constraints.unit_interval)))

    engine = engine_of(coin, guide)
    for _ in range(8):
        engine.step()
    assert pyro.param("f_").item() == pytest.approx(8 / 13, rel=1e-9)
    explained = engine.explain().to_dict()
    assert explained["ordinary"]["f"].startswith("a point: Newton's method")


def mixture(y: Tensor) -> None:
    weights = pyro.sample("weights", dist.Dirichlet(2.0 * torch.ones(2)))
    with pyro.plate("components", 2):
        locs = pyro.sample("locs", dist.Normal(0.0, 10.0))
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(locs[z], 1.0), obs=y)


def test_discrete_sites_summed_out_by_the_loss() -> None:
    y = torch.tensor([0.0, 1.0, 10.0, 11.0, 12.0])
    start = init_to_value(values={"weights": torch.tensor([0.5, 0.5]), "locs": torch.tensor([1.0, 9.0])})
    guide = AutoDelta(poutine.block(mixture, hide=["z"]), init_loc_fn=start)
    engine = engine_of(mixture, guide, TraceEnum_ELBO(max_plate_nesting=1))
    losses = [engine.step(y) for _ in range(15)]
    assert all(b <= a + 1e-9 for a, b in zip(losses[:-1], losses[1:], strict=True))
    found = guide.median()
    np.testing.assert_allclose(found["weights"], [3 / 7, 4 / 7], atol=1e-6)  # the components are far apart
    np.testing.assert_allclose(found["locs"], [1 / 2.01, 33 / 3.01], atol=1e-6)


def test_a_loss_that_does_not_warn_of_enumeration_is_followed() -> None:
    """Warnings are errors here."""

    def model() -> None:
        pyro.sample("x", dist.Normal(0.0, 1.0))

    loss = TraceEnum_ELBO(strict_enumeration_warning=False)
    BLRInference(model, AutoDelta(model), Adam({"lr": 0.1}), loss).step()


def test_many_unknowns() -> None:
    y = torch.randn(400)

    def model() -> None:
        with pyro.plate("rows", 400):
            theta = pyro.sample("theta", dist.StudentT(4.0, 0.0, 1.0))
            pyro.sample("y", dist.Normal(theta, 0.5), obs=y)

    guide = AutoDelta(model, init_loc_fn=init_to_value(values={"theta": torch.zeros(400)}))
    engine_of(model, guide).run(progress=False, max_steps=60)
    theta = guide.median()["theta"].requires_grad_()
    density = dist.StudentT(4.0, 0.0, 1.0).log_prob(theta).sum() + dist.Normal(theta, 0.5).log_prob(y).sum()
    (slope,) = torch.autograd.grad(density, theta)
    assert float(slope.abs().max()) < 1e-4


def test_parameters_of_the_model_take_steps_of_optim() -> None:
    """y ~ N(m + a, 1), a ~ N(0, 1): at the optimum of both, a = 0 and m is the mean of y."""
    y = torch.randn(30) + 2

    def model() -> None:
        m = pyro.param("m", torch.tensor(0.0))
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 30):
            pyro.sample("y", dist.Normal(m + a, 1.0), obs=y)

    guide = AutoDelta(model)
    engine = BLRInference(model, guide, Adam({"lr": 0.1}), Trace_ELBO())
    for _ in range(400):
        engine.step()
    assert pyro.param("m").item() == pytest.approx(float(y.mean()), abs=0.05)
    assert abs(guide.median()["a"].item()) < 0.05


def test_minibatches_run_as_under_svi() -> None:
    y = torch.randn(30) + 2

    def model() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 30, subsample_size=5) as index:
            pyro.sample("y", dist.Normal(a, 1.0), obs=y[index])

    guides, losses = [AutoDelta(model) for _ in range(2)], []
    for make, guide in zip((BLRInference, SVI), guides, strict=True):
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        guide._setup_prototype()
        engine = make(model, guide, Adam({"lr": 0.05}), Trace_ELBO())
        losses.append([engine.step() for _ in range(20)])
    assert losses[0] == losses[1]


@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_a_failed_step_leaves_the_point() -> None:
    broken = False

    def model() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample(
            "y", dist.Normal(a * (math.nan if broken else 1.0), 1.0, validate_args=False), obs=torch.tensor(1.0)
        )

    guide = AutoDelta(model)
    engine = engine_of(model, guide)
    engine.step()
    before = guide.median()["a"].clone()
    broken = True
    with pytest.raises(ValueError, match="gradient that is not finite at the guide's point"):
        engine.step()
    assert torch.equal(guide.median()["a"], before)


def test_float32_comes_to_rest() -> None:
    """What Newton's method could still gain is below the loss's own rounding: a step moves nothing, bit for bit."""
    torch.set_default_dtype(torch.float32)
    x = torch.linspace(-2, 2, 30)
    y = 1.0 + 2.0 * x + 0.1 * torch.sin(40 * x)

    def model() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 10.0))
        b = pyro.sample("b", dist.Normal(0.0, 10.0))
        sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", 30):
            pyro.sample("y", dist.Normal(a + b * x, sigma), obs=y)

    guide = AutoDelta(model)
    engine = BLRInference(model, guide)
    for _ in range(30):
        engine.step()
    still = {name: value.clone() for name, value in guide.median().items()}
    for _ in range(3):
        engine.step()
    assert all(torch.equal(value, still[name]) for name, value in guide.median().items())
    assert float(still["b"]) == pytest.approx(2.0, abs=0.02)
