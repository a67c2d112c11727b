"""Rates and precisions that are one site here and another there (`where`, `stack` and an index): conjugate, element by element."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor
from torch.special import digamma, gammaln

from pyro_blr import BLRInference

TIMES = torch.arange(30)


def counts() -> Tensor:
    return torch.poisson(torch.where(TIMES < 18, 3.0, 1.0))


def by_where(tau: Tensor, early: Tensor, late: Tensor) -> Tensor:
    return torch.where(TIMES < tau, early, late)


def by_stack(tau: Tensor, early: Tensor, late: Tensor) -> Tensor:
    return torch.stack([early, late])[(TIMES >= tau).long()]


def model(rate: Callable, data: Tensor) -> None:
    early, late = pyro.sample("early", dist.Gamma(2.0, 1.0)), pyro.sample("late", dist.Gamma(1.0, 0.5))
    tau = pyro.sample("tau", dist.Categorical(torch.ones(30) / 30))
    with pyro.plate("times", 30):
        pyro.sample("data", dist.Poisson(rate(tau, early, late)), obs=data)


def coordinate_ascent(data: Tensor) -> tuple[Tensor, Tensor, float]:
    """(a, b) of both Gammas, q(tau) and the bound, by the textbook's updates, from q(tau) uniform."""
    before = (TIMES[None] < TIMES[:, None]).to(data)  # (tau, t)
    prior = torch.tensor([[2.0, 1.0], [1.0, 0.5]])
    q = torch.ones(30) / 30
    for _ in range(500):
        weight = torch.stack([q @ before, 1 - q @ before])
        a, b = prior[:, 0] + weight @ data, prior[:, 1] + weight.sum(-1)
        log, mean = digamma(a) - b.log(), a / b
        score = data * log[:, None] - mean[:, None] - gammaln(data + 1)
        table = before @ score[0] + (1 - before) @ score[1]
        q = (table - table.logsumexp(0)).exp()
    log_prior = prior[:, 0] * prior[:, 1].log() - gammaln(prior[:, 0]) + (prior[:, 0] - 1) * log - prior[:, 1] * mean
    entropy = a - b.log() + gammaln(a) + (1 - a) * digamma(a)
    bound = q @ table + (log_prior + entropy).sum() - torch.tensor(30.0).log() - torch.xlogy(q, q).sum()
    return torch.stack([a, b], -1), q, float(bound)


@pytest.mark.parametrize("rate", [by_where, by_stack])
def test_a_change_point_is_exact(rate: Callable) -> None:
    data = counts()
    engine = BLRInference(lambda: model(rate, data), init={"tau": dist.Categorical(torch.ones(30) / 30)})
    posterior = engine.run(progress=False, tol=1e-9)
    explanation = engine.explain()
    assert explanation.exact and {verdict.how for verdict in explanation.verdicts} == {"exact (proved)"}
    gammas, tau, bound = coordinate_ascent(data)
    for name, (a, b) in zip(("early", "late"), gammas, strict=True):
        assert posterior[name].concentration == pytest.approx(float(a), rel=1e-6)
        assert posterior[name].rate == pytest.approx(float(b), rel=1e-6)
    assert torch.allclose(posterior["tau"].probs, tau, atol=1e-7)
    assert posterior.elbo == pytest.approx(bound, abs=1e-7)


def fit(model: Callable, **options: Any) -> tuple[Any, Any]:
    engine = BLRInference(model, **options)
    return engine.run(progress=False, tol=1e-10), engine.explain()


def test_what_is_constant_in_places_adds_no_more_than_a_constant() -> None:
    data = torch.tensor([1.0, 4.0, 2.0])

    def model() -> None:
        rate = pyro.sample("rate", dist.Gamma(2.0, 3.0))
        with pyro.plate("n", 3):
            pyro.sample("data", dist.Poisson(torch.stack([rate, torch.tensor(3.0), 2 * rate])), obs=data)

    posterior, explanation = fit(model)
    assert explanation.exact and str(explanation).count("exact evidence") == 1
    assert (posterior["rate"].concentration.item(), posterior["rate"].rate.item()) == pytest.approx((5.0, 6.0))
    # the integral over the rate in closed form
    evidence = 2 * torch.tensor(3.0).log() - gammaln(torch.tensor(2.0)) + gammaln(torch.tensor(5.0))
    evidence = evidence - 5 * torch.tensor(6.0).log() + 2 * torch.tensor(2.0).log() - gammaln(data[[0, 2]] + 1).sum()
    assert posterior.elbo == pytest.approx(float(evidence + dist.Poisson(3.0).log_prob(data[1])), abs=1e-9)


def test_two_scales_are_two_conjugate_precisions() -> None:
    data = torch.randn(40) * torch.where(torch.arange(40) < 25, 0.3, 2.0)
    is_calm = torch.arange(40) < 25

    def model() -> None:
        calm, wild = pyro.sample("calm", dist.Gamma(1.0, 1.0)), pyro.sample("wild", dist.InverseGamma(2.0, 1.0))
        with pyro.plate("n", 40):
            pyro.sample("data", dist.Normal(0.0, torch.where(is_calm, calm.rsqrt(), wild.sqrt())), obs=data)

    posterior, explanation = fit(model)
    assert explanation.exact and {verdict.how for verdict in explanation.verdicts} == {"exact (proved)"}
    squares = 0.5 * data.square()
    calm, wild = posterior["calm"], posterior["wild"]
    assert calm.concentration.item() == pytest.approx(1 + 12.5)
    assert calm.rate.item() == pytest.approx(1 + float(squares[is_calm].sum()))
    assert wild.concentration.item() == pytest.approx(2 + 7.5)
    assert wild.rate.item() == pytest.approx(1 + float(squares[~is_calm].sum()))


REFUSED: dict[str, Callable[[Tensor], Tensor]] = {
    "a sum": lambda rate: torch.where(torch.arange(3) < 1, rate, 1.0) + 0.5,
    "its own condition": lambda rate: torch.where(rate > 1, rate, torch.ones(3)),
    "a clamp": lambda rate: rate.clamp(max=0.3).expand(3),
    "powers": lambda rate: torch.stack([rate, rate**2, rate]),
    "a product with itself": lambda rate: torch.where(torch.arange(3) < 1, rate, 1.0) * rate,
    "a sum over both": lambda rate: torch.stack([rate, torch.tensor(1.0)]).sum().expand(3),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_choice_between_sites_is_not_conjugate(name: str) -> None:
    def model() -> None:
        rate = pyro.sample("rate", dist.Gamma(2.0, 3.0))
        with pyro.plate("n", 3):
            pyro.sample("data", dist.Poisson(REFUSED[name](rate)), obs=torch.tensor([1.0, 4.0, 2.0]))

    verdicts = {v.factor: v.exact for v in BLRInference(model).explain().verdicts}
    assert verdicts == {"rate": True, "data": False}


def test_a_parameter_beside_a_location_has_no_variance() -> None:
    """The terms of the bound at coefficients that may change from step to step."""
    fixed = torch.nn.Parameter(torch.tensor(3.0))
    data = torch.tensor([1.0, 2.5])

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("n", 2):
            pyro.sample("data", dist.Normal(torch.stack([z, fixed]), 1.0), obs=data)

    engine = BLRInference(model, optim=pyro.optim.Adam({"lr": 0.0}), loss=Trace_ELBO())
    engine.step()
    evidence = dist.Normal(0.0, 2**0.5).log_prob(data[0]) + dist.Normal(3.0, 1.0).log_prob(data[1])
    assert -engine.evaluate_loss() == pytest.approx(float(evidence), abs=1e-9)


def test_states_that_enter_below_the_predictors() -> None:
    """Two predictors, and the states choose between them after the transform: the bound by draws of q, written out."""
    data = counts()

    def model() -> None:
        early, late = pyro.sample("early", dist.HalfNormal(2.0)), pyro.sample("late", dist.HalfNormal(2.0))
        tau = pyro.sample("tau", dist.Categorical(torch.ones(30) / 30))
        with pyro.plate("times", 30):
            pyro.sample("data", dist.Poisson(by_where(tau, early, late)), obs=data)

    posterior, explanation = fit(model)
    assert not any(verdict.how == "Monte Carlo" for verdict in explanation.verdicts)
    draws = posterior.sample((50_000,))
    rates, tau = torch.stack([draws["early"], draws["late"]], -1), draws["tau"]
    rate = torch.where(TIMES < tau[:, None], rates[:, :1], rates[:, 1:])
    joint = dist.Poisson(rate).log_prob(data).sum(-1) + dist.HalfNormal(2.0).log_prob(rates).sum(-1)
    values = joint - torch.tensor(30.0).log() - posterior.log_prob(draws)
    assert abs(float(values.mean()) - posterior.elbo) < 4 * float(values.std()) / 50_000**0.5
