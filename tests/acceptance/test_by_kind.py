"""Pyro's unit tests of SVI by kind: the same models, guides and assertions, with a tenth of the steps or fewer.

Their guides have the right family and a wrong start; what they assert is the distance of variational parameters from
the exact posterior's, at their tolerances.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO, config_enumerate
from pyro.optim import Adam
from torch import Tensor
from torch.distributions import constraints

from pyro_blr import BLRInference

positive = constraints.positive
LOSSES = [Trace_ELBO, TraceMeanField_ELBO, TraceGraph_ELBO, TraceEnum_ELBO]
every_loss = pytest.mark.parametrize("loss", LOSSES, ids=[loss.__name__ for loss in LOSSES])


def trained(model: Callable, guide: Callable, loss: Any, steps: int) -> BLRInference:
    engine = BLRInference(model, guide, Adam({"lr": 0.001, "betas": (0.95, 0.999)}), loss())
    for _ in range(steps):
        engine.step()
    return engine


def distance(name: str, expected: Any) -> float:
    return float((pyro.param(name).detach() - torch.as_tensor(expected)).abs().max())


def data(*rows: Any) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------------
# Conjugate pairs: 3,000 to 15,000 steps there


@pytest.mark.parametrize(
    ("loss", "reparameterised", "subsampled"),
    [*itertools.product(LOSSES, [True, False], [False]), (Trace_ELBO, True, True), (TraceGraph_ELBO, False, True)],
)
def test_normal_normal(loss: Any, reparameterised: bool, subsampled: bool) -> None:
    prior_loc, prior_precision, precision = data(0.0, 0.5), data(1.3, 2.0), data(2.0, 3.0)
    y = data([-0.1, 0.3], [0.0, 0.4], [0.2, 0.5], [0.1, 0.7])
    size = 2 if subsampled else 4

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(prior_loc, prior_precision.rsqrt()).to_event(1))
        with pyro.plate("data", 4, subsample_size=size) as index:
            pyro.sample("obs", dist.Normal(mu, precision.rsqrt()).to_event(1), obs=y[index])

    def guide() -> None:
        loc = pyro.param("loc", lambda: exact_loc + 0.334 * torch.ones(2))
        log_scale = pyro.param("log_scale", lambda: exact_log_scale - 0.29 * torch.ones(2))
        q = dist.Normal(loc, torch.exp(log_scale))
        pyro.sample(
            "mu", (q if reparameterised else dist.testing.fakes.NonreparameterizedNormal(loc, q.scale)).to_event(1)
        )

    exact_precision = prior_precision + 4 * precision
    exact_loc = (prior_precision * prior_loc + precision * y.sum(0)) / exact_precision
    exact_log_scale = -0.5 * exact_precision.log()
    trained(model, guide, loss, 100 if subsampled else 5)
    assert distance("loc", exact_loc) < (0.05 if subsampled else 1e-9)
    assert distance("log_scale", exact_log_scale) < (0.05 if subsampled else 1e-9)


@every_loss
def test_poisson_gamma(loss: Any) -> None:
    y = data(1.0, 2.0, 3.0)

    def model() -> None:
        rate = pyro.sample("rate", dist.Gamma(1.0, 1.0))
        with pyro.plate("data", 3):
            pyro.sample("obs", dist.Poisson(rate), obs=y)

    def guide() -> None:
        shape = pyro.param("shape", torch.tensor(7.0 * math.exp(0.17)), constraint=positive)
        rate = pyro.param("rate_", torch.tensor(4.0 / math.exp(0.143)), constraint=positive)
        pyro.sample("rate", dist.Gamma(shape, rate))

    trained(model, guide, loss, 1)
    assert distance("shape", 7.0) < 1e-9 and distance("rate_", 4.0) < 1e-9


@every_loss
def test_exponential_gamma(loss: Any) -> None:
    y = data(3.0, 2.0)

    def model() -> None:
        rate = pyro.sample("rate", dist.Gamma(1.0, 1.0))
        with pyro.plate("data", 2):
            pyro.sample("obs", dist.Exponential(rate), obs=y)

    def guide() -> None:
        log_shape = pyro.param("log_shape", torch.tensor(math.log(3.0) + 0.14))
        log_rate = pyro.param("log_rate", torch.tensor(math.log(6.0) - 0.14))
        pyro.sample("rate", dist.Gamma(log_shape.exp(), log_rate.exp()))

    trained(model, guide, loss, 1)
    assert distance("log_shape", math.log(3.0)) < 1e-9 and distance("log_rate", math.log(6.0)) < 1e-9


@every_loss
def test_bernoulli_beta(loss: Any) -> None:
    y = data(0.0, 1.0, 1.0, 1.0)

    def model() -> None:
        p = pyro.sample("p", dist.Beta(1.0, 1.0))
        with pyro.plate("data", 4):
            pyro.sample("obs", dist.Bernoulli(p), obs=y)

    def guide() -> None:
        a = pyro.param("log_a", torch.tensor(math.log(4.0) + 0.143)).exp()
        b = pyro.param("log_b", torch.tensor(math.log(2.0) - 0.143)).exp()
        pyro.sample("p", dist.Beta(a, b))

    trained(model, guide, loss, 1)
    assert distance("log_a", math.log(4.0)) < 1e-9 and distance("log_b", math.log(2.0)) < 1e-9


@every_loss
def test_log_normal_normal(loss: Any) -> None:
    y = data([1.5], [2.2])

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(torch.zeros(1), 5**-0.5).to_event(1))
        with pyro.plate("data", 2):
            pyro.sample("obs", dist.LogNormal(mu, 0.5).to_event(1), obs=y)

    def guide() -> None:
        loc = pyro.param("loc", torch.tensor([0.6]))
        pyro.sample("mu", dist.Normal(loc, pyro.param("log_tau", torch.tensor([0.3])).exp()).to_event(1))

    trained(model, guide, loss, 1)
    precision = 5 + 2 * 4.0
    assert distance("loc", 4 * float(y.log().sum()) / precision) < 1e-9
    assert distance("log_tau", -0.5 * math.log(precision)) < 1e-9


# ------------------------------------------------------------------------------------------------------------
# Plates in every nesting


@pytest.mark.parametrize("outer", ["vectorised", "sequential"])
@pytest.mark.parametrize("inner", ["vectorised", "sequential"])
@pytest.mark.parametrize("size", [2, 3])
def test_nested_plates(outer: str, inner: str, size: int) -> None:
    """theta_i ~ N(0, 1), y_ij ~ N(theta_i, 1), both plates as a batch or as a loop, the outer one subsampled or whole."""
    y = torch.arange(12.0).reshape(3, 4) / 5

    def loop(name: str, index: Any, body: Callable) -> None:
        for i in pyro.plate(name, len(index)):
            body(int(index[i]), f"_{int(index[i])}")

    def rows(i: Any, label: str) -> None:
        theta = pyro.sample(f"theta{label}", dist.Normal(0.0, 1.0))
        if inner == "vectorised":
            with pyro.plate(f"columns{label}", 4, dim=-2):
                pyro.sample(f"y{label}", dist.Normal(theta, 1.0), obs=y[i].T if y[i].dim() > 1 else y[i][:, None])
        else:
            loop(
                f"columns{label}",
                range(4),
                lambda j, more: pyro.sample(f"y{label}{more}", dist.Normal(theta, 1.0), obs=y[i, j]),
            )

    def model() -> None:
        if outer == "vectorised":
            with pyro.plate("rows", 3, subsample_size=size, dim=-1) as index:
                rows(index, "")
        else:
            loop("rows", range(3), rows)

    engine = BLRInference(model)
    for _ in range(30):
        engine.step()
    expected = y.sum(1) / 5
    if outer == "vectorised":
        np.testing.assert_allclose(engine.posterior["theta"].mean, expected, atol=1e-9)
        np.testing.assert_allclose(engine.posterior["theta"].variance, 0.2, rtol=1e-9)
    else:
        found = [float(engine.posterior[f"theta_{i}"].mean) for i in range(3)]
        np.testing.assert_allclose(found, expected, atol=1e-9)


# ------------------------------------------------------------------------------------------------------------
# Enumeration on small models, against brute force


def test_gradients_of_enumerated_guides() -> None:
    """A Bernoulli guide of a Bernoulli model: the exact posterior, from a wrong start, in one step."""

    def model() -> None:
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Bernoulli(0.2 + 0.5 * z), obs=torch.tensor(1.0))

    @config_enumerate
    def guide() -> None:
        pyro.sample("z", dist.Bernoulli(pyro.param("q", torch.tensor(0.9), constraint=constraints.unit_interval)))

    engine = trained(model, guide, lambda: TraceEnum_ELBO(max_plate_nesting=0), 1)
    evidence = 0.3 * 0.7 + 0.7 * 0.2
    assert distance("q", 0.21 / evidence) < 1e-9
    assert -engine.evaluate_loss() == pytest.approx(math.log(evidence), abs=1e-9)


def test_independent_categoricals_in_plates() -> None:
    weights = data([0.1, 0.2, 0.7], [0.5, 0.3, 0.2])
    likelihood = data(0.9, 0.3, 0.2)

    def model() -> None:
        with pyro.plate("rows", 2):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("x", dist.Bernoulli(likelihood[z]), obs=torch.ones(2))

    def guide() -> None:
        probs = pyro.param("probs", torch.full((2, 3), 1 / 3, dtype=torch.float64), constraint=constraints.simplex)
        with pyro.plate("rows", 2):
            pyro.sample("z", dist.Categorical(probs), infer={"enumerate": "parallel"})

    engine = BLRInference(model, guide, Adam({"lr": 0.01}), TraceEnum_ELBO(max_plate_nesting=1))
    for _ in range(3):
        engine.step()
    joint = weights * likelihood
    np.testing.assert_allclose(pyro.param("probs").detach(), joint / joint.sum(-1, keepdim=True), atol=1e-7)
    assert -engine.evaluate_loss() == pytest.approx(float(joint.sum(-1).log().sum()), abs=1e-6)


def test_a_chain_of_discrete_sites_has_the_best_product() -> None:
    """Three dependent states, q independent: the fixed point of coordinate ascent by brute force over all 8 states."""
    start, move, emit = data(0.6, 0.4), data([0.7, 0.3], [0.2, 0.8]), data(0.1, 0.8)

    def model() -> None:
        z = pyro.sample("z_0", dist.Categorical(start))
        for t in range(1, 3):
            z = pyro.sample(f"z_{t}", dist.Categorical(move[z]))
            pyro.sample(f"x_{t}", dist.Bernoulli(emit[z]), obs=torch.tensor(float(t % 2)))

    def guide() -> None:
        for t in range(3):
            pyro.sample(f"z_{t}", dist.Categorical(logits=pyro.param(f"q_{t}", data(0.1, 0.0))))

    trained(model, guide, TraceEnum_ELBO, 60)
    table = torch.zeros(2, 2, 2)
    for i, j, k in itertools.product(range(2), repeat=3):
        x = emit[j].log() + (1 - emit[k]).log()
        table[i, j, k] = start[i].log() + move[i, j].log() + move[j, k].log() + x
    q = [data(0.55, 0.45).clone() for _ in range(3)]
    for _ in range(500):
        for t, letters in enumerate(("j,k->i", "i,k->j", "i,j->k")):
            others = [q[s] for s in range(3) if s != t]
            q[t] = torch.einsum(f"ijk,{letters}", table, *others).softmax(-1)
    for t in range(3):
        np.testing.assert_allclose(pyro.param(f"q_{t}").softmax(-1).detach(), q[t], atol=1e-6)


# ------------------------------------------------------------------------------------------------------------
# Beside guides: parameters of the model


def test_empirical_bayes_with_a_guide_of_the_users_own() -> None:
    """theta_j ~ N(m, 1), y_j ~ N(theta_j, 1): the evidence is N(m, 2), so m is the mean of y."""
    y = 3.0 + torch.randn(40)

    def model() -> None:
        m = pyro.param("m", torch.tensor(0.0))
        with pyro.plate("groups", 40):
            theta = pyro.sample("theta", dist.Normal(m, 1.0))
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y)

    def guide() -> None:
        loc = pyro.param("loc", torch.zeros(40))
        scale = pyro.param("scale", torch.ones(40), constraint=positive)
        with pyro.plate("groups", 40):
            pyro.sample("theta", dist.Normal(loc, scale))

    engine = BLRInference(model, guide, Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(400):
        engine.step()
    m = pyro.param("m").item()
    assert m == pytest.approx(float(y.mean()), abs=0.01)
    np.testing.assert_allclose(pyro.param("loc").detach(), (y + m) / 2, atol=0.02)
    assert distance("scale", 0.5**0.5) < 1e-9
    assert -engine.evaluate_loss() == pytest.approx(float(dist.Normal(m, 2**0.5).log_prob(y).sum()), abs=0.05)
