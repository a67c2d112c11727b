"""Models written for SVI, most after Pyro's tutorials: replacing the constructor alone runs, and is right."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam, PyroSample
from pyro.ops.indexing import Vindex
from pyro.optim import Adam, ClippedAdam
from torch import Tensor
from torch.distributions import constraints

from pyro_blr import BLRInference


def script(
    model: Callable,
    *args: Any,
    steps: int = 30,
    guide: Any = None,
    optim: Any = None,
    loss: Any = None,
    **options: Any,
) -> Any:
    """What an SVI script does, with one name changed."""
    svi = BLRInference(model, guide, optim or Adam({"lr": 0.02}), loss or Trace_ELBO(), **options)
    losses = [svi.step(*args) for _ in range(steps)]
    assert all(isinstance(loss, float) and math.isfinite(loss) for loss in losses)
    assert math.isfinite(svi.evaluate_loss(*args))
    return svi


def predict(model: Callable, svi: Any, *args: Any, sites: list[str], num_samples: int = 200) -> dict[str, Tensor]:
    return_sites = None if "_RETURN" not in sites else sites
    drawn = Predictive(model, guide=svi.guide, num_samples=num_samples, return_sites=return_sites)(*args)
    for site in sites:
        assert drawn[site].shape[0] == num_samples and torch.isfinite(drawn[site].double()).all(), site
    return drawn


# 1 -- the coin of the first SVI tutorial: a loop of observations


def test_coin() -> None:
    def model(data: list[Tensor]) -> None:
        f = pyro.sample("latent_fairness", dist.Beta(torch.tensor(10.0), torch.tensor(10.0)))
        for i in range(len(data)):
            pyro.sample(f"obs_{i}", dist.Bernoulli(f), obs=data[i])

    data = [torch.tensor(1.0)] * 6 + [torch.tensor(0.0)] * 4
    svi = script(model, data, steps=1)
    q = svi.posterior["latent_fairness"]
    assert float(q.concentration1) == pytest.approx(16.0, abs=1e-12)
    assert float(q.concentration0) == pytest.approx(14.0, abs=1e-12)
    drawn = predict(model, svi, data, sites=["latent_fairness"], num_samples=2000)
    assert float(drawn["latent_fairness"].mean()) == pytest.approx(16 / 30, abs=0.02)


# 2 -- the noisy scale of the introduction


def test_scale_conditioned() -> None:
    def scale(guess: float) -> Tensor:
        weight = pyro.sample("weight", dist.Normal(guess, 1.0))
        return pyro.sample("measurement", dist.Normal(weight, 0.75))

    conditioned = poutine.condition(scale, data={"measurement": torch.tensor(9.5)})
    svi = script(conditioned, 8.5, steps=2)
    assert float(svi.posterior["weight"].mean) == pytest.approx((8.5 + 9.5 / 0.5625) / (1 + 1 / 0.5625), abs=1e-10)
    predict(scale, svi, 8.5, sites=["weight", "measurement"])


# 3 -- Bayesian regression I: terrain ruggedness, scalar sites and a HalfNormal or Uniform scale


def ruggedness() -> tuple[Tensor, Tensor, Tensor]:
    is_africa = (torch.arange(60) % 3 == 0).double()
    ruggedness = torch.rand(60) * 3
    log_gdp = 9.2 - 1.9 * is_africa - 0.2 * ruggedness + 0.35 * is_africa * ruggedness + 0.9 * torch.randn(60)
    return is_africa, ruggedness, log_gdp


def terrain(is_cont_africa: Tensor, ruggedness: Tensor, log_gdp: Tensor | None = None) -> Tensor:
    a = pyro.sample("a", dist.Normal(0.0, 10.0))
    b_a = pyro.sample("bA", dist.Normal(0.0, 1.0))
    b_r = pyro.sample("bR", dist.Normal(0.0, 1.0))
    b_ar = pyro.sample("bAR", dist.Normal(0.0, 1.0))
    sigma = pyro.sample("sigma", dist.Uniform(0.0, 10.0))
    mean = a + b_a * is_cont_africa + b_r * ruggedness + b_ar * is_cont_africa * ruggedness
    with pyro.plate("data", len(ruggedness)):
        return pyro.sample("obs", dist.Normal(mean, sigma), obs=log_gdp)


def test_regression_with_scalar_sites() -> None:
    """Mean field has the posterior's means: penalised least squares at the fitted noise."""
    data = ruggedness()
    svi = script(terrain, *data, steps=60)
    noise = float(svi.posterior["sigma"].mean) ** 2
    x = torch.stack([torch.ones(60), data[0], data[1], data[0] * data[1]], -1)
    prior = torch.diag(torch.tensor([0.01, 1.0, 1.0, 1.0]))
    exact = torch.linalg.solve(x.T @ x / noise + prior, x.T @ data[2] / noise)
    found = torch.stack([svi.posterior[name].mean for name in ("a", "bA", "bR", "bAR")])
    assert torch.allclose(found, exact, atol=0.1)
    drawn = predict(terrain, svi, *data[:2], sites=["a", "sigma", "obs"])
    assert drawn["obs"].shape == (200, 60)


# 4 -- Bayesian regression with PyroModule, PyroSample


class BayesianRegression(PyroModule):
    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.linear = PyroModule[torch.nn.Linear](in_features, out_features)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([out_features, in_features]).to_event(2))
        self.linear.bias = PyroSample(dist.Normal(0.0, 10.0).expand([out_features]).to_event(1))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        sigma = pyro.sample("sigma", dist.Uniform(0.0, 10.0))
        mean = self.linear(x).squeeze(-1)
        with pyro.plate("data", x.shape[0]):
            pyro.sample("obs", dist.Normal(mean, sigma), obs=y)
        return mean


def test_regression_as_a_module() -> None:
    is_africa, rugged, y = ruggedness()
    x = torch.stack([is_africa, rugged, is_africa * rugged], -1)
    model = BayesianRegression(3, 1)
    svi = script(model, x, y, steps=40)
    drawn = predict(model, svi, x, sites=["linear.weight", "linear.bias", "sigma", "obs", "_RETURN"])
    residual = (drawn["_RETURN"].mean(0) - y).square().mean().sqrt()
    assert float(residual) < 1.2
    summary = svi.guide.quantiles([0.05, 0.5, 0.95])
    assert set(summary) == {"linear.weight", "linear.bias", "sigma"}


# 5 -- Gaussian mixture of the GMM tutorial: shared scale, LogNormal prior, an enumerated assignment


def test_gaussian_mixture_with_enumerated_assignments() -> None:
    data = torch.tensor([0.0, 1.0, 10.0, 11.0, 12.0], dtype=torch.float64)

    @pyro.infer.config_enumerate
    def model(data: Tensor) -> None:
        weights = pyro.sample("weights", dist.Dirichlet(0.5 * torch.ones(2)))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 2.0))
        with pyro.plate("components", 2):
            locs = pyro.sample("locs", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(data)):
            assignment = pyro.sample("assignment", dist.Categorical(weights))
            pyro.sample("obs", dist.Normal(locs[assignment], scale), obs=data)

    svi = script(model, data, steps=60, loss=TraceEnum_ELBO(max_plate_nesting=1))
    locs = svi.posterior["locs"].mean.sort().values
    assert torch.allclose(locs, torch.tensor([0.5, 11.0]), atol=0.4)
    predict(model, svi, data, sites=["weights", "scale", "locs"])


# 6 -- LDA of Pyro's examples: words in a nested plate, documents subsampled


def test_lda_with_subsampled_documents() -> None:
    topics = torch.tensor([[0.4, 0.4, 0.1, 0.05, 0.05], [0.05, 0.05, 0.1, 0.4, 0.4]])
    mixing = dist.Dirichlet(torch.tensor([0.3, 0.3])).sample((40,))
    words = dist.Categorical(mixing @ topics).sample((64,))

    def model(words: Tensor) -> None:
        with pyro.plate("topics", 2):
            topic_words = pyro.sample("topic_words", dist.Dirichlet(torch.ones(5) / 5))
        with pyro.plate("documents", 40, subsample_size=10) as index:
            doc_topics = pyro.sample("doc_topics", dist.Dirichlet(torch.ones(2)))
            with pyro.plate("words", 64):
                word_topics = pyro.sample("word_topics", dist.Categorical(doc_topics))
                # Predictive gives samples a dim for every plate: `topic_words[word_topics]` fails there.
                probs = Vindex(topic_words)[..., word_topics, :]
                pyro.sample("doc_words", dist.Categorical(probs), obs=words[:, index])

    # About one start in three ends in another maximum of the bound, whatever the version of torch makes of the seed.
    optim, loss = ClippedAdam({"lr": 0.01}), TraceEnum_ELBO(max_plate_nesting=2)
    starts = [script(model, words, steps=20, optim=optim, loss=loss) for _ in range(4)]
    svi = min(starts, key=lambda start: sum(start.evaluate_loss(words) for _ in range(5)))
    found = svi.posterior["topic_words"].mean
    found = found if found[0, 0] > found[1, 0] else found.flip(0)
    assert float((found - topics).abs().max()) < 0.12
    predict(model, svi, words, sites=["topic_words", "doc_topics"], num_samples=20)


def test_lda_over_tokens() -> None:
    topics = torch.tensor([[0.4, 0.4, 0.1, 0.05, 0.05], [0.05, 0.05, 0.1, 0.4, 0.4]])
    mixing = dist.Dirichlet(torch.tensor([0.3, 0.3])).sample((20,))
    document = torch.arange(20).repeat_interleave(60)
    word = dist.Categorical(mixing[document] @ topics).sample()

    def model(document: Tensor, word: Tensor | None = None) -> None:
        with pyro.plate("documents", 20):
            theta = pyro.sample("theta", dist.Dirichlet(torch.ones(2)))
        with pyro.plate("topics", 2):
            phi = pyro.sample("phi", dist.Dirichlet(torch.ones(5)))
        with pyro.plate("tokens", len(document)):
            z = pyro.sample("z", dist.Categorical(theta[document]))
            pyro.sample("word", dist.Categorical(phi[z]), obs=word)

    svi = script(model, document, word, steps=60)
    found = svi.posterior["phi"].mean
    found = found if found[0, 0] > found[1, 0] else found.flip(0)
    assert float((found - topics).abs().max()) < 0.1
    drawn = predict(model, svi, document, sites=["phi", "theta", "word"], num_samples=50)
    assert drawn["word"].shape == (50, 1200)


# 7 -- eight schools


def test_eight_schools() -> None:
    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])

    def model(sigma: Tensor, y: Tensor | None = None) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("schools", 8):
            eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
            pyro.sample("obs", dist.Normal(mu + tau * eta, sigma), obs=y)

    svi = script(model, sigma, y, steps=60)
    assert float(svi.posterior["mu"].mean) == pytest.approx(4.4, abs=0.8)  # 4.4 under NUTS
    drawn = predict(model, svi, sigma, sites=["mu", "tau", "eta", "obs"])
    assert drawn["obs"].shape == (200, 8)


# 8 -- empirical Bayes: pyro.param in the model


def test_a_parameter_of_the_model_is_learned() -> None:
    """theta_j ~ N(m, v), y_j ~ N(theta_j, 1): the evidence is N(m, v + 1), so v is the variance less one."""
    y = 3.0 + 2.0 * torch.randn(50)

    def model(y: Tensor) -> None:
        m = pyro.param("m", torch.tensor(0.0))
        v = pyro.param("v", torch.tensor(1.0), constraint=constraints.positive)
        with pyro.plate("groups", len(y)):
            theta = pyro.sample("theta", dist.Normal(m, v.sqrt()))
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y)

    svi = script(model, y, steps=600, optim=Adam({"lr": 0.05}))
    assert set(pyro.get_param_store().keys()) == {"m", "v"}
    assert pyro.param("m").item() == pytest.approx(float(y.mean()), abs=0.02)
    assert pyro.param("v").item() == pytest.approx(float(y.var(unbiased=False)) - 1, rel=0.05)
    evidence = dist.Normal(pyro.param("m"), (pyro.param("v") + 1).sqrt()).log_prob(y).sum()
    assert -svi.evaluate_loss(y) == pytest.approx(evidence.item(), abs=1e-2)
    predict(model, svi, y, sites=["theta"])


def test_parameters_of_a_module_are_learned() -> None:
    class Shift(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.shift = PyroParam(torch.tensor(0.0))
            self.linear = torch.nn.Linear(1, 1, bias=False)

        def forward(self, x: Tensor, y: Tensor) -> None:
            tau = pyro.sample("tau", dist.Gamma(2.0, 2.0))
            with pyro.plate("data", len(y)):
                pyro.sample("y", dist.Normal(self.linear(x).squeeze(-1) + self.shift, tau.rsqrt()), obs=y)

    x = torch.randn(80, 1)
    y = 2.0 * x[:, 0] + 1.0 + 0.3 * torch.randn(80)
    model = Shift()
    script(model, x, y, steps=400, optim=Adam({"lr": 0.05}))
    least_squares = torch.linalg.lstsq(torch.cat([x, torch.ones(80, 1)], -1), y).solution
    assert model.linear.weight.item() == pytest.approx(float(least_squares[0]), abs=0.01)
    assert model.shift.item() == pytest.approx(float(least_squares[1]), abs=0.01)


# 9 -- subsampled data, a global site


def test_subsampled_data() -> None:
    y = 1.5 + torch.randn(500)

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        with pyro.plate("data", 500, subsample_size=100) as index:
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y[index])

    svi = script(model, y, steps=200)
    assert float(svi.posterior["mu"].mean) == pytest.approx(float(y.mean()), abs=0.1)
    assert float(svi.posterior["mu"].stddev) == pytest.approx((500 + 0.01) ** -0.5, rel=1e-3)
    predict(model, svi, y, sites=["mu"])


def test_a_plate_over_given_rows() -> None:
    """`pyro.plate(..., subsample=...)` with data passed in batches, as in the scalable tutorials."""
    y = 1.5 + torch.randn(500)

    def model(index: Tensor, y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        with pyro.plate("data", 500, subsample=index):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    svi = BLRInference(model, None, Adam({"lr": 0.01}), Trace_ELBO())
    for _ in range(20):
        for index in torch.randperm(500).split(100):
            svi.step(index, y[index])
    assert float(svi.posterior["mu"].mean) == pytest.approx(float(y.mean()), abs=0.05)


# 10 -- poutine.scale, 11 -- poutine.mask, 12 -- poutine.condition and block


def base_model(y: Tensor | None = None, size: int = 30) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("data", size):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def test_scale_tempers_the_factors() -> None:
    """Under poutine.scale(0.5) the prior and the likelihood count half, the entropy in full."""
    y = 1.0 + torch.randn(30)
    svi = script(poutine.scale(base_model, scale=0.5), y, steps=3)
    q = svi.posterior["mu"]
    precision = 0.5 * (0.25 + 30)
    assert float(q.mean) == pytest.approx(0.5 * float(y.sum()) / precision, abs=1e-9)
    assert float(q.stddev) == pytest.approx(precision**-0.5, abs=1e-9)
    predict(base_model, svi, y, sites=["mu"])


def test_scaled_likelihood() -> None:
    y = 1.0 + torch.randn(30)

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("data", 30), poutine.scale(scale=10.0):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    svi = script(model, y, steps=2)
    assert float(svi.posterior["mu"].mean) == pytest.approx(10 * float(y.sum()) / 300.25, abs=1e-9)


def test_mask_on_ragged_sequences() -> None:
    lengths = torch.tensor([4, 2, 3])
    y = torch.randn(3, 4) + torch.tensor([[0.0], [2.0], [-2.0]])
    mask = torch.arange(4) < lengths[:, None]

    def model(y: Tensor) -> None:
        with pyro.plate("sequences", 3, dim=-2):
            mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
            with pyro.plate("times", 4, dim=-1), poutine.mask(mask=mask):
                pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    svi = script(model, y, steps=2)
    precision = lengths + 1 / 9
    expected = (y * mask).sum(-1) / precision
    assert torch.allclose(svi.posterior["mu"].mean[:, 0], expected, atol=1e-10)
    predict(model, svi, y, sites=["mu"])


def test_conditioned_and_blocked() -> None:
    def model() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(a, 1.0))
        pyro.sample("c", dist.Normal(b, 1.0))

    conditioned = pyro.condition(model, data={"c": torch.tensor(3.0), "a": torch.tensor(1.0)})
    svi = script(conditioned, steps=2)
    assert set(svi.posterior.natural) == {"b"}
    assert float(svi.posterior["b"].mean) == pytest.approx(2.0, abs=1e-12)
    drawn = predict(model, svi, sites=["b"])
    assert "a" in drawn  # the unconditioned model draws it
    hidden = poutine.block(pyro.condition(model, data={"c": torch.tensor(3.0), "b": torch.tensor(1.0)}), hide=["c"])
    alone = script(hidden, steps=2)
    assert float(alone.posterior["a"].mean) == pytest.approx(0.5, abs=1e-12)


# 13 -- missing data by obs_mask


def test_obs_mask() -> None:
    y = 2.0 + torch.randn(40)
    seen = torch.arange(40) % 4 != 0

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        with pyro.plate("data", 40):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y, obs_mask=seen)

    svi = script(model, y, steps=60)
    expected = float(y[seen].sum()) / (30 + 0.04)
    assert float(svi.posterior["mu"].mean) == pytest.approx(expected, abs=1e-4)
    drawn = predict(model, svi, y, sites=["mu", "y"])
    assert torch.equal(drawn["y"][:, seen], y[seen].expand(200, -1))


# 14 -- logistic regression, hierarchical radon-like model, count regression


def test_logistic_regression() -> None:
    x = torch.randn(200, 2)
    y = dist.Bernoulli(logits=x @ torch.tensor([1.5, -1.0])).sample()

    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)

    svi = script(model, x, y, steps=60)
    w = torch.zeros(2, requires_grad=True)
    mode = torch.optim.LBFGS([w], max_iter=100)

    def closure() -> Tensor:
        mode.zero_grad()
        loss = -dist.Bernoulli(logits=x @ w).log_prob(y).sum() + 0.5 * w.square().sum()
        loss.backward()
        return loss

    mode.step(closure)
    assert torch.allclose(svi.posterior["w"].mean, w.detach(), atol=0.1)
    predict(model, svi, x, sites=["w", "y"])


def test_hierarchical_intercepts() -> None:
    group = torch.arange(60) % 6
    truth = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0, 3.0])
    y = truth[group] + 0.5 * torch.randn(60)

    def model(group: Tensor, y: Tensor | None = None) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        spread = pyro.sample("spread", dist.Gamma(2.0, 2.0))
        with pyro.plate("groups", 6):
            theta = pyro.sample("theta", dist.Normal(mu, spread.rsqrt()))
        tau = pyro.sample("tau", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", len(group)):
            pyro.sample("y", dist.Normal(theta[group], tau.rsqrt()), obs=y)

    svi = script(model, group, y, steps=40, loss=TraceMeanField_ELBO())
    assert torch.allclose(svi.posterior["theta"].mean, truth, atol=0.5)
    drawn = predict(model, svi, group, sites=["mu", "theta", "y"])
    assert drawn["y"].shape == (200, 60)


# 15 -- guides of the user's own: ordinary gradients of the loss


def test_a_hand_written_guide() -> None:
    data = torch.tensor([1.0] * 6 + [0.0] * 4)

    def model(data: Tensor) -> None:
        f = pyro.sample("f", dist.Beta(10.0, 10.0))
        with pyro.plate("data", len(data)):
            pyro.sample("obs", dist.Bernoulli(f), obs=data)

    def guide(data: Tensor) -> None:
        a = pyro.param("a", torch.tensor(15.0), constraint=constraints.positive)
        b = pyro.param("b", torch.tensor(15.0), constraint=constraints.positive)
        pyro.sample("f", dist.Beta(a, b))

    svi = script(
        model,
        data,
        steps=1000,
        guide=guide,
        optim=Adam({"lr": 0.02}),
        loss=Trace_ELBO(num_particles=4, vectorize_particles=True),
    )
    a, b = pyro.param("a").item(), pyro.param("b").item()
    assert a / (a + b) == pytest.approx(16 / 30, abs=0.02)
    predict(model, svi, data, sites=["f"])


@pytest.mark.parametrize("autoguide", [AutoNormal, AutoDiagonalNormal])
def test_an_autoguide(autoguide: Callable) -> None:
    y = 1.5 + torch.randn(50)
    guide = autoguide(base_model)
    svi = script(base_model, y, 50, steps=400, guide=guide, optim=Adam({"lr": 0.05}))
    assert svi.guide is guide
    median = guide.median(y, 50)["mu"]
    assert float(median) == pytest.approx(float(y.sum()) / 50.25, abs=0.1)
    predict(base_model, svi, y, 50, sites=["mu"])


def test_an_amortised_guide() -> None:
    """z ~ N(0, 1), x ~ N(2 z, 1): the exact posterior mean 0.4 x is a linear encoder."""
    x = dist.Normal(0.0, 5.0**0.5).sample((64,))

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(1, 1)
            self.log_scale = torch.nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.linear(x.unsqueeze(-1)).squeeze(-1), self.log_scale.exp()

    encoder = Encoder()

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(2 * z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, scale = encoder(x)
            pyro.sample("z", dist.Normal(loc, scale))

    svi = script(model, x, steps=1500, guide=guide, optim=Adam({"lr": 0.02}))
    assert encoder.linear.weight.item() == pytest.approx(0.4, abs=0.05)
    assert encoder.log_scale.exp().item() == pytest.approx(0.2**0.5, abs=0.05)
    assert "encoder$$$linear.weight" in pyro.get_param_store()
    predict(model, svi, x, sites=["z"])


def test_no_optimiser_is_needed() -> None:
    y = 1.0 + torch.randn(30)
    svi = BLRInference(base_model)
    svi.step(y)
    assert float(svi.posterior["mu"].mean) == pytest.approx(float(y.sum()) / 30.25, abs=1e-12)


def test_data_that_the_program_says_not_to_check() -> None:
    """Grey pixels under a Bernoulli with `validate_args=False` (Pyro's VAE): Σ y and Σ (1 − y) are its counts."""
    pixels = torch.tensor([0.2, 0.9, 0.5])

    def model() -> None:
        p = pyro.sample("p", dist.Beta(2.0, 1.0))
        with pyro.plate("data", 3):
            pyro.sample("y", dist.Bernoulli(p, validate_args=False), obs=pixels)

    posterior = BLRInference(model).run(progress=False)
    assert torch.allclose(posterior.natural["p"], torch.tensor([2.0 - 1 + 1.6, 1.0 - 1 + 1.4]))


def test_a_plate_without_a_size() -> None:
    """It has as many elements as the data in it (the tutorial on score functions)."""
    bits = torch.tensor([1.0, 1.0, 0.0, 1.0])

    def model() -> None:
        p = pyro.sample("p", dist.Beta(2.0, 1.0))
        with pyro.plate("data"):
            pyro.sample("y", dist.Bernoulli(p), obs=bits)

    posterior = BLRInference(model).run(progress=False)
    assert torch.equal(posterior.natural["p"], torch.tensor([4.0, 1.0], dtype=torch.float64))
    assert posterior.sample((3,))["p"].shape == (3,)
