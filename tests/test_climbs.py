"""Where climbs start, how far they step, and that they end in float32 too; oracles are grids."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor
from torch.nn.functional import pad

from pyro_blr import BLRInference

AT_BATS = torch.full((18,), 45.0)
HITS = torch.tensor([18.0, 17, 16, 15, 14, 14, 13, 12, 11, 11, 10, 10, 10, 10, 10, 9, 8, 7])


def pooled(at_bats: Tensor, hits: Tensor) -> None:
    """Given equal rates the density of kappa rises without end: there is no mode for Newton's method to find."""
    m = pyro.sample("m", dist.Uniform(torch.tensor(0.0), torch.tensor(1.0)))
    kappa = pyro.sample("kappa", dist.Pareto(torch.tensor(1.0), torch.tensor(1.5)))
    with pyro.plate("players", len(at_bats)):
        phi = pyro.sample("phi", dist.Beta(m * kappa, (1 - m) * kappa))
        pyro.sample("obs", dist.Binomial(at_bats, phi), obs=hits)


def evidence() -> float:
    """log p(hits): rates integrated in closed form, (m, log kappa) on a grid."""
    m = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    log_kappa = torch.linspace(0, 25, 2001, dtype=torch.float64)[:, None]
    kappa = log_kappa.exp()
    a, b = (m * kappa)[..., None], ((1 - m) * kappa)[..., None]
    hits, misses = HITS.double(), (AT_BATS - HITS).double()

    def log_beta(x: Tensor, y: Tensor) -> Tensor:
        return torch.lgamma(x) + torch.lgamma(y) - torch.lgamma(x + y)

    choose = torch.lgamma(hits + misses + 1) - torch.lgamma(hits + 1) - torch.lgamma(misses + 1)
    each = (choose + log_beta(a + hits, b + misses) - log_beta(a, b)).sum(-1)
    prior = math.log(1.5) - 1.5 * log_kappa  # Pareto(1, 1.5), its Jacobian with it
    return float((each + prior).logsumexp((0, 1)) + math.log(25 / 2000 / 400))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("seed", [3])
def test_scales_without_a_mode(seed: int, dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    pyro.set_rng_seed(seed)
    posterior = BLRInference(pooled).run(AT_BATS.to(dtype), HITS.to(dtype), progress=False)
    log_evidence = evidence()
    assert posterior.converged
    assert log_evidence - 1.5 < posterior.elbo < log_evidence


def test_an_autoguide_that_starts_with_equal_rates() -> None:
    engine = BLRInference(pooled, AutoNormal(pooled))
    posterior = engine.run(AT_BATS, HITS, progress=False)
    assert posterior.converged and evidence() - 2.0 < posterior.elbo < evidence()


def test_float32_comes_to_rest() -> None:
    """Rounding is not taken for a fall of the bound: a script's steps after the optimum leave λ where it is."""
    torch.set_default_dtype(torch.float32)
    lengths, answers = torch.tensor([5.0, 7.0, 9.0]), torch.tensor([1.0, 1.0, 0.0])

    def model() -> None:
        theta = pyro.sample("theta", dist.Normal(torch.tensor(7.0), torch.tensor(2.0))).unsqueeze(-1)
        pyro.sample("y", dist.Bernoulli(logits=theta - lengths).to_event(1), obs=answers)

    engine = BLRInference(model)
    for _ in range(12):
        engine.step()
    still = engine.posterior.natural["theta"]
    for _ in range(3):
        engine.step()
        assert torch.equal(engine.posterior.natural["theta"], still)
    # the Gaussian of least KL(q ‖ p), by a grid for E_q and a search on it
    grid = torch.linspace(-5, 19, 4001, dtype=torch.float64)
    logits = grid[:, None] - lengths.double()
    log_joint = -0.5 * ((grid - 7) / 2) ** 2 + (answers.double() * logits - logits.exp().log1p()).sum(-1)
    free = torch.tensor([7.0, 0.5], dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS([free], max_iter=200, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        search.zero_grad()
        weights = torch.softmax(-0.5 * ((grid - free[0]) / free[1].exp()) ** 2, 0)
        value = -(weights * log_joint).sum() - free[1]
        value.backward()
        return value

    search.step(loss)
    found = engine.posterior["theta"]
    assert float(found.mean) == pytest.approx(float(free[0].detach()), abs=1e-4)
    assert float(found.stddev) == pytest.approx(float(free[1].detach().exp()), abs=1e-4)


def test_draws_stay_inside_the_support_in_float32() -> None:
    """Of Beta(1, 0.1) a fifth is nearer to 1 than float32 can say, and log(1 − x) would be −∞ there."""
    torch.set_default_dtype(torch.float32)
    data = torch.cat([torch.randn(20) - 4, torch.randn(20) + 4])

    def model() -> None:
        with pyro.plate("sticks", 3):
            beta = pyro.sample("beta", dist.Beta(1, 0.1))
        with pyro.plate("components", 4):
            loc = pyro.sample("loc", dist.Normal(0.0, 5.0))
        probs = pad(beta, (0, 1), value=1) * pad((1 - beta).cumprod(-1), (1, 0), value=1)
        with pyro.plate("data", 40):
            z = pyro.sample("z", dist.Categorical(probs))
            pyro.sample("obs", dist.Normal(loc[z], 1.0), obs=data)

    for seed in range(3):
        pyro.set_rng_seed(seed)
        engine = BLRInference(model)
        assert all(math.isfinite(engine.step()) for _ in range(3))
