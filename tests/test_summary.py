"""`posterior.summary()`: the table, and what it says in words where a posterior should not be trusted."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import init_to_value
from test_diagnostics import PRECISION, scaled_mean, subsampled
from test_export import Y, exact_mean, nested_model, posterior_of
from torch import Tensor

from pyro_blr import BLRInference
from pyro_blr.diagnostics import Facts, Restart, warnings_about

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of ArviZ itself, on import
    import arviz as az

INTERVAL = ["hdi_3%", "hdi_97%"] if "InferenceData" in vars(az) else ["eti89_lb", "eti89_ub"]


def regression(x: Tensor, y: Tensor) -> None:
    tau = pyro.sample("tau", dist.Gamma(1.0, 1.0))
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 10.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, tau.rsqrt()), obs=y)


@pytest.fixture
def fitted() -> Any:
    x = torch.randn(200, 3)
    y = x @ torch.tensor([1.0, -2.0, 0.5]) + 0.3 * torch.randn(200)
    return BLRInference(regression, blocks="sites").run(x, y, progress=False)


# --------------------------------------------------------------------------------------------------
# The table


def test_rows_and_columns(fitted: Any) -> None:
    table = fitted.summary().table
    assert list(table.index) == ["tau", "w[0]", "w[1]", "w[2]"]
    assert list(table.columns)[:5] == ["mean", "sd", "sd_lr", *INTERVAL]
    np.testing.assert_allclose(table["mean"], [fitted["tau"].mean, *fitted["w"].mean])
    np.testing.assert_allclose(table["sd"], [fitted["tau"].stddev, *fitted["w"].stddev])
    response = fitted.linear_response()
    np.testing.assert_allclose(table["sd_lr"], [response.stddev("tau"), *response.stddev("w")])
    assert bool((table[INTERVAL[0]] < table["mean"]).all()) and bool((table["mean"] < table[INTERVAL[1]]).all())


def test_rows_of_plates_stand_in_the_order_of_their_elements() -> None:
    posterior = posterior_of(nested_model, torch.randn(3, 5), theta=dist.Normal(torch.arange(3.0)[:, None], 1e-6))
    table = posterior.summary(200, sites=["theta", "weights", "z"]).table
    assert list(table.index[:3]) == ["theta[0]", "theta[1]", "theta[2]"]
    assert list(table.index[3:5]) == ["weights[0, 0]", "weights[0, 1]"] and table.index[-1] == "z[2, 4]"
    for column in ("mean", *INTERVAL):  # the interval comes from draws through ArviZ, the mean from q
        np.testing.assert_allclose(table[column][:3], [0, 1, 2], atol=1e-4)
    assert len(table) == 3 + 12 + 15


def test_resampled_moments_stand_beside_where_khat_is_between() -> None:
    pyro.set_rng_seed(1)
    summary = scaled_mean(0.6).summary(4000)
    assert 0.5 < summary.khat < 0.7
    weighed = summary.psis
    assert float(summary.table.loc["mu", "mean_is"]) == pytest.approx(float(weighed.mean("mu")))
    assert float(summary.table.loc["mu", "sd_is"]) == pytest.approx(float(weighed.stddev("mu")))
    exact = PRECISION**-0.5
    assert abs(summary.table.loc["mu", "sd_is"] - exact) < abs(summary.table.loc["mu", "sd"] - exact)
    assert any("ead mean_is and sd_is" in warning for warning in summary.warnings)
    assert "mean_is" not in scaled_mean(1.1).summary().table and scaled_mean(1.1).summary().warnings == []


@pytest.mark.parametrize(("ratio", "shift"), [(2.0, 0.0), (1.5, 0.9)])
def test_a_q_that_is_too_wide_or_off_is_told_although_khat_is_small(ratio: float, shift: float) -> None:
    summary = scaled_mean(ratio, shift).summary()
    assert summary.khat < 0.5
    (warning,) = summary.warnings
    assert warning.startswith("q differs from its own draws, weighed: mu is")
    row, exact, scale = summary.table.loc["mu"], float(Y.sum()) / PRECISION, PRECISION**-0.5
    assert abs(row["mean_is"] - exact) < 4 * scale / math.sqrt(summary.psis.ess)
    assert abs(row["sd_is"] - scale) < 4 * scale / math.sqrt(2 * summary.psis.ess)


def test_sites_narrow_the_table_and_not_the_diagnosis(fitted: Any) -> None:
    pyro.set_rng_seed(3)
    whole = fitted.summary(500)
    pyro.set_rng_seed(3)
    part = fitted.summary(500, sites=["w"])
    assert part.table.equals(whole.table.iloc[1:]) and part.khat == whole.khat and part.warnings == whole.warnings
    assert fitted.summary(500, sites="tau").table.index.tolist() == ["tau"]
    with pytest.raises(ValueError, match=r"sites: found \['v'\], expected latent sites of the model: \['tau', 'w'\]"):
        fitted.summary(500, sites=["v"])


def test_no_row_of_a_site_that_was_summed_out_is_resampled() -> None:
    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        z = pyro.sample("z", dist.Bernoulli(0.5))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.8))

    q = dist.Normal(Y.sum() / PRECISION, 0.6 * PRECISION**-0.5)
    pyro.set_rng_seed(1)
    table = posterior_of(model, Y, mu=q).summary(4000).table
    assert math.isnan(table.loc["z", "mean_is"]) and not math.isnan(table.loc["mu", "mean_is"])


def test_the_same_seed_gives_the_same_table(fitted: Any) -> None:
    first, second = (pyro.set_rng_seed(2) or fitted.summary(200) for _ in range(2))
    assert first.table.equals(second.table) and first.khat == second.khat


# --------------------------------------------------------------------------------------------------
# What is printed


def test_print_and_html() -> None:
    summary = exact_mean().summary()
    lines = str(summary).splitlines()
    assert lines[0].split() == ["mean", "sd", *INTERVAL] and lines[1].startswith("mu ")
    assert "converged after 3 steps: one exact block" in str(summary)
    assert "Pareto k-hat -inf (all weights are equal: q is the posterior)" in str(summary)
    assert "bound -14.5 (exact evidence)" in str(summary)
    assert "<td>" in summary._repr_html_() and "k-hat" in summary._repr_html_()
    assert not summary.warnings and "WARNING" not in str(summary)
    assert repr(summary) == str(summary)


def test_many_rows_of_one_site_are_cut_in_print_only() -> None:
    def wide(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)
        pyro.sample("last", dist.Normal(0.0, 1.0))

    summary = posterior_of(wide, torch.zeros(50)).summary(200)
    assert len(summary.table) == 51
    assert "... 40 more of z" in str(summary) and "z[10]" not in str(summary) and "\nlast" in str(summary)


# --------------------------------------------------------------------------------------------------
# Warnings


def test_a_bad_posterior_is_told_with_what_to_do() -> None:
    def pair(y: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(a + b, 0.05), obs=y)

    summary = BLRInference(pair, blocks="sites").run(torch.tensor(1.0), progress=False).summary()
    assert summary.khat > 0.7 and summary.table.loc["a", "sd_lr"] > 5 * summary.table.loc["a", "sd"]
    (warning,) = [w for w in summary.warnings if w.startswith("Do not trust this posterior")]
    for word in ("a, b independent", "blocks=", "reparameterise", "NUTS"):
        assert word in warning
    assert "WARNING: Do not trust" in str(summary)
    assert BLRInference(pair, blocks=[["a", "b"]]).run(torch.tensor(1.0), progress=False).summary().warnings == []


def test_nuts_from_this_start_is_a_program() -> None:
    """The words of the warning, run."""
    posterior = exact_mean()
    kernel = NUTS(posterior.model, init_strategy=init_to_value(values=posterior.sample()))
    chain = MCMC(kernel, num_samples=20, warmup_steps=20, disable_progbar=True)
    chain.run(*posterior.args)
    assert chain.get_samples()["mu"].shape == (20,)


def test_a_run_that_was_cut_short_is_told(fitted: Any) -> None:
    engine = BLRInference(fitted.model, blocks="sites")
    summary = engine.run(*fitted.args, max_steps=2, progress=False).summary()
    assert summary.warnings[0].startswith("Not converged: max_steps=2 reached")
    assert "not converged after 2 steps" in str(summary)
    engine = BLRInference(fitted.model, blocks="sites")
    engine.step(*fitted.args)
    assert "step was called by hand" in engine.posterior.summary().warnings[0]


def test_where_there_are_no_weights_the_table_stands_and_why_is_said() -> None:
    summary = posterior_of(subsampled, Y).summary()
    assert math.isnan(summary.khat) and summary.psis is None
    assert "No k-hat, so nothing says how close q is: the model sees a part of the data" in " ".join(summary.warnings)
    assert summary.table.shape == (1, 4)


GOOD_FIT = Facts(converged=True, stop_reason="", elbo=-10.0, elbo_se=0.0, khat=0.3)


def told(**changes: Any) -> str:
    return "; ".join(warnings_about(Facts(**{**GOOD_FIT.__dict__, **changes})))


def restart(elbo: float, distance: float, converged: bool = True) -> Restart:
    return Restart(elbo, 0.01, converged, distance)


KEPT = restart(-10.0, 0.0)
WORDS = [
    ({}, ""),
    ({"khat": 0.6}, "between 0.5 and 0.7"),
    ({"khat": 0.75, "factors": ["a"]}, "Do not trust this posterior: Pareto k-hat is 0.75"),
    ({"khat": 0.6, "most_error": 2.5, "factors": ["a"]}, "k-hat is 0.60, of few effective draws"),
    ({"khat": 0.9, "most_error": 0.02}, ""),
    ({"khat": 0.9, "most_error": 0.25}, ""),
    ({"khat": 0.4, "heavy": (0.9, "a")}, "Do not trust the spread of a: the k-hat of its weighted variance is 0.90"),
    ({"khat": 0.9, "most_error": 0.25, "heavy": (0.8, "a")}, "Do not trust the spread of a"),
    ({"khat": 0.4, "most_error": 0.05, "heavy": (0.9, "a")}, ""),
    ({"shifted": "a is 1 ± 1 in q and 2 ± 1 by weights"}, "q differs from its own draws, weighed: a is 1 ± 1"),
    ({"elbo_se": 3.0}, "differences between models below 6 nats say nothing"),
    ({"elbo_se": 0.5}, ""),
    ({"is_saddle": True}, "Start elsewhere"),
    ({"restarts": [KEPT, restart(-10.001, 0.01), restart(-10.0, 0.2)]}, ""),
    ({"restarts": [KEPT, restart(-11.0, 30.0)]}, "Several modes: of 2 converged starts 1 ended elsewhere"),
    ({"restarts": [KEPT, restart(-10.0, 30.0), restart(-9.0, 50.0, converged=False)]}, "Several modes: of 2 converged"),
    ({"restarts": [KEPT, restart(-40.0, 90.0)]}, "Local optima: 1 of 2 converged starts"),
    ({"restarts": [KEPT, restart(-11.0, 30.0, converged=False)]}, ""),
]


@pytest.mark.parametrize(("changes", "words"), WORDS, ids=[str(changes)[:40] for changes, _ in WORDS])
def test_words(changes: dict[str, Any], words: str) -> None:
    found = told(**changes)
    assert words in found if words else found == ""


def test_starts_that_end_in_different_modes_are_told_and_kept(tmp_path: Any) -> None:
    def two_sided(y: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 5.0).to_event(1))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.5])))
            pyro.sample("y", dist.Normal(loc[z], 0.5), obs=y)

    y = torch.cat([torch.randn(20) * 0.5 - 2, torch.randn(20) * 0.5 + 2])
    posterior = BLRInference(two_sided, blocks="sites").run(y, num_restarts=8, progress=False)
    assert len(posterior.restarts) == 8 and min(one.distance for one in posterior.restarts) == 0
    assert max(one.elbo for one in posterior.restarts) == posterior.elbo
    assert any(one.distance > 10 for one in posterior.restarts)  # relabelled
    assert "Several modes" in "; ".join(posterior.summary(200).warnings)
    posterior.save(tmp_path / "q.safetensors")
    assert type(posterior).load(tmp_path / "q.safetensors").restarts == posterior.restarts
