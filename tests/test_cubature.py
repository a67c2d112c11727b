"""Factors seen through three affine predictors or more: random points, against brute force.

The oracle of the regressions writes the bound as sums of three-dimensional integrals by product Gauss-Hermite rules and maximises it over
(m, L) by L-BFGS.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from test_quadrature import best_gaussian, normal_prior
from torch import Tensor

from pyro_blr import BLRInference
from pyro_blr.cubature import random_integrals, random_values

DOUBLE = torch.float64
N, CLASSES = 20, 4
GENERATOR = torch.Generator().manual_seed(8)
X = torch.stack([torch.ones(N), torch.randn(N, generator=GENERATOR)], -1).double()
CLASS = torch.randint(0, CLASSES, (N,), generator=GENERATOR)
YES = torch.randint(0, 2, (N,), generator=GENERATOR).double()


def product_rule(order: int, dim: int) -> tuple[Tensor, Tensor]:
    nodes, weights = (torch.as_tensor(x) for x in np.polynomial.hermite_e.hermegauss(order))
    grid = torch.cartesian_prod(*[nodes] * dim)
    return grid, torch.cartesian_prod(*[weights / weights.sum()] * dim).prod(-1)


def rows(n: int, k: int, spread: float, seed: int) -> tuple[Tensor, Tensor]:
    """Means (n, k) and covariances (n, k, k) of no particular kind."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(n, k, k, generator=generator, dtype=DOUBLE) * spread / k**0.5
    return 2 * torch.randn(n, k, generator=generator, dtype=DOUBLE), root @ root.mT


# -- integrals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [3, 7, 12])
def test_cubic_functions_are_integrated_exactly(k: int) -> None:
    """E of a + bᵀx + xᵀCx + (dᵀ(x − m))³: the cube averages to zero, its gradient 3 (dᵀ(x − m))² d to 3 dᵀVd d."""
    mean, covariance = rows(5, k, 1.3, k)
    generator = torch.Generator().manual_seed(1)
    b, d = torch.randn(2, k, generator=generator, dtype=DOUBLE)
    c = torch.randn(k, k, generator=generator, dtype=DOUBLE)

    def function(x: Tensor) -> Tensor:
        return 0.3 + x @ b + ((x @ c) * x).sum(-1) + ((x - mean) @ d) ** 3

    found = random_integrals(function, mean, covariance, torch.Size([5]), 8 * k)
    square = torch.einsum("nij,ij->n", covariance, c) + torch.einsum("ni,ij,nj->n", mean, c, mean)
    assert torch.allclose(found.value, 0.3 + mean @ b + square, atol=1e-9)
    assert torch.allclose(
        found.gradient, b + mean @ (c + c.T) + 3 * torch.einsum("i,nij,j->n", d, covariance, d)[:, None] * d
    )
    assert torch.allclose(found.hessian, (c + c.T).expand(5, k, k), atol=1e-9)
    assert float(found.error.abs().max()) < 1e-9


@pytest.mark.parametrize("spread", [0.0, 0.5, 2.0])
def test_integrals_of_a_softmax_are_within_their_error(spread: float) -> None:
    """log softmax of three logits against 30³ Gauss-Hermite points, for 60 rows: errors average out over rows."""
    mean, covariance = rows(60, 3, spread, 3)
    label = torch.arange(60) % 3

    def function(x: Tensor) -> Tensor:
        return x.log_softmax(-1).gather(-1, label.expand(x.shape[:-1]).unsqueeze(-1)).squeeze(-1)

    grid, weights = product_rule(30, 3)
    root = torch.linalg.cholesky(covariance + 1e-14 * torch.eye(3, dtype=DOUBLE)) if spread else covariance
    points = (mean.unsqueeze(1) + grid @ root.mT).movedim(1, 0)  # (Q, n, 3)
    exact = (function(points) * weights.unsqueeze(-1)).sum(0)
    probs = points.softmax(-1)
    average = (probs * weights[:, None, None]).sum(0)
    slope = torch.eye(3, dtype=DOUBLE)[label] - average
    bend = torch.einsum("q,qni,qnj->nij", weights, probs, probs) - torch.diag_embed(average)
    for count in (512, 4096):
        found = random_integrals(function, mean, covariance, torch.Size([60]), count)
        off = float((found.value - exact).sum().abs())
        assert off <= 4 * found.total_error + 1e-9
    assert found.total_error < 0.02 * (1 + spread)
    assert torch.allclose(found.gradient, slope, atol=2e-3 * spread + 1e-9)
    assert torch.allclose(found.hessian, bend, atol=4e-3 * spread + 1e-9)
    assert bool((torch.linalg.eigvalsh(found.hessian) < 1e-12).all())  # concave, as the function is
    assert float((found.hessian.sum(-1)).abs().max()) < 1e-12  # and flat where all logits move together
    if spread:
        others = random_values(function, mean, covariance, torch.Size([60]), 4096)
        assert not torch.equal(others, found.value)
        assert float((others - exact).sum().abs()) < 8 * found.total_error


def test_a_direction_without_variance() -> None:
    """A logit that is always zero (`pad`): its row of V is zero."""
    mean, covariance = rows(6, 3, 1.0, 5)
    mean[:, 2], covariance[:, 2], covariance[:, :, 2] = 0.0, 0.0, 0.0
    found = random_integrals(lambda x: -x.logsumexp(-1), mean, covariance, torch.Size([6]), 2048)
    grid, weights = product_rule(60, 2)
    points = mean[:, None, :2] + grid @ torch.linalg.cholesky(covariance[:, :2, :2]).mT
    padded = torch.nn.functional.pad(points, (0, 1))
    assert torch.allclose(found.value, -(padded.logsumexp(-1) * weights).sum(-1), atol=2e-3)


# -- models --------------------------------------------------------------------------------------------------


def expected(law: Callable[[Tensor], Tensor], mean: Tensor, covariance: Tensor, order: int = 14) -> Tensor:
    """Σ_n E law(x_n), x_n ~ N(m_n, V_n) of three dimensions."""
    grid, weights = product_rule(order, 3)
    root = torch.linalg.cholesky(covariance + 1e-12 * torch.eye(3, dtype=DOUBLE))
    return (law(mean + (grid @ root.mT).movedim(1, 0)) * weights.unsqueeze(-1)).sum()


def fit(model: Callable, **options: Any) -> tuple[BLRInference, Any]:
    pyro.set_rng_seed(0)
    engine = BLRInference(model, **options)
    posterior = engine.run(progress=False)
    assert posterior.converged, posterior.stop_reason
    assert posterior.elbo_kind.startswith("bound by quadrature")
    return engine, posterior


def near(posterior: Any, best: tuple[Tensor, Tensor, float], site: str, bound: float, means: float, sds: float) -> None:
    mean, covariance, value = best
    sd = covariance.diagonal().sqrt()
    assert abs(posterior.elbo - value) < bound
    assert bool(((posterior[site].mean.flatten() - mean).abs() < means * sd).all())
    assert torch.allclose(posterior[site].stddev.flatten(), sd, rtol=sds)


def softmax_regression(logits: Callable[[Tensor], dict[str, Tensor]], event: bool = False) -> Callable:
    def model() -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2, CLASSES, dtype=DOUBLE), 1.5).to_event(2))
        with pyro.plate("rows", N):
            if event:
                one = torch.nn.functional.one_hot(CLASS, CLASSES).double()
                pyro.sample("y", dist.OneHotCategorical(**logits(X @ w)), obs=one)
            else:
                pyro.sample("y", dist.Categorical(**logits(X @ w)), obs=CLASS)

    return model


@pytest.fixture(scope="module")
def best_softmax() -> tuple[Tensor, Tensor, float]:
    """Of four logits only the three differences from the last matter."""
    contrast = torch.cat([torch.eye(3), -torch.ones(3, 1)], -1).double()
    design = torch.einsum("nd,ac->nadc", X, contrast).reshape(N, 3, 8)

    def law(difference: Tensor) -> Tensor:
        logits = torch.nn.functional.pad(difference, (0, 1)).log_softmax(-1)
        return logits.gather(-1, CLASS.expand(logits.shape[:-1]).unsqueeze(-1)).squeeze(-1)

    def bound(mean: Tensor, covariance: Tensor) -> Tensor:
        spread = torch.einsum("nai,ij,nbj->nab", design, covariance, design)
        return expected(law, design @ mean, spread) + normal_prior(mean, covariance, 1.5)

    return best_gaussian(bound, 8)


@pytest.mark.parametrize("written", ["logits", "probs", "one hot"])
def test_four_classes(written: str, best_softmax: tuple[Tensor, Tensor, float]) -> None:
    """The best of all Gaussians, to the error that is stated; the logits may be seen through a softmax."""
    named = (lambda x: {"probs": x.softmax(-1)}) if written == "probs" else (lambda x: {"logits": x})
    engine, posterior = fit(softmax_regression(named, written == "one hot"))
    near(posterior, best_softmax, "w", 0.05, 0.02, 0.01)
    columns = engine._seen.messages.averages["y"].integral.rows._columns["w"][1]  # type: ignore[union-attr]
    assert columns.shape == (CLASSES, N, 2)  # a logit sees the weights of its class alone
    (verdict,) = [v for v in engine.explain() if v.factor == "y"]
    assert verdict.how == "quadrature"
    assert "random points over 4 affine predictors for each element" in verdict.reason


def test_a_product_of_two_predictors_and_a_third() -> None:
    """Logits (x·a)(x·b) + exp(c): no block is affine in them, three numbers of each row are."""

    def model() -> None:
        a = pyro.sample("a", dist.Normal(torch.zeros(2, dtype=DOUBLE), 0.7).to_event(1))
        b = pyro.sample("b", dist.Normal(torch.ones(2, dtype=DOUBLE), 0.7).to_event(1))
        c = pyro.sample("c", dist.Normal(torch.zeros((), dtype=DOUBLE), 0.7))
        with pyro.plate("rows", N):
            pyro.sample("y", dist.Bernoulli(logits=(X @ a) * (X @ b) + c.exp()), obs=YES)

    engine, posterior = fit(model, blocks=[["a", "b", "c"]])
    design = torch.zeros(N, 3, 5, dtype=DOUBLE)
    design[:, 0, :2], design[:, 1, 2:4], design[:, 2, 4] = X, X, 1.0
    centre = torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0], dtype=DOUBLE)

    def law(x: Tensor) -> Tensor:
        logits = x[..., 0] * x[..., 1] + x[..., 2].exp()
        return -torch.nn.functional.softplus(torch.where(YES == 1, -logits, logits))

    def bound(mean: Tensor, covariance: Tensor) -> Tensor:
        spread = torch.einsum("nai,ij,nbj->nab", design, covariance, design)
        return expected(law, design @ mean, spread) + normal_prior(mean - centre, covariance, 0.7)

    best = best_gaussian(bound, 5)
    if posterior.elbo > best[2] + 0.02:  # signs of a and b may be exchanged: the search from zero found the lower mode
        pytest.fail(f"the oracle's mode {best[2]} is below {posterior.elbo}")
    assert posterior.elbo == pytest.approx(best[2], abs=0.05)


def test_masks_and_scales(best_softmax: tuple[Tensor, Tensor, float]) -> None:
    """Twice the data at half the scale, and rows that are masked, are the same posterior."""
    twice, label = torch.cat([X, X, X]), torch.cat([CLASS, CLASS, (CLASS + 1) % CLASSES])
    shown = torch.arange(3 * N) < 2 * N

    def model() -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2, CLASSES, dtype=DOUBLE), 1.5).to_event(2))
        with pyro.plate("rows", 3 * N), pyro.poutine.scale(scale=0.5), pyro.poutine.mask(mask=shown):
            pyro.sample("y", dist.Categorical(logits=twice @ w), obs=label)

    near(fit(model)[1], best_softmax, "w", 0.05, 0.02, 0.01)


def test_one_block_a_class_and_elements(best_softmax: tuple[Tensor, Tensor, float]) -> None:
    """Smaller families have lower bounds, in the order in which they contain each other."""

    def by_class() -> None:
        with pyro.plate("classes", CLASSES):
            w = pyro.sample("w", dist.Normal(torch.zeros(2, dtype=DOUBLE), 1.5).to_event(1))
        with pyro.plate("rows", N):
            pyro.sample("y", dist.Categorical(logits=X @ w.T), obs=CLASS)

    apart = fit(by_class, blocks="sites")[1]
    elements = fit(softmax_regression(lambda x: {"logits": x}), blocks="elements")[1]
    assert elements.elbo < apart.elbo + 0.02 < best_softmax[2]


def test_a_kink_is_drawn() -> None:
    """Random points need two derivatives."""

    def model() -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2, CLASSES, dtype=DOUBLE), 1.5).to_event(2))
        with pyro.plate("rows", N):
            pyro.sample("y", dist.Categorical(logits=(X @ w).relu()), obs=CLASS)

    (verdict,) = [v for v in BLRInference(model).explain() if v.factor == "y"]
    assert verdict.how == "Monte Carlo"


def test_steps_reach_what_the_run_reaches(best_softmax: tuple[Tensor, Tensor, float]) -> None:
    engine = BLRInference(softmax_regression(lambda x: {"logits": x}))
    for _ in range(15):
        engine.step()
    near(engine.posterior, best_softmax, "w", 0.05, 0.02, 0.01)


def test_a_first_step_that_goes_too_far_is_shortened() -> None:
    """Eight funnels in float32: from the prior a full step ends at a bound of −3e27, known to as much."""
    y, sigma = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12]), torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18])

    def model() -> None:
        with pyro.plate("schools", 8):
            eta = pyro.sample("eta", dist.Normal(torch.zeros(8).float(), 1.0))
            mu = pyro.sample("mu", dist.Normal(torch.zeros(8).float(), 10.0))
            tau = pyro.sample("tau", dist.HalfCauchy(torch.full((8,), 25.0).float()))
            pyro.sample("obs", dist.Normal(mu + tau * eta, sigma.float()), obs=y.float())

    posterior = BLRInference(model).run(progress=False)
    draws = posterior.sample((20_000,))
    joint = dist.Normal(0.0, 1.0).log_prob(draws["eta"]) + dist.Normal(0.0, 10.0).log_prob(draws["mu"])
    joint = joint + dist.HalfCauchy(25.0).log_prob(draws["tau"])
    joint = joint + dist.Normal(draws["mu"] + draws["tau"] * draws["eta"], sigma).log_prob(y)
    values = joint.sum(-1) - posterior.log_prob(draws)
    assert posterior.converged
    assert abs(float(values.mean()) - posterior.elbo) < 5 * float(values.std()) / 20_000**0.5 + 0.1  # its stated error
