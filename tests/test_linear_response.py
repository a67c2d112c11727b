"""Linear-response covariances: exact posteriors of Gaussians, and how optima move when the model is tilted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_blr import BLRInference

Y = torch.tensor([0.3, -0.4, 1.2, 0.8, 0.1, 2.0, -0.6, 0.9], dtype=torch.float64)


def fit(model: Callable, *args: Any, **options: Any) -> Any:
    return BLRInference(model, **{"blocks": "sites", **options}).run(*args, tol=1e-12, max_steps=3000, progress=False)


# --------------------------------------------------------------------------------------------------
# Gaussians: the covariance of the posterior itself


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_of_a_factorised_gaussian_it_is_the_exact_covariance(offset: float) -> None:
    root = torch.randn(5, 5)
    prior = root @ root.mT + 0.3 * torch.eye(5)

    def model(y: Tensor) -> None:
        z = pyro.sample("z", dist.MultivariateNormal(offset + torch.zeros(5), prior))
        pyro.sample("y", dist.Normal(z, 0.7).to_event(1), obs=y)

    posterior = fit(model, offset + torch.randn(5), blocks="elements")
    exact = torch.linalg.inv(torch.linalg.inv(prior) + torch.eye(5) / 0.49)
    response = posterior.linear_response()
    assert not response.is_saddle
    torch.testing.assert_close(response.covariance(["z"]), exact, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(response.stddev("z"), exact.diagonal().sqrt(), rtol=1e-7, atol=1e-9)
    assert bool((posterior["z"].stddev < 0.99 * response.stddev("z")).any())  # which q itself does not have


def test_sites_of_several_shapes() -> None:
    x = torch.randn(8, 2)

    def model(y: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 2.0))
        b = pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", 8):
            c = pyro.sample("c", dist.Normal(0.0, 0.5))
            pyro.sample("y", dist.Normal(a + x @ b + c, 0.4), obs=y)

    response = fit(model, Y).linear_response()
    design = torch.cat([torch.ones(8, 1), x, torch.eye(8)], -1)
    prior = torch.cat([torch.tensor([0.25, 1.0, 1.0]), torch.full((8,), 4.0)])
    exact = torch.linalg.inv(torch.diag(prior) + design.mT @ design / 0.16)
    torch.testing.assert_close(response.covariance(["a", "b", "c"]), exact, rtol=1e-6, atol=1e-9)
    order = [3, 4, 5, 6, 7, 8, 9, 10, 0]
    torch.testing.assert_close(response.covariance(["c", "a"]), exact[order][:, order], rtol=1e-6, atol=1e-9)


# --------------------------------------------------------------------------------------------------
# Other families: brute force on a tilted model


def normal_gamma_optimum(tilt_mean: float, tilt_precision: float) -> Tensor:
    """Coordinate ascent by hand for μ ~ N(0, 4), τ ~ Gamma(2, 1), y ~ N(μ, 1/τ), log p + t₁ μ + t₂ τ: E μ, E τ."""
    n, total, squares = len(Y), Y.sum(), Y.square().sum()
    mean, variance, precision = torch.tensor(0.0), torch.tensor(1.0), torch.tensor(1.0)
    for _ in range(500):
        variance = 1 / (0.25 + n * precision)
        mean = variance * (precision * total + tilt_mean)
        rate = 1.0 - tilt_precision + 0.5 * (squares - 2 * mean * total + n * (mean**2 + variance))
        precision = (2.0 + n / 2) / rate
    return torch.stack([mean, precision])


def test_normal_gamma_against_differences_of_optima() -> None:
    def model(y: Tensor) -> None:
        tau = pyro.sample("tau", dist.Gamma(2.0, 1.0))
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, tau.rsqrt()), obs=y)

    posterior = fit(model, Y)
    step = 1e-4
    columns = [
        (normal_gamma_optimum(*(step * e)) - normal_gamma_optimum(*(-step * e))) / (2 * step) for e in torch.eye(2)
    ]
    expected = torch.stack(columns)
    found = posterior.linear_response().covariance(["mu", "tau"])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    assert abs(float(found[0, 1])) > 1e-3  # q holds them independent


def mixture(y: Tensor, center: Tensor) -> None:
    weights = pyro.sample("weights", dist.Dirichlet(torch.tensor([2.0, 3.0])))
    loc = pyro.sample("loc", dist.Normal(center, 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("y", dist.Normal(loc[z], 0.8), obs=y)


def test_mixture_against_differences_of_optima() -> None:
    """A prior N(c, 1) moved by dc is a tilt by dc · loc: d E h / dc = Cov_LR(loc, h)."""
    center, step = torch.tensor([-1.0, 1.0]), 1e-4
    start = {"loc": torch.tensor([-0.8, 1.1])}
    response = fit(mixture, Y, center, init=start).linear_response()
    moved = [fit(mixture, Y, center + sign * step * torch.tensor([1.0, 0.0]), init=start) for sign in (1, -1)]

    def slope(moment: Callable[[Any], Tensor]) -> Tensor:
        return (moment(moved[0]) - moment(moved[1])) / (2 * step)

    found = response.covariance(["loc", "z"])
    torch.testing.assert_close(found[0, :2], slope(lambda q: q["loc"].mean), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found[0, 2:], slope(lambda q: q["z"].mean), rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="site 'weights': its elements depend on each other in q as Dirichlet"):
        response.covariance(["loc", "weights"])
    assert bool((response.stddev("weights") > fit(mixture, Y, center, init=start)["weights"].stddev).all())


def logistic(x: Tensor, y: Tensor, center: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(center, 1.5).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)


def test_without_closed_form_against_differences_of_optima() -> None:
    x, center, step = torch.randn(40, 2) @ torch.tensor([[1.0, 0.8], [0.0, 0.6]]), torch.zeros(2), 1e-3
    y = (x.sum(-1) + torch.randn(40) > 0).double()
    posterior = fit(logistic, x, y, center, blocks="elements")
    tilt = step * torch.tensor([2.25, 0.0])  # of a prior with variance 2.25
    ends = [fit(logistic, x, y, center + sign * tilt, blocks="elements")["w"].mean for sign in (1, -1)]
    found = posterior.linear_response().covariance(["w"])
    torch.testing.assert_close(found[0], (ends[0] - ends[1]) / (2 * step), rtol=1e-3, atol=1e-4)
    full = BLRInference(logistic, blocks="sites").run(x, y, center, progress=False)["w"].covariance_matrix
    assert float((found - full).abs().max()) < 0.1 * float(full.abs().max())  # most of what the factors left out


def test_from_draws_against_differences_of_optima() -> None:
    """Three sites that meet in a product inside a sine: no predictor, hence draws, the same for every centre."""
    x = torch.linspace(-1, 1, 8)

    def model(y: Tensor, center: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(center, 1.0))
        b = pyro.sample("b", dist.Normal(0.5, 0.5))
        d = pyro.sample("d", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 8):
            pyro.sample("y", dist.Normal(torch.sin(a * x * b + d) + a, 0.6), obs=y)

    def optimum(center: float) -> Any:
        pyro.set_rng_seed(3)
        return fit(model, Y, torch.tensor(center))

    posterior, step = optimum(0.2), 0.02
    assert posterior.elbo_kind.startswith("estimate")
    ends = [optimum(0.2 + step), optimum(0.2 - step)]
    expected = torch.stack([(ends[0][name].mean - ends[1][name].mean) / (2 * step) for name in "abd"])
    found = posterior.linear_response().covariance(["a", "b", "d"])[0]
    torch.testing.assert_close(found, expected, rtol=0.03, atol=0.003)  # 1024 draws of the derivatives
    assert found[0] > 3 * posterior["a"].variance


def test_a_positive_site_pushed_forward() -> None:
    """E of exp(u) moves with the tilt, too; by differences of the engine's own optima."""

    def model(y: Tensor, center: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(center, 1.0))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, scale), obs=y)

    step = 1e-3
    response = fit(model, Y, torch.tensor(0.3)).linear_response()
    ends = [fit(model, Y, torch.tensor(0.3) + sign * step)["scale"].mean for sign in (1, -1)]
    found = response.covariance(["mu", "scale"])
    assert float(found[0, 1]) == pytest.approx(float(ends[0] - ends[1]) / (2 * step), rel=1e-3, abs=1e-5)


def test_of_sites_that_are_independent_given_the_data_q_is_kept() -> None:
    def model(y: Tensor) -> None:
        p = pyro.sample("p", dist.Beta(1.0, 1.0))
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        pyro.sample("heads", dist.Binomial(8, p), obs=torch.tensor(5.0))
        pyro.sample("count", dist.Poisson(rate), obs=torch.tensor(3.0))

    posterior = fit(model, Y)
    response = posterior.linear_response()
    for name in ("p", "rate"):
        torch.testing.assert_close(response.stddev(name), posterior[name].stddev, rtol=1e-9, atol=0)


# --------------------------------------------------------------------------------------------------
# Where there is none


def test_a_saddle_is_told() -> None:
    """Two components that started alike stay alike: the bound gains when they part."""

    def model(y: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 5.0).to_event(1))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.5])))
            pyro.sample("y", dist.Normal(loc[z], 0.3), obs=y)

    y = torch.tensor([-2.0, -2.1, -1.9, 2.0, 2.1, 1.9])
    posterior = fit(model, y, init={"loc": torch.zeros(2)})
    response = posterior.linear_response()
    assert response.is_saddle
    with pytest.raises(ValueError, match="the bound is not at a maximum"):
        response.stddev("loc")
    assert any("no maximum here" in warning for warning in posterior.summary(200).warnings)


def subsampled(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = pyro.sample("tau", dist.Gamma(1.0, 1.0))
    with pyro.plate("data", len(y), subsample_size=3) as index:
        pyro.sample("y", dist.Normal(mu, tau.rsqrt()), obs=y[index])


def many(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 1200):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y[0])


def one_factor(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(mu, 1.0).expand([8]).to_event(1), obs=y)


REFUSED = [
    (subsampled, "sees a part of the data"),
    (many, "q has 2402 parameters, more than the 2000"),
    (one_factor, "q is one factor, which leaves no covariance out; use posterior"),
]


@pytest.mark.parametrize(("model", "message"), REFUSED, ids=[model.__name__ for model, _ in REFUSED])
def test_refusals_say_why(model: Callable, message: str) -> None:
    posterior = BLRInference(model, blocks="sites").run(Y, max_steps=30, progress=False)
    with pytest.raises(ValueError, match=message):
        posterior.linear_response()


def test_a_loaded_posterior_has_none(tmp_path: Any) -> None:
    posterior = BLRInference(many, blocks="sites").run(Y, max_steps=3, progress=False)
    posterior.save(tmp_path / "q.safetensors")
    with pytest.raises(ValueError, match="without its engine; use engine.posterior"):
        type(posterior).load(tmp_path / "q.safetensors").linear_response()


def test_it_is_of_the_posterior_that_was_asked_although_the_engine_went_on() -> None:
    engine = BLRInference(mixture, blocks="sites")
    center = torch.tensor([-1.0, 1.0])
    posterior = engine.run(Y, center, progress=False)
    before = posterior.linear_response().stddev("loc")
    engine.run(3 * Y, center + 2, progress=False)
    torch.testing.assert_close(posterior.linear_response().stddev("loc"), before)
