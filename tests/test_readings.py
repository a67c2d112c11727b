"""Guides of a user's own, read as families: they start where the guide is, and the guide holds the result."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoDiscreteParallel,
    AutoGaussian,
    AutoGuideList,
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalMessenger,
    AutoStructured,
    init_to_value,
)
from pyro.nn import PyroModule, PyroParam
from pyro.optim import Adam
from scipy import integrate, optimize, stats
from torch import Tensor
from torch.distributions import constraints

from pyro_blr import BLRInference, Posterior

X = torch.tensor([[1.0, 0.5], [1.0, -1.0], [1.0, 2.0], [1.0, 0.3]], dtype=torch.float64)
Y = torch.tensor([1.2, -0.3, 2.9, 1.1], dtype=torch.float64)
PRECISION = 4 * X.mT @ X + torch.eye(2, dtype=torch.float64) / 9
MEAN = torch.linalg.solve(PRECISION, 4 * X.mT @ Y)
COVARIANCE = 9 * X @ X.mT + 0.25 * torch.eye(4, dtype=torch.float64)
EVIDENCE = float(dist.MultivariateNormal(torch.zeros(4, dtype=torch.float64), COVARIANCE).log_prob(Y))


def scalar_sites() -> None:
    """A regression whose weights are two sites: their exact posterior is one Gaussian."""
    a = pyro.sample("a", dist.Normal(0.0, 3.0))
    b = pyro.sample("b", dist.Normal(0.0, 3.0))
    with pyro.plate("rows", 4):
        pyro.sample("y", dist.Normal(a * X[:, 0] + b * X[:, 1], 0.5), obs=Y)


def weights_in_a_plate() -> None:
    """The same with a plate whose elements a factor mixes."""
    with pyro.plate("weights", 2):
        w = pyro.sample("w", dist.Normal(0.0, 3.0))
    with pyro.plate("rows", 4):
        pyro.sample("y", dist.Normal(X @ w, 0.5), obs=Y)


def engine_of(model: Callable, guide: Any, loss: Any = None) -> BLRInference:
    return BLRInference(model, guide, Adam({"lr": 0.01}), loss or Trace_ELBO())


def why_not(engine: BLRInference) -> str:
    """What `explain` says of a guide that was not read."""
    (reason,) = set(engine.explain().to_dict()["ordinary"].values())
    assert reason.endswith("ordinary gradient of loss through optim, as under SVI")
    return reason


def fitted(model: Callable, guide: Any, *args: Any, loss: Any = None, steps: int = 40) -> BLRInference:
    engine = engine_of(model, guide, loss)
    for _ in range(steps):
        engine.step(*args)
    assert "is read as these families" in str(engine.explain(*args)).replace("\n  ", " ")
    return engine


# ------------------------------------------------------------------------------------------------------------
# Gaussian posteriors: the optimum of each family has a closed form


@pytest.mark.parametrize("make", [AutoNormal, AutoDiagonalNormal, AutoNormalMessenger])
def test_independent_normals_reach_the_best_product(make: Callable) -> None:
    guide = make(scalar_sites)
    engine = fitted(scalar_sites, guide, steps=200)
    median = guide.median()
    np.testing.assert_allclose([median[name].item() for name in "ab"], MEAN, atol=1e-8)
    variances = [float(engine.posterior[name].variance) for name in "ab"]
    np.testing.assert_allclose(variances, 1 / PRECISION.diagonal(), rtol=1e-10)
    best = EVIDENCE + 0.5 * float(torch.logdet(PRECISION) - PRECISION.diagonal().log().sum())
    assert -engine.evaluate_loss() == pytest.approx(best, abs=1e-8)
    if make is not AutoNormalMessenger:
        low, high = guide.quantiles([0.025, 0.975])["a"]
        assert float(high - low) / 2 == pytest.approx(1.959964 * PRECISION[0, 0].item() ** -0.5, rel=1e-6)


@pytest.mark.parametrize("model", [scalar_sites, weights_in_a_plate])
def test_one_gaussian_over_all_sites_is_the_exact_posterior(model: Callable) -> None:
    guide = AutoMultivariateNormal(model)
    engine = engine_of(model, guide)
    engine.step()
    root = (guide.scale.unsqueeze(-1) * guide.scale_tril).detach()
    np.testing.assert_allclose(guide.loc.detach(), MEAN, rtol=1e-9)
    np.testing.assert_allclose(root @ root.mT, torch.linalg.inv(PRECISION), rtol=1e-9)
    assert -engine.evaluate_loss() == pytest.approx(EVIDENCE, abs=1e-9)
    draws = [-Trace_ELBO().loss(model, guide) for _ in range(3)]
    np.testing.assert_allclose(draws, EVIDENCE, atol=1e-9)


@pytest.mark.parametrize(("conditional", "exact"), [("normal", False), ("mvn", True)])
def test_structured_guides_without_dependencies(conditional: str, exact: bool) -> None:
    def model() -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 3.0).to_event(1))
        pyro.sample("y", dist.Normal(X @ w, 0.5).to_event(1), obs=Y)

    guide = AutoStructured(model, conditionals=conditional, dependencies={})
    engine = fitted(model, guide, steps=200)
    np.testing.assert_allclose(guide.median()["w"], MEAN, atol=1e-8)
    gap = 0.0 if exact else 0.5 * float(torch.logdet(PRECISION) - PRECISION.diagonal().log().sum())
    assert -engine.evaluate_loss() == pytest.approx(EVIDENCE + gap, abs=1e-8)


# ------------------------------------------------------------------------------------------------------------
# The bound is that of the family which the guide denotes


def best_by_quadrature(log_joint: Callable, push: Callable, log_jacobian: Callable) -> tuple[float, float, float]:
    """(loc, scale, bound) of the best Normal pushed onto a support, by brute force."""

    def minus_bound(point: np.ndarray) -> float:
        loc, scale = point[0], math.exp(point[1])
        value, _ = integrate.quad(
            lambda z: stats.norm.pdf(z) * (log_joint(push(loc + scale * z)) + log_jacobian(loc + scale * z)),
            *(-9, 9),
            epsabs=1e-11,
            limit=200,
        )
        return -(value + 0.5 * math.log(2 * math.pi * math.e) + point[1])

    found = optimize.minimize(minus_bound, [0.0, -1.0], method="Nelder-Mead", options={"xatol": 1e-8, "fatol": 1e-11})
    return found.x[0], math.exp(found.x[1]), -found.fun


COUNTS = torch.tensor([3.0, 1.0, 4.0], dtype=torch.float64)
CASES: dict[str, tuple[Callable, Callable, Callable, Callable]] = {
    "Gamma": (
        lambda: pyro.sample(
            "y", dist.Poisson(pyro.sample("z", dist.Gamma(2.0, 1.0)) * torch.ones(3)).to_event(1), obs=COUNTS
        ),
        lambda z: stats.gamma.logpdf(z, 2) + stats.poisson.logpmf(COUNTS.numpy(), z).sum(),
        math.exp,
        lambda u: u,
    ),
    "Beta": (
        lambda: pyro.sample(
            "y", dist.Bernoulli(pyro.sample("z", dist.Beta(2.0, 2.0)) * torch.ones(3)).to_event(1), obs=torch.ones(3)
        ),
        lambda z: stats.beta.logpdf(z, 2, 2) + 3 * math.log(z),
        lambda u: 1 / (1 + math.exp(-u)),
        lambda u: -u - 2 * math.log1p(math.exp(-u)),
    ),
}


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize("make", [AutoNormal, AutoMultivariateNormal])
def test_a_normal_in_unconstrained_space_stays_one(make: Callable, name: str) -> None:
    """Although a Gamma or a Beta would be the exact posterior."""
    model, log_joint, push, log_jacobian = CASES[name]
    guide = make(model)
    posterior = engine_of(model, guide).run(progress=False)
    loc, scale, bound = best_by_quadrature(log_joint, push, log_jacobian)
    assert float(guide.median()["z"]) == pytest.approx(push(loc), rel=2e-3)
    low, high = (float(torch.as_tensor(q)) for q in guide.quantiles([stats.norm.cdf(-1), stats.norm.cdf(1)])["z"])
    assert low == pytest.approx(push(loc - scale), rel=3e-3) and high == pytest.approx(push(loc + scale), rel=3e-3)
    assert posterior.elbo == pytest.approx(bound, abs=5e-3)


def test_a_simplex_has_independent_elements_in_unconstrained_space(tmp_path: Any) -> None:
    def model() -> None:
        p = pyro.sample("p", dist.Dirichlet(torch.tensor([2.0, 3.0, 4.0])))
        pyro.sample("y", dist.Categorical(p), obs=torch.tensor(2))

    guide = AutoNormal(model)
    engine = engine_of(model, guide)
    posterior = engine.run(progress=False)
    assert posterior.natural["p"].shape == (4,)
    found = np.mean([-Trace_ELBO().loss(model, guide) for _ in range(400)])
    assert found == pytest.approx(posterior.elbo, abs=0.05)
    posterior.save(tmp_path / "posterior")
    again = Posterior.load(tmp_path / "posterior")
    values = posterior.sample((3,))
    np.testing.assert_allclose(again.log_prob(values), posterior.log_prob(values), rtol=1e-12)
    np.testing.assert_allclose(again["p"].mean, posterior["p"].mean, rtol=1e-12)
    exact = torch.tensor([2.0, 3.0, 5.0]) / 10
    np.testing.assert_allclose(posterior["p"].mean, exact, atol=0.03)


def test_discrete_parts_are_responsibilities() -> None:
    y = torch.tensor([-2.1, -1.7, 2.2, 1.9, 0.1])

    def model() -> None:
        with pyro.plate("components", 2):
            mu = pyro.sample("mu", dist.Normal(torch.tensor([-1.0, 1.0]), 2.0))
        with pyro.plate("rows", 5):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.4, 0.6])), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(mu[z], 1.0), obs=y)

    guide = AutoGuideList(model)
    start = init_to_value(values={"mu": torch.tensor([-0.5, 0.5])})
    guide.append(AutoNormal(poutine.block(model, hide=["z"]), init_loc_fn=start))
    guide.append(AutoDiscreteParallel(poutine.block(model, expose=["z"])))
    fitted(model, guide, loss=TraceEnum_ELBO(max_plate_nesting=1), steps=100)
    loc, scale = guide[0].locs.mu.detach(), guide[0].scales.mu.detach()
    scores = torch.tensor([0.4, 0.6]).log() - 0.5 * ((y[:, None] - loc).square() + scale.square())
    np.testing.assert_allclose(guide[1].z_probs.detach(), scores.softmax(-1), atol=1e-6)
    weights = guide[1].z_probs.detach()
    precision = 0.25 + weights.sum(0)
    np.testing.assert_allclose(scale, precision.rsqrt(), atol=1e-6)
    np.testing.assert_allclose(loc, (torch.tensor([-0.25, 0.25]) + weights.mT @ y) / precision, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------
# Where it starts, and what the parameter store holds


@pytest.mark.parametrize("make", [AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal])
def test_it_starts_where_the_guide_is(make: Callable) -> None:
    start = init_to_value(values={"a": torch.tensor(0.7), "b": torch.tensor(-0.4)})
    guide = make(scalar_sites, init_loc_fn=start, init_scale=0.3)
    engine = engine_of(scalar_sites, guide)
    loss = engine.evaluate_loss()
    assert float(engine.posterior["a"].mean) == pytest.approx(0.7, abs=1e-12)
    assert float(engine.posterior["b"].stddev) == pytest.approx(0.3, rel=1e-12)
    mean, spread = torch.tensor([0.7, -0.4]), 0.3
    expected = dist.Normal(X @ mean, 0.5).log_prob(Y).sum() - 2 * (X.square() * spread**2).sum()
    expected = expected + dist.Normal(0.0, 3.0).log_prob(mean).sum() - spread**2 / 9 + 2 * math.log(spread)
    expected = expected + math.log(2 * math.pi * math.e)
    assert -loss == pytest.approx(float(expected), abs=1e-9)


def test_looking_changes_no_parameter() -> None:
    guide = AutoNormal(scalar_sites)
    engine = engine_of(scalar_sites, guide)
    engine.evaluate_loss()
    before = {name: value.clone() for name, value in guide.state_dict().items()}
    state = torch.get_rng_state()
    engine.explain()
    engine.evaluate_loss()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in guide.state_dict().items())


def test_the_store_saves_loads_and_clears(tmp_path: Any) -> None:
    guide = AutoNormal(scalar_sites)
    engine = fitted(scalar_sites, guide)
    names = {"AutoNormal.locs.a", "AutoNormal.locs.b", "AutoNormal.scales.a", "AutoNormal.scales.b"}
    store = pyro.get_param_store()
    assert set(store.keys()) == names
    kept = store["AutoNormal.locs.a"].item()
    assert kept == pytest.approx(float(engine.posterior["a"].mean), abs=1e-12)
    store.save(tmp_path / "store")
    with torch.no_grad():
        guide.locs.a_unconstrained.fill_(5.0)  # somebody else moves a parameter
    engine.evaluate_loss()
    assert float(engine.posterior["a"].mean) == pytest.approx(5.0)
    store.clear()
    # Under torch 2.6 Pyro 1.9.1's own `load` reads nothing; this is what 1.9.2's does (pyro-ppl/pyro, pull request 3389).
    store.set_state(torch.load(tmp_path / "store", weights_only=False))
    engine.evaluate_loss()
    assert float(engine.posterior["a"].mean) == pytest.approx(kept, abs=1e-12)
    assert float(guide.median()["a"]) == pytest.approx(kept, abs=1e-12)


def test_a_trained_guide_goes_on_from_there() -> None:
    guide = AutoMultivariateNormal(scalar_sites)
    engine_of(scalar_sites, guide).step()
    assert -engine_of(scalar_sites, guide).evaluate_loss() == pytest.approx(EVIDENCE, abs=1e-9)


def test_a_failed_step_leaves_the_parameters_bit_for_bit() -> None:
    broken = False

    def model() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 3.0))
        if broken and float(a) != 0:
            raise KeyError("broken")
        pyro.sample("y", dist.Normal(a.exp(), 0.5), obs=torch.tensor(1.0))

    guide = AutoNormal(model)
    engine = engine_of(model, guide)
    engine.step()
    before = {name: value.clone() for name, value in guide.state_dict().items()}
    natural = engine.posterior.natural["a"]
    broken = True
    with pytest.raises(KeyError, match="broken"):
        engine.step()
    assert all(torch.equal(value, before[name]) for name, value in guide.state_dict().items())
    broken = False
    assert torch.equal(engine.posterior.natural["a"], natural)


def test_predictive_and_plates() -> None:
    y = torch.randn(6) + 1

    def model(y: Tensor | None = None) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        with pyro.plate("rows", 6):
            theta = pyro.sample("theta", dist.Normal(mu, 1.0))
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y)

    guide = AutoNormal(model)
    fitted(model, guide, y)
    drawn = Predictive(model, guide=guide, num_samples=50)()
    assert drawn["y"].shape == (50, 6)


def test_subsampled_plates_keep_every_row() -> None:
    y = torch.randn(40) + 1

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        with pyro.plate("rows", 40, subsample_size=10) as index:
            theta = pyro.sample("theta", dist.Normal(mu, 1.0))
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y[index])

    guide = AutoNormal(model)
    engine = fitted(model, guide, y, steps=60)
    assert guide.locs.theta.shape == (40,)
    expected = (y + float(engine.posterior["mu"].mean)) / 2
    np.testing.assert_allclose(guide.locs.theta.detach(), expected, atol=0.1)
    np.testing.assert_allclose(guide.scales.theta.detach(), 0.5**0.5, rtol=1e-5)


@pytest.mark.parametrize("family", ["Gamma", "Categorical"])
def test_rows_of_parameters_in_a_subsampled_plate(family: str) -> None:
    """A guide that looks up its parameters by the plate's indices: exact for every row that was drawn, the others untouched."""
    y, weights = torch.arange(12.0), torch.tensor([0.3, 0.7])

    def model(index: Tensor) -> None:
        with pyro.plate("rows", 12, subsample=index):
            if family == "Gamma":
                z = pyro.sample("z", dist.Gamma(2.0, 3.0))
                pyro.sample("y", dist.Poisson(z), obs=y[index])
            else:
                z = pyro.sample("z", dist.Categorical(weights))
                pyro.sample("y", dist.Normal(3.0 * z, 1.0), obs=y[index] / 4)

    def guide(index: Tensor) -> None:
        with pyro.plate("rows", 12, subsample=index):
            if family == "Gamma":
                shape = pyro.param("shape", torch.ones(12), constraint=positive)
                pyro.sample("z", dist.Gamma(shape[index], pyro.param("rate", torch.zeros(12)).exp()[index]))
            else:
                pyro.sample("z", dist.Categorical(logits=pyro.param("logits", torch.zeros(12, 2))[index]))

    engine = engine_of(model, guide)
    drawn = torch.tensor([7, 2, 9])
    engine.step(drawn)
    for rows in (torch.tensor([0, 2, 4]), torch.tensor([9, 10, 11])):
        engine.step(rows)
        drawn = torch.cat([drawn, rows])
    seen = torch.zeros(12, dtype=torch.bool).index_fill(0, drawn, True)
    if family == "Gamma":
        np.testing.assert_allclose(pyro.param("shape").detach(), torch.where(seen, y + 2, torch.ones(12)), rtol=1e-9)
        np.testing.assert_allclose(pyro.param("rate").detach(), torch.where(seen, 4.0, 1.0).log(), atol=1e-9)
    else:
        scores = weights.log() - 0.5 * (y[:, None] / 4 - torch.tensor([0.0, 3.0])).square()
        expected = torch.where(seen[:, None], scores.softmax(-1), 0.5 * torch.ones(12, 2))
        np.testing.assert_allclose(pyro.param("logits").softmax(-1).detach(), expected, atol=1e-9)
    assert engine.explain(drawn[:3]).to_dict()["ordinary"] == {}


def test_a_script_of_many_steps_settles() -> None:
    """Messages from draws, on full data: after a few steps the optimum is there, and further steps leave it."""

    def model() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 3.0))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal((a * b).sin(), 0.5), obs=torch.tensor(0.4))

    guide = AutoNormal(model)
    engine = engine_of(model, guide)
    losses = [engine.step() for _ in range(60)]
    assert len(set(losses[20:])) == 1
    assert engine.posterior.converged and len(engine.posterior.history) == 60
    guide.locs.a_unconstrained.data.add_(3.0)
    assert engine.step() != losses[-1]


# ------------------------------------------------------------------------------------------------------------
# Hand-written guides


HEADS = torch.tensor([1.0] * 6 + [0.0] * 4, dtype=torch.float64)


def coin() -> None:
    f = pyro.sample("f", dist.Beta(10.0, 10.0))
    with pyro.plate("tosses", 10):
        pyro.sample("y", dist.Bernoulli(f), obs=HEADS)


positive = constraints.positive


def direct() -> None:
    a = pyro.param("a", torch.tensor(15.0), constraint=positive)
    b = pyro.param("b", lambda: torch.tensor(15.0), constraint=positive)
    pyro.sample("f", dist.Beta(a, b))


def through_exp() -> None:
    a, b = pyro.param("a", torch.tensor(1.0)), pyro.param("b", torch.tensor(1.0))
    pyro.sample("f", dist.Beta(a.exp(), torch.nn.functional.softplus(b)))


class AsModule(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.a = PyroParam(torch.tensor(2.0), constraint=positive)
        self.b = torch.nn.Parameter(torch.tensor(2.0))

    def forward(self) -> None:
        pyro.sample("f", dist.Beta(self.a, self.b.square()))


@pytest.mark.parametrize("make", [lambda: direct, lambda: through_exp, AsModule])
def test_a_guide_of_the_right_family_is_exact_in_one_step(make: Callable) -> None:
    guide = make()
    engine = engine_of(coin, guide)
    engine.step()
    with poutine.block():
        q = poutine.trace(guide).get_trace().nodes["f"]["fn"]
    assert q.concentration1.item() == pytest.approx(16.0, abs=1e-9)
    assert q.concentration0.item() == pytest.approx(14.0, abs=1e-9)
    assert engine.guide is guide and not engine.explain().to_dict()["bound"].startswith("estimate")


def test_vectors_matrices_and_states() -> None:
    y = torch.tensor([1.0, 2.5])

    def model() -> None:
        w = pyro.sample("w", dist.MultivariateNormal(torch.zeros(2), torch.eye(2)))
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.3, 0.7])))
        pyro.sample("y", dist.Normal(w, 1.0).to_event(1), obs=y)
        pyro.sample("x", dist.Normal(torch.tensor([-1.0, 1.0])[z], 1.0), obs=torch.tensor(0.2))

    def guide() -> None:
        loc = pyro.param("loc", torch.zeros(2))
        root = pyro.param("root", torch.eye(2), constraint=constraints.lower_cholesky)
        pyro.sample("w", dist.MultivariateNormal(loc, scale_tril=root))
        pyro.sample("z", dist.Categorical(logits=pyro.param("logits", torch.zeros(2))))

    engine_of(model, guide).step()
    np.testing.assert_allclose(pyro.param("loc").detach(), y / 2, rtol=1e-9)
    np.testing.assert_allclose(pyro.param("root").detach(), 0.5**0.5 * torch.eye(2), atol=1e-9)
    scores = torch.tensor([0.3, 0.7]).log() - 0.5 * (0.2 - torch.tensor([-1.0, 1.0])).square()
    np.testing.assert_allclose(pyro.param("logits").softmax(-1).detach(), scores.softmax(-1), rtol=1e-9)


def test_local_parameters_in_a_plate() -> None:
    y = torch.tensor([1.0, 2.0, 4.0])

    def model() -> None:
        with pyro.plate("rows", 3):
            rate = pyro.sample("rate", dist.Gamma(2.0, 3.0))
            pyro.sample("y", dist.Poisson(rate), obs=y)

    def guide() -> None:
        shape = pyro.param("shape", torch.ones(3), constraint=positive)
        scale = pyro.param("rate_", torch.ones(3), constraint=positive)
        with pyro.plate("rows", 3):
            pyro.sample("rate", dist.Gamma(shape, scale))

    engine_of(model, guide).step()
    np.testing.assert_allclose(pyro.param("shape").detach(), y + 2, rtol=1e-9)
    np.testing.assert_allclose(pyro.param("rate_").detach(), 4.0, rtol=1e-9)


# ------------------------------------------------------------------------------------------------------------
# What cannot be read runs by ordinary gradients, and the reason is said


def conditional() -> None:
    a = pyro.sample("a", dist.Normal(pyro.param("m", torch.zeros(())), pyro.param("s", torch.ones(()), positive)))
    pyro.sample("b", dist.Normal(pyro.param("n", torch.zeros(())) * a, pyro.param("t", torch.ones(()), positive)))


def shared() -> None:
    scale = pyro.param("s", torch.ones(()), constraint=positive)
    pyro.sample("a", dist.Normal(pyro.param("m", torch.zeros(())), scale))
    pyro.sample("b", dist.Normal(pyro.param("n", torch.zeros(())), scale))


def heavy() -> None:
    pyro.sample("a", dist.StudentT(3.0, pyro.param("m", torch.zeros(())), 1.0))
    pyro.sample("b", dist.Normal(pyro.param("n", torch.zeros(())), 1.0))


def partial() -> None:
    pyro.sample("a", dist.Normal(pyro.param("m", torch.zeros(())), pyro.param("s", torch.ones(()), positive)))


def tied() -> None:
    m, s = pyro.param("m", torch.zeros(())), pyro.param("s", torch.ones(()), constraint=positive)
    with pyro.plate("weights", 2):
        pyro.sample("w", dist.Normal(m, s))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda model: conditional, "loc of its distribution at b is no parameter of its own"),
        (lambda model: shared, "b and a share the parameter 's'"),
        (lambda model: heavy, "its StudentT at a is no exponential family"),
        (lambda model: tied, "elements of w meet in a factor, and share parameters in the guide"),
        (AutoLowRankMultivariateNormal, "low rank plus diagonal"),
        (lambda model: AutoIAFNormal(model, hidden_dim=[8]), "normalising flow"),
        (AutoGaussian, "its precision is sparse"),
        (AutoStructured, "depends on"),
        (lambda model: AutoNormalMessenger(model, amortized_plates=("weights",)), "elements of w share the parameter"),
    ],
)
def test_ordinary_gradients_say_why(make: Callable, reason: str) -> None:
    model = weights_in_a_plate if "of w" in reason else scalar_sites
    engine = engine_of(model, make(model))
    assert math.isfinite(engine.step())
    assert reason in why_not(engine)


def test_sites_that_the_guide_leaves_to_the_loss() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Bernoulli(0.4), infer={"enumerate": "parallel"})
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(a + z, 1.0), obs=torch.tensor(0.5))

    engine = engine_of(model, AutoNormal(poutine.block(model, hide=["z"])), Trace_ELBO())
    with pytest.warns(UserWarning, match="in model but not guide"):
        assert math.isfinite(engine.step())
    assert "the guide has no q for z" in why_not(engine)


def test_parts_that_cannot_be_read_leave_the_others_theirs() -> None:
    guide = AutoGuideList(scalar_sites)
    guide.append(AutoNormal(poutine.block(scalar_sites, hide=["b"])))
    guide.append(AutoDelta(poutine.block(scalar_sites, expose=["b"])))
    engine = engine_of(scalar_sites, guide)
    assert math.isfinite(engine.step())
    assert why_not(engine).startswith("it is a point") and set(engine.explain().to_dict()["sites"]) == {"a"}
