"""What `to_arviz` and `psis` say of fits, against ArviZ on data that were put together by hand from the same draws.

By hand: log likelihoods and log p from torch's own distributions, log q from the posterior's, no statement of the model run again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from test_diagnostics import through_arviz
from test_export import IS_TREE, elpd, group
from torch import Tensor

from pyro_blr import BLRInference

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of ArviZ itself, on import
    import arviz as az

GENERATOR = torch.Generator().manual_seed(8)
X = torch.randn(25, 2, generator=GENERATOR, dtype=torch.float64)
LABELS = (X[:, 0] > 0.3).double()
COUNTS = torch.tensor([0, 3, 1, 0, 14, 2, 0, 5, 1, 0], dtype=torch.float64)


def logistic(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 3.0).to_event(1))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)


def overdispersed(y: Tensor) -> None:
    """A Gamma and Gaussians, and one datum that q finds hard: some k̂ of leave-one-out are large."""
    tau = pyro.sample("tau", dist.Gamma(torch.tensor(2.0), 2.0))
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Normal(torch.tensor(0.5), tau.rsqrt()))
        pyro.sample("y", dist.Poisson(z.exp()), obs=y)


class Case(NamedTuple):
    name: str
    model: Callable
    args: tuple
    log_prior: Callable[[dict[str, Tensor]], Tensor]  # of draws, (S,)
    log_likelihood: Callable[[dict[str, Tensor]], Tensor]  # (S, rows)


CASES = [
    Case(
        "logistic",
        logistic,
        (X, LABELS),
        lambda d: dist.Normal(0.0, 3.0).log_prob(d["w"]).sum(-1),
        lambda d: dist.Bernoulli(logits=d["w"] @ X.mT).log_prob(LABELS),
    ),
    Case(
        "overdispersed",
        overdispersed,
        (COUNTS,),
        lambda d: (
            dist.Gamma(2.0, 2.0).log_prob(d["tau"])
            + dist.Normal(0.5, d["tau"].rsqrt().unsqueeze(-1)).log_prob(d["z"]).sum(-1)
        ),
        lambda d: dist.Poisson(d["z"].exp()).log_prob(COUNTS),
    ),
]


def by_hand(draws: dict[str, Tensor], log_likelihood: Tensor) -> Any:
    groups = {
        "posterior": {name: value.numpy()[None] for name, value in draws.items()},
        "log_likelihood": {"y": log_likelihood.numpy()[None]},
    }
    return az.from_dict(groups) if IS_TREE else az.from_dict(**groups)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_loo_khat_and_resampling(case: Case) -> None:
    posterior = BLRInference(case.model).run(*case.args, progress=False)
    data = posterior.to_arviz(1500)
    exported = group(data, "posterior")
    draws = {name: torch.from_numpy(exported[name].values[0].copy()) for name in posterior}
    log_likelihood = case.log_likelihood(draws)
    np.testing.assert_allclose(group(data, "log_likelihood")["y"].values[0], log_likelihood, rtol=1e-9, atol=1e-12)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of large k-hats, which are compared
        found, wanted = (az.loo(d, pointwise=True) for d in (data, by_hand(draws, log_likelihood)))
    assert elpd(found) == pytest.approx(elpd(wanted), abs=1e-9)
    assert float(found.se) == pytest.approx(float(wanted.se), abs=1e-9)
    np.testing.assert_allclose(np.asarray(found.pareto_k), np.asarray(wanted.pareto_k), atol=1e-7)

    log_p = case.log_prior(draws) + log_likelihood.sum(-1)
    log_q = posterior.log_prob(draws)
    weights, khat = through_arviz((log_p - log_q).numpy())
    told = group(data, "variational")
    assert float(told["khat"].values[0]) == pytest.approx(khat, abs=1e-7)
    np.testing.assert_allclose(group(data, "sample_stats")["log_weight"].values[0], weights, atol=1e-7)
    assert float(told["importance_ess"].values[0]) == pytest.approx(1 / float(np.exp(2 * weights).sum()), rel=1e-7)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_importance_resampled_summaries(case: Case) -> None:
    """Means and sds of weighted draws, and ArviZ's summary of resampled ones, within their Monte-Carlo error."""
    posterior = BLRInference(case.model).run(*case.args, progress=False)
    found = posterior.psis(2000)
    draws = dict(found.draws)
    log_p = case.log_prior(draws) + case.log_likelihood(draws).sum(-1)
    weights, khat = through_arviz((log_p - posterior.log_prob(draws)).numpy())
    assert found.khat == pytest.approx(khat, abs=1e-7)
    share, count = np.exp(weights), 20_000
    again = found.resample(count)
    resampled = {name: value.numpy()[None] for name, value in again.items()}
    kept = az.from_dict({"posterior": resampled}) if IS_TREE else az.from_dict(posterior=resampled)
    for site, value in draws.items():
        values = value.numpy().reshape(len(share), -1)
        mean = share @ values
        sd = np.sqrt(share @ (values - mean) ** 2)
        np.testing.assert_allclose(found.mean(site).reshape(-1), mean, rtol=1e-7, atol=1e-9)
        np.testing.assert_allclose(found.stddev(site).reshape(-1), sd, rtol=1e-7)
        of_draws = group(kept, "posterior")[site].values.reshape(count, -1)
        assert bool((np.abs(of_draws.mean(0) - mean) < 5 * sd / np.sqrt(count)).all())
