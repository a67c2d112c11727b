"""What is kept from step to step holds for the data that it was made from: a tensor written into is other data."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

from pyro_blr import BLRInference


def regression(x: Tensor, y: Tensor, scale: Tensor, mask: Tensor, likelihood: Callable) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(2, dtype=torch.float64), 3.0).to_event(1))
    with pyro.plate("rows", len(y)), poutine.mask(mask=mask):
        pyro.sample("y", likelihood(x @ w, scale), obs=y)


def data() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 2, generator=generator, dtype=torch.float64)
    y = x.sum(-1) + torch.randn(30, generator=generator, dtype=torch.float64)
    return {"x": x, "y": y, "scale": torch.ones(30, dtype=torch.float64), "mask": torch.arange(30) < 20}


WRITES: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "data": lambda d: d["y"].add_(3),
    "a row of the data": lambda d: d["y"][4:6].mul_(-2),
    "an argument": lambda d: d["scale"].mul_(2),
    "the design": lambda d: d["x"].neg_(),
    "the mask": lambda d: d["mask"].fill_(True),
}


@pytest.mark.parametrize(
    "likelihood", [dist.Normal, lambda m, s: dist.StudentT(4.0, m, s)], ids=["exact", "quadrature"]
)
@pytest.mark.parametrize("name", WRITES)
def test_a_write_between_steps_is_seen(name: str, likelihood: Callable) -> None:
    written = data()
    engine = BLRInference(regression)
    for _ in range(12):
        engine.step(**written, likelihood=likelihood)
    WRITES[name](written)
    engine.run(**written, likelihood=likelihood, progress=False)
    fresh = BLRInference(regression).run(**written, likelihood=likelihood, progress=False)
    # two fits, each within 1e-6 nats of its optimum: √(2 · 1e-6) standard deviations of at most 0.3 apart from it
    torch.testing.assert_close(engine.posterior["w"].mean, fresh["w"].mean, rtol=0, atol=2 * 0.3 * (2e-6) ** 0.5)
    loss = engine.evaluate_loss(**written, likelihood=likelihood)
    assert loss == pytest.approx(-fresh.elbo, abs=1e-3)
