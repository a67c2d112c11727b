"""Mixtures: the tutorial's, its enumerated guide, Dirichlet processes of Gaussians and of Poissons, the toy of three bits, topics."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDelta
from pyro.ops.indexing import Vindex
from pyro.optim import Adam, ClippedAdam
from torch import Tensor, nn
from torch.distributions import constraints

from acceptance.scripts import Script, program

positive, simplex = constraints.positive, constraints.simplex


@config_enumerate
def two_components(data: Tensor) -> None:
    weights = pyro.sample("weights", dist.Dirichlet(0.5 * torch.ones(2)))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 2.0))
    with pyro.plate("components", 2):
        locs = pyro.sample("locs", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(data)):
        assignment = pyro.sample("assignment", dist.Categorical(weights))
        pyro.sample("obs", dist.Normal(locs[assignment], scale), obs=data)


def five_points() -> tuple[Tensor, Any]:
    """The tutorial's data, and its point for the globals, from the best of a hundred starts."""
    data, elbo = torch.tensor([0.0, 1.0, 10.0, 11.0, 12.0]), TraceEnum_ELBO(max_plate_nesting=1)

    def start(site: Any) -> Tensor:
        if site["name"] == "weights":
            return torch.ones(2) / 2
        if site["name"] == "scale":
            return (data.var() / 2).sqrt()
        return data[torch.multinomial(torch.ones(5) / 5, 2)]

    def initialised(seed: int) -> tuple[float, Any]:
        pyro.set_rng_seed(seed)
        pyro.clear_param_store()
        guide = AutoDelta(poutine.block(two_components, expose=["weights", "locs", "scale"]), init_loc_fn=start)
        return elbo.loss(two_components, guide, data), guide

    _, best = min((initialised(seed)[0], seed) for seed in range(100))
    return data, initialised(best)[1]


@program("Gaussian mixture, MAP", "gmm.ipynb", "AutoDelta, assignments summed out", points=True, draws=1)
def mixture_map() -> Script:
    data, guide = five_points()
    optim = Adam({"lr": 0.1, "betas": (0.8, 0.99)})
    return Script(two_components, guide, (data,), optim, TraceEnum_ELBO(max_plate_nesting=1), steps=200)


@program("Gaussian mixture, assignments", "gmm.ipynb", "a fixed point, Categorical enumerated", points=True, draws=1)
def mixture_assignments() -> Script:
    data, point = five_points()
    loss = TraceEnum_ELBO(max_plate_nesting=1)
    optim = Adam({"lr": 0.1, "betas": (0.8, 0.99)})
    trained = pyro.infer.SVI(two_components, point, optim, loss)
    for _ in range(200):
        trained.step(data)

    @config_enumerate
    def guide(data: Tensor) -> None:
        with poutine.block(hide_types=["param"]):
            point(data)
        with pyro.plate("data", len(data)):
            probs = pyro.param("assignment_probs", torch.ones(len(data), 2) / 2, constraint=simplex)
            pyro.sample("assignment", dist.Categorical(probs))

    return Script(two_components, guide, (data,), Adam({"lr": 0.2, "betas": (0.8, 0.99)}), loss, steps=200)


def sticks(beta: Tensor) -> Tensor:
    rest = (1 - beta).cumprod(-1)
    return nn.functional.pad(beta, (0, 1), value=1) * nn.functional.pad(rest, (1, 0), value=1)


@program(
    "Dirichlet process of Gaussians", "dirichlet_process_mixture.ipynb", "Beta, Normals of fixed scale, Categorical"
)
def process_of_gaussians() -> Script:
    centres = torch.tensor([[-8.0, -8.0], [8.0, 8.0], [1.5, 2.0], [-0.5, 1.0]])
    data = torch.cat([dist.MultivariateNormal(centre, torch.eye(2)).sample((50,)) for centre in centres])
    size, alpha = 6, 0.1

    def model(data: Tensor) -> None:
        with pyro.plate("beta_plate", size - 1):
            beta = pyro.sample("beta", dist.Beta(1, alpha))
        with pyro.plate("mu_plate", size):
            mu = pyro.sample("mu", dist.MultivariateNormal(torch.zeros(2), 5 * torch.eye(2)))
        with pyro.plate("data", len(data)):
            z = pyro.sample("z", dist.Categorical(sticks(beta)))
            pyro.sample("obs", dist.MultivariateNormal(mu[z], torch.eye(2)), obs=data)

    def guide(data: Tensor) -> None:
        kappa = pyro.param("kappa", lambda: dist.Uniform(0, 2).sample([size - 1]), constraint=positive)
        tau = pyro.param("tau", lambda: dist.MultivariateNormal(torch.zeros(2), 3 * torch.eye(2)).sample([size]))
        phi = pyro.param("phi", lambda: dist.Dirichlet(torch.ones(size) / size).sample([len(data)]), constraint=simplex)
        with pyro.plate("beta_plate", size - 1):
            pyro.sample("beta", dist.Beta(torch.ones(size - 1), kappa))
        with pyro.plate("mu_plate", size):
            pyro.sample("mu", dist.MultivariateNormal(tau, torch.eye(2)))
        with pyro.plate("data", len(data)):
            pyro.sample("z", dist.Categorical(phi))

    return Script(model, guide, (data,), Adam({"lr": 0.05}), Trace_ELBO(), steps=1000)


@program("Dirichlet process of Poissons", "dirichlet_process_mixture.ipynb", "Beta, Gamma, Categorical")
def process_of_poissons() -> Script:
    rates = torch.tensor([10.0, 45.0, 100.0])[torch.arange(289) % 3]
    data, size, alpha = dist.Poisson(rates).sample(), 20, 1.1

    def model(data: Tensor) -> None:
        with pyro.plate("beta_plate", size - 1):
            beta = pyro.sample("beta", dist.Beta(1, alpha))
        with pyro.plate("lambda_plate", size):
            rate = pyro.sample("lambda", dist.Gamma(3, 0.05))
        with pyro.plate("data", len(data)):
            z = pyro.sample("z", dist.Categorical(sticks(beta)))
            pyro.sample("obs", dist.Poisson(rate[z]), obs=data)

    def guide(data: Tensor) -> None:
        kappa = pyro.param("kappa", lambda: dist.Uniform(0, 2).sample([size - 1]), constraint=positive)
        tau_0 = pyro.param("tau_0", lambda: dist.Uniform(0, 5).sample([size]), constraint=positive)
        tau_1 = pyro.param("tau_1", lambda: dist.LogNormal(-1, 1).sample([size]), constraint=positive)
        phi = pyro.param("phi", lambda: dist.Dirichlet(torch.ones(size) / size).sample([len(data)]), constraint=simplex)
        with pyro.plate("beta_plate", size - 1):
            pyro.sample("beta", dist.Beta(torch.ones(size - 1), kappa))
        with pyro.plate("lambda_plate", size):
            pyro.sample("lambda", dist.Gamma(tau_0, tau_1))
        with pyro.plate("data", len(data)):
            pyro.sample("z", dist.Categorical(phi))

    return Script(model, guide, (data,), Adam({"lr": 0.05}), Trace_ELBO(), steps=1500)


@program("three bits, the middle one summed out", "examples/toy_mixture_model_discrete_enumeration.py", "Betas")
def three_bits() -> Script:
    size = 10000
    prior = {
        "A": torch.tensor([1.0, 10.0]),
        "B": torch.tensor([[10.0, 1.0], [1.0, 10.0]]),
        "C": torch.tensor([[10.0, 1.0], [1.0, 10.0]]),
    }
    p_a = dist.Beta(prior["A"][0], prior["A"][1]).sample()
    p_b, p_c = (dist.Beta(prior[name][:, 0], prior[name][:, 1]).sample() for name in "BC")
    a = dist.Bernoulli(p_a.expand(size)).sample()
    c = dist.Bernoulli(p_c[dist.Bernoulli(p_b[a.long()]).sample().long()]).sample()

    @config_enumerate
    def model(prior: dict[str, Tensor], obs: dict[str, Tensor], num_obs: int) -> None:
        p_a = pyro.sample("p_A", dist.Beta(1, 1))
        p_b = pyro.sample("p_B", dist.Beta(torch.ones(2), torch.ones(2)).to_event(1))
        p_c = pyro.sample("p_C", dist.Beta(torch.ones(2), torch.ones(2)).to_event(1))
        with pyro.plate("data_plate", num_obs):
            a = pyro.sample("A", dist.Bernoulli(p_a.expand(num_obs)), obs=obs["A"])
            b = pyro.sample("B", dist.Bernoulli(Vindex(p_b)[a.long()]), infer={"enumerate": "parallel"})
            pyro.sample("C", dist.Bernoulli(Vindex(p_c)[b.long()]), obs=obs["C"])

    def guide(prior: dict[str, Tensor], obs: dict[str, Tensor], num_obs: int) -> None:
        a = pyro.param("a", prior["A"], constraint=positive)
        pyro.sample("p_A", dist.Beta(a[0], a[1]))
        b = pyro.param("b", prior["B"], constraint=positive)
        pyro.sample("p_B", dist.Beta(b[:, 0], b[:, 1]).to_event(1))
        c = pyro.param("c", prior["C"], constraint=positive)
        pyro.sample("p_C", dist.Beta(c[:, 0], c[:, 1]).to_event(1))

    loss = TraceEnum_ELBO(max_plate_nesting=1)
    return Script(model, guide, (prior, {"A": a, "C": c}, size), Adam({"lr": 0.01}), loss, steps=4000)


TOPICS, WORDS, DOCUMENTS, LENGTH, BATCH = 8, 256, 500, 64, 32  # published: 1,024 words and 1,000 documents


def topics(data: Tensor | None = None, batch_size: int | None = None) -> Tensor:
    with pyro.plate("topics", TOPICS):
        weights = pyro.sample("topic_weights", dist.Gamma(1.0 / TOPICS, 1.0))
        words = pyro.sample("topic_words", dist.Dirichlet(torch.ones(WORDS) / WORDS))
    with pyro.plate("documents", DOCUMENTS) as ind:
        if data is not None:
            data = data[:, ind]
        mixture = pyro.sample("doc_topics", dist.Dirichlet(weights))
        with pyro.plate("words", LENGTH):
            topic = pyro.sample("word_topics", dist.Categorical(mixture), infer={"enumerate": "parallel"})
            return pyro.sample("doc_words", dist.Categorical(words[topic]), obs=data)


def topic_posteriors() -> None:
    weights = pyro.param("topic_weights_posterior", lambda: torch.ones(TOPICS), constraint=positive)
    words = pyro.param(
        "topic_words_posterior", lambda: torch.ones(TOPICS, WORDS), constraint=constraints.greater_than(0.5)
    )
    with pyro.plate("topics", TOPICS):
        pyro.sample("topic_weights", dist.Gamma(weights, 1.0))
        pyro.sample("topic_words", dist.Dirichlet(words))


@program("topics, amortised", "examples/lda.py", "Gamma of fixed rate, Dirichlet, points by a network", minutes=True)
def topics_amortised() -> Script:
    with torch.no_grad():
        data = topics()
    layers: list[nn.Module] = []
    for inputs, outputs in ((WORDS, 100), (100, 100), (100, TOPICS)):
        layer = nn.Linear(inputs, outputs)
        layer.weight.data.normal_(0, 0.001)
        layer.bias.data.normal_(0, 0.001)
        layers += [layer, nn.Sigmoid()]
    predictor = nn.Sequential(*layers, nn.Softmax(dim=-1))

    def guide(data: Tensor, batch_size: int | None = None) -> None:
        topic_posteriors()
        pyro.module("predictor", predictor)
        with pyro.plate("documents", DOCUMENTS, batch_size) as ind:
            rows = data[:, ind]
            counts = torch.zeros(WORDS, len(ind)).scatter_add(0, rows, torch.ones(rows.shape))
            pyro.sample("doc_topics", dist.Delta(predictor(counts.transpose(0, 1)), event_dim=1))

    loss, batch = TraceEnum_ELBO(max_plate_nesting=2), (data, BATCH)
    optim = ClippedAdam({"lr": 0.01})
    return Script(topics, guide, (data,), optim, loss, steps=1000, batches=lambda _: batch)


@program("topics, not amortised", "examples/lda.py", "Gamma of fixed rate, Dirichlets", minutes=True)
def topics_not_amortised() -> Script:
    with torch.no_grad():
        data = topics()

    def guide(data: Tensor, batch_size: int | None = None) -> None:
        topic_posteriors()
        mixtures = pyro.param("doc_topics_posterior", lambda: torch.ones(DOCUMENTS, TOPICS), constraint=positive)
        with pyro.plate("documents", DOCUMENTS, batch_size) as ind:
            pyro.sample("doc_topics", dist.Dirichlet(mixtures[ind]))

    loss, batch = TraceEnum_ELBO(max_plate_nesting=2), (data, BATCH)
    return Script(topics, guide, (data,), ClippedAdam({"lr": 0.01}), loss, steps=1000, batches=lambda _: batch)
