"""Guides that are families at some sites and something else at others: natural gradients there, `optim` for the rest."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    SVI,
    Predictive,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    config_enumerate,
)
from pyro.infer.autoguide import AutoDelta, AutoGuideList, AutoNormal
from pyro.nn import PyroModule, PyroParam
from pyro.optim import SGD, Adam
from torch import Tensor
from torch.distributions import constraints

from pyro_blr import BLRInference

positive = constraints.positive
Y = torch.tensor([2.1, 3.4, 2.8, 4.0, 3.3, 1.9, 2.6, 3.7], dtype=torch.float64)


def param(name: str, value: float, constraint: Any = constraints.real) -> Tensor:
    return pyro.param(name, torch.tensor(value), constraint=constraint)


def unknown_precision() -> None:
    a = pyro.sample("a", dist.Normal(0.0, 3.0))
    tau = pyro.sample("tau", dist.Gamma(2.0, 1.5))
    with pyro.plate("rows", 8):
        pyro.sample("y", dist.Normal(a, tau.rsqrt()), obs=Y)


def gamma_of_tau() -> None:
    pyro.sample("tau", dist.Gamma(param("alpha", 1.0, positive), param("beta", 1.0, positive)))


def point_and_gamma() -> None:
    pyro.sample("a", dist.Delta(param("m", 0.5)))
    gamma_of_tau()


def normal_of_fixed_width_and_gamma() -> None:
    pyro.sample("a", dist.Normal(param("m", 0.5), 0.3).mask(torch.tensor(True)))  # so that it is not read
    gamma_of_tau()


def still(model: Callable, guide: Callable, loss: Any = None) -> BLRInference:
    """An engine whose `optim` leaves every parameter where it is."""
    return BLRInference(model, guide, SGD({"lr": 0.0}), loss or Trace_ELBO())


def said(engine: BLRInference) -> dict[str, Any]:
    return engine.explain().to_dict()


# ------------------------------------------------------------------------------------------------------------
# The message given the rest, against closed forms


def test_beside_a_point_the_update_is_bayes_rule() -> None:
    engine = still(unknown_precision, point_and_gamma)
    for _ in range(3):
        engine.step()
        assert pyro.param("alpha").item() == pytest.approx(2 + 4, rel=1e-12)
        assert pyro.param("beta").item() == pytest.approx(1.5 + 0.5 * float((Y - 0.5).square().sum()), rel=1e-12)
    assert pyro.param("m").item() == 0.5


def test_beside_a_random_site_it_is_averaged_over_draws() -> None:
    """β̂ = 1.5 + ½ Σ (y − a)² for each draw a ~ N(0.5, 0.3²): its mean, and its standard error from its variance."""
    count, spread, away = 100, 0.09, 0.5 - float(Y.mean())
    still(unknown_precision, normal_of_fixed_width_and_gamma, Trace_ELBO(num_particles=count)).step()
    assert pyro.param("alpha").item() == pytest.approx(6, rel=1e-12)
    expected = 1.5 + 0.5 * float((Y - 0.5).square().sum()) + 4 * spread
    error = 4 * ((4 * away**2 * spread + 2 * spread**2) / count) ** 0.5  # of 4 (a − ȳ)²
    assert pyro.param("beta").item() == pytest.approx(expected, abs=5 * error)


@pytest.mark.parametrize("how", ["detached", "frozen"])
def test_a_parameter_that_takes_no_gradient_is_held(how: str) -> None:
    """Under SVI it would stay where it is; so it does here: q is the best Gamma of shape 3, whose rate is 3 / 2 · 1."""

    def model() -> None:
        pyro.sample("a", dist.Gamma(2.0, 1.0))
        pyro.sample("b", dist.Normal(1.0, 1.0))

    def guide() -> None:
        shape = param("shape", 3.0, positive)
        if how == "frozen":
            pyro.get_param_store()._params["shape"].requires_grad_(False)
            shape = pyro.param("shape")
        pyro.sample("a", dist.Gamma(shape.detach() if how == "detached" else shape, param("rate", 4.0, positive)))
        pyro.sample("b", dist.Normal(param("m", 0.0), param("width", 2.0, positive)))

    engine = BLRInference(model, guide, SGD({"lr": 0.1}), Trace_ELBO())
    engine.step()
    assert pyro.param("shape").item() == pytest.approx(3.0, rel=1e-12)
    assert pyro.param("rate").item() == pytest.approx(1.5, rel=1e-6)
    assert pyro.param("m").item() == pytest.approx(1.0, rel=1e-9)
    assert not said(engine)["ordinary"]


def test_vectorised_particles_are_not_taken_one_by_one() -> None:
    """A loss runs 500 of them in one run of the model; here every draw of the rest is a run of its own."""
    runs = 0

    def model() -> None:
        nonlocal runs
        runs += 1
        unknown_precision()

    loss = Trace_ELBO(num_particles=500, vectorize_particles=True, max_plate_nesting=1)
    engine = still(model, normal_of_fixed_width_and_gamma, loss)
    engine.step()
    runs = 0
    engine.step()
    assert runs < 100


def test_noise_averages_out_over_steps() -> None:
    engine = still(unknown_precision, normal_of_fixed_width_and_gamma)
    for _ in range(60):
        engine.step()
    expected = 1.5 + 0.5 * float((Y - 0.5).square().sum()) + 4 * 0.09
    one = 4 * (4 * (0.5 - float(Y.mean())) ** 2 * 0.09 + 2 * 0.09**2) ** 0.5
    rates = [(t + 1.0) ** -0.6 for t in range(60)]
    weights = [rate * np.prod([1 - r for r in rates[t + 1 :]]) for t, rate in enumerate(rates)]
    assert pyro.param("beta").item() == pytest.approx(expected, abs=5 * one * np.linalg.norm(weights))


def pair() -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(a, 1.0))
    pyro.sample("y", dist.Normal(b, 0.5), obs=torch.tensor(2.0))


def test_the_rest_may_follow_a_site() -> None:
    """b = k a + c + s ε in the guide: log p − log q is a quadratic in a, of the same curvature at every ε."""
    k, c, s, count = 0.7, 0.4, 0.6, 16

    def guide() -> None:
        a = pyro.sample("a", dist.Normal(param("m", 0.0), param("width", 1.0, positive)))
        pyro.sample("b", dist.Normal(param("k", k) * a + param("c", c), s))

    engine = still(pair, guide, Trace_ELBO(num_particles=count))
    engine.step()
    precision = 1 + (k - 1) ** 2 + 4 * k**2
    assert pyro.param("width").item() == pytest.approx(precision**-0.5, rel=1e-6)
    mean = (-(k - 1) * c + 4 * k * (2 - c)) / precision
    error = s * abs(k - 1 + 4 * k) / precision / count**0.5
    assert pyro.param("m").item() == pytest.approx(mean, abs=5 * error)
    assert set(said(engine)["ordinary"]) == {"b"}


def test_an_encoder_beside_a_site_of_the_model() -> None:
    """mu ~ N(0, 10), z_i ~ N(mu, 1), y_i ~ N(z_i, 1), and z_i ~ N(W y_i + c, s) in the guide, which holds the best product."""
    net = torch.nn.Linear(1, 1)

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        with pyro.plate("rows", 8):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=Y)

    def guide() -> None:
        pyro.module("net", net)
        pyro.sample("mu", dist.Normal(param("m", 0.0), param("width", 1.0, positive)))
        with pyro.plate("rows", 8):
            pyro.sample("z", dist.Normal(net(Y[:, None])[:, 0], param("s", 1.0, positive)))

    engine = BLRInference(model, guide, Adam({"lr": 0.05}), Trace_ELBO(num_particles=2))
    engine.step()
    assert pyro.param("width").item() == pytest.approx((8 + 0.01) ** -0.5, rel=1e-9)
    for _ in range(100):
        engine.step()
    best = float(Y.sum()) / 2 / (4 + 0.01)
    assert pyro.param("m").item() == pytest.approx(best, abs=0.2)
    assert pyro.param("s").item() == pytest.approx(0.5**0.5, rel=0.15)
    assert said(engine)["optimised"] == ["net$$$bias", "net$$$weight", "s"]


def test_points_and_families_together_reach_the_fixed_point() -> None:
    """E step in closed form, M step by `optim`: the mode of a under q(tau), by iteration of both closed forms."""
    a = 0.5
    for _ in range(200):
        tau = 6 / (1.5 + 0.5 * float((Y - a).square().sum()))
        a = tau * float(Y.sum()) / (8 * tau + 1 / 9)
    engine = BLRInference(unknown_precision, point_and_gamma, Adam({"lr": 0.1}), Trace_ELBO(num_particles=4))
    for _ in range(100):
        engine.step()
    assert pyro.param("m").item() == pytest.approx(a, abs=0.05)
    expected = 1.5 + 0.5 * float((Y - a).square().sum())
    assert pyro.param("beta").item() == pytest.approx(expected, rel=0.02)


# ------------------------------------------------------------------------------------------------------------
# Which sites, and why not the others


def network_shares() -> None:
    m = param("m", 0.0)
    pyro.sample("a", dist.Normal(m, param("width", 1.0, positive)))
    pyro.sample("b", dist.Normal(m * 2, 1.0))


def not_reparameterised() -> None:
    a = pyro.sample("a", dist.Normal(param("m", 0.0), param("width", 1.0, positive)))
    pyro.sample("b", dist.testing.fakes.NonreparameterizedNormal(a, 0.5))


def other_order() -> None:
    b = pyro.sample("b", dist.Normal(param("m", 0.0), param("width", 1.0, positive)))
    pyro.sample("a", dist.Normal(b, 0.5))


@pytest.mark.parametrize(
    ("guide", "reason"),
    [
        (network_shares, "loc of its distribution at b is no parameter of its own"),
        (not_reparameterised, "loc of its distribution at b is no parameter of its own"),
        (other_order, "loc of its distribution at a is no parameter of its own"),
    ],
)
def test_where_no_site_can_be_told_apart(guide: Callable, reason: str) -> None:
    engine = BLRInference(pair, guide, Adam({"lr": 0.01}), Trace_ELBO())
    engine.step()
    (found,) = set(said(engine)["ordinary"].values())
    assert reason in found


def test_explain_says_per_site() -> None:
    engine = still(unknown_precision, point_and_gamma)
    found = said(engine)
    assert found["sites"]["tau"]["family"] == "Gamma" and found["sites"]["tau"]["exact"]
    assert found["ordinary"] == {
        "a": "it is a point at a, which has no natural parameters: ordinary gradient of loss through optim, as under SVI"
    }
    assert found["optimised"] == ["m"]
    assert "given the values of its others" in found["notes"][0]


def test_lists_of_autoguides() -> None:
    guide = AutoGuideList(unknown_precision)
    guide.append(AutoNormal(poutine.block(unknown_precision, hide=["a"])))
    guide.append(AutoDelta(poutine.block(unknown_precision, expose=["a"])))
    engine = BLRInference(unknown_precision, guide, Adam({"lr": 0.01}), Trace_ELBO())
    engine.step()
    assert set(said(engine)["ordinary"]) == {"a"} and set(said(engine)["sites"]) == {"tau"}
    assert said(engine)["sites"]["tau"]["family"] == "LogNormal"


def test_modules_with_parameters_of_their_own() -> None:
    class Guide(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.alpha = PyroParam(torch.tensor(1.0), constraint=positive)
            self.beta = PyroParam(torch.tensor(1.0), constraint=positive)
            self.m = torch.nn.Parameter(torch.tensor(0.5))

        def forward(self) -> None:
            pyro.sample("a", dist.Delta(self.m))
            pyro.sample("tau", dist.Gamma(self.alpha, self.beta))

    guide = Guide()
    still(unknown_precision, guide).step()
    assert guide.alpha.item() == pytest.approx(6, rel=1e-12)
    assert guide.beta.item() == pytest.approx(1.5 + 0.5 * float((Y - 0.5).square().sum()), rel=1e-12)


# ------------------------------------------------------------------------------------------------------------
# Losses, plates, stores


@pytest.mark.filterwarnings("ignore:TraceEnum_ELBO found no sample sites")
@pytest.mark.parametrize("loss", [Trace_ELBO, TraceMeanField_ELBO, TraceGraph_ELBO, TraceEnum_ELBO])
@pytest.mark.parametrize("particles", [{}, {"num_particles": 3, "vectorize_particles": True}])
def test_every_loss(loss: Any, particles: dict) -> None:
    engine = BLRInference(unknown_precision, point_and_gamma, Adam({"lr": 0.1}), loss(max_plate_nesting=1, **particles))
    losses = [engine.step() for _ in range(3)]
    assert all(np.isfinite(losses)) and pyro.param("alpha").item() == pytest.approx(6, rel=1e-12)
    assert 0.5 < pyro.param("m").item() < 1.0


def test_states_beside_points() -> None:
    """Responsibilities at the present point, in closed form."""
    y = torch.tensor([-2.0, -1.5, 2.5, 1.8])

    def model() -> None:
        with pyro.plate("components", 2):
            mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        with pyro.plate("rows", 4):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.4, 0.6])))
            pyro.sample("y", dist.Normal(mu[z], 1.0), obs=y)

    @config_enumerate
    def guide() -> None:
        with pyro.plate("components", 2):
            pyro.sample("mu", dist.Delta(pyro.param("m", torch.tensor([-1.0, 1.0]))))
        with pyro.plate("rows", 4):
            probs = pyro.param("probs", torch.full((4, 2), 0.5), constraint=constraints.simplex)
            pyro.sample("z", dist.Categorical(probs))

    engine = BLRInference(model, guide, Adam({"lr": 0.05}), TraceEnum_ELBO(max_plate_nesting=1))
    engine.step()
    scores = torch.tensor([0.4, 0.6]).log() - 0.5 * (y[:, None] - torch.tensor([-1.0, 1.0])).square()
    np.testing.assert_allclose(pyro.param("probs").detach(), scores.softmax(-1), rtol=1e-9)


def test_subsampled_rows_are_the_same_in_guide_and_model() -> None:
    """z_i is where the guide's row of y says: its variance given mu is then known at every step, whatever rows were drawn."""
    y = torch.arange(40.0) / 10

    def model(y: Tensor) -> None:
        tau = pyro.sample("tau", dist.Gamma(2.0, 1.5))
        with pyro.plate("rows", 40, subsample_size=10) as index:
            z = pyro.sample("z", dist.Normal(y[index] + 1, tau.rsqrt()))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y[index])

    def guide(y: Tensor) -> None:
        gamma_of_tau()
        with pyro.plate("rows", 40, subsample_size=10) as index:
            pyro.sample("z", dist.Delta(y[index] + param("shift", 0.5)))

    engine = still(model, guide)
    for _ in range(3):
        engine.step(y)
        assert pyro.param("alpha").item() == pytest.approx(2 + 20, rel=1e-9)
        assert pyro.param("beta").item() == pytest.approx(1.5 + 20 * 0.25, rel=1e-9)


def test_the_store_saves_loads_and_clears(tmp_path: Any) -> None:
    engine = BLRInference(unknown_precision, point_and_gamma, Adam({"lr": 0.1}), Trace_ELBO())
    for _ in range(3):
        engine.step()
    store = pyro.get_param_store()
    store.save(tmp_path / "store")
    kept = {name: value.detach().clone() for name, value in store.items()}
    assert set(kept) == {"m", "alpha", "beta"}
    store.clear()
    # Under torch 2.6 Pyro 1.9.1's own `load` reads nothing; this is what 1.9.2's does (pyro-ppl/pyro, pull request 3389).
    store.set_state(torch.load(tmp_path / "store", weights_only=False))
    assert all(torch.equal(store[name], value) for name, value in kept.items())
    again = still(unknown_precision, point_and_gamma)
    again.step()
    expected = 1.5 + 0.5 * float((Y - kept["m"]).square().sum())
    assert pyro.param("beta").item() == pytest.approx(expected, rel=1e-12)
    drawn = Predictive(unknown_precision, guide=point_and_gamma, num_samples=5)()
    assert drawn["y"].shape == (5, 8)


def test_run_returns_the_fitted_guide() -> None:
    engine = BLRInference(unknown_precision, point_and_gamma, Adam({"lr": 0.1}), Trace_ELBO())
    fit = engine.run(max_steps=20, progress=False)
    assert fit.num_steps == 20 and set(fit.sample((3,))) == {"a", "tau"} and np.isfinite(fit.elbo)


@pytest.mark.parametrize("weighs", ["one", "all"])
def test_weighted_entropies_are_the_losss(weighs: str) -> None:
    """poutine.scale around a guide's statement (an annealed KL): the objective of `loss`, by steps that are SVI's."""

    def model() -> None:
        with poutine.scale(scale=0.25):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with poutine.scale(scale=0.25 if weighs == "all" else 1.0):
            b = pyro.sample("b", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(a + b, 0.5), obs=torch.tensor(2.0))

    def guide() -> None:
        with poutine.scale(scale=0.25):
            pyro.sample("a", dist.Normal(param("m", 0.0), param("s", 1.0, positive)))
        with poutine.scale(scale=0.25 if weighs == "all" else 1.0):
            pyro.sample("b", dist.Normal(param("n", 0.0), param("t", 1.0, positive)))

    engine = BLRInference(model, guide, Adam({"lr": 0.05}), Trace_ELBO())
    found = [engine.step() for _ in range(3)]
    assert "poutine.scale weighs its statement at a" in said(engine)["ordinary"]["a"]
    if weighs == "all":
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svi = SVI(model, guide, Adam({"lr": 0.05}), Trace_ELBO())
        assert found == [svi.step() for _ in range(3)]
    else:
        assert set(said(engine)["ordinary"]) == {"a"}
        assert pyro.param("t").item() == pytest.approx(5**-0.5, rel=1e-9)


# ------------------------------------------------------------------------------------------------------------
# Nothing is lost


@pytest.mark.parametrize("fault", ["raises", "nan"])
def test_a_failed_step_leaves_everything_as_it_was(fault: str) -> None:
    broken = False

    def model() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 3.0))
        tau = pyro.sample("tau", dist.Gamma(2.0, 1.5))
        if broken and fault == "raises":
            raise KeyError("broken")
        with pyro.plate("rows", 8):
            loc = a * float("nan") if broken else a
            with pyro.validation_enabled(False):
                pyro.sample("y", dist.Normal(loc, tau.rsqrt(), validate_args=False), obs=Y)

    def fitted(fails: bool) -> dict[str, Tensor]:
        nonlocal broken
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        engine = BLRInference(model, normal_of_fixed_width_and_gamma, Adam({"lr": 0.1}), Trace_ELBO())
        engine.step()
        if fails:
            broken = True
            state = torch.get_rng_state()
            before = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
            with pytest.warns() if fault == "nan" else nullcontext(), pytest.raises((KeyError, ValueError)):
                engine.step()
            assert torch.equal(torch.get_rng_state(), state)
            assert all(torch.equal(pyro.param(name), value) for name, value in before.items())
            broken = False
        for _ in range(3):
            engine.step()
        return {name: value.detach().clone() for name, value in pyro.get_param_store().items()}

    plain, mended = fitted(False), fitted(True)
    assert all(torch.equal(plain[name], mended[name]) for name in plain)


def test_looking_changes_nothing() -> None:
    engine = still(unknown_precision, normal_of_fixed_width_and_gamma)
    engine.step()
    before = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
    state = torch.get_rng_state()
    engine.explain()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(pyro.param(name), value) for name, value in before.items())
