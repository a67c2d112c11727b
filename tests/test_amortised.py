"""Guides whose parameters a network computes take SVI's own steps: `optim` on the gradient of `loss`, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.nn import PyroModule
from pyro.optim import Adam
from torch import Tensor, nn

from pyro_blr import BLRInference

N, SCALE = 60, 0.8
WEIGHTS = torch.tensor(
    [[1.5, 0.0], [0.0, 1.0], [0.0, 0.0]], dtype=torch.float64
)  # orthogonal: the posterior is a product


def observed() -> Tensor:
    generator = torch.Generator().manual_seed(5)
    z = torch.randn(N, 2, generator=generator, dtype=torch.float64)
    return z @ WEIGHTS.T + SCALE * torch.randn(N, 3, generator=generator, dtype=torch.float64)


class Decoder(PyroModule):
    """z ~ N(0, 1)², x ~ N(W z, 0.8), in a plate of which a part may be drawn."""

    def forward(self, x: Tensor, size: int = N) -> None:
        with pyro.plate("rows", N, subsample_size=size) as index:
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ WEIGHTS.T, SCALE).to_event(1), obs=x[index])


class Encoder(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.loc, self.log_scale = PyroModule[nn.Linear](3, 2), PyroModule[nn.Linear](3, 2)

    def forward(self, x: Tensor, size: int = N) -> None:
        with pyro.plate("rows", N, subsample_size=size) as index:
            rows = x[index]
            pyro.sample("z", dist.Normal(self.loc(rows), self.log_scale(rows).exp()).to_event(1))


def trained(make: Callable, size: int, steps: int, **options: Any) -> tuple[list[float], dict[str, Tensor], Any]:
    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    model, guide = Decoder(), Encoder()
    stepper = make(model, guide, **options)
    losses = [stepper.step(observed(), size) for _ in range(steps)]
    return losses, {name: value.detach().clone() for name, value in pyro.get_param_store().items()}, stepper


@pytest.mark.parametrize("loss", [Trace_ELBO, TraceMeanField_ELBO, TraceGraph_ELBO])
@pytest.mark.parametrize("particles", [{}, {"num_particles": 3, "vectorize_particles": True}])
@pytest.mark.parametrize("size", [N, 20])
def test_steps_are_those_of_svi(loss: Any, particles: dict, size: int) -> None:
    def make(cls: Any) -> Callable:
        return lambda m, g: cls(m, g, Adam({"lr": 0.02}), loss(max_plate_nesting=1, **particles))

    ours, found, engine = trained(make(BLRInference), size, 4)
    theirs, expected, _ = trained(make(SVI), size, 4)
    assert ours == theirs and set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert set(engine.explain(observed(), size).to_dict()["ordinary"]) == {"z"}


def test_the_best_encoder_is_reached() -> None:
    """q(z | x) = N(W' x / (d + 0.64), 0.64 / (d + 0.64)), d the squared lengths of W's columns."""
    options = {"optim": Adam({"lr": 0.02}), "loss": TraceMeanField_ELBO(num_particles=4, vectorize_particles=True)}
    trained(lambda m, g, **o: BLRInference(m, g, **o), N, 400, **options)
    lengths = WEIGHTS.square().sum(0)
    x, store = observed(), pyro.get_param_store()
    loc = x @ store["loc.weight"].T + store["loc.bias"]
    log_scale = x @ store["log_scale.weight"].T + store["log_scale.bias"]
    best = x @ WEIGHTS / (lengths + SCALE**2)
    width = (SCALE**2 / (lengths + SCALE**2)).sqrt()
    q, p = dist.Normal(loc.detach(), log_scale.detach().exp()), dist.Normal(best, width)
    kl = torch.distributions.kl_divergence(q, p).sum(-1).mean()  # nats a datum below the evidence
    assert float(kl) < 0.02


def test_save_load_and_clear(tmp_path: Any) -> None:
    options = {"optim": Adam({"lr": 0.02}), "loss": Trace_ELBO()}
    _, found, _ = trained(lambda m, g, **o: BLRInference(m, g, **o), N, 3, **options)
    store = pyro.get_param_store()
    store.save(tmp_path / "store")
    store.clear()
    # Under torch 2.6 Pyro 1.9.1's own `load` reads nothing; this is what 1.9.2's does (pyro-ppl/pyro, pull request 3389).
    store.set_state(torch.load(tmp_path / "store", weights_only=False))
    assert all(torch.equal(store[name], value) for name, value in found.items())


def test_a_failed_step_leaves_weights_optimiser_and_generator() -> None:
    def make(model: Any, guide: Any) -> BLRInference:
        return BLRInference(model, guide, Adam({"lr": 0.02}), Trace_ELBO())

    _, expected, _ = trained(make, N, 4)
    _, _, engine = trained(make, N, 2)
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError):
        engine.step(observed()[:, :2], N)  # the encoder wants three columns
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match="NaN in the gradient"), pytest.warns(UserWarning):
        with pyro.validation_enabled(False):
            engine.step(observed() * float("nan"), N)
    assert torch.equal(torch.get_rng_state(), state)
    for _ in range(2):
        engine.step(observed(), N)
    store = pyro.get_param_store()
    assert all(torch.equal(store[name].detach(), value) for name, value in expected.items())
    assert np.isfinite(engine.evaluate_loss(observed(), N))
