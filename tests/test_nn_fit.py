"""`BLRInference` on models with networks: weights in place, other sites by their own messages, against closed forms and loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Predictive
from torch import Tensor, nn
from torch.distributions import Categorical

from pyro_blr import BLRInference
from pyro_blr.nn import BLROptimizer, Prior, bayesian
from pyro_blr.posterior import Posterior

SIZE, WIDTH = 200, 4


def data() -> tuple[Tensor, Tensor]:
    x = torch.randn(SIZE, WIDTH) @ (torch.eye(WIDTH) + 0.3 * torch.randn(WIDTH, WIDTH))
    return x, x @ torch.tensor([1.0, -2.0, 0.5, 0.0]) + 0.5 * torch.randn(SIZE)


def linear() -> nn.Module:
    return nn.Linear(WIDTH, 1, bias=False)


def relevance(network: Any, batch: int = SIZE) -> Callable:
    """Regression with a Gamma precision of the noise, Gamma(2, 1), and one of the weights, Gamma(2, 1)."""

    def model(x: Tensor, y: Tensor) -> None:
        noise = pyro.sample("noise", dist.Gamma(2.0, 1.0))
        weights = pyro.sample("weights", dist.Gamma(2.0, 1.0))
        mean = network.sample(weights)(x).squeeze(-1)
        with pyro.plate("data", SIZE, subsample_size=batch) as rows:
            pyro.sample("y", dist.Normal(mean[rows], noise.rsqrt()), obs=y[rows])

    return model


def coordinate_ascent(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, dist.Gamma, dist.Gamma, Tensor]:
    """Mean and precision of the best N(m, diag(1/s)) Gamma Gamma for `relevance`, and its ELBO, by closed-form updates."""
    noise = weights = torch.ones(())
    for _ in range(500):
        precision = noise * x.square().sum(0) + weights
        mean = torch.linalg.solve(noise * x.T @ x + weights * torch.eye(WIDTH), noise * x.T @ y)
        residuals = (y - x @ mean).square().sum() + x.square() @ (1 / precision) @ torch.ones(SIZE)
        q_noise = dist.Gamma(2 + SIZE / 2, 1 + residuals / 2)
        squares = (mean.square() + 1 / precision).sum()
        q_weights = dist.Gamma(2 + WIDTH / 2, 1 + squares / 2)
        noise, weights = q_noise.mean, q_weights.mean

    def log_of(q: dist.Gamma) -> Tensor:
        return torch.digamma(q.concentration) - q.rate.log()

    elbo = 0.5 * (SIZE * (log_of(q_noise) - math.log(2 * math.pi)) - noise * residuals)
    elbo = elbo + 0.5 * (WIDTH * (log_of(q_weights) - math.log(2 * math.pi)) - weights * squares)
    elbo = elbo + (0.5 * (1 + math.log(2 * math.pi) - precision.log())).sum()
    for q in (q_noise, q_weights):
        elbo = elbo - torch.distributions.kl_divergence(q, dist.Gamma(2.0, 1.0))
    return mean, precision, q_noise, q_weights, elbo


# -- mixed models ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [SIZE, pytest.param(50, marks=pytest.mark.slow)])
def test_linear_regression_with_gamma_precisions_has_the_mean_field_optimum(batch: int) -> None:
    x, y = data()
    mean, precision, noise, weights, elbo = coordinate_ascent(x, y)
    engine = BLRInference(relevance(bayesian(linear(), seed=0, trust=1.0), batch))
    for _ in range(500 if batch == SIZE else 1200):  # the rates of minibatches forget the first steps as t^-2.3
        engine.step(x, y)
    posterior = engine.posterior
    tolerance = 1.0 if batch == SIZE else 3.0  # a quarter of the data a step: twice the noise, and what the rows add
    found = posterior["network"]
    # the mean is an average over steps, of noise sd (α / 2)^½ = 0.1 posterior sds: α = 10 / 500
    assert ((found.mean - mean) * precision.sqrt()).abs().max() < 0.5 * tolerance
    torch.testing.assert_close(found.stddev * precision.sqrt(), torch.ones(WIDTH), atol=0.05 * tolerance, rtol=0)
    assert posterior["noise"].concentration == pytest.approx(float(noise.concentration))
    assert posterior["noise"].mean == pytest.approx(float(noise.mean), rel=0.01 * tolerance)
    assert posterior["weights"].concentration == pytest.approx(float(weights.concentration))
    assert posterior["weights"].mean == pytest.approx(float(weights.mean), rel=0.01 * tolerance)
    last = torch.tensor(posterior.history[-200:])
    error = 4 * last.std() / 200**0.5
    assert -0.1 - error < last.mean() - elbo < error  # the history's last steps are near the optimum, and below it


def test_prior_precisions_are_exact_given_the_weights() -> None:
    """λ of each Gamma is its conjugate update from E w² of q before the step: by layer, by unit, and about a mean."""
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    network = bayesian(module, seed=0)

    def model(x: Tensor, y: Tensor) -> None:
        units = pyro.sample("units", dist.Gamma(2.0, 3.0).expand([4, 1]).to_event(2))
        layers = pyro.sample("layers", dist.Gamma(1.5, 0.5).expand([2]).to_event(1))
        with pyro.plate("biases", 1):
            bias = pyro.sample("bias", dist.Gamma(1.0, 1.0))
        priors = {"0.weight": units, "0.bias": Prior(0.7, bias[0]), "2.weight": layers[0], "2.bias": layers[1]}
        mean = network.sample(priors)(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 0.3), obs=y)

    x, y = torch.randn(30, 3), torch.randn(30)
    engine = BLRInference(model)
    for _ in range(5):
        engine.step(x, y)
    before = engine.posterior["network"]
    engine.step(x, y)
    mean, variance = network.split(before.mean), network.split(before.variance)
    second = {name: (mean[name] - (0.7 if name == "0.bias" else 0.0)).square() + variance[name] for name in mean}
    after = engine.posterior
    torch.testing.assert_close(after["units"].base_dist.concentration, torch.full((4, 1), 2.0 + 1.5))
    torch.testing.assert_close(after["units"].base_dist.rate, 3.0 + 0.5 * second["0.weight"].sum(1, keepdim=True))
    layers = after["layers"].base_dist
    torch.testing.assert_close(layers.concentration, 1.5 + torch.tensor([2.0, 0.5]))
    torch.testing.assert_close(layers.rate, 0.5 + 0.5 * torch.stack([second["2.weight"].sum(), second["2.bias"].sum()]))
    torch.testing.assert_close(after["bias"].rate, 1.0 + 0.5 * second["0.bias"].sum().reshape(1))
    said = str(engine.explain(x, y))
    assert all(row.split("|")[2].strip() == "yes" for row in said.splitlines() if row.startswith(("units", "layers")))


def test_noise_precision_is_exact_given_the_draw() -> None:
    """With q(θ) a point in effect, every target is the conjugate update from the residuals there."""
    x, y = data()
    network = bayesian(linear(), prior=1e16)  # a step moves no mean by more than a part of 1e-8

    def model(x: Tensor, y: Tensor) -> None:
        noise = pyro.sample("noise", dist.Gamma(2.0, 1.0))
        mean = network(x).squeeze(-1)
        with pyro.plate("data", SIZE):
            pyro.sample("y", dist.Normal(mean, noise.rsqrt()), obs=y)

    engine = BLRInference(model)
    for _ in range(5):
        engine.step(x, y)
    residuals = y - x @ network.module.weight[0].detach()
    torch.testing.assert_close(engine.posterior["noise"].rate, 1 + 0.5 * residuals.square().sum(), rtol=1e-5, atol=0)
    torch.testing.assert_close(engine.posterior["noise"].concentration, torch.tensor(2.0 + SIZE / 2))
    assert "exact (proved), given" in str(engine.explain(x, y))


def test_a_falling_prior_precision_leaves_scales_finite() -> None:
    """The Hessian of a Student-t likelihood is negative far out, where the prior alone kept the precision positive."""
    x = torch.randn(60, 3)
    y = x.sum(1) + 0.3 * torch.randn(60)
    network = bayesian(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), seed=0)

    def model(x: Tensor, y: Tensor) -> None:
        scale = pyro.sample("scale", dist.HalfCauchy(1.0))
        noise = pyro.sample("noise", dist.Gamma(1.0, 1.0))
        mean = network.sample({"0.*": scale**-2})(x).squeeze(-1)
        with pyro.plate("data", 60):
            pyro.sample("y", dist.StudentT(4.0, mean, noise.rsqrt()), obs=y)

    engine = BLRInference(model)
    for _ in range(40):
        engine.step(x, y)
    history = engine.posterior.history
    assert min(history) > -1000 and sum(history[-10:]) > sum(history[4:14])
    assert engine.posterior["network"].stddev.max() < 100 and "quadrature" in str(engine.explain(x, y))


def test_the_bound_rises_on_average() -> None:
    x = torch.linspace(-2, 2, 300).unsqueeze(-1)
    y = torch.sin(2 * x[:, 0]) + 0.1 * torch.randn(300)
    network = bayesian(nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 1)), seed=1)

    def model(x: Tensor, y: Tensor) -> None:
        noise = pyro.sample("noise", dist.Gamma(1.0, 1.0))
        layers = pyro.sample("layers", dist.Gamma(1.0, 1.0).expand([2]).to_event(1))
        mean = network.sample({"0.*": layers[0], "2.*": layers[1]})(x).squeeze(-1)
        with pyro.plate("data", 300, subsample_size=150) as rows:
            pyro.sample("y", dist.Normal(mean[rows], noise.rsqrt()), obs=y[rows])

    engine = BLRInference(model)
    for _ in range(240):
        engine.step(x, y)
    means = [sum(engine.posterior.history[i : i + 60]) / 60 for i in (1, 60, 120, 180)]
    assert means == sorted(means)


def test_a_network_and_group_effects() -> None:
    """Linear and Gaussian throughout: means under mean field are those of the exact posterior."""
    groups, x = torch.arange(SIZE) % 8, data()[0]
    y = x @ torch.tensor([1.0, -2.0, 0.5, 0.0]) + torch.randn(8)[groups] + 0.5 * torch.randn(SIZE)
    network = bayesian(linear(), seed=0, trust=1.0, decay=30.0)  # the start is 70 standard deviations away

    def model(x: Tensor, y: Tensor) -> None:
        with pyro.plate("groups", 8):
            effects = pyro.sample("effects", dist.Normal(0.0, 1.0))
        mean = network(x).squeeze(-1) + effects[groups]
        with pyro.plate("data", SIZE):
            pyro.sample("y", dist.Normal(mean, 0.5), obs=y)

    design = torch.cat([x, nn.functional.one_hot(groups).to(x)], 1)
    precision = 4 * design.T @ design + torch.eye(WIDTH + 8)
    exact = torch.linalg.solve(precision, 4 * design.T @ y)
    engine = BLRInference(model)
    for _ in range(300):
        engine.step(x, y)
    posterior = engine.posterior
    found = torch.cat([posterior["network"].mean, posterior["effects"].mean])
    # five times the noise of the mean, (α / 2)^½ with α = 30 / 330
    assert ((found - exact) * precision.diagonal().sqrt()).abs().max() < 1.0
    torch.testing.assert_close(posterior["effects"].stddev, precision.diagonal()[WIDTH:].rsqrt(), rtol=1e-6, atol=0)


# -- the same as the loop --------------------------------------------------------------------------------------


def classifier() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(WIDTH, 6), nn.Tanh(), nn.Linear(6, 3))


@pytest.mark.parametrize("curvature", ["auto", "labels", "price", "examples"])
def test_steps_are_those_of_the_optimizer_in_a_loop(curvature: str) -> None:
    x, labels = data()[0], torch.randint(3, (SIZE,))
    ours, theirs = classifier(), classifier()
    network = bayesian(ours, prior=2.0, seed=3, curvature=curvature)

    def model(x: Tensor, y: Tensor) -> None:
        logits = network(x)
        with pyro.plate("data", SIZE, subsample=torch.arange(len(x))):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    engine = BLRInference(model)
    optimizer = BLROptimizer(theirs.parameters(), num_data=SIZE, prior_precision=2.0, seed=3, curvature=curvature)
    for step in range(30):
        rows = torch.arange(25) + 25 * (step % 8)

        def closure(rows: Tensor = rows) -> Any:
            return Categorical(logits=theirs(x[rows])), labels[rows]

        engine.step(x[rows], labels[rows])
        optimizer.step(closure)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    sds = torch.cat([optimizer.stddev(parameter).flatten() for parameter in theirs.parameters()])
    torch.testing.assert_close(engine.posterior["network"].stddev, sds)


# -- the posterior ---------------------------------------------------------------------------------------------


def fitted(steps: int = 20) -> tuple[BLRInference, Any, tuple[Tensor, Tensor]]:
    x, y = data()
    network = bayesian(linear(), seed=0)
    engine = BLRInference(relevance(network))
    for _ in range(steps):
        engine.step(x, y)
    return engine, network, (x, y)


def test_the_posterior_saves_loads_and_samples(tmp_path: Path) -> None:
    engine, network, _ = fitted()
    posterior = engine.posterior
    posterior.save(tmp_path / "q.safetensors")
    loaded = Posterior.load(tmp_path / "q.safetensors")
    for name in ("network", "noise", "weights"):
        assert torch.equal(loaded[name].mean, posterior[name].mean)
    draws = posterior.sample(3)
    assert draws["network"].shape == (3, WIDTH) and draws["noise"].shape == (3,)
    assert network.split(draws["network"])["weight"].shape == (3, 1, WIDTH)
    torch.testing.assert_close(
        network.module.weight[0].detach(), posterior["network"].mean
    )  # the module is at the mean


def test_the_guide_is_the_posterior() -> None:
    engine, _, (x, y) = fitted()
    found = Predictive(engine.model, guide=engine.guide, num_samples=500, return_sites=["network", "noise"])(x, y)
    mean, sd = engine.posterior["network"].mean, engine.posterior["network"].stddev
    assert ((found["network"].reshape(500, -1).mean(0) - mean) / sd).abs().max() < 4 / 500**0.5
    state = engine.guide.state_dict()
    other, _, _ = fitted(3)
    other.guide.load_state_dict(state)
    other.step(x, y)
    engine.step(x, y)
    for name in ("noise", "weights"):
        assert abs(float(other.posterior[name].mean / engine.posterior[name].mean) - 1) < 0.2


def test_to_arviz() -> None:
    engine, _, _ = fitted()
    exported = engine.posterior.to_arviz(num_samples=10)
    assert exported.posterior["network"].shape[-1] == WIDTH


def test_run_returns_the_posterior() -> None:
    x, y = data()
    engine = BLRInference(relevance(bayesian(linear(), seed=0)))
    posterior = engine.run(x, y, max_steps=15, progress=False)
    assert posterior.num_steps == 15 and "max_steps" in posterior.stop_reason
    state = torch.get_rng_state()
    assert math.isfinite(engine.evaluate_loss(x, y))
    assert torch.equal(torch.get_rng_state(), state)


# -- modules as they come --------------------------------------------------------------------------------------


def observed(network: Any, scale: float = 0.5) -> Callable:
    def model(x: Tensor, y: Tensor) -> None:
        mean = network(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, scale), obs=y)

    return model


class Unused(nn.Module):
    """A layer of which nothing depends."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(WIDTH, 1), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_what_no_loss_depends_on_keeps_its_prior() -> None:
    x, y = data()
    module = Unused()
    before = module.spare.weight.clone()
    network = bayesian(module, prior={"spare.weight": Prior(0.5, 4.0), "*": 1.0}, seed=0, curvature="price")
    alone = bayesian(nn.Linear(WIDTH, 1), seed=0, curvature="price")
    alone.module.load_state_dict(module.used.state_dict())
    losses = []
    for one in (network, alone):
        engine = BLRInference(observed(one))
        losses.append([engine.step(x, y) for _ in range(5)])
        if one is network:
            parts = network.split(torch.stack([engine.posterior["network"].mean, engine.posterior["network"].stddev]))
            torch.testing.assert_close(parts["spare.weight"][0], torch.full((5, 5), 0.5))
            torch.testing.assert_close(parts["spare.weight"][1], torch.full((5, 5), 0.5))
    assert torch.equal(module.spare.weight, before)
    torch.testing.assert_close(*map(torch.tensor, losses))  # KL(prior | prior) is zero


def test_an_exception_or_nan_changes_nothing() -> None:
    x, y = data()
    network, bad = bayesian(linear(), seed=0), [False]
    inner = relevance(network)

    def model(x: Tensor, y: Tensor) -> None:
        inner(x, y)
        if bad[0]:
            raise RuntimeError("after the draw")

    engine = BLRInference(model)
    for _ in range(3):
        engine.step(x, y)
    before, state = {name: x.clone() for name, x in engine.guide.naturals.items()}, torch.get_rng_state()
    weight, optimizer = network.module.weight.clone(), network.module.weight
    bad[0] = True
    with pytest.raises(RuntimeError, match="after the draw"):
        engine.step(x, y)
    bad[0] = False
    with pytest.raises(ValueError, match="site 'y': found a log probability that is not finite"):
        engine.step(x, torch.full_like(y, math.inf))
    assert torch.equal(weight, optimizer) and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], x) for name, x in engine.guide.naturals.items())
    engine.step(x, y)


class Mixed(nn.Module):
    """A channels-last convolution, a float64 head over bfloat16 features, frozen and tied parameters, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 4, 3, dtype=torch.float32).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(4, dtype=torch.float32)
        self.narrow = nn.Linear(4, 4, dtype=torch.bfloat16)
        self.again = nn.Linear(4, 4, dtype=torch.bfloat16)
        self.again.weight = self.narrow.weight
        self.head = nn.Linear(4, 1)
        self.head.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        features = self.norm(self.convolution(x)).mean((2, 3)).bfloat16()
        return self.head(self.again(torch.relu(self.narrow(features))).double())


def test_frozen_tied_mixed_dtypes_channels_last_and_buffers() -> None:
    module = Mixed()
    network = bayesian(module, seed=0, prior=10.0)
    assert "again.weight" not in network.exposed.parameters and "head.bias" not in network.exposed.parameters
    bias = module.head.bias.clone()
    x, y = torch.randn(16, 1, 5, 5, dtype=torch.float32), torch.randn(16)
    engine = BLRInference(observed(network))
    losses = [engine.step(x, y) for _ in range(60)]
    assert all(map(math.isfinite, losses)) and sum(losses[-10:]) < sum(losses[1:11])
    assert module.again.weight is module.narrow.weight and torch.equal(module.head.bias, bias)
    assert module.narrow.weight.dtype == torch.bfloat16 and module.norm.num_batches_tracked > 60
    assert module.convolution.weight.is_contiguous(memory_format=torch.channels_last)


def test_compile_autocast_and_checkpoints_keep_working() -> None:
    """Against the module as it is: the same numbers where the arithmetic is, finite ones in bfloat16."""

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(WIDTH, 8), nn.Linear(8, 1)

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.utils.checkpoint.checkpoint(lambda x: torch.tanh(self.inner(x)), x, use_reentrant=False)
            return self.outer(hidden)

    def plain() -> nn.Module:
        torch.manual_seed(5)
        return nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, 1))

    x, y = data()
    checkpointed = Checkpointed()
    checkpointed.load_state_dict(dict(zip(checkpointed.state_dict(), plain().state_dict().values(), strict=True)))
    losses = {}
    modules = {"plain": plain(), "compiled": torch.compile(plain(), backend="eager"), "checkpointed": checkpointed}
    for name, module in modules.items():
        engine = BLRInference(observed(bayesian(module, seed=0)))
        losses[name] = torch.tensor([engine.step(x, y) for _ in range(8)])
    torch.testing.assert_close(losses["compiled"], losses["plain"])
    torch.testing.assert_close(losses["checkpointed"], losses["plain"])
    for enabled in (False, True):
        engine = BLRInference(observed(bayesian(plain().float(), seed=0)))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses[f"{enabled}"] = torch.tensor([engine.step(x.float(), y.float()) for _ in range(8)])
    torch.testing.assert_close(losses["True"][0], losses["False"][0], rtol=0.02, atol=0)  # bfloat16 has 8 bits
    assert losses["True"].isfinite().all() and losses["True"].diff().abs().min() > 1e-3  # each draw is seen


def test_methods_beside_forward_work_at_the_mean_and_at_draws() -> None:
    class Generator(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step = nn.Linear(1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.step(x)

        def generate(self, x: Tensor) -> Tensor:
            return torch.cat([x := self.step(x) for _ in range(3)])

    module = Generator()
    network = bayesian(module, seed=0)
    engine = BLRInference(observed(network))
    x, y = torch.randn(20, 1), torch.randn(20)
    for _ in range(5):
        engine.step(x, y)
    mean = module.generate(torch.ones(1, 1))
    with network.at(engine.posterior.sample()["network"]) as drawn:
        assert not torch.equal(drawn.generate(torch.ones(1, 1)), mean)
    assert torch.equal(module.generate(torch.ones(1, 1)), mean)


def test_parameters_that_are_points_go_to_optim() -> None:
    """The noise as a `pyro.param`, the first layer not exposed."""
    x, y = data()
    network = bayesian(nn.Sequential(nn.Linear(WIDTH, 3), nn.Linear(3, 1)), expose="1.*", seed=0)

    def model(x: Tensor, y: Tensor) -> None:
        scale = pyro.param("scale", torch.tensor(3.0), constraint=dist.constraints.positive)
        mean = network(x).squeeze(-1)
        with pyro.plate("data", SIZE):
            pyro.sample("y", dist.Normal(mean, scale), obs=y)

    engine = BLRInference(model, optim=pyro.optim.Adam({"lr": 0.05}))
    losses = [engine.step(x, y) for _ in range(150)]
    assert pyro.param("scale") < 1.0 and losses[-1] < losses[1]
    assert set(engine.explain(x, y).optimised) == {"scale", "network.0.weight", "network.0.bias"}


def test_the_likelihood_of_a_factor_statement_takes_prices_curvature() -> None:
    x, y = data()
    network = bayesian(linear(), seed=0)

    def model(x: Tensor, y: Tensor) -> None:
        residuals = y - network(x).squeeze(-1)
        pyro.factor("likelihood", -2 * residuals.square().sum(), has_rsample=False)
        with pyro.plate("data", SIZE):
            pyro.sample("z", dist.Normal(residuals, 1e3), obs=torch.zeros(SIZE))

    engine = BLRInference(model)
    for _ in range(5):
        engine.step(x, y)
    assert "curvature: Price" in " ".join(str(engine.explain(x, y)).split())


# -- what is refused -------------------------------------------------------------------------------------------


def refused(model: Callable, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        BLRInference(model).step()


def test_what_a_network_cannot_be_in_is_refused() -> None:
    network, x = bayesian(linear()), torch.randn(5, WIDTH)

    def in_a_plate() -> None:
        with pyro.plate("many", 3):
            network(x)

    def scaled() -> None:
        with pyro.poutine.scale(scale=0.5):
            network(x)

    def twice() -> None:
        network(x), network(x)

    def unobserved() -> None:
        network(x)

    refused(in_a_plate, "sampled inside plates \\['many'\\]")
    refused(scaled, "inside poutine.scale or poutine.mask")
    refused(twice, "a second statement of the network")
    refused(unobserved, "found 0 data whose distribution depends on the network 'network'")
