"""The same models on a GPU: the same verdicts, bounds and posteriors as on the CPU, λ where the data are."""

from __future__ import annotations

from collections.abc import Iterator

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import ORACLES, oracle_case

from pyro_blr import BLRInference, Posterior

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]),
]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    found = torch.device(request.param)
    torch.set_default_device(found)
    yield found
    torch.set_default_device(None)


@pytest.mark.parametrize("name", list(ORACLES))
def test_oracles_reach_their_bounds(name: str, device: torch.device) -> None:
    model, args, init, expected = oracle_case(name)
    args, init = tuple(x.to(device) for x in args), {key: value.to(device) for key, value in init.items()}
    engine = BLRInference(model, init=init, blocks="sites")
    posterior = engine.run(*args, progress=False)
    assert posterior.elbo == pytest.approx(expected["bound"], abs=1e-3)
    assert engine.explain(*args).exact
    assert all(natural.device.type == device.type for natural in posterior.natural.values())
    draws = engine.guide(*args)
    assert all(value.device.type == device.type for value in draws.values())


def logistic(x: torch.Tensor, y: torch.Tensor) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([x.shape[-1]]).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)


def test_draws_give_what_they_give_on_the_cpu(device: torch.device) -> None:
    generator = torch.Generator("cpu").manual_seed(0)
    x = torch.randn(200, 3, generator=generator, device="cpu")
    y = (
        torch.rand(200, generator=generator, device="cpu")
        < torch.sigmoid(x @ torch.tensor([1.0, -1.0, 0.5], device="cpu"))
    ).to(x)
    posterior = BLRInference(logistic).run(x.to(device), y.to(device), progress=False)
    torch.set_default_device("cpu")
    reference = BLRInference(logistic).run(x, y, progress=False)
    sd = reference["w"].stddev
    assert torch.allclose(posterior["w"].mean.cpu(), reference["w"].mean, atol=float(0.05 * sd.min()))
    assert torch.allclose(posterior["w"].stddev.cpu(), sd, rtol=0.05)


def test_a_gamma_site_under_another_likelihood(device: torch.device) -> None:
    def model(y: torch.Tensor) -> None:
        scale = pyro.sample("scale", dist.Gamma(2.0, 2.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Laplace(0.0, scale), obs=y)

    y = torch.linspace(-2, 2, 40)
    posterior = BLRInference(model).run(y, progress=False)
    assert posterior["scale"].mean.device.type == device.type
    assert 0.7 < float(posterior["scale"].mean) < 1.5


def test_saved_on_one_device_and_loaded(device: torch.device, tmp_path) -> None:
    def model(y: torch.Tensor) -> None:
        p = pyro.sample("p", dist.Beta(10.0, 10.0))
        with pyro.plate("flips", len(y)):
            pyro.sample("y", dist.Bernoulli(p), obs=y)

    engine = BLRInference(model)
    engine.step(torch.tensor([1.0] * 6 + [0.0] * 4))
    posterior = engine.posterior
    posterior.save(tmp_path / "coin")
    loaded = Posterior.load(tmp_path / "coin")
    assert torch.equal(loaded["p"].concentration1.cpu(), posterior["p"].concentration1.cpu())
    assert float(posterior["p"].concentration1) == pytest.approx(16, abs=1e-12)


def test_float32_minibatches(device: torch.device) -> None:
    def model(y: torch.Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 10.0))
        tau = pyro.sample("tau", dist.Gamma(y.new_ones(()), 1.0))
        with pyro.plate("data", len(y), subsample_size=50) as index:
            pyro.sample("y", dist.Normal(mu, tau.rsqrt()), obs=y[index])

    y = torch.randn(500, generator=torch.Generator("cpu").manual_seed(1), device="cpu").float().to(device) + 3
    engine = BLRInference(model)
    for _ in range(200):
        engine.step(y)
    assert float(engine.posterior["mu"].mean) == pytest.approx(float(y.mean()), abs=0.15)
