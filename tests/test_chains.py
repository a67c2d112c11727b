"""Independent restarts as chains: `pyro_blr.to_arviz([posterior, ...])`."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_blr
from pyro_blr import BLRInference

Y = torch.tensor([0.5, -1.0, 2.0, 0.1], dtype=torch.float64)


def model() -> None:
    m = pyro.sample("m", dist.Normal(torch.tensor(0.0), 3.0))
    tau = pyro.sample("tau", dist.Gamma(torch.tensor(2.0), 1.0))
    with pyro.plate("n", 4):
        pyro.sample("x", dist.Normal(m, tau.rsqrt()), obs=Y)


def test_runs_are_chains():
    """One chain for each posterior, with its own draws and its own trace of the bound."""
    posteriors = [
        BLRInference(model, init={"m": torch.tensor(start)}).run(progress=False) for start in (-5.0, 0.0, 5.0)
    ]
    data = pyro_blr.to_arviz(posteriors, num_samples=500)
    draws = np.asarray(data["posterior"]["m"])
    assert draws.shape == (3, 500)
    spread = float(posteriors[0]["m"].stddev)
    assert np.all(np.abs(draws.mean(1) - float(posteriors[0]["m"].mean)) < 5 * spread / 500**0.5)
    assert len({tuple(chain[:3]) for chain in draws}) == 3
    trace = np.asarray(data["variational"]["elbo_trace"])
    for one, elbos in zip(posteriors, trace, strict=True):
        assert elbos[: one.num_steps] == pytest.approx(one.history)
        assert np.isnan(elbos[one.num_steps :]).all()


def test_one_posterior_is_one_chain():
    posterior = BLRInference(model).run(progress=False)
    assert np.asarray(pyro_blr.to_arviz(posterior, num_samples=20)["posterior"]["m"]).shape == (1, 20)


def test_chains_of_different_models_are_refused():
    def other() -> None:
        pyro.sample("w", dist.Normal(torch.tensor(0.0), 1.0))

    posteriors = [BLRInference(one).run(progress=False) for one in (model, other)]
    with pytest.raises(ValueError, match=r"posterior 1 has the sites \['w'\].*chains are restarts of one model"):
        pyro_blr.to_arviz(posteriors)
