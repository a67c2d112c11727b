"""`bayesian`: one sample site for a module's parameters, as an ordinary site of Pyro's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

from pyro_blr.nn import Prior, bayesian


def data() -> tuple[Tensor, Tensor]:
    x = torch.randn(12, 3)
    return x, x @ torch.tensor([1.0, -2.0, 0.5]) + 0.1 * torch.randn(12)


def regression(network: Any) -> Callable:
    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        mean = network(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(mean, 0.5), obs=y)

    return model


def by_hand(x: Tensor, y: Tensor | None = None) -> Tensor:
    """The same for Linear(3, 1) with a precision of 4 for weights and of 1 about 2 for the bias."""
    weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 0.5).to_event(1))
    bias = pyro.sample("bias", dist.Normal(2.0, 1.0))
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Normal((x * weight).sum(-1) + bias, 0.5), obs=y)


PRIOR = {"weight": 4.0, "bias": Prior(2.0, 1.0)}


def log_joint(model: Callable, values: dict[str, Tensor], *args: Any) -> Tensor:
    return poutine.trace(poutine.condition(model, values)).get_trace(*args).log_prob_sum()


# -- an ordinary site ------------------------------------------------------------------------------------------


def test_a_linear_module_is_the_regression_written_by_hand() -> None:
    x, y = data()
    weights = torch.randn(4, requires_grad=True)
    ours = log_joint(regression(bayesian(nn.Linear(3, 1), PRIOR)), {"network": weights}, x, y)
    theirs = log_joint(by_hand, {"weight": weights[:3], "bias": weights[3]}, x, y)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(joint, weights)[0] for joint in (ours, theirs)))


def test_precisions_may_be_sites_by_layer_and_by_unit() -> None:
    module, x = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1)), data()[0]
    network = bayesian(module, {"*.bias": 1.0, "*": 9.0})

    def model() -> None:
        units = pyro.sample("units", dist.Gamma(2.0, 1.0).expand([4, 1]).to_event(2))
        layer = pyro.sample("layer", dist.Gamma(2.0, 1.0))
        network.sample({"0.weight": units, "1.weight": layer})(x)

    trace = poutine.trace(model).get_trace()
    found = network.split(1 / trace.nodes["network"]["fn"].stddev ** 2)
    units, layer = (trace.nodes[name]["value"] for name in ("units", "layer"))
    torch.testing.assert_close(found["0.weight"], units.expand(4, 3))
    torch.testing.assert_close(found["1.weight"], layer.expand(1, 4))
    assert (found["0.bias"] == 1).all() and (found["1.bias"] == 1).all()


@pytest.mark.parametrize("vectorized", [False, True])
def test_svi_learns_through_the_site(vectorized: bool) -> None:
    model = regression(bayesian(nn.Linear(3, 1)))
    guide = AutoNormal(model)
    loss = Trace_ELBO(num_particles=4, vectorize_particles=vectorized)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), loss)
    x, y = data()
    losses = [svi.step(x, y) for _ in range(150)]
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def test_nuts_draws_the_weights_of_a_linear_gaussian_model() -> None:
    x, y = data()
    design = torch.cat([x, torch.ones(12, 1)], 1)
    covariance = (4 * design.T @ design + torch.eye(4)).inverse()
    sampler = MCMC(NUTS(regression(bayesian(nn.Linear(3, 1)))), num_samples=120, warmup_steps=80, disable_progbar=True)
    sampler.run(x, y)
    draws = sampler.get_samples()["network"]
    error = (draws.mean(0) - 4 * covariance @ design.T @ y) / covariance.diagonal().sqrt()
    assert error.abs().max() < 4 / 30**0.5  # four standard errors at a quarter of the draws effective


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive_is_the_module_at_each_draw(parallel: bool) -> None:
    x, _ = data()
    network = bayesian(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)))

    def model(x: Tensor) -> None:
        logits = network(x)
        pyro.deterministic("logits", logits, event_dim=1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=logits))

    draws = torch.randn(6, network.exposed.size)
    found = Predictive(model, {"network": draws}, parallel=parallel)(x)
    assert found["y"].shape == (6, 12)
    for draw, logits in zip(draws, found["logits"].reshape(6, 12, 2), strict=True):
        with network.at(draw) as module:
            torch.testing.assert_close(logits, module(x))


def test_predictive_draws_from_the_prior_in_parallel() -> None:
    x, _ = data()
    found = Predictive(regression(bayesian(nn.Linear(3, 1))), num_samples=7, parallel=True)(x)
    assert found["y"].shape == (7, 12)


def test_several_calls_at_one_draw() -> None:
    network = bayesian(nn.Linear(3, 1))
    x, _ = data()

    def model() -> tuple[Tensor, Tensor]:
        drawn = network.sample()
        return drawn(x), drawn(x[:2])

    whole, part = model()
    torch.testing.assert_close(whole[:2], part)


# -- which parameters ------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """An embedding whose weight is also the head's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embedding(x))


def test_tied_weights_are_one_part_and_change_together() -> None:
    network = bayesian(Tied())
    assert network.exposed.size == 15
    value, x = torch.randn(15), torch.arange(5)
    out = poutine.condition(lambda: network(x), {"network": value})()
    torch.testing.assert_close(out, value.reshape(5, 3) @ value.reshape(5, 3).T)


def test_buffers_frozen_parameters_and_dtypes_are_kept() -> None:
    module = nn.Sequential(nn.Linear(3, 4).bfloat16(), nn.BatchNorm1d(4).float(), nn.Linear(4, 2).float())
    module[2].bias.requires_grad_(False)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    network = bayesian(module, expose=["0.*", "2.*"])
    assert list(network.exposed.parameters) == ["0.weight", "0.bias", "2.weight"]
    assert network.sample().weights.dtype == torch.float32
    parts = network.split(torch.randn(5, network.exposed.size))
    assert {name: part.dtype for name, part in parts.items()} == {
        "0.weight": torch.bfloat16,
        "0.bias": torch.bfloat16,
        "2.weight": torch.float32,
    }
    assert parts["0.weight"].shape == (5, 4, 3)
    with pytest.raises(RuntimeError), network.at(torch.randn(network.exposed.size)):
        assert not torch.equal(module[0].weight, before["0.weight"])
        raise RuntimeError("inside")
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert type(module) is nn.Sequential


def test_channels_last_parameters() -> None:
    module = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    network = bayesian(module)
    weights, x = torch.randn(network.exposed.size), torch.randn(2, 3, 5, 5)
    out = poutine.condition(lambda: network(x), {"network": weights})()
    expected = nn.functional.conv2d(x, weights[:108].reshape(4, 3, 3, 3), weights[108:])
    torch.testing.assert_close(out, expected)
    with network.at(weights):
        assert module.weight.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(module(x), expected)


def test_what_is_not_exposed_is_learned_as_points() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    model = regression(bayesian(module, expose="1.*"))
    svi = SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    before = module[0].weight.clone()
    svi.step(*data())
    assert set(pyro.get_param_store()) >= {"network.0.weight", "network.0.bias"}
    assert not torch.equal(module[0].weight, before)


def test_a_predicate_chooses_by_name_and_parameter() -> None:
    network = bayesian(nn.Linear(3, 1), expose=lambda name, parameter: parameter.dim() == 2)
    assert list(network.exposed.parameters) == ["weight"]


# -- what is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"expose": "conv*"}, "found no parameter"),
        ({"expose": ["weight", "conv*"]}, "pattern 'conv\\*' that matches no parameter"),
        ({"prior": -1.0}, "prior precision: found -1.0"),
        ({"prior": float("nan")}, "expected a finite number"),
        ({"prior": {"weight": 1.0}}, "found none for parameter 'bias'"),
        ({"prior": {"weights": 1.0, "*": 1.0}}, "found pattern 'weights'"),
    ],
)
def test_what_has_no_meaning_is_refused(arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        bayesian(nn.Linear(3, 1), **arguments)


def test_a_prior_of_another_shape_names_the_parameter() -> None:
    network = bayesian(nn.Linear(3, 2), {"weight": torch.ones(7), "*": 1.0})
    with pytest.raises(
        ValueError, match=r"parameter 'weight': found shape \(7,\), expected one that broadcasts to \(2, 3\)"
    ):
        network.sample()


def test_frozen_parameters_are_not_exposed() -> None:
    module = nn.Linear(3, 1)
    module.bias.requires_grad_(False)
    with pytest.raises(ValueError, match="are frozen"):
        bayesian(module, expose=["weight", "bias"])
