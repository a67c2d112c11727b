"""A discrete site has no floating dtype of its own: models in one precision under a default of the other."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from definitions import default_dtype

from pyro_blr import BLRInference, Posterior

X = [-2.0, -1.9, 3.0, 3.1, 2.9]


def fitted(dtype: torch.dtype, default: torch.dtype) -> Posterior:
    """A mixture whose numbers are all of `dtype`, fitted where torch's default is `default`."""
    with default_dtype(default):
        data = torch.tensor(X, dtype=dtype)

        def model() -> None:
            mu = pyro.sample("mu", dist.Normal(torch.zeros(2, dtype=dtype), torch.tensor(5.0, dtype=dtype)).to_event(1))
            with pyro.plate("n", 5):
                z = pyro.sample("z", dist.Categorical(torch.tensor([0.4, 0.6], dtype=dtype)))
                b = pyro.sample("b", dist.Bernoulli(torch.tensor(0.3, dtype=dtype)))
                pyro.sample("x", dist.Normal(mu[z] + 0.5 * b, torch.tensor(1.0, dtype=dtype)), obs=data)

        start = torch.tensor([-1.0, 1.0], dtype=dtype)
        engine = BLRInference(model, init={"mu": start}, blocks="sites")
        posterior = engine.run(progress=False, tol=1e-6)
        drawn = engine.guide()
        assert drawn["mu"].dtype == drawn["b"].dtype == dtype
        assert drawn["z"].dtype == torch.int64
        assert posterior["mu"].mean.dtype == posterior["b"].mean.dtype == dtype
        return posterior


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("default", [torch.float32, torch.float64])
def test_the_default_does_not_matter(dtype: torch.dtype, default: torch.dtype):
    """The optimum of all-float64, to the precision of the model or of the default, whichever is less."""
    found, expected = fitted(dtype, default), fitted(torch.float64, torch.float64)
    tolerance = 1e-10 if dtype == default == torch.float64 else 2e-6
    assert found.elbo == pytest.approx(expected.elbo, rel=tolerance)
    for site in ("mu", "b"):
        assert torch.allclose(found[site].mean.double(), expected[site].mean, rtol=5 * tolerance, atol=5 * tolerance)
    assert torch.allclose(found["z"].probs.double(), expected["z"].probs, rtol=10 * tolerance, atol=10 * tolerance)
