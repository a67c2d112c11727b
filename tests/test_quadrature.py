"""Factors seen through one or two affine predictors: deterministic messages, against brute force.

The oracle writes the bound of a regression with a Gaussian q(w) = N(m, L Lᵀ) as sums of one- or two-dimensional integrals by
Gauss-Hermite rules of high order (or in closed form, where there are kinks) and maximises it over (m, L) by L-BFGS.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import arrays, shared_path
from pyro import poutine
from scipy import integrate
from torch import Tensor

from pyro_blr import BLRInference
from pyro_blr.ascent import Ascent
from pyro_blr.quadrature import gaussian_integrals

NODES, WEIGHTS = (torch.as_tensor(x) for x in np.polynomial.hermite_e.hermegauss(100))
WEIGHTS = WEIGHTS / WEIGHTS.sum()
N = 12
GENERATOR = torch.Generator().manual_seed(4)
X = torch.stack([torch.ones(N), torch.linspace(-1.5, 1.5, N) + 0.1 * torch.randn(N, generator=GENERATOR)], -1).double()
ETA = X @ torch.tensor([0.3, 0.8], dtype=torch.float64)
NOISE = torch.randn(N, generator=GENERATOR, dtype=torch.float64)
UNIFORM = torch.rand(N, generator=GENERATOR, dtype=torch.float64)

Law = Callable[[Tensor], Tensor]


# -- integrals -----------------------------------------------------------------------------------------------


def softplus(x: Tensor) -> Tensor:
    return torch.nn.functional.softplus(x)


@pytest.mark.parametrize("sd", [0.0, 1e-3, 0.1, 1.0, 3.0, 10.0, 300.0])
@pytest.mark.parametrize("mean", [0.0, -2.3, 8.0])
@pytest.mark.parametrize(
    "function",
    [
        lambda x: -softplus(x),
        lambda x: -(x - 0.7).abs(),
        lambda x: -1.5 * torch.log1p((x - 1) ** 2 / 3),
        lambda x: torch.where(x > 1.0, -x, -0.5 * x**2),
    ],
    ids=["logistic", "absolute", "student", "jump"],
)
def test_integrals_in_one_dimension(function: Law, mean: float, sd: float) -> None:
    found = gaussian_integrals(
        lambda points, rows: function(points.squeeze(-1)),
        torch.tensor([[mean]], dtype=torch.float64),
        torch.tensor([[[sd**2]]], dtype=torch.float64),
    )
    width = sd if sd > 0 else 1e-4 * (1 + abs(mean))  # a variance of zero is a narrow one

    def moment(power: Callable[[float], float]) -> float:
        edges = sorted({-15.0, 15.0, *(z for z in ((b - mean) / width for b in (0.0, 0.7, 1.0)) if abs(z) < 15)})
        pieces = zip(edges, edges[1:], strict=False)

        def integrand(z: float) -> float:
            x = torch.tensor(mean + width * z, dtype=torch.float64)
            return float(function(x)) * power(z) * math.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)

        return sum(integrate.quad(integrand, a, b, epsabs=1e-12, epsrel=1e-12, limit=400)[0] for a, b in pieces)

    value = moment(lambda z: 1.0)
    scale = abs(value) + abs(moment(lambda z: z)) + 1e-3
    assert abs(float(found.value) - value) < 1e-8 * scale
    assert abs(float(found.gradient) * width - moment(lambda z: z)) < 1e-7 * scale
    assert abs(float(found.hessian) * width**2 - moment(lambda z: z * z - 1)) < 1e-7 * scale
    assert float(found.error) < 1e-8 * scale


def test_sixty_four_fixed_points_are_not_enough_at_sd_10_and_300() -> None:
    """E of the logistic curvature: what 64 fixed points miss is found."""
    z, w = (torch.as_tensor(x) for x in np.polynomial.hermite_e.hermegauss(64))
    for sd, off in ((10.0, 0.05), (300.0, 0.5)):
        found = gaussian_integrals(
            lambda points, rows: -softplus(points.squeeze(-1)),
            torch.zeros(1, 1, dtype=torch.float64),
            torch.full((1, 1, 1), sd**2, dtype=torch.float64),
        )
        x = torch.linspace(-60, 60, 200_001, dtype=torch.float64)
        curvature = -torch.sigmoid(x) * torch.sigmoid(-x)
        density = torch.exp(-0.5 * (x / sd) ** 2) / (sd * math.sqrt(2 * math.pi))
        exact = float(torch.trapezoid(curvature * density, x))
        fixed = float((-torch.sigmoid(sd * z) * torch.sigmoid(-sd * z) * w / w.sum()).sum())
        assert float(found.hessian) == pytest.approx(exact, rel=1e-6)
        assert abs(fixed - exact) > off * abs(exact)


def test_integrals_in_two_dimensions() -> None:
    """log N(1.2; a, exp b): its moments under a correlated Gaussian are known."""
    mean = torch.tensor([[0.3, -0.4], [2.0, 1.0]], dtype=torch.float64)
    covariance = torch.tensor([[[0.5, 0.3], [0.3, 0.4]], [[4.0, -1.0], [-1.0, 1.0]]], dtype=torch.float64)

    def function(points: Tensor, rows: Tensor | None) -> Tensor:
        a, b = points.unbind(-1)
        return -0.5 * ((1.2 - a) * (-b).exp()) ** 2 - b

    found = gaussian_integrals(function, mean, covariance)
    a, b = mean.unbind(-1)
    v, c, s = covariance[:, 0, 0], covariance[:, 0, 1], covariance[:, 1, 1]
    tilted = a - 2 * c  # E[g(a) e^{−2b}] = E e^{−2b} E g(a − 2c + …)
    expected = -0.5 * torch.exp(-2 * b + 2 * s) * ((1.2 - tilted) ** 2 + v) - b
    assert torch.allclose(found.value, expected, rtol=1e-8)
    leaf, wide = mean.clone().requires_grad_(), covariance.clone().requires_grad_()
    shift = leaf[:, 0] - 2 * wide[:, 0, 1]
    total = (
        -0.5 * torch.exp(-2 * leaf[:, 1] + 2 * wide[:, 1, 1]) * ((1.2 - shift) ** 2 + wide[:, 0, 0]) - leaf[:, 1]
    ).sum()
    in_mean, in_covariance = torch.autograd.grad(total, [leaf, wide])
    assert torch.allclose(found.gradient, in_mean, rtol=1e-7)
    assert torch.allclose(found.hessian, in_covariance + in_covariance.mT, rtol=1e-6)


def test_a_kink_in_two_dimensions_states_its_error() -> None:
    mean, covariance = torch.zeros(1, 2, dtype=torch.float64), torch.eye(2, dtype=torch.float64).unsqueeze(0)
    found = gaussian_integrals(lambda p, rows: -(p[..., 0] - p[..., 1]).abs(), mean, covariance)
    assert abs(float(found.value) + 2 / math.sqrt(math.pi)) <= float(found.error) + 1e-9
    assert float(found.error) < 1e-4


# -- one predictor -------------------------------------------------------------------------------------------


def bernoulli(eta: Tensor) -> Any:
    return dist.Bernoulli(logits=eta)


Y = {
    "bernoulli": (UNIFORM < torch.sigmoid(ETA)).double(),
    "probit": (UNIFORM < torch.sigmoid(2 * ETA)).double(),
    "binomial": (5 * UNIFORM).round(),
    "poisson": (2 * UNIFORM * ETA.exp()).round(),
    "negative binomial": (3 * UNIFORM * ETA.exp()).round(),
    "gamma": UNIFORM + 0.1,
    "beta": 0.05 + 0.9 * UNIFORM,
    "student": ETA + NOISE,
    "laplace": ETA + NOISE,
    "ordinal": (3 * UNIFORM).floor(),
    "geometric": (3 * UNIFORM).floor(),
    "lognormal": (ETA + NOISE).exp(),
    "cauchy": ETA + NOISE,
    "categorical": (UNIFORM < 0.5).long(),
    "weibull": UNIFORM + 0.2,
}
CUTS = torch.tensor([-0.5, 1.0], dtype=torch.float64)


def _ordinal(eta: Tensor) -> Tensor:
    upper, lower = torch.sigmoid(CUTS - eta.unsqueeze(-1)), torch.zeros_like(eta).unsqueeze(-1)
    probs = torch.cat([upper, 1 + lower], -1) - torch.cat([lower, upper], -1)
    index = Y["ordinal"].long().unsqueeze(-1).expand(*eta.shape, 1)
    return probs.gather(-1, index).squeeze(-1).log()


ONE: dict[str, tuple[Callable[[Tensor], Any], Law]] = {
    "bernoulli": (bernoulli, lambda e: Y["bernoulli"] * e - softplus(e)),
    "probit": (
        lambda e: dist.Bernoulli(probs=dist.Normal(0.0, 1.0).cdf(e)),
        lambda e: torch.special.log_ndtr((2 * Y["probit"] - 1) * e),
    ),
    "binomial": (
        lambda e: dist.Binomial(5, logits=e),
        lambda e: (
            Y["binomial"] * e
            - 5 * softplus(e)
            + math.lgamma(6)
            - torch.lgamma(Y["binomial"] + 1)
            - torch.lgamma(6 - Y["binomial"])
        ),
    ),
    "poisson": (
        lambda e: dist.Poisson(e.exp()),
        lambda e: Y["poisson"] * e - e.exp() - torch.lgamma(Y["poisson"] + 1),
    ),
    "negative binomial": (
        lambda e: dist.NegativeBinomial(3.0, logits=e),
        lambda e: (
            Y["negative binomial"] * e
            - (3 + Y["negative binomial"]) * softplus(e)
            + torch.lgamma(3 + Y["negative binomial"])
            - math.lgamma(3)
            - torch.lgamma(Y["negative binomial"] + 1)
        ),
    ),
    "gamma": (
        lambda e: dist.Gamma(2.0, 2 * (-e).exp()),
        lambda e: 2 * (math.log(2) - e) + Y["gamma"].log() - 2 * Y["gamma"] * (-e).exp(),
    ),
    "beta": (
        lambda e: dist.Beta(4 * torch.sigmoid(e), 4 * torch.sigmoid(-e)),
        lambda e: (
            math.lgamma(4)
            - torch.lgamma(4 * torch.sigmoid(e))
            - torch.lgamma(4 * torch.sigmoid(-e))
            + (4 * torch.sigmoid(e) - 1) * Y["beta"].log()
            + (4 * torch.sigmoid(-e) - 1) * (1 - Y["beta"]).log()
        ),
    ),
    "student": (
        lambda e: dist.StudentT(4.0, e, 0.7),
        lambda e: (
            math.lgamma(2.5)
            - math.lgamma(2)
            - 0.5 * math.log(4 * math.pi)
            - math.log(0.7)
            - 2.5 * torch.log1p(((Y["student"] - e) / 0.7) ** 2 / 4)
        ),
    ),
    "ordinal": (lambda e: dist.OrderedLogistic(e, CUTS), _ordinal),
    "geometric": (
        lambda e: dist.Geometric(logits=e),
        lambda e: -Y["geometric"] * softplus(e) - softplus(-e),
    ),
    "lognormal": (
        lambda e: dist.LogNormal(softplus(e), 0.5),
        lambda e: (
            -0.5 * ((Y["lognormal"].log() - softplus(e)) / 0.5) ** 2
            - math.log(0.5 * math.sqrt(2 * math.pi))
            - Y["lognormal"].log()
        ),
    ),
    "cauchy": (
        lambda e: dist.Cauchy(e, 1.0),
        lambda e: -math.log(math.pi) - torch.log1p((Y["cauchy"] - e) ** 2),
    ),
    "categorical": (
        lambda e: dist.Categorical(logits=torch.stack([torch.zeros_like(e), e], -1)),
        lambda e: Y["categorical"] * e - softplus(e),
    ),
    "weibull": (
        lambda e: dist.Weibull(e.exp(), 1.5),
        lambda e: math.log(1.5) - 1.5 * e + 0.5 * Y["weibull"].log() - (Y["weibull"] * (-e).exp()) ** 1.5,
    ),
}


def expected_under(law: Law, mean: Tensor, variance: Tensor) -> Tensor:
    """Σ_n E law(eta_n) by 100 points."""
    return (law(mean + variance.sqrt() * NODES.unsqueeze(-1)) * WEIGHTS.unsqueeze(-1)).sum()


def best_gaussian(
    bound: Callable[[Tensor, Tensor], Tensor], dim: int, blocks: tuple[int, ...] | None = None
) -> tuple[Tensor, Tensor, float]:
    """(m, V, the largest bound) over N(m, L Lᵀ), V block-diagonal where `blocks` are given; `bound` is without the entropy."""
    keep = torch.block_diag(*(torch.ones(size, size, dtype=torch.float64) for size in blocks or (dim,)))
    mean = torch.zeros(dim, dtype=torch.float64, requires_grad=True)
    flat = (0.3 * torch.eye(dim, dtype=torch.float64)).requires_grad_()
    search = torch.optim.LBFGS(
        [mean, flat],
        max_iter=2000,
        max_eval=5000,
        tolerance_grad=1e-11,
        tolerance_change=1e-16,
        history_size=30,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        search.zero_grad()
        lower = flat.tril() * keep
        entropy = lower.diagonal().abs().log().sum() + 0.5 * dim * math.log(2 * math.pi * math.e)
        value = -(bound(mean, lower @ lower.T) + entropy)
        value.backward()
        return value

    search.step(loss)
    value = loss()
    assert float(mean.grad.norm() + flat.grad.tril().norm()) < 1e-4  # type: ignore[union-attr]
    lower = flat.detach().tril() * keep
    return mean.detach(), lower @ lower.T, -float(value.detach())


def normal_prior(mean: Tensor, covariance: Tensor, sd: float = 2.0) -> Tensor:
    square = mean.square() + covariance.diagonal()
    return (-0.5 * square / sd**2 - math.log(sd * math.sqrt(2 * math.pi))).sum()


def run(model: Callable, *args: Any, **options: Any) -> Any:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    engine = BLRInference(model, **options)
    posterior = engine.run(*args, progress=False)
    assert posterior.converged, posterior.stop_reason
    return posterior


def near(posterior: Any, best: tuple[Tensor, Tensor, float], site: str = "w") -> None:
    mean, covariance, bound = best
    assert posterior.elbo == pytest.approx(bound, rel=1e-6)
    assert posterior.elbo_kind.startswith("bound by quadrature")
    sd = covariance.diagonal().sqrt()
    assert bool(((posterior[site].mean.double() - mean).abs() < 3e-3 * sd).all())
    assert torch.allclose(posterior[site].variance.double(), covariance.diagonal(), rtol=3e-3)


def regression(law: Callable[[Tensor], Any], y: Tensor) -> Callable:
    def model() -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2, dtype=torch.float64), 2.0).to_event(1))
        with pyro.plate("rows", N):
            pyro.sample("y", law(X @ w), obs=y)

    return model


def best_regression(law: Law) -> tuple[Tensor, Tensor, float]:
    def bound(mean: Tensor, covariance: Tensor) -> Tensor:
        variance = torch.einsum("ni,ij,nj->n", X, covariance, X)
        return expected_under(law, X @ mean, variance) + normal_prior(mean, covariance)

    return best_gaussian(bound, 2)


@pytest.mark.parametrize("name", sorted(ONE))
def test_regressions_with_one_predictor(name: str) -> None:
    law, log_prob = ONE[name]
    near(run(regression(law, Y[name])), best_regression(log_prob))


@pytest.mark.parametrize("name", sorted(ONE))
def test_at_a_point_the_integral_is_the_density(name: str) -> None:
    """q of no width: log p(y | X w) + log p(w) as it is."""
    law, _ = ONE[name]
    engine = BLRInference(regression(law, Y[name]))
    ascent = engine._ascent(engine._program((), {}))
    w = ascent.beliefs.wide["w"]["mean"]
    expected = law(X @ w).log_prob(Y[name]).sum() + dist.Normal(0.0, 2.0).log_prob(w).sum()
    assert ascent.targets.at_mean("w", ascent.beliefs) == pytest.approx(float(expected), rel=1e-12)


def absolute(mean: Tensor, variance: Tensor) -> Tensor:
    """E|x| of x ~ N(m, v)."""
    sd = variance.sqrt()
    ratio = mean / sd
    return sd * math.sqrt(2 / math.pi) * torch.exp(-0.5 * ratio**2) + mean * torch.erf(ratio / math.sqrt(2))


def test_a_kink_has_a_closed_form() -> None:
    """Laplace errors: E|y − eta| is the folded Normal's mean."""

    def bound(mean: Tensor, covariance: Tensor) -> Tensor:
        variance = torch.einsum("ni,ij,nj->n", X, covariance, X)
        fit = -absolute(Y["laplace"] - X @ mean, variance) / 0.8 - math.log(1.6)
        return fit.sum() + normal_prior(mean, covariance)

    near(run(regression(lambda e: dist.Laplace(e, 0.8), Y["laplace"])), best_gaussian(bound, 2))


def test_a_censored_regression_written_by_hand() -> None:
    """`pyro.factor` of torch code with a branch: log density where seen, log probability beyond the limit."""
    y, limit, sd = Y["student"], 0.8, 0.7

    def law(eta: Tensor) -> Tensor:
        seen = -0.5 * ((y - eta) / sd) ** 2 - math.log(sd * math.sqrt(2 * math.pi))
        return torch.where(y > limit, torch.special.log_ndtr((eta - limit) / sd), seen)

    def model() -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2, dtype=torch.float64), 2.0).to_event(1))
        with pyro.plate("rows", N):
            pyro.factor("y", law(X @ w))

    near(run(model), best_regression(law))


# -- two predictors ------------------------------------------------------------------------------------------

GRID = torch.cartesian_prod(NODES[20:80], NODES[20:80])
GRID_WEIGHTS = torch.cartesian_prod(WEIGHTS[20:80], WEIGHTS[20:80]).prod(-1)
Law2 = Callable[[Tensor, Tensor], Tensor]


def expected_under_two(law: Law2, mean: Tensor, covariance: Tensor) -> Tensor:
    """Σ_n E law(a_n, b_n) under N(mean_n (n, 2), covariance_n (n, 2, 2)), by 60 × 60 points."""
    root = torch.linalg.cholesky(covariance)
    points = mean + torch.einsum("nij,qj->qni", root, GRID)
    return (law(points[..., 0], points[..., 1]) * GRID_WEIGHTS.unsqueeze(-1)).sum()


def best_with_scale(law: Law2, log_scale_prior: Law, joint: bool) -> tuple[Tensor, Tensor, float]:
    """Over q(w, u): w the weights of X, u the log of a positive site; block-diagonal unless `joint`."""
    design = torch.zeros(N, 2, 3, dtype=torch.float64)
    design[:, 0, :2], design[:, 1, 2] = X, 1.0

    def bound(mean: Tensor, covariance: Tensor) -> Tensor:
        spread = torch.einsum("nai,ij,nbj->nab", design, covariance, design)
        fit = expected_under_two(law, design @ mean, spread)
        u, s = mean[2], covariance[2, 2].sqrt()
        return fit + normal_prior(mean[:2], covariance[:2, :2]) + (log_scale_prior(u + s * NODES) * WEIGHTS).sum()

    return best_gaussian(bound, 3, blocks=None if joint else (2, 1))


def half_normal_of_log(u: Tensor) -> Tensor:
    """log density of u = log s, s ~ HalfNormal(1)."""
    return math.log(2) - 0.5 * math.log(2 * math.pi) - 0.5 * (2 * u).exp() + u


TWO: dict[str, tuple[Callable[[Tensor, Tensor], Any], Law2, str]] = {
    "normal": (
        lambda e, s: dist.Normal(e, s),
        lambda e, u: -0.5 * ((Y["student"] - e) * (-u).exp()) ** 2 - u - 0.5 * math.log(2 * math.pi),
        "student",
    ),
    "student": (
        lambda e, s: dist.StudentT(4.0, e, s),
        lambda e, u: (
            math.lgamma(2.5)
            - math.lgamma(2)
            - 0.5 * math.log(4 * math.pi)
            - u
            - 2.5 * torch.log1p(((Y["student"] - e) * (-u).exp()) ** 2 / 4)
        ),
        "student",
    ),
    "negative binomial": (
        lambda e, s: dist.NegativeBinomial(s, logits=e),
        lambda e, u: (
            Y["negative binomial"] * e
            - (u.exp() + Y["negative binomial"]) * softplus(e)
            + torch.lgamma(u.exp() + Y["negative binomial"])
            - torch.lgamma(u.exp())
            - torch.lgamma(Y["negative binomial"] + 1)
        ),
        "negative binomial",
    ),
    "gamma": (
        lambda e, s: dist.Gamma(s, s * (-e).exp()),
        lambda e, u: (
            u.exp() * (u - e) - torch.lgamma(u.exp()) + (u.exp() - 1) * Y["gamma"].log() - Y["gamma"] * (u - e).exp()
        ),
        "gamma",
    ),
}


@pytest.mark.parametrize("joint", [True, False], ids=["joint", "sites"])
@pytest.mark.parametrize("name", sorted(TWO))
def test_regressions_with_a_latent_scale(name: str, joint: bool) -> None:
    law, log_prob, data = TWO[name]

    def model() -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2, dtype=torch.float64), 2.0).to_event(1))
        s = pyro.sample("s", dist.HalfNormal(torch.ones((), dtype=torch.float64)))
        with pyro.plate("rows", N):
            pyro.sample("y", law(X @ w, s), obs=Y[data])

    posterior = run(model, blocks=[["w", "s"]] if joint else "sites")
    mean, covariance, bound = best_with_scale(log_prob, half_normal_of_log, joint)
    assert posterior.elbo == pytest.approx(bound, rel=1e-6)
    assert posterior.elbo_kind.startswith("bound by quadrature")
    near_mean = (posterior["w"].mean - mean[:2]).abs() / covariance.diagonal()[:2].sqrt()
    assert float(near_mean.max()) < 5e-3


@pytest.mark.parametrize("joint", [True, False], ids=["joint", "sites"])
def test_a_heteroscedastic_regression(joint: bool) -> None:
    """y ~ N(x·w, exp(x·v)), predictors that share q where w and v do."""
    law = TWO["normal"][1]
    design = torch.zeros(N, 2, 4, dtype=torch.float64)
    design[:, 0, :2], design[:, 1, 2:] = X, 0.5 * X

    def bound(mean: Tensor, covariance: Tensor) -> Tensor:
        spread = torch.einsum("nai,ij,nbj->nab", design, covariance, design)
        return expected_under_two(law, design @ mean, spread) + normal_prior(mean, covariance)

    def model() -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2, dtype=torch.float64), 2.0).to_event(1))
        v = pyro.sample("v", dist.Normal(torch.zeros(2, dtype=torch.float64), 2.0).to_event(1))
        with pyro.plate("rows", N):
            pyro.sample("y", dist.Normal(X @ w, (0.5 * X @ v).exp()), obs=Y["student"])

    posterior = run(model, blocks=[["w", "v"]] if joint else "sites")
    _, _, best = best_gaussian(bound, 4, blocks=None if joint else (2, 2))
    assert posterior.elbo == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("written", ["two entries", "padded"])
def test_three_classes_have_two_contrasts(written: str) -> None:
    """Categorical logits (N, 3) of which one is zero: X @ W with W (2, 2), its two columns correlated in q."""
    y = Y["ordinal"].long()

    def model() -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2, 2, dtype=torch.float64), 2.0).to_event(2))
        eta = X @ w
        if written == "padded":
            logits = torch.nn.functional.pad(eta, (0, 1))
        else:
            logits = torch.stack([eta[:, 0], eta[:, 1], torch.zeros(N, dtype=torch.float64)], -1)
        with pyro.plate("rows", N):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    def law(a: Tensor, b: Tensor) -> Tensor:
        logits = torch.stack([a, b, torch.zeros_like(a)], -1).log_softmax(-1)
        return logits.gather(-1, y.unsqueeze(-1).expand(*a.shape, 1)).squeeze(-1)

    design = torch.zeros(N, 2, 4, dtype=torch.float64)
    design[:, 0, 0::2], design[:, 1, 1::2] = X, X

    def bound(mean: Tensor, covariance: Tensor) -> Tensor:
        spread = torch.einsum("nai,ij,nbj->nab", design, covariance, design)
        return expected_under_two(law, design @ mean, spread) + normal_prior(mean, covariance)

    posterior = run(model)
    assert posterior.elbo == pytest.approx(best_gaussian(bound, 4)[2], rel=1e-6)
    assert posterior.elbo_kind.startswith("bound by quadrature")


def test_the_difference_of_two_sites_is_one_predictor() -> None:
    """θ ~ StudentT(μ, 2): what matters is θ − μ, whose variance is the sum of theirs."""

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=torch.float64), 2.0))
        theta = pyro.sample("theta", dist.StudentT(4.0, mu, 2.0))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=torch.tensor(1.3, dtype=torch.float64))

    def student(x: Tensor) -> Tensor:
        constant = math.lgamma(2.5) - math.lgamma(2) - 0.5 * math.log(4 * math.pi) - math.log(2)
        return constant - 2.5 * torch.log1p((x / 2) ** 2 / 4)

    def bound(mean: Tensor, covariance: Tensor) -> Tensor:
        v = covariance.diagonal()
        apart = expected_under(student, mean[1] - mean[0], v.sum()[None])
        fit = -0.5 * ((1.3 - mean[1]) ** 2 + v[1]) - 0.5 * math.log(2 * math.pi)
        return apart + fit + normal_prior(mean[:1], covariance[:1, :1])

    posterior = run(model, blocks="sites")
    _, _, best = best_gaussian(bound, 2, blocks=(1, 1))
    assert posterior.elbo == pytest.approx(best, rel=1e-6)
    (plan,) = [p for p in plans(model, "sites").values() if p.factor.name == "theta"]
    assert len(plan.cut.predictors) == 1


def plans(model: Callable, blocks: Any = "auto", *args: Any) -> Any:
    return BLRInference(model, blocks=blocks)._program(args, {}).plans


# -- masks, scales, precisions, minibatches, other blocks ------------------------------------------------------

BERNOULLI = ONE["bernoulli"][1]


def best_weighted(weights: Tensor) -> tuple[Tensor, Tensor, float]:
    """The logistic regression with every row counted so often."""

    def bound(mean: Tensor, covariance: Tensor) -> Tensor:
        variance = torch.einsum("ni,ij,nj->n", X, covariance, X)
        law = BERNOULLI(X @ mean + variance.sqrt() * NODES.unsqueeze(-1))
        return (law * weights * WEIGHTS.unsqueeze(-1)).sum() + normal_prior(mean, covariance)

    return best_gaussian(bound, 2)


def test_masks_and_scales() -> None:
    """A mask hides rows (NaN data too), a scale counts them several times, as tensors and in a plate."""
    shown = torch.arange(N) % 3 != 0
    counts = 1.0 + (torch.arange(N) % 2)
    y = torch.where(shown, Y["bernoulli"], torch.nan)

    def model() -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2, dtype=torch.float64), 2.0).to_event(1))
        with pyro.plate("rows", N), poutine.mask(mask=shown), poutine.scale(scale=counts):
            pyro.sample("y", dist.Bernoulli(logits=X @ w, validate_args=False), obs=y)

    with pyro.validation_enabled(False):
        near(run(model), best_weighted(shown * counts))


def test_an_event_with_a_mask_of_its_own() -> None:
    shown = torch.arange(N) % 4 != 1

    def model() -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2, dtype=torch.float64), 2.0).to_event(1))
        pyro.sample("y", dist.Bernoulli(logits=X @ w).mask(shown).to_event(1), obs=Y["bernoulli"])

    near(run(model), best_weighted(shown.double()))


def test_some_rows_unseen() -> None:
    """`obs_mask` on Student-t data: rows without data are latent, and integrate out of the fit only where q allows it."""
    seen = torch.arange(N) < N - 2

    def model() -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2, dtype=torch.float64), 2.0).to_event(1))
        with pyro.plate("rows", N):
            pyro.sample("y", dist.StudentT(4.0, X @ w, 0.7), obs=Y["student"], obs_mask=seen)

    posterior = run(model, blocks="sites")
    assert posterior.elbo_kind.startswith("bound by quadrature")

    def bound(mean: Tensor, covariance: Tensor) -> Tensor:
        variance = torch.einsum("ni,ij,nj->n", X, covariance[:2, :2], X)
        law = ONE["student"][1]
        fit = law(X @ mean[:2] + variance.sqrt() * NODES.unsqueeze(-1)) * WEIGHTS.unsqueeze(-1)
        unseen = variance[N - 2 :] + covariance.diagonal()[2:]
        apart = X[N - 2 :] @ mean[:2] - mean[2:]
        points = apart + unseen.sqrt() * NODES.unsqueeze(-1)
        constant = math.lgamma(2.5) - math.lgamma(2) - 0.5 * math.log(4 * math.pi) - math.log(0.7)
        latent = (constant - 2.5 * torch.log1p((points / 0.7) ** 2 / 4)) * WEIGHTS.unsqueeze(-1)
        return fit[:, : N - 2].sum() + latent.sum() + normal_prior(mean[:2], covariance[:2, :2])

    _, _, best = best_gaussian(bound, 4, blocks=(2, 1, 1))
    assert posterior.elbo == pytest.approx(best, rel=1e-6)


def test_float32_data() -> None:
    """Sums and integrals are in float64: float32 data cost no digits beyond their own."""
    x, y = X.float(), Y["bernoulli"].float()

    def model() -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2, dtype=torch.float32), 2.0).to_event(1))
        with pyro.plate("rows", N):
            pyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)

    near(run(model), best_weighted(torch.ones(N)))
    assert BLRInference(model).run(progress=False)["w"].mean.dtype == torch.float32


def test_several_blocks_under_one_predictor() -> None:
    """Intercept, slope and group effects that q holds independent: their variances add."""
    group = torch.arange(N) % 3
    design = torch.cat([X, torch.nn.functional.one_hot(group, 3).double()], 1)

    def model() -> None:
        a = pyro.sample("a", dist.Normal(torch.zeros((), dtype=torch.float64), 2.0))
        b = pyro.sample("b", dist.Normal(torch.zeros((), dtype=torch.float64), 2.0))
        with pyro.plate("groups", 3):
            g = pyro.sample("g", dist.Normal(torch.zeros((), dtype=torch.float64), 2.0))
        with pyro.plate("rows", N):
            pyro.sample("y", dist.Bernoulli(logits=a + b * X[:, 1] + g[group]), obs=Y["bernoulli"])

    def bound(mean: Tensor, covariance: Tensor) -> Tensor:
        variance = torch.einsum("ni,ij,nj->n", design, covariance, design)
        return expected_under(BERNOULLI, design @ mean, variance) + normal_prior(mean, covariance)

    posterior = run(model, blocks="sites")
    assert posterior.elbo == pytest.approx(best_gaussian(bound, 5, blocks=(1,) * 5)[2], rel=1e-6)
    joint = run(model, blocks=[["a", "b", "g"]])
    assert joint.elbo == pytest.approx(best_gaussian(bound, 5)[2], rel=1e-6)


def test_elements_of_a_plate_that_share_a_predictor() -> None:
    """q holds the elements independent, and their means move together."""

    def model() -> None:
        with pyro.plate("columns", 2):
            w = pyro.sample("w", dist.Normal(torch.zeros((), dtype=torch.float64), 2.0))
        with pyro.plate("rows", N):
            pyro.sample("y", dist.Bernoulli(logits=X @ w), obs=Y["bernoulli"])

    def bound(mean: Tensor, covariance: Tensor) -> Tensor:
        variance = torch.einsum("ni,ij,nj->n", X, covariance, X)
        return expected_under(BERNOULLI, X @ mean, variance) + normal_prior(mean, covariance)

    posterior = run(model, blocks="sites")
    assert posterior.elbo == pytest.approx(best_gaussian(bound, 2, blocks=(1, 1))[2], rel=1e-6)
    assert posterior.num_steps <= 15


def test_an_exact_precision_beside_quadrature() -> None:
    """w ~ N(0, 1/τ), τ ~ Gamma: τ's message stays closed, and its optimum given q(w) is Bayes' rule."""

    def model() -> None:
        tau = pyro.sample("tau", dist.Gamma(torch.tensor(2.0, dtype=torch.float64), 1.5))
        w = pyro.sample("w", dist.Normal(torch.zeros(2, dtype=torch.float64), tau.rsqrt()).to_event(1))
        with pyro.plate("rows", N):
            pyro.sample("y", dist.Bernoulli(logits=X @ w), obs=Y["bernoulli"])

    def bound(mean: Tensor, covariance: Tensor) -> Tensor:
        """With q(τ) at its optimum Gamma(3, 1.5 + ½ E|w|²): constants and E log τ cancel but for −3 log b."""
        variance = torch.einsum("ni,ij,nj->n", X, covariance, X)
        rate = 1.5 + 0.5 * (mean.square() + covariance.diagonal()).sum()
        prior = 2 * math.log(1.5) - math.lgamma(2) - math.log(2 * math.pi) + math.lgamma(3) - 3 * rate.log()
        return expected_under(BERNOULLI, X @ mean, variance) + prior

    mean, covariance, best = best_gaussian(bound, 2)
    posterior = run(model)
    assert posterior.elbo == pytest.approx(best, rel=1e-6)
    rate = 1.5 + 0.5 * float((mean.square() + covariance.diagonal()).sum())
    assert float(posterior["tau"].mean) == pytest.approx(3 / rate, rel=1e-3)


def test_minibatches() -> None:
    """Half the rows at a time: within a tenth of a posterior sd of the optimum on all of them."""
    mean, covariance, _ = best_weighted(torch.ones(N))

    def model() -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2, dtype=torch.float64), 2.0).to_event(1))
        with pyro.plate("rows", N, subsample_size=6) as index:
            pyro.sample("y", dist.Bernoulli(logits=X[index] @ w), obs=Y["bernoulli"][index])

    pyro.set_rng_seed(3)
    engine = BLRInference(model)
    assert {v.how for v in engine.explain() if v.factor == "y"} == {"quadrature"}
    for _ in range(150):
        engine.step()
    found = engine.posterior["w"]
    assert float(((found.mean - mean).abs() / covariance.diagonal().sqrt()).max()) < 0.3
    assert torch.allclose(found.variance, covariance.diagonal(), rtol=0.3)


def test_a_mixture_of_regressions() -> None:
    """A discrete site chooses the weights: one integral for every state, and responsibilities from them."""
    y = Y["poisson"]

    def model() -> None:
        with pyro.plate("components", 2):
            b = pyro.sample("b", dist.Normal(torch.tensor([-1.0, 1.0], dtype=torch.float64), 1.0))
        with pyro.plate("rows", N):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.4, 0.6], dtype=torch.float64)))
            pyro.sample("y", dist.Poisson((b[z] * X[:, 1]).exp()), obs=y)

    posterior = run(model, blocks="sites")
    mean, variance = posterior["b"].mean, posterior["b"].variance
    eta, spread = mean[:, None] * X[:, 1], variance[:, None] * X[:, 1] ** 2
    table = y * eta - (eta + spread / 2).exp() - torch.lgamma(y + 1)  # (2, N), in closed form
    weights = torch.tensor([0.4, 0.6], dtype=torch.float64).log().unsqueeze(-1)
    assert torch.allclose(posterior["z"].probs.T, (table + weights).softmax(0), atol=1e-3)
    prior = -0.5 * ((mean - torch.tensor([-1.0, 1.0])) ** 2 + variance) + 0.5 * variance.log() + 0.5
    assert posterior.elbo == pytest.approx(float((table + weights).logsumexp(0).sum() + prior.sum()), rel=1e-6)


def test_what_explain_says() -> None:
    explanation = BLRInference(regression(ONE["poisson"][0], Y["poisson"])).explain()
    (verdict,) = [v for v in explanation if v.factor == "y"]
    assert (verdict.how, verdict.exact) == ("quadrature", False)
    assert "one affine predictor for each element" in verdict.reason
    assert explanation.bound_kind.startswith("bound by quadrature")


@pytest.mark.parametrize("in_plate", [False, True])
def test_an_angle_goes_round_once(in_plate: bool) -> None:
    """z ~ VonMises(0.5, 2), y ~ N(sin z, 0.2): its mean and sd by integration over one round; on the line it would be improper."""
    seen = torch.tensor(0.6, dtype=torch.float64)

    def model() -> None:
        centre = torch.tensor(0.5, dtype=torch.float64)
        if in_plate:
            with pyro.plate("angles", 3):
                z = pyro.sample("z", dist.VonMises(centre, 20.0).expand([3]))
                pyro.sample("y", dist.Normal(z.sin(), 0.2), obs=seen.expand(3))
        else:
            z = pyro.sample("z", dist.VonMises(centre, 20.0))
            pyro.sample("y", dist.Normal(z.sin(), 0.2), obs=seen)

    grid = torch.linspace(-math.pi, math.pi, 20001, dtype=torch.float64)
    log = 20.0 * (grid - 0.5).cos() - 0.5 * ((grid.sin() - seen) / 0.2) ** 2
    weights = (log - log.logsumexp(0)).exp()
    mean = float((weights * grid).sum())
    sd = float((weights * (grid - mean) ** 2).sum()) ** 0.5
    found = run(model)["z"]
    assert bool(((found.mean - mean).abs() < 0.02 * sd).all())
    assert bool(((found.stddev / sd - 1).abs() < 0.02).all())


def test_the_flat_part_of_a_clamp_is_no_line() -> None:
    """An epidemic that is over at every place that is looked at: the last infected are no affine predictor."""

    def model() -> None:
        rate, first = pyro.sample("rate", dist.LogNormal(0.0, 0.5)), pyro.sample("first", dist.LogNormal(0.0, 0.5))
        left, ill = 300.0 - first, first
        for t in range(12):
            new = rate * left * ill / 300
            left, ill = (left - new).clamp(min=1e-3), (0.6 * ill + new).clamp(min=1e-3, max=20.0)
            pyro.sample(f"seen{t}", dist.Poisson(ill), obs=torch.tensor(float(t)))
        far = (rate.log() - 40).clamp(min=0.1) + first.log()
        pyro.sample("flat", dist.StudentT(3.0, far, 1.0), obs=torch.tensor(1.0))

    for how in ("auto", "sites"):
        for name, plan in plans(model, how).items():
            if plan.factor.is_observed:  # the two sites themselves, at best
                assert plan.cut is None or len(plan.cut.predictors) == 2, name


def test_what_is_not_elementwise_is_drawn() -> None:
    """Rows that meet below the predictors: Monte Carlo, as before."""

    def rows_meet() -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2, dtype=torch.float64), 2.0).to_event(1))
        with pyro.plate("rows", N):
            pyro.sample("y", dist.Normal((X @ w).cumsum(0).sin() + (X @ w).exp().sum(), 1.0), obs=Y["student"])

    (plan,) = [p for p in plans(rows_meet, "sites").values() if p.factor.name == "y"]
    assert plan.sampled and not plan.integrated


@pytest.mark.parametrize("name", ["breast_cancer", "a1a"])
def test_the_logistic_oracles(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound of an independent program to 1e-6; on a1a at most twelve iterations, those of the start included."""
    data = arrays(f"{name}.npz")
    expected = json.loads(shared_path("oracles", "expected.json").read_text())[f"logistic_{name}"]
    x = torch.as_tensor(data["x"], dtype=torch.float64)
    x = torch.cat([torch.ones(len(x), 1, dtype=torch.float64), x], 1)
    y = (torch.as_tensor(data["y"], dtype=torch.float64) > 0).double()
    scale = torch.ones(x.shape[1], dtype=torch.float64)
    if name == "a1a":
        scale = torch.full_like(scale, 2.8072**-0.5)
        scale[0] = 1e-5**-0.5

    def model() -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros_like(scale), scale).to_event(1))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)

    start: list[str] = []
    at_mean = Ascent.target_at_mean
    monkeypatch.setattr(Ascent, "target_at_mean", lambda self, name: start.append(name) or at_mean(self, name))
    posterior = run(model)
    assert posterior.elbo == pytest.approx(expected["bound"], rel=1e-6)
    assert len(start) + posterior.num_steps <= (12 if name == "a1a" else 15)


def test_a_predictor_that_the_program_wants_in_its_own_shape() -> None:
    """A scalar that meets data before `unsqueeze` cannot be given one value an element: draws, and the same posterior."""
    y = torch.stack([Y["student"], Y["student"] + 0.5], -1)

    def model(unsqueezed: bool) -> None:
        a = pyro.sample("a", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        with pyro.plate("rows", N):
            loc = (X[:, 1] * a * a).unsqueeze(-1) if unsqueezed else X[:, 1:] * a * a
            pyro.sample("y", dist.Normal(loc, 2.0).expand((N, 2)).to_event(1), obs=y)

    pyro.set_rng_seed(0)
    init = {"a": torch.tensor(0.5, dtype=torch.float64)}
    drawn, integrated = (BLRInference(model, init=init).run(flag, progress=False) for flag in (True, False))
    assert integrated.elbo_kind.startswith("bound by quadrature")
    assert drawn.elbo == pytest.approx(integrated.elbo, abs=5 * drawn.elbo_se + 1e-2)


def test_a_parameter_of_an_integrated_factor_is_learned() -> None:
    """Overdispersion beside the predictor: its factor is averaged over draws, and the parameter moves to its optimum."""
    x = torch.randn(200, 2)
    y = dist.NegativeBinomial(3.0, logits=x @ torch.tensor([0.5, -0.5])).sample()

    def model() -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        r = pyro.param("r", torch.tensor(1.0), constraint=dist.constraints.positive)
        with pyro.plate("rows", 200):
            pyro.sample("y", dist.NegativeBinomial(r, logits=x @ w), obs=y)

    engine = BLRInference(model, optim=pyro.optim.Adam({"lr": 0.1}))
    assert "Monte Carlo" in str(engine.explain())
    first = engine.step()
    for _ in range(15):
        last = engine.step()
    assert last < first - 5
    assert 1.5 < float(pyro.param("r").detach()) < 6.0
