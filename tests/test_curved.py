"""Guides that do not fill their exponential families: the optimum over the parameters that they have, against L-BFGS and closed forms."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.optim import Adam
from torch import Tensor
from torch.distributions import constraints

from pyro_blr import BLRInference
from pyro_blr.families import Gamma, Normal
from pyro_blr.mixed import MixedFit
from pyro_blr.projections import Projection

positive = constraints.positive


@pytest.fixture(autouse=True)
def empty_store() -> Iterator[None]:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield


def engine_of(model: Callable, guide: Callable, *args: Any, steps: int = 1) -> BLRInference:
    engine = BLRInference(model, guide, Adam({"lr": 0.01}))
    for _ in range(steps):
        engine.step(*args)
    assert engine._ordinary is None, "the guide is read as a whole"
    return engine


def best(bound: Callable[..., Tensor], *start: Tensor) -> list[Tensor]:
    """Where L-BFGS finds the maximum of a bound."""
    leaves = [x.clone().requires_grad_() for x in start]
    optimiser = torch.optim.LBFGS(leaves, max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = -bound(*leaves)
        loss.backward()
        return loss

    for _ in range(3):
        optimiser.step(closure)
    return [leaf.detach() for leaf in leaves]


# ------------------------------------------------------------------------------------------------------------
# The projection


def test_the_first_order_is_the_natural_gradient() -> None:
    """θ moves by (Jᵀ F J)⁻¹ Jᵀ F δλ where λ̂ = λ(θ) + δλ and δλ is small."""
    family, place = Gamma(), [torch.tensor(0.7, dtype=torch.float64)]

    def natural(theta: Any) -> Tensor:
        return torch.stack([theta[0].exp() - 1, -(2 * theta[0]).sin() - 2], -1)

    start = natural(place)
    change = torch.tensor([0.3, -0.5], dtype=torch.float64) * 1e-4
    found = Projection.of(natural, place, family).nearest(start + change, place)[1][0] - place[0]
    jacobian = torch.autograd.functional.jacobian(lambda x: natural([x]), place[0])
    metric = family.fisher(start)
    expected = (jacobian @ metric @ change) / (jacobian @ metric @ jacobian)
    np.testing.assert_allclose(found.item(), expected.item(), rtol=1e-3)


def test_it_is_the_least_divergence() -> None:
    family, grid = Normal(), torch.linspace(-3, 3, 60_001, dtype=torch.float64)

    def natural(theta: Any) -> Tensor:
        scale = torch.nn.functional.softplus(theta[0])
        return torch.stack([theta[0] / scale**2, -0.5 / scale**2], -1)

    target = torch.tensor([1.7, -0.9], dtype=torch.float64)
    start = [torch.tensor(-1.0, dtype=torch.float64)]
    found = Projection.of(natural, start, family).nearest(target, start)[1][0]
    divergences = family.kl(natural([grid]), target.expand(len(grid), 2))
    assert abs(float(found) - float(grid[divergences.argmin()])) <= 1e-4


def test_elements_with_their_own_parameters_are_found_together() -> None:
    family = Gamma()

    def natural(theta: Any) -> Tensor:
        return torch.stack([theta[0].exp() - 1, -theta[0].exp() / theta[1].exp()], -1)

    start = [torch.zeros(400, dtype=torch.float64), torch.zeros(400, dtype=torch.float64)]
    projection = Projection.of(natural, start, family)
    target = natural([torch.linspace(-1, 3, 400, dtype=torch.float64), torch.linspace(2, -2, 400, dtype=torch.float64)])
    assert projection.elements
    torch.testing.assert_close(projection.nearest(target, start)[0], target, rtol=1e-6, atol=1e-8)
    with pytest.raises(ValueError, match="801 parameters together"):
        Projection.of(lambda theta: natural(theta[:2]) * theta[2].exp(), [*start, torch.zeros(1)], family)


# ------------------------------------------------------------------------------------------------------------
# Exact messages: the optimum over θ in one step


def heights(data: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(1.0, 2.0))
    with pyro.plate("data", len(data)):
        pyro.sample("x", dist.Normal(z, 0.5), obs=data)


DATA = torch.tensor([0.3, 1.9, 2.2, 1.1], dtype=torch.float64)
PRECISION = 1 / 4 + len(DATA) / 0.25
MEAN = (1.0 / 4 + float(DATA.sum()) / 0.25) / PRECISION


@pytest.mark.parametrize("scale", [0.01, 0.7, 30.0])
def test_a_scale_that_is_fixed(scale: float) -> None:
    def guide(data: Tensor) -> None:
        pyro.sample("z", dist.Normal(pyro.param("m", torch.tensor(-3.0)), scale))

    engine = engine_of(heights, guide, DATA)
    np.testing.assert_allclose(pyro.param("m").item(), MEAN, rtol=1e-9)
    np.testing.assert_allclose(engine.posterior["z"].stddev.item(), scale, rtol=1e-9)
    assert engine.explain(DATA).to_dict()["bound"] == "exact bound"


def test_a_location_that_is_fixed() -> None:
    """E ½ (s² + (m − m̂)²) Λ = log s is least at s = Λ^−½, wherever m is."""

    def guide(data: Tensor) -> None:
        pyro.sample("z", dist.Normal(5.0, pyro.param("s", torch.tensor(1.0), constraint=positive)))

    engine_of(heights, guide, DATA)
    # a search ends 1e-13 of the divergence, 120 nats, from its end: 2 (s / ŝ − 1)² of them
    np.testing.assert_allclose(pyro.param("s").item(), PRECISION**-0.5, rtol=3e-6)


def test_a_scale_that_is_the_location() -> None:
    def guide(data: Tensor) -> None:
        log_m = pyro.param("log_m", torch.tensor(0.0))
        pyro.sample("z", dist.Normal(log_m.exp(), 0.5 * log_m.exp()))

    engine_of(heights, guide, DATA)

    def bound(log_m: Tensor) -> Tensor:
        m, s = log_m.exp(), 0.5 * log_m.exp()
        return -0.5 * PRECISION * ((m - MEAN) ** 2 + s**2) + s.log()

    (expected,) = best(bound, torch.zeros((), dtype=torch.float64))
    np.testing.assert_allclose(pyro.param("log_m").item(), expected.item(), rtol=1e-6)


def test_elements_of_a_plate_share_their_parameters() -> None:
    data, scale = torch.tensor([1.0, -0.5, 4.0]), torch.tensor([0.5, 1.0, 3.0])

    def model() -> None:
        with pyro.plate("groups", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, scale), obs=data)

    def guide() -> None:
        m, s = pyro.param("m", torch.zeros(1)), pyro.param("s", torch.ones(1), constraint=positive)
        with pyro.plate("groups", 3):
            pyro.sample("z", dist.Normal(m, s))

    engine_of(model, guide)
    precision = 1 + scale**-2
    np.testing.assert_allclose(pyro.param("m").item(), float((data / scale**2).sum() / precision.sum()), rtol=1e-7)
    np.testing.assert_allclose(pyro.param("s").item(), float((3 / precision.sum()) ** 0.5), rtol=1e-7)


def test_a_function_that_fills_the_family_is_exact() -> None:
    """Gamma(α, α / m), α and m softplus of parameters: the conjugate posterior of Poisson counts."""
    counts = torch.tensor([3.0, 1.0, 4.0])

    def model() -> None:
        with pyro.plate("rates", 3):
            rate = pyro.sample("rate", dist.Gamma(2.0, 1.5))
            pyro.sample("count", dist.Poisson(rate), obs=counts)

    def guide() -> None:
        alpha = torch.nn.functional.softplus(pyro.param("a", torch.zeros(3)))
        mean = torch.nn.functional.softplus(pyro.param("b", torch.zeros(3)))
        with pyro.plate("rates", 3):
            pyro.sample("rate", dist.Gamma(alpha, alpha / mean))

    engine_of(model, guide)
    alpha = torch.nn.functional.softplus(pyro.param("a").detach())
    mean = torch.nn.functional.softplus(pyro.param("b").detach())
    torch.testing.assert_close(alpha, 2 + counts, rtol=1e-6, atol=0)
    torch.testing.assert_close(mean, (2 + counts) / 2.5, rtol=1e-6, atol=0)


def test_a_constraint_that_is_narrower_than_the_family() -> None:
    """The optimum is beyond the bounds: parameters come to them, and no number is NaN."""

    def guide(data: Tensor) -> None:
        m = pyro.param("m", torch.tensor(0.2), constraint=constraints.interval(0.0, 1.0))
        s = pyro.param("s", torch.tensor(1.0), constraint=constraints.greater_than(0.5))
        pyro.sample("z", dist.Normal(m, s))

    engine = engine_of(heights, guide, DATA)
    assert MEAN > 1.1 and PRECISION**-0.5 < 0.4
    np.testing.assert_allclose(pyro.param("m").item(), 1.0, atol=1e-3)
    np.testing.assert_allclose(pyro.param("s").item(), 0.5, atol=1e-3)
    assert np.isfinite(engine.evaluate_loss(DATA))


def test_probabilities_above_a_bound() -> None:
    """Dirichlet concentrations above a half (the topics of Pyro's example), where conjugate ones are 0.1 and more."""
    counts = torch.tensor([7, 7, 7, 5, 5])

    def model() -> None:
        p = pyro.sample("p", dist.Dirichlet(torch.full((8,), 0.1)))
        with pyro.plate("data", len(counts)):
            pyro.sample("x", dist.Categorical(p), obs=counts)

    def guide() -> None:
        bounded = constraints.independent(constraints.greater_than(0.5), 1)
        pyro.sample("p", dist.Dirichlet(pyro.param("c", torch.ones(8), constraint=bounded)))

    engine_of(model, guide)
    prior = torch.full((8,), 0.1).double()
    conjugate = prior + torch.bincount(counts, minlength=8)

    def bound(free: Tensor) -> Tensor:
        return -torch.distributions.kl_divergence(dist.Dirichlet(0.5 + free.exp()), dist.Dirichlet(conjugate))

    (expected,) = best(bound, torch.zeros(8, dtype=torch.float64))
    torch.testing.assert_close(pyro.param("c").detach(), 0.5 + expected.exp(), rtol=1e-3, atol=1e-3)


def test_coefficients_of_a_regression_with_one_scale() -> None:
    """Elements that meet in a factor: means go where they like, so their optimum is joint; the scale's is s² = D / tr Λ."""
    x = torch.randn(30, 3)
    y = x @ torch.tensor([1.0, -2.0, 0.5]) + 0.3 * torch.randn(30)

    def model() -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", 30):
            pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)

    def guide() -> None:
        m, s = pyro.param("m", torch.zeros(3)), pyro.param("s", torch.tensor(1.0), constraint=positive)
        pyro.sample("w", dist.Normal(m, s).to_event(1))

    engine_of(model, guide)
    precision = torch.eye(3) + x.T @ x / 0.25
    torch.testing.assert_close(pyro.param("m").detach(), torch.linalg.solve(precision, x.T @ y / 0.25))
    np.testing.assert_allclose(pyro.param("s").item(), float((3 / precision.trace()) ** 0.5), rtol=1e-7)


# ------------------------------------------------------------------------------------------------------------
# Other messages, other guides


def test_by_quadrature_to_the_optimum() -> None:
    """A logit with a Normal of fixed scale, against L-BFGS on Gauss-Hermite's bound; a script's steps settle there."""
    nodes, weights = map(torch.as_tensor, np.polynomial.hermite_e.hermegauss(80))
    weights = weights / weights.sum()

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 2.0))
        with pyro.plate("data", 5):
            pyro.sample("x", dist.Bernoulli(logits=z), obs=torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0]))

    def guide() -> None:
        pyro.sample("z", dist.Normal(pyro.param("m", torch.tensor(0.0)), 0.9))

    engine_of(model, guide, steps=12)

    def bound(m: Tensor) -> Tensor:
        z = m + 0.9 * nodes
        return (weights * (5 * torch.nn.functional.logsigmoid(z) - z)).sum() - (m**2 + 0.81) / 8

    (expected,) = best(bound, torch.zeros((), dtype=torch.float64))
    np.testing.assert_allclose(pyro.param("m").item(), expected.item(), atol=1e-5)


def test_beside_a_site_that_is_no_family() -> None:
    """A point beside it: the model given the point is normal with a normal prior."""

    def model(data: Tensor) -> None:
        centre = pyro.sample("centre", dist.Normal(0.0, 3.0))
        z = pyro.sample("z", dist.Normal(centre, 2.0))
        with pyro.plate("data", len(data)):
            pyro.sample("x", dist.Normal(z, 0.5), obs=data)

    def guide(data: Tensor) -> None:
        pyro.sample("centre", dist.Delta(pyro.param("c", torch.tensor(1.0))))
        pyro.sample("z", dist.Normal(pyro.param("m", torch.tensor(0.0)), 0.7))

    engine = BLRInference(model, guide, Adam({"lr": 0.0}))
    engine.step(DATA)
    assert isinstance(engine._ordinary, MixedFit)
    np.testing.assert_allclose(pyro.param("m").item(), MEAN, rtol=1e-7)


def shared() -> None:
    m = pyro.param("m", torch.tensor(0.0))
    pyro.sample("a", dist.Normal(m, 1.0))
    pyro.sample("b", dist.Normal(m, 1.0))


def follows() -> None:
    a = pyro.sample("a", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0))
    pyro.sample("b", dist.Normal(a * pyro.param("k", torch.tensor(1.0)), 1.0 + a.square()))


@pytest.mark.parametrize(("guide", "read"), [(shared, set()), (follows, {"a"})])
def test_what_is_no_function_of_parameters_of_its_own(guide: Callable, read: set[str]) -> None:
    def model() -> None:
        a, b = pyro.sample("a", dist.Normal(0.0, 1.0)), pyro.sample("b", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(a + b, 1.0), obs=torch.tensor(1.0))

    engine = BLRInference(model, guide, Adam({"lr": 0.01}))
    engine.step()
    found = engine._ordinary.division.read if isinstance(engine._ordinary, MixedFit) else set()
    assert found == read


def test_a_function_of_data_is_amortised() -> None:
    def guide(data: Tensor) -> None:
        pyro.sample("z", dist.Normal(pyro.param("k", torch.tensor(0.5)) * data.mean(), 0.7))

    engine = BLRInference(heights, guide, Adam({"lr": 0.01}))
    engine.step(DATA)
    assert engine._ordinary is not None and not isinstance(engine._ordinary, MixedFit)


def test_means_that_are_shared_where_elements_meet_are_left_to_optim() -> None:
    x = torch.randn(10, 3)

    def model() -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", 10):
            pyro.sample("y", dist.Normal(x @ w, 0.5), obs=torch.ones(10))

    def guide() -> None:
        pyro.sample("w", dist.Normal(pyro.param("m", torch.zeros(1)).expand(3), torch.ones(3)).to_event(1))

    engine = BLRInference(model, guide, Adam({"lr": 0.01}))
    engine.step()
    assert engine._ordinary is not None


def test_sites_of_many_parameters_are_left_to_optim() -> None:
    def model() -> None:
        with pyro.plate("many", 201):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    def guide() -> None:
        with pyro.plate("many", 201):
            pyro.sample("z", dist.Normal(pyro.param("m", torch.ones(201)), 0.5))

    engine = BLRInference(model, guide, Adam({"lr": 0.01}))
    engine.step()
    assert engine._ordinary is not None


def test_explain_says_what_it_is() -> None:
    def guide(data: Tensor) -> None:
        pyro.sample("z", dist.Normal(pyro.param("m", torch.tensor(0.0)), 0.7))

    text = str(engine_of(heights, guide, DATA).explain(DATA))
    assert "'m' need not give every member of its family" in " ".join(text.split())


def test_a_start_that_somebody_moves_is_where_it_goes_on() -> None:
    def guide(data: Tensor) -> None:
        pyro.sample("z", dist.Normal(pyro.param("m", torch.tensor(0.0)), 0.7))

    engine = engine_of(heights, guide, DATA)
    with torch.no_grad():
        pyro.param("m").unconstrained().fill_(9.0)
    here = engine.evaluate_loss(DATA)
    expected = 0.5 * PRECISION * (9.0 - MEAN) ** 2
    engine.step(DATA)
    np.testing.assert_allclose(here - engine.evaluate_loss(DATA), expected, rtol=1e-9)
    np.testing.assert_allclose(pyro.param("m").item(), MEAN, rtol=1e-9)


def test_a_parameter_without_a_constraint_stays_where_its_distribution_has_it() -> None:
    """Probabilities shared by a plate, as Pyro's own tests write them: a full Newton step leaves the simplex."""
    data = torch.tensor([-1.5, -0.3, 0.2, 0.4, 1.8, 2.5])
    locs, prior = torch.tensor([-3.0, 0.3, 0.5]), torch.tensor([0.2, 0.3, 0.5])

    def model() -> None:
        with pyro.plate("plate", 6):
            x = pyro.sample("x", dist.Categorical(prior))
            pyro.sample("obs", dist.Normal(locs[x], 1.0), obs=data)

    def guide() -> None:
        p = pyro.param("p", torch.tensor([0.5, 0.3, 0.2]))
        with pyro.plate("plate", 6):
            pyro.sample("x", dist.Categorical(p))

    engine = BLRInference(model, guide)
    for _ in range(5):
        engine.step()
    # Σ_n E_q[log p(x, y_n)] + 6 H(q) is highest at q ∝ prior · exp of the average log likelihood
    scores = prior.log() + dist.Normal(locs, 1.0).log_prob(data[:, None]).mean(0)
    p = pyro.param("p").detach()
    assert torch.allclose((p / p.sum()).double(), scores.softmax(0).double(), atol=1e-6)
