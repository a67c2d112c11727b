"""Newton's search for a mode goes uphill where the log density is not concave."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_blr import BLRInference
from pyro_blr.concave import uphill
from pyro_blr.families import LogNormal, MultivariateNormal, Normal

FAMILY = MultivariateNormal(3)


def packed(gradient: torch.Tensor, precision: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """λ̂ of −½ (u − m)ᵀ S (u − m) + gᵀ(u − m), S of any sign."""
    rows, columns = torch.tril_indices(3, 3)
    second = -0.5 * precision[rows, columns] * torch.where(rows == columns, 1.0, 2.0)
    return torch.cat([gradient + precision @ mean, second])


def some(seed: int, signs: tuple[float, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """g, S with eigenvalues of these signs, and m."""
    torch.manual_seed(seed)
    q = torch.linalg.qr(torch.randn(3, 3))[0]
    return torch.randn(3), q @ torch.diag(torch.tensor(signs) * (torch.rand(3) + 0.5)) @ q.mT, torch.randn(3)


def test_where_it_is_concave_it_is_newtons_step() -> None:
    gradient, precision, mean = some(0, (1.0, 1.0, 1.0))
    found = uphill(FAMILY, mean, packed(gradient, precision, mean))
    torch.testing.assert_close(found, mean + torch.linalg.solve(precision, gradient))


@pytest.mark.parametrize("signs", [(1.0, 1.0, -1.0), (1.0, -1.0, -1.0), (-1.0, -1.0, -1.0)])
def test_elsewhere_it_is_uphill_and_units_do_not_matter(signs: tuple[float, ...]) -> None:
    gradient, precision, mean = some(1, signs)
    step = uphill(FAMILY, mean, packed(gradient, precision, mean)) - mean
    assert float(step @ gradient) > 0
    units = torch.tensor([1.0, 1e3, 1e-3])
    other = packed(gradient / units, precision / units / units.unsqueeze(-1), units * mean)
    torch.testing.assert_close(uphill(FAMILY, units * mean, other) - units * mean, units * step, rtol=1e-5, atol=1e-9)


def test_elements_of_a_plate_each_by_their_own_curvature() -> None:
    """−½ s (u − m)² + g (u − m): the step is g / |s|."""
    mean, gradient, curvature = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 0.5]), torch.tensor([2.0, -0.25])
    target = torch.stack([gradient + curvature * mean, -0.5 * curvature], -1)
    torch.testing.assert_close(uphill(Normal(), mean, target), mean + gradient / curvature.abs())


@pytest.mark.parametrize("family", [Normal(), LogNormal()], ids=["Normal", "LogNormal"])
def test_elements_that_are_concave_go_to_their_own_mean(family: Normal | LogNormal) -> None:
    concave, convex = torch.tensor([1.7, -2.0]), torch.tensor([1.7, 2.0])
    found = uphill(family, torch.tensor([0.3, 0.3]), torch.stack([concave, convex]))
    torch.testing.assert_close(found[0], family.moments(concave)["mean"])
    assert float(found[1]) > 0.3  # gradient 1.7 + 4 · 0.3, and 1 of the Jacobian


def test_a_regression_with_flat_priors_in_large_units_takes_few_steps() -> None:
    """y about 900 with noise of 20, from coefficients of 0 and a noise of 1: the search crosses a region that is not concave."""
    x = torch.randn(60, 3) * torch.tensor([1.0, 15.0, 100.0])
    y = 900 + x @ torch.tensor([5.0, -1.0, 0.3]) + 20 * torch.randn(60)

    def model() -> None:
        beta = pyro.sample("beta", dist.ImproperUniform(dist.constraints.real_vector, (), (3,)))
        intercept = pyro.sample("intercept", dist.ImproperUniform(dist.constraints.real, (), ()))
        noise = pyro.sample("noise", dist.HalfCauchy(2.5))
        with pyro.plate("rows", 60):
            pyro.sample("y", dist.Normal(intercept + x @ beta, noise), obs=y)

    posterior = BLRInference(model).run(progress=False)
    design = torch.cat([x, torch.ones(60, 1)], -1)
    best = torch.linalg.lstsq(design, y.unsqueeze(-1)).solution.squeeze(-1)
    rest = y - design @ best
    sds = torch.linalg.inv(design.mT @ design).diagonal().sqrt() * rest.norm() / 56**0.5
    found = torch.cat([posterior["beta"].mean, posterior["intercept"].mean.reshape(1)])
    assert posterior.converged and posterior.num_steps < 20
    assert bool(((found - best).abs() < 0.05 * sds).all())  # flat priors: the posterior mean is least squares


def moving_average(y: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
    """e_t = y_t − θ e_{t−1}, stacked last: it grows like |θ|ᵗ."""
    errors = [y[0] + 0 * theta]
    for value in y[1:]:
        errors.append(value - theta * errors[-1])
    return torch.stack(errors, -1)


def test_a_start_that_explodes_is_left_at_once() -> None:
    """At θ = −2.2 the log density is about −1e68: uphill, a step divides what is left by e, and no search has 150 of them.

    The posterior against one on a grid of (θ, log σ).
    """
    noise = 0.5 * torch.randn(100)
    y = noise + 0.4 * torch.cat([torch.zeros(1), noise[:-1]])

    def model() -> None:
        theta = pyro.sample("theta", dist.Normal(0.0, 2.0))
        sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
        with pyro.plate("times", len(y)):
            pyro.sample("y", dist.Normal(y - moving_average(y, theta), sigma), obs=y)

    posterior = BLRInference(model, init={"theta": torch.tensor(-2.2)}).run(progress=False)
    theta, log_sigma = torch.linspace(-0.2, 1.0, 400), torch.linspace(-1.2, -0.2, 200).unsqueeze(-1)
    squares = moving_average(y, theta).square().sum(-1)
    sigma = log_sigma.exp()
    log_prob = (
        -0.5 * squares / sigma**2 + (1 - len(y)) * log_sigma + dist.HalfCauchy(2.5).log_prob(sigma) - theta**2 / 8
    )
    weights = (log_prob - log_prob.max()).exp().sum(0)
    mean = (weights * theta).sum() / weights.sum()
    sd = ((weights * (theta - mean) ** 2).sum() / weights.sum()).sqrt()
    assert posterior.converged
    assert abs(posterior["theta"].mean - mean) < 0.05 * sd
    torch.testing.assert_close(posterior["theta"].stddev, sd, rtol=0.05, atol=0.0)
