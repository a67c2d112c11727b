"""Importance weights of q's own draws: k̂, evidence and resampling, against ArviZ and closed forms."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from test_export import Y, elpd, exact_mean, group, posterior_of
from torch import Tensor

from pyro_blr import BLRInference
from pyro_blr.diagnostics import ParetoSmoothed, pareto_smoothed
from pyro_blr.export import to_arviz

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of ArviZ itself, on import
    import arviz as az


def through_arviz(log_ratios: np.ndarray) -> tuple[np.ndarray, float]:
    """(log weights, k̂) by whichever line of ArviZ is installed."""
    if "psislw" in vars(az):
        smoothed, khat = vars(az)["psislw"](log_ratios)
    else:
        from arviz_stats.base import array_stats

        smoothed, khat = array_stats.psislw(-log_ratios)
    return np.asarray(smoothed), float(khat)


def normal_model(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


PRECISION = len(Y) + 1.0
EVIDENCE = float(dist.MultivariateNormal(torch.zeros(8).to(Y), (torch.eye(8) + 1).to(Y)).log_prob(Y))


def scaled_mean(ratio: float, shift: float = 0.0) -> Any:
    """q = N(posterior mean + shift, ratio² × posterior variance)."""
    scale = PRECISION**-0.5
    return posterior_of(normal_model, Y, mu=dist.Normal(Y.sum() / PRECISION + shift * scale, ratio * scale))


# --------------------------------------------------------------------------------------------------
# k̂ and the evidence


def test_khat_and_weights_are_arviz_s_on_the_same_draws() -> None:
    found = scaled_mean(0.7).psis(2000)
    mu = found.draws["mu"]
    log_p = dist.Normal(0.0, 1.0).log_prob(mu) + dist.Normal(mu[:, None], 1.0).log_prob(Y).sum(-1)
    log_q = dist.Normal(Y.sum() / PRECISION, 0.7 * PRECISION**-0.5).log_prob(mu)
    np.testing.assert_allclose(found.log_ratios, log_p - log_q, rtol=1e-10)
    smoothed, khat = through_arviz((log_p - log_q).numpy())
    assert found.khat == pytest.approx(khat, abs=1e-8)
    np.testing.assert_allclose(found.log_weights, smoothed, atol=1e-8)


@pytest.mark.parametrize("ratio", [0.4, 0.6, 0.8])
def test_khat_is_the_tail_index_that_theory_gives(ratio: float) -> None:
    """w = exp(½ δ² (1/s² − 1)) at δ ~ N(0, s²) has P(w > t) ~ t^(−1/(1 − s²)): k = 1 − s²."""
    found = [scaled_mean(ratio).psis(4000).khat for _ in range(10)]
    expected = 1 - ratio**2
    # A fit to 3 √S weights has the standard error (1 + k) / √(3 √S); log factors in the tail bias it down.
    error = (1 + expected) / math.sqrt(3 * math.sqrt(4000)) / math.sqrt(10)
    assert expected - 0.2 < np.mean(found) < expected + 3 * error


def test_a_q_wider_than_the_posterior_has_a_small_khat() -> None:
    assert scaled_mean(1.5).psis(1000).khat < 0.2


def test_of_the_posterior_itself_all_weights_are_equal() -> None:
    found = exact_mean().psis(1000)
    assert found.khat == -math.inf and found.ess == pytest.approx(1000) and found.log_evidence_se < 1e-8
    assert found.log_evidence == pytest.approx(EVIDENCE, abs=1e-9)
    assert "all weights are equal" in str(found)


@pytest.mark.parametrize("ratio", [0.8, 1.3])
def test_evidence_within_its_standard_error(ratio: float) -> None:
    errors = []
    for _ in range(20):
        found = scaled_mean(ratio, shift=0.3).psis(1000)
        assert found.log_evidence_se > 0
        errors.append((found.log_evidence - EVIDENCE) / found.log_evidence_se)
    assert abs(np.mean(errors)) < 4 / math.sqrt(20) and 0.5 < np.std(errors) < 1.6


def test_weighted_moments_correct_q() -> None:
    """By hand from the weights, and nearer to the posterior than q by many standard errors."""
    q = scaled_mean(1.4, shift=0.8)
    found = q.psis(4000)
    weights = np.exp(found.log_weights.numpy())
    draws = found.draws["mu"].numpy()
    mean = float((weights * draws).sum())
    assert float(found.mean("mu")) == pytest.approx(mean, abs=1e-12)
    assert float(found.stddev("mu")) == pytest.approx(math.sqrt((weights * (draws - mean) ** 2).sum()), abs=1e-12)
    exact, scale = float(Y.sum()) / PRECISION, PRECISION**-0.5
    assert abs(mean - exact) < 4 * scale / math.sqrt(found.ess)
    assert abs(float(found.stddev("mu")) - scale) < 4 * scale / math.sqrt(2 * found.ess)
    again = found.resample(20_000)["mu"]
    assert float(again.mean()) == pytest.approx(mean, abs=4 * scale / math.sqrt(20_000))


def test_a_few_infinite_ratios_are_weight_zero_and_nan_is_refused() -> None:
    ratios = torch.randn(500)
    ratios[:20] = -math.inf
    weights, khat = pareto_smoothed(ratios)
    assert bool((weights[:20].exp() == 0).all()) and math.isfinite(khat)
    kept = ParetoSmoothed(khat, ratios, weights, {})
    exact = math.log(float(ratios.exp().mean()))
    assert kept.log_evidence == pytest.approx(exact, abs=0.05)
    with pytest.raises(ValueError, match="found NaN or inf at 1 of 500 draws, expected numbers"):
        pareto_smoothed(ratios.index_fill(0, torch.tensor([3]), math.nan))
    with pytest.raises(ValueError, match="found -inf everywhere"):
        pareto_smoothed(torch.full((500,), -math.inf))


def test_a_heavy_tail_of_nearly_equal_weights_does_not_matter() -> None:
    """k̂ is blind to scale; the Cauchy-Schwarz inequality is not: |E_p h - E_q h| <= sd_q(h) √Var_q(w)."""
    ratios = 1e-2 * torch.from_numpy(np.random.default_rng(0).standard_t(2.0, size=2000))
    weights, khat = pareto_smoothed(ratios)
    found = ParetoSmoothed(khat, ratios, weights, {"z": torch.randn(2000)})
    assert khat > 0.5 and found.most_error < 0.1 and found.is_trusted
    assert "nearly equal" in str(found)
    assert found.most_error == pytest.approx(float((weights.exp() * 2000).std(correction=0)), rel=1e-6)


def test_largest_weights_that_are_equal_have_no_tail() -> None:
    """Of discrete sites there are few different weights."""
    ratios = torch.where(torch.rand(1000) < 0.4, 0.0, -1.0)
    weights, khat = pareto_smoothed(ratios)
    assert khat == -math.inf
    torch.testing.assert_close(weights.exp(), ratios.exp() / ratios.exp().sum())
    assert "the largest weights are equal" in str(ParetoSmoothed(khat, ratios, weights, {}))


def test_of_discrete_sites_alone_the_weights_are_joint() -> None:
    def model(y: Tensor) -> None:
        with pyro.plate("coins", 3):
            z = pyro.sample("z", dist.Bernoulli(0.5))
        pyro.sample("y", dist.Normal(z.sum(), 0.5), obs=y[0])

    found = BLRInference(model, blocks="sites").run(Y, progress=False).psis(2000)
    assert found.summed_out == ()
    states = torch.tensor(list(itertools.product([0.0, 1.0], repeat=3)))
    exact = dist.Normal(states.sum(-1), 0.5).log_prob(Y[0]).exp().mean().log()
    assert abs(found.log_evidence - float(exact)) < 4 * found.log_evidence_se + 1e-6


def test_the_same_seed_gives_the_same_weights_and_draws_come_from_torch() -> None:
    first, second = (pyro.set_rng_seed(7) or scaled_mean(0.8).psis(200) for _ in range(2))
    assert torch.equal(first.log_weights, second.log_weights)
    assert not torch.equal(first.log_weights, scaled_mean(0.8).psis(200).log_weights)


# --------------------------------------------------------------------------------------------------
# Discrete sites are summed out


def mixture(y: Tensor) -> None:
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
    with pyro.plate("components", 2):
        loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("y", dist.Normal(loc[z], 1.0), obs=y)


def sequence(y: Tensor) -> None:
    with pyro.plate("states", 2):
        loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
    move = torch.tensor([[0.8, 0.2], [0.3, 0.7]])
    z = torch.tensor(0)
    for t in pyro.markov(range(len(y))):
        z = pyro.sample(f"z{t}", dist.Categorical(move[z]))
        pyro.sample(f"y{t}", dist.Normal(loc[z], 1.0), obs=y[t])


def switches(y: Tensor) -> None:
    """Two discrete sites that meet in one factor, one of them inside a plate, under a scale and a mask."""
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    flipped = pyro.sample("flipped", dist.Bernoulli(0.3))
    with pyro.plate("data", len(y)), poutine.scale(scale=0.5), poutine.mask(mask=y > -0.5):
        on = pyro.sample("on", dist.Bernoulli(0.6))
        pyro.sample("y", dist.Normal(loc * on + flipped, 1.0), obs=y)


def by_brute_force(model: Callable, y: Tensor, values: dict[str, Tensor], discrete: dict[str, tuple]) -> float:
    """log Σ_z exp of the joint over every assignment, by running the model at each."""
    sizes = [int(torch.Size(shape).numel()) for shape, _ in discrete.values()]
    totals = []
    for states in itertools.product(
        *(range(k) for (_, k), n in zip(discrete.values(), sizes, strict=True) for _ in range(n))
    ):
        flat, given = list(states), dict(values)
        for (name, (shape, _)), size in zip(discrete.items(), sizes, strict=True):
            state, flat = torch.tensor(flat[:size]), flat[size:]
            given[name] = (state.double() if model is switches else state).reshape(shape)
        trace = poutine.trace(poutine.condition(model, given)).get_trace(y)
        totals.append(trace.log_prob_sum())
    return float(torch.stack(totals).logsumexp(0))


DISCRETE = [
    (mixture, {"z": ((5,), 2)}),
    (sequence, {f"z{t}": ((), 2) for t in range(5)}),
    (switches, {"flipped": ((), 2), "on": ((5,), 2)}),
]


@pytest.mark.parametrize(("model", "discrete"), DISCRETE, ids=[model.__name__ for model, _ in DISCRETE])
def test_summed_out_weights_are_those_of_brute_force(model: Callable, discrete: dict[str, tuple]) -> None:
    y = Y[:5]
    posterior = posterior_of(model, y)
    found = posterior.psis(100)
    assert set(found.summed_out) == set(discrete)
    for s in (0, 57):
        values = {name: draws[s] for name, draws in found.draws.items() if name not in discrete}
        log_q = sum(float(posterior[name].log_prob(value).sum()) for name, value in values.items())
        assert float(found.log_ratios[s]) == pytest.approx(by_brute_force(model, y, values, discrete) - log_q, rel=1e-9)


def test_joint_weights_on_request_and_what_they_do_to_khat() -> None:
    engine = BLRInference(mixture)
    y = torch.cat([torch.randn(60) - 1.5, torch.randn(60) + 1.5])
    posterior = engine.run(y, progress=False)
    summed, joint = posterior.psis(1000), posterior.psis(1000, sum_out_discrete=False)
    assert joint.summed_out == () and joint.ess < 0.9 * summed.ess  # χ² shrinks when z is summed out
    one = {name: draws[0] for name, draws in joint.draws.items()}
    log_p = poutine.trace(poutine.condition(mixture, one)).get_trace(y).log_prob_sum()
    assert float(joint.log_ratios[0]) == pytest.approx(float(log_p - posterior.log_prob(one)), rel=1e-10)
    with pytest.raises(ValueError, match="site 'z': found a discrete site that was summed out"):
        summed.mean("z")
    assert "z" not in summed.resample(10)


@pytest.mark.parametrize("how", ["branch", "reduction"])
def test_what_does_not_run_at_all_states_at_once_is_weighed_jointly_and_said(how: str) -> None:
    def model(y: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        if how == "branch":
            z = pyro.sample("z", dist.Bernoulli(0.5))
            shift = 1.0 if float(z) > 0 else -1.0
        else:  # a table of all states would add them up
            z = pyro.sample("z", dist.Categorical(torch.ones(3)).expand([1]).to_event(1))
            shift = z.sum()
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(loc + shift, 1.0), obs=y)

    posterior = posterior_of(model, Y)
    found = posterior.psis(100)
    assert found.summed_out == () and "cannot be run at all states of z at once" in found.note
    one = {name: draws[3] for name, draws in found.draws.items()}
    log_p = poutine.trace(poutine.condition(model, one)).get_trace(Y).log_prob_sum()
    assert float(found.log_ratios[3]) == pytest.approx(float(log_p - posterior.log_prob(one)), rel=1e-9)


def test_indexing_a_latent_does_not_mean_a_run_a_draw() -> None:
    calls, groups = 0, torch.tensor([0, 0, 1, 1, 2, 2, 2, 0])

    def model(y: Tensor) -> None:
        nonlocal calls
        calls += 1
        with pyro.plate("groups", 3):
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(theta[groups], 1.0), obs=y)

    posterior, calls = posterior_of(model, Y), 0
    found = posterior.psis(1000)
    assert calls < 50
    theta = found.draws["theta"]
    log_p = dist.Normal(0.0, 1.0).log_prob(theta).sum(-1) + dist.Normal(theta[:, groups], 1.0).log_prob(Y).sum(-1)
    np.testing.assert_allclose(found.log_ratios, log_p - posterior.log_prob(found.draws), rtol=1e-10)


# --------------------------------------------------------------------------------------------------
# What has no weights


def subsampled(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y), subsample_size=3) as index:
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y[index])


def copied(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    counts = torch.arange(1.0, 9.0)
    with pyro.plate("data", len(y)), poutine.scale(scale=counts):
        z = pyro.sample("z", dist.Categorical(torch.ones(2)), infer={"blr": {"copies": counts}})
        pyro.sample("y", dist.Normal(mu[z], 1.0), obs=y)


def loaded(tmp_path: Any) -> Any:
    exact_mean().save(tmp_path / "q.safetensors")
    return type(exact_mean()).load(tmp_path / "q.safetensors")


REFUSED = [
    (lambda _: exact_mean().psis(99), "num_samples: found 99, expected an integer of at least 100"),
    (lambda path: loaded(path).psis(), r"has no model .* pass model=, args= and kwargs="),
    (lambda _: posterior_of(subsampled, Y).psis(), r"plates \['data'\] are subsampled.* do not subsample"),
    (lambda _: posterior_of(copied, Y).psis(), r"sites \['z'\] stand for several exchangeable copies"),
    (lambda _: exact_mean().psis(model=subsampled), "are subsampled"),
    (
        lambda _: exact_mean().psis(model=mixture),
        r"model sites \['loc', 'weights', 'z'\] that q lacks and sites of q \['mu'\]",
    ),
    (lambda _: exact_mean().psis(args=(Y * torch.nan,)), "log density NaN"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=[message[:25] for _, message in REFUSED])
def test_refusals_say_why_and_what_to_do(call: Callable, message: str, tmp_path: Any) -> None:
    with pytest.raises(ValueError, match=message):
        call(tmp_path)


def test_a_loaded_posterior_is_judged_with_its_model(tmp_path: Any) -> None:
    found = loaded(tmp_path).psis(model=normal_model, args=(Y,))
    assert found.khat == -math.inf and found.log_evidence == pytest.approx(EVIDENCE, abs=1e-9)


# --------------------------------------------------------------------------------------------------
# In ArviZ's structure


def test_to_arviz_carries_the_weights_and_what_they_say() -> None:
    data = scaled_mean(0.8, shift=0.2).to_arviz(2000)
    stats, fit = group(data, "sample_stats"), group(data, "variational")
    ratios = (stats["lp"] - stats["lq"]).values[0]
    np.testing.assert_allclose(stats["log_ratio"].values[0], ratios, atol=1e-9)
    smoothed, khat = through_arviz(ratios)
    np.testing.assert_allclose(stats["log_weight"].values[0], smoothed, atol=1e-8)
    assert float(fit["khat"][0]) == pytest.approx(khat, abs=1e-8)
    assert float(fit["importance_ess"][0]) == pytest.approx(1 / np.exp(2 * smoothed).sum(), rel=1e-6)
    assert abs(float(fit["log_evidence"][0]) - EVIDENCE) < 4 * float(fit["log_evidence_se"][0])
    # Importance-resampled means, by hand on the same draws.
    mu = group(data, "posterior")["mu"].values[0]
    by_hand = (np.exp(smoothed) * mu).sum()
    assert abs(by_hand - float(Y.sum()) / PRECISION) < 4 * PRECISION**-0.5 / math.sqrt(float(fit["importance_ess"][0]))


def test_loo_is_arviz_s_on_the_same_draws_by_hand() -> None:
    data = scaled_mean(0.9).to_arviz(1000)
    mu = group(data, "posterior")["mu"].values[0]
    log_likelihood = -0.5 * (Y.numpy() - mu[:, None]) ** 2 - 0.5 * math.log(2 * math.pi)
    total = 0.0
    for n in range(len(Y)):
        smoothed, _ = through_arviz(-log_likelihood[:, n])
        total += np.logaddexp.reduce(smoothed + log_likelihood[:, n])
    assert elpd(az.loo(data, reff=1.0)) == pytest.approx(total, abs=1e-8)


def test_in_to_arviz_discrete_sites_are_summed_out_of_the_weights_only() -> None:
    posterior = BLRInference(mixture).run(Y, progress=False)
    pyro.set_rng_seed(5)
    data = posterior.to_arviz(200, posterior_predictive=False)
    pyro.set_rng_seed(5)
    weighed = posterior.psis(200)
    stats = group(data, "sample_stats")
    np.testing.assert_allclose(stats["log_ratio"].values[0], weighed.log_ratios, rtol=1e-9)
    one = {name: draws[0] for name, draws in weighed.draws.items()}
    log_p = poutine.trace(poutine.condition(mixture, one)).get_trace(Y).log_prob_sum()
    assert float(stats["lp"][0, 0]) == pytest.approx(float(log_p), rel=1e-9)


def test_why_there_are_no_weights_is_in_the_export() -> None:
    for posterior, num, reason in [
        (exact_mean(), 20, "at least 100 draws"),
        (posterior_of(subsampled, Y), 100, "subsampled"),
    ]:
        data = posterior.to_arviz(num, posterior_predictive=False)
        fit = group(data, "variational")
        assert math.isnan(float(fit["khat"][0])) and reason in str(fit["khat_note"].values[0])
        assert bool(np.isnan(group(data, "sample_stats")["log_weight"]).all())


def test_chains_have_a_khat_each() -> None:

    data = to_arviz([scaled_mean(0.5), scaled_mean(1.2)], 300)
    khat = group(data, "variational")["khat"].values
    assert khat.shape == (2,) and khat[0] > khat[1]
