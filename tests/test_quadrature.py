"""Factors seen through one or two affine predictors: deterministic messages, against brute force.

The oracle writes the bound of a regression with a Gaussian q(w) = N(m, L Lᵀ) as sums of one- or two-dimensional integrals by
Gauss-Hermite rules of high order (or in closed form, where there are kinks) and maximises it over (m, L) by L-BFGS.
"""

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
from scipy import integrate
from torch import Tensor

from pyro_blr import BLRInference
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


def best_gaussian(bound: Callable[[Tensor, Tensor], Tensor], dim: int) -> tuple[Tensor, Tensor, float]:
    """(m, V, the largest bound) over N(m, L Lᵀ); `bound` is without the entropy."""
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
        lower = flat.tril()
        entropy = lower.diagonal().abs().log().sum() + 0.5 * dim * math.log(2 * math.pi * math.e)
        value = -(bound(mean, lower @ lower.T) + entropy)
        value.backward()
        return value

    search.step(loss)
    value = loss()
    assert float(mean.grad.norm() + flat.grad.tril().norm()) < 1e-4  # type: ignore[union-attr]
    lower = flat.detach().tril()
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
