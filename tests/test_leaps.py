"""Slow climbs: leaps over sweeps that creep, and starts that avoid the neck of a funnel."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_blr import BLRInference, climbs, portfolio
from pyro_blr.ascent import Ascent
from pyro_blr.draws import Draws
from pyro_blr.leaps import LARGEST, PATIENCE, Leaps, Step, moved_nats
from pyro_blr.newton import newton_start

float64 = {"dtype": torch.float64}


# -- exact sweeps --------------------------------------------------------------------------------------------


def sum_of_two() -> None:
    """Each of two sites explains what the other does not: a sweep shrinks the distance by 1 / (1 + 0.05²)²."""
    a = pyro.sample("a", dist.Normal(torch.zeros((), **float64), 1.0))
    b = pyro.sample("b", dist.Normal(torch.zeros((), **float64), 1.0))
    pyro.sample("y", dist.Normal(a + b, 0.05), obs=torch.tensor(1.0, **float64))


def test_a_leap_ends_at_the_optimum_of_the_factorised_family() -> None:
    """p is Gaussian with the precision Λ = I + 1 1ᵀ / s²: the best independent q has p's mean and the variances 1 / Λ_ii, and is
    ½ (Σ log Λ_ii − log |Λ|) nats from p (Bishop 2006, eq. 10.13).
    """
    posterior = BLRInference(sum_of_two, blocks="sites").run(progress=False)
    precision = torch.eye(2, **float64) + 400.0
    evidence = dist.Normal(0.0, math.sqrt(2.0025)).log_prob(torch.tensor(1.0, **float64))
    gap = 0.5 * (precision.diagonal().log().sum() - torch.logdet(precision))
    assert posterior.converged and len(posterior.history) < 40  # by sweeps alone 1,600
    assert posterior.elbo == pytest.approx(float(evidence - gap), abs=1e-9)
    for name in "ab":
        assert float(posterior[name].mean) == pytest.approx(1 / 2.0025, abs=1e-6)
        assert float(posterior[name].variance) == pytest.approx(1 / 401.0, rel=1e-9)


def factor_model(y: Tensor, number: int) -> None:
    rows, columns = y.shape
    zeros = torch.zeros(number, **float64)
    with pyro.plate("loadings", columns):
        c = pyro.sample("c", dist.Normal(zeros, 1.0).to_event(1))
        tau = pyro.sample("tau", dist.Gamma(torch.ones((), **float64), 1.0))
    with pyro.plate("scores", rows):
        x = pyro.sample("x", dist.Normal(zeros, 1.0).to_event(1))
    with pyro.plate("rows", rows, dim=-2), pyro.plate("columns", columns, dim=-1):
        pyro.sample("y", dist.Normal(x @ c.T, tau.rsqrt()), obs=y)


def test_leaps_end_where_sweeps_stand_still() -> None:
    """Plain sweeps by `step` go on from the end, and find nothing more."""
    torch.manual_seed(0)
    y = torch.randn(40, 2, **float64) @ torch.randn(2, 6, **float64) + 0.2 * torch.randn(40, 6, **float64)
    engine = BLRInference(factor_model)
    posterior = engine.run(y, 2, tol=1e-9, progress=False)
    assert posterior.converged and len(posterior.history) < 150
    rises = torch.tensor(posterior.history, **float64).diff()
    assert bool((rises >= -1e-9).all())
    for _ in range(20):
        engine.step(y, 2)
    assert engine.posterior.elbo == pytest.approx(posterior.elbo, abs=1e-8)
    for name in ("c", "x"):
        torch.testing.assert_close(engine.posterior[name].mean, posterior[name].mean, rtol=0, atol=1e-5)


def rate_of_counts() -> None:
    rate = pyro.sample("rate", dist.Gamma(torch.tensor(2.0, **float64), 1.0))
    pyro.sample("y", dist.Poisson(rate), obs=torch.tensor(3.0, **float64))


def ascent_of(model: Callable[[], None]) -> Ascent:
    engine = BLRInference(model)
    return engine._ascent(engine._program((), {}))


@pytest.mark.parametrize("start, size, ratio, moves", [(-1.0, 0.75, 0.25, True), (1.0, 0.25, 0.9, False)])
def test_a_leap_never_leaves_the_domain(start: float, size: float, ratio: float, moves: bool) -> None:
    """Steps along λ* + t (1, 0.9) that shrink by `ratio` come together at start + size / (1 − ratio): at Bayes' rule λ*, or beyond a
    rate of zero.
    """
    ascent = ascent_of(rate_of_counts)
    optimum, direction = (
        torch.tensor([4.0, -2.0], **float64),
        torch.tensor([1.0, 0.9], **float64),
    )  # Gamma(2 + 3, 1 + 1)
    leaps, at = Leaps(patience=0), optimum + start * direction
    for length in (size, size * ratio):
        leaps = leaps.after(Step(at, length * direction, length * direction))
        at = at + length * direction
    ascent.beliefs.update("rate", at)
    reached, _ = leaps.leap(ascent, None, 1.0, float(ascent.estimates(None)))
    torch.testing.assert_close(ascent.beliefs.naturals["rate"], optimum if moves else at, rtol=0, atol=1e-9)
    assert (reached is not None) == moves


def test_a_leap_never_lowers_the_bound() -> None:
    """Steps away from the optimum would come together twice as far away."""
    ascent = ascent_of(rate_of_counts)
    at, direction = torch.tensor([4.0, -2.0], **float64), torch.tensor([0.1, 0.0], **float64)
    leaps = Leaps(patience=0)
    for length in (1.0, 0.5):
        leaps = leaps.after(Step(at, length * direction, length * direction))
        at = at + length * direction
    ascent.beliefs.update("rate", at)
    assert leaps.leap(ascent, None, 1.0, float(ascent.estimates(None)))[0] is None
    torch.testing.assert_close(ascent.beliefs.naturals["rate"], at, rtol=0, atol=0)


def test_nothing_is_remembered_before_it_is_needed_nor_of_very_large_q() -> None:
    ascent = ascent_of(rate_of_counts)
    leaps = Leaps.of(ascent)
    for _ in range(PATIENCE - 2):
        assert leaps.is_waiting
        leaps = leaps.after(None)
    assert not leaps.is_waiting
    ascent.beliefs.update("rate", torch.zeros(LARGEST, 2, **float64))
    assert Leaps.of(ascent, patience=0).is_waiting


# -- draws ---------------------------------------------------------------------------------------------------

PLACES, COUNTS = torch.linspace(-2.0, 2.0, 6, **float64), torch.tensor([8.0, 3.0, 1.0, 0.0, 2.0, 9.0], **float64)


def process() -> None:
    """A Gaussian process in white coordinates: every draw sees all of them, so nothing is integrated otherwise."""
    scale = pyro.sample("scale", dist.LogNormal(torch.zeros((), **float64), 0.5))
    length = pyro.sample("length", dist.LogNormal(torch.zeros((), **float64), 0.5))
    white = pyro.sample("white", dist.Normal(torch.zeros(6, **float64), 1.0).to_event(1))
    kernel = torch.exp(-0.5 * ((PLACES.unsqueeze(-1) - PLACES) / length[..., None, None]) ** 2)
    root = torch.linalg.cholesky(scale[..., None, None] ** 2 * kernel + 1e-6 * torch.eye(6, **float64))
    with pyro.plate("points", 6):
        pyro.sample("y", dist.Poisson((root @ white.unsqueeze(-1)).squeeze(-1).exp()), obs=COUNTS)


def test_leaps_on_fixed_draws_end_where_sweeps_on_them_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the same place, on the same draws, with leaps and without: half as many sweeps, and the same λ to 1e-6 nats."""
    draws, ends, sweeps = Draws(0, 256, balanced=True), [], []
    for soon in (climbs.SOON, 10**6):
        monkeypatch.setattr(climbs, "SOON", soon)
        ascent, told = ascent_of(process), list[float]()
        newton_start(ascent)
        assert climbs.climb(ascent, draws, 1e-7, 100, lambda bound, _, told=told: told.append(bound)).converged
        ends.append(ascent)
        sweeps.append(len(told))
    assert moved_nats(ends[0], ends[1].beliefs) < 1e-6
    assert 2 * sweeps[0] < sweeps[1] + 2


# -- funnels -------------------------------------------------------------------------------------------------

EFFECTS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], **float64)
ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0], **float64)


def eight_schools() -> None:
    mu = pyro.sample("mu", dist.Normal(torch.zeros((), **float64), 5.0))
    tau = pyro.sample("tau", dist.LogNormal(torch.ones((), **float64), 1.0))
    with pyro.plate("schools", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, ERRORS), obs=EFFECTS)


def best_gaussian_bound() -> float:
    """The largest bound over Gaussians of (mu, log tau, theta), in closed form and by L-BFGS on (m, L).

    E exp(−2 s) (θ − μ)² = exp(−2 m_s + 2 v_s) ((m_d − 2 c)² + v_d) for Gaussian s and d = θ − μ with covariance c.
    """
    mean = torch.cat([torch.tensor([4.4, 1.0], **float64), 0.5 * EFFECTS]).requires_grad_()
    root = torch.diag(torch.tensor([3.0, 0.5] + [5.0] * 8, **float64).log()).requires_grad_()

    def minus_bound() -> Tensor:
        tril = root.tril(-1) + root.diagonal().exp().diag()
        cov, half_log_two_pi = tril @ tril.mT, 0.5 * math.log(2 * math.pi)
        apart, shared = mean[2:] - mean[0], cov[2:, 1] - cov[0, 1]
        spread = cov.diagonal()[2:] + cov[0, 0] - 2 * cov[2:, 0]
        squares = (-2 * mean[1] + 2 * cov[1, 1]).exp() * ((apart - 2 * shared).square() + spread)
        prior = -half_log_two_pi - math.log(5.0) - (mean[0].square() + cov[0, 0]) / 50
        scale = -half_log_two_pi - 0.5 * ((mean[1] - 1).square() + cov[1, 1])
        group = (-half_log_two_pi - mean[1] - 0.5 * squares).sum()
        error = ((EFFECTS - mean[2:]).square() + cov.diagonal()[2:]) / (2 * ERRORS.square())
        data = (-half_log_two_pi - ERRORS.log() - error).sum()
        entropy = 10 * (0.5 + half_log_two_pi) + root.diagonal().sum()
        return -(prior + scale + group + data + entropy)

    optimiser = torch.optim.LBFGS(
        [mean, root], max_iter=2000, history_size=50, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = minus_bound()
        loss.backward()
        return loss

    optimiser.step(closure)
    return -float(minus_bound().detach())


def test_a_funnel_from_the_centre_of_its_prior() -> None:
    posterior = BLRInference(eight_schools).run(progress=False)
    assert posterior.converged and len(posterior.history) < 60
    assert posterior.elbo == pytest.approx(best_gaussian_bound(), abs=1e-5)


def regression() -> None:
    x = torch.linspace(-2.0, 2.0, 30, **float64)
    w = pyro.sample("w", dist.Normal(torch.zeros(2, **float64), 3.0).to_event(1))
    with pyro.plate("rows", 30):
        pyro.sample("y", dist.Bernoulli(logits=w[0] + w[1] * x), obs=(x.sin() > 0.2).double())


@pytest.mark.parametrize("model, climbs", [(regression, 2), (eight_schools, 4)])
def test_other_starts_are_tried_where_the_climb_is_slow(
    model: Callable[[], None], climbs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, climb = [], portfolio.climb  # one of them the last, on fine quadrature
    monkeypatch.setattr(portfolio, "climb", lambda *args, **kwargs: count.append(1) or climb(*args, **kwargs))
    assert BLRInference(model).run(progress=False).converged
    assert len(count) == climbs
