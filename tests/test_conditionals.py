"""Guides whose statements are linear in their own latents are one Gaussian: exact evidence in one step where they hold the posterior."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.nn import PyroModule, PyroParam
from pyro.optim import SGD, Adam
from torch import Tensor
from torch.distributions import constraints

from pyro_blr import BLRInference

positive = constraints.positive
LOSSES = [Trace_ELBO, TraceMeanField_ELBO, TraceGraph_ELBO, TraceEnum_ELBO]


def param(name: str, value: Any, constraint: Any = constraints.real) -> Tensor:
    return pyro.param(name, torch.as_tensor(value, dtype=torch.float64), constraint=constraint)


def engine_of(model: Callable, guide: Callable, loss: Any = Trace_ELBO) -> BLRInference:
    return BLRInference(model, guide, Adam({"lr": 0.01}), loss())


def chain_model(length: int, y: Tensor) -> Callable:
    """z_1 ~ N(0.2, 1), z_k ~ N(z_{k−1}, 0.8), y_n ~ N(z_K, 0.5)."""

    def model() -> None:
        z = pyro.sample("z_1", dist.Normal(torch.tensor([0.2]), 1.0).to_event(1))
        for k in range(2, length + 1):
            z = pyro.sample(f"z_{k}", dist.Normal(z, 0.8).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(z, 0.5).to_event(1), obs=y)

    return model


def backwards(length: int) -> Callable:
    """Pyro's guide of such a chain: every site given the next one."""

    def guide() -> None:
        z: Any = None
        for k in reversed(range(1, length + 1)):
            loc = param(f"loc_{k}", [0.3])
            if z is not None:
                loc = param(f"kappa_{k}", [0.4]) * z + loc
            z = pyro.sample(f"z_{k}", dist.Normal(loc, param(f"log_sig_{k}", [0.1]).exp()).to_event(1))

    return guide


def chain_posterior(length: int, y: Tensor) -> tuple[np.ndarray, np.ndarray, float]:
    """(mean, covariance, log evidence), by conditioning the joint Gaussian of all variables."""
    prior = np.ones((length, length)) + 0.64 * (np.minimum.outer(np.arange(length), np.arange(length)))
    count = len(y)
    design = np.zeros((count, length))
    design[:, -1] = 1.0
    cover = design @ prior @ design.T + 0.25 * np.eye(count)
    gain = prior @ design.T @ np.linalg.inv(cover)
    apart = y.numpy().ravel() - 0.2
    evidence = dist.MultivariateNormal(0.2 * torch.ones(count), torch.as_tensor(cover)).log_prob(y.ravel())
    return 0.2 + gain @ apart, prior - gain @ design @ prior, float(evidence)


@pytest.mark.parametrize("length", [2, 3, 8, 17])
def test_a_chain_is_exact_in_one_step(length: int) -> None:
    y = torch.tensor([[0.8], [1.7], [1.1]])
    model, guide = chain_model(length, y), backwards(length)
    engine = engine_of(model, guide)
    engine.step()
    mean, covariance, evidence = chain_posterior(length, y)
    assert -engine.evaluate_loss() == pytest.approx(evidence, abs=1e-8)
    assert pyro.param(f"loc_{length}").item() == pytest.approx(mean[-1], abs=1e-8)
    for k in range(length - 1):
        kappa = covariance[k, k + 1] / covariance[k + 1, k + 1]
        assert pyro.param(f"kappa_{k + 1}").item() == pytest.approx(kappa, rel=1e-7)
        assert pyro.param(f"loc_{k + 1}").item() == pytest.approx(mean[k] - kappa * mean[k + 1], abs=1e-7)
        left = covariance[k, k] - kappa * covariance[k, k + 1]
        assert pyro.param(f"log_sig_{k + 1}").item() == pytest.approx(0.5 * math.log(left), abs=1e-7)
    draws = [-Trace_ELBO().loss(model, guide) for _ in range(3)]
    np.testing.assert_allclose(draws, evidence, atol=1e-7)  # at the posterior every draw is the evidence
    assert engine.explain().to_dict()["ordinary"] == {}


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 0.8), (torch.float32, 0.05), (torch.float64, 1e-4)])
def test_single_precision_and_tight_chains(dtype: torch.dtype, width: float) -> None:
    """One observation y of z_6 ~ N(0, 1 + 5 w²), with noise of variance ¼."""
    torch.set_default_dtype(dtype)

    def model() -> None:
        z = pyro.sample("z_1", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        for k in range(2, 7):
            z = pyro.sample(f"z_{k}", dist.Normal(z, width).to_event(1))
        pyro.sample("y", dist.Normal(z, 0.5).to_event(1), obs=torch.tensor([1.3]))

    def guide() -> None:
        z: Any = None
        for k in reversed(range(1, 7)):
            loc = pyro.param(f"loc_{k}", torch.tensor([0.3]))
            if z is not None:
                loc = pyro.param(f"kappa_{k}", torch.tensor([0.4])) * z + loc
            z = pyro.sample(f"z_{k}", dist.Normal(loc, pyro.param(f"s_{k}", torch.ones(1)).exp()).to_event(1))

    engine = engine_of(model, guide)
    engine.step()
    assert engine.explain().to_dict()["ordinary"] == {}
    evidence = float(dist.Normal(0.0, (1.25 + 5 * width**2) ** 0.5).log_prob(torch.tensor(1.3)))
    assert -engine.evaluate_loss() == pytest.approx(evidence, abs=1e-4 if dtype == torch.float32 else 1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss(loss: Any) -> None:
    y = torch.tensor([[0.8], [1.7]])
    engine = engine_of(chain_model(2, y), backwards(2), loss)
    engine.step()
    assert -engine.evaluate_loss() == pytest.approx(chain_posterior(2, y)[2], abs=1e-8)


@pytest.mark.parametrize("form", ["W @ z", "z @ W", "multivariate"])
def test_matrices_of_coefficients(form: str) -> None:
    """a in R², b in R³ given a; the posterior from the joint precision."""
    design = torch.tensor([[1.0, 0.5], [-0.3, 2.0], [0.7, -1.0]])
    y = torch.tensor([1.0, -0.5, 2.0])

    def model() -> None:
        a = pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        b = pyro.sample("b", dist.Normal(design @ a, 0.7).to_event(1))
        pyro.sample("y", dist.Normal(b, 0.5).to_event(1), obs=y)

    def guide() -> None:
        root = param("root", torch.eye(2), constraints.lower_cholesky)
        a = pyro.sample("a", dist.MultivariateNormal(param("m", [0.0, 0.0]), scale_tril=root))
        start, c = 0.1 * torch.ones(3, 2), param("c", [0.0, 0.0, 0.0])
        loc = a @ param("W", start.T) + c if form == "z @ W" else param("W", start) @ a + c
        if form == "multivariate":
            pyro.sample(
                "b", dist.MultivariateNormal(loc, scale_tril=param("s", torch.eye(3), constraints.lower_cholesky))
            )
        else:
            pyro.sample("b", dist.Normal(loc, param("s", torch.ones(3), positive)).to_event(1))

    engine = engine_of(model, guide)
    engine.step()
    given = (1 / 0.49) / (1 / 0.49 + 4)  # E[b | a, y] = given · design a + (1 − given) y
    found = pyro.param("W").detach()
    np.testing.assert_allclose(found.T if form == "z @ W" else found, given * design, atol=1e-8)
    np.testing.assert_allclose(pyro.param("c").detach(), (1 - given) * y, atol=1e-8)
    cover = design @ design.T + (0.49 + 0.25) * torch.eye(3)
    evidence = float(dist.MultivariateNormal(torch.zeros(3), cover).log_prob(y))
    assert -engine.evaluate_loss() == pytest.approx(evidence, abs=1e-8)


@pytest.mark.parametrize("registered", ["PyroModule", "pyro.module"])
def test_a_linear_layer_is_a_coefficient_and_an_intercept(registered: str) -> None:
    """W and c are a layer's weight and bias, which the store holds too."""
    y = torch.tensor([0.7, -1.1])

    def model() -> None:
        a = pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("b", dist.Normal(a, 1.0).to_event(1))
        pyro.sample("y", dist.Normal(a.flip(0), 0.5).to_event(1), obs=y)

    class Guide(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.m, self.c = torch.nn.Parameter(torch.zeros(2)), PyroModule[torch.nn.Linear](2, 2)
            self.s = PyroParam(torch.ones(2), constraint=positive)
            self.t = PyroParam(torch.ones(2), constraint=positive)

        def forward(self) -> None:
            a = pyro.sample("a", dist.Normal(self.m, self.s).to_event(1))
            pyro.sample("b", dist.Normal(self.c(a), self.t).to_event(1))

    layer = torch.nn.Linear(2, 2)

    def guide() -> None:
        pyro.module("c", layer)
        a = pyro.sample("a", dist.Normal(param("m", [0.0, 0.0]), param("s", [1.0, 1.0], positive)).to_event(1))
        pyro.sample("b", dist.Normal(layer(a), param("t", [1.0, 1.0], positive)).to_event(1))

    q = Guide() if registered == "PyroModule" else guide
    engine = engine_of(model, q)
    engine.step()
    net = q.c if isinstance(q, Guide) else layer
    np.testing.assert_allclose(net.weight.detach(), torch.eye(2), atol=1e-9)
    np.testing.assert_allclose(net.bias.detach(), 0.0, atol=1e-9)
    evidence = float(dist.Normal(torch.zeros(2), 1.25**0.5).log_prob(y).sum())
    assert -engine.evaluate_loss() == pytest.approx(evidence, abs=1e-9)
    assert torch.equal(pyro.get_param_store()["c.bias" if q is not guide else "c$$$bias"], net.bias)
    with torch.no_grad():
        net.bias.fill_(3.0)  # somebody else moves a parameter
    assert -engine.evaluate_loss() < evidence - 1
    engine.step()
    assert -engine.evaluate_loss() == pytest.approx(evidence, abs=1e-9)


def test_a_group_beside_families_and_beside_the_rest() -> None:
    """Two linear sites, a Gamma, and a point: the first three take natural gradients given it."""
    y = torch.tensor([0.4, 1.3, 2.2])

    def model() -> None:
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
        a = pyro.sample("a", dist.Normal(shift, 1.0))
        b = pyro.sample("b", dist.Normal(a, 1.0))
        tau = pyro.sample("tau", dist.Gamma(2.0, 1.0))
        with pyro.plate("rows", 3):
            pyro.sample("y", dist.Normal(b, tau.rsqrt()), obs=y)

    def guide() -> None:
        pyro.sample("shift", dist.Delta(param("point", 0.5)))
        a = pyro.sample("a", dist.Normal(param("m", 0.0), param("s", 1.0, positive)))
        pyro.sample("b", dist.Normal(param("k", 0.1) * a + param("c", 0.0), param("t", 1.0, positive)))
        pyro.sample("tau", dist.Gamma(param("alpha", 1.0, positive), param("beta", 1.0, positive)))

    engine = BLRInference(model, guide, SGD({"lr": 0.0}), Trace_ELBO())
    for _ in range(60):
        engine.step()
    tau = 1.0
    for _ in range(200):  # coordinate ascent on two numbers
        precision = np.array([[2.0, -1.0], [-1.0, 1 + 3 * tau]])
        cover = np.linalg.inv(precision)
        mean = cover @ np.array([0.5, tau * float(y.sum())])
        beta = 1 + 0.5 * (float(((y - mean[1]) ** 2).sum()) + 3 * cover[1, 1])
        tau = 3.5 / beta
    assert pyro.param("beta").item() == pytest.approx(beta, rel=1e-7)
    assert pyro.param("m").item() == pytest.approx(mean[0], rel=1e-7)
    assert pyro.param("k").item() == pytest.approx(cover[0, 1] / cover[0, 0], rel=1e-7)
    assert set(engine.explain().to_dict()["ordinary"]) == {"shift"}


def test_a_non_conjugate_pair_has_a_gaussian_for_every_optimum() -> None:
    """y ~ Poisson(exp(a + b)): the best Gaussian of two dimensions, by `AutoMultivariateNormal`'s own optimum."""

    def model() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(0.0, 0.5))
        pyro.sample("y", dist.Poisson((a + b).exp()), obs=torch.tensor(4.0))

    def guide() -> None:
        a = pyro.sample("a", dist.Normal(param("m", 0.0), param("s", 1.0, positive)))
        pyro.sample("b", dist.Normal(param("k", 0.1) * a + param("c", 0.0), param("t", 1.0, positive)))

    engine = engine_of(model, guide)
    bound = engine.run(progress=False).elbo
    best = BLRInference(model, blocks=[["a", "b"]]).run(progress=False).elbo
    assert bound == pytest.approx(best, abs=1e-5)


# ------------------------------------------------------------------------------------------------------------
# What is no Gaussian of the guide's own


def pair() -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(a, 1.0))
    pyro.sample("y", dist.Normal(b, 0.5), obs=torch.tensor(2.0))


def leaf(name: str) -> Tensor:
    return pyro.sample(name, dist.Normal(param(f"m_{name}", 0.0), param(f"s_{name}", 1.0, positive)))


def no_intercept() -> None:
    pyro.sample("b", dist.Normal(param("k", 0.1) * leaf("a"), param("t", 1.0, positive)))


def not_linear() -> None:
    pyro.sample("b", dist.Normal(param("k", 0.1) * leaf("a").exp() + param("c", 0.0), param("t", 1.0, positive)))


def scale_follows() -> None:
    a = leaf("a")
    pyro.sample("b", dist.Normal(param("k", 0.1) * a + param("c", 0.0), param("t", 1.0, positive) * (1 + a * a)))


def fixed_coefficient() -> None:
    pyro.sample("b", dist.Normal(leaf("a") + param("c", 0.0), param("t", 1.0, positive)))


def one_parameter_twice() -> None:
    a, t = leaf("a"), param("t", 1.0, positive)
    pyro.sample("b", dist.Normal(t * a + param("c", 0.0), t))


@pytest.mark.parametrize("guide", [no_intercept, not_linear, scale_follows, fixed_coefficient, one_parameter_twice])
def test_the_child_is_left_to_optim(guide: Callable) -> None:
    engine = engine_of(pair, guide)
    assert math.isfinite(engine.step())
    found = engine.explain().to_dict()
    assert set(found["ordinary"]) == {"b"} and set(found["sites"]) == {"a"}


def test_a_chain_that_leaves_out_a_dependence() -> None:
    """The posterior correlates a and c given b; the guide does not: the natural gradient would leave its family."""

    def model() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(a, 1.0))
        c = pyro.sample("c", dist.Normal(b, 1.0))
        pyro.sample("y", dist.Normal(a + c, 0.5), obs=torch.tensor(2.0))

    def guide() -> None:
        b = pyro.sample("b", dist.Normal(param("k", 0.1) * leaf("a") + param("l", 0.0), param("t", 1.0, positive)))
        pyro.sample("c", dist.Normal(param("h", 0.1) * b + param("n", 0.0), param("u", 1.0, positive)))

    engine = engine_of(model, guide)
    assert math.isfinite(engine.step())
    assert set(engine.explain().to_dict()["ordinary"]) == {"b", "c"}


def test_looking_leaves_parameters_and_generator() -> None:
    engine = engine_of(chain_model(3, torch.tensor([[0.8]])), backwards(3))
    engine.evaluate_loss()
    before = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
    state = torch.get_rng_state()
    engine.explain()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(pyro.param(name), value) for name, value in before.items())
    assert before["kappa_1"].item() == 0.4
