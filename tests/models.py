"""The models of the oracles, as a Pyro user writes them; priors as `expected.json` states them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from oracles import oracle
from torch import Tensor


def normal_mean_precision(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1e3**0.5))
    tau = pyro.sample("tau", dist.Gamma(1e-3, 1e-3))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, tau.rsqrt()), obs=y)


def linear_regression(x: Tensor, y: Tensor) -> None:
    b = pyro.sample("b", dist.Normal(0.0, 1.0).expand([x.shape[-1]]).to_event(1))
    tau = pyro.sample("tau", dist.Gamma(1.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x @ b, tau.rsqrt()), obs=y)


def ard_regression(x: Tensor, y: Tensor) -> None:
    with pyro.plate("coefficients", x.shape[-1]):
        alpha = pyro.sample("alpha", dist.Gamma(1e-3, 1e-3))
    b = pyro.sample("b", dist.Normal(0.0, alpha.rsqrt()).to_event(1))
    tau = pyro.sample("tau", dist.Gamma(1e-3, 1e-3))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x @ b, tau.rsqrt()), obs=y)


def gamma_poisson(y: Tensor) -> None:
    with pyro.plate("groups", y.shape[1], dim=-1):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("counts", y.shape[0], dim=-2):
            pyro.sample("y", dist.Poisson(rate), obs=y)


def gaussian_mixture(y: Tensor, num_components: int = 5) -> None:
    dimension = y.shape[-1]
    pi = pyro.sample("pi", dist.Dirichlet(torch.full((num_components,), 0.01)))
    with pyro.plate("components", num_components):
        m = pyro.sample(
            "m", dist.MultivariateNormal(torch.zeros(dimension), precision_matrix=0.01 * torch.eye(dimension))
        )
        L = pyro.sample("L", dist.Wishart(torch.tensor(2.0), precision_matrix=2.0 * torch.eye(dimension)))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(pi))
        pyro.sample("y", dist.MultivariateNormal(m[z], precision_matrix=L[z]), obs=y)


def bernoulli_mixture(x: Tensor, num_components: int = 5) -> None:
    pi = pyro.sample("pi", dist.Dirichlet(torch.full((num_components,), 0.01)))
    with pyro.plate("components", num_components, dim=-1), pyro.plate("features", x.shape[-1], dim=-2):
        p = pyro.sample("p", dist.Beta(0.5, 0.5))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(pi))
        pyro.sample("x", dist.Bernoulli(p.T[z]).to_event(1), obs=x)


def lda(doc: Tensor, word: Tensor, num_topics: int = 4, num_documents: int = 30, num_words: int = 40) -> None:
    with pyro.plate("documents", num_documents):
        theta = pyro.sample("theta", dist.Dirichlet(torch.ones(num_topics)))
    with pyro.plate("topics", num_topics):
        phi = pyro.sample("phi", dist.Dirichlet(torch.ones(num_words)))
    with pyro.plate("tokens", len(word)):
        z = pyro.sample("z", dist.Categorical(theta[doc]))
        pyro.sample("word", dist.Categorical(phi[z]), obs=word)


ORACLES: dict[str, Callable] = {
    model.__name__: model
    for model in (
        normal_mean_precision,
        linear_regression,
        ard_regression,
        gaussian_mixture,
        bernoulli_mixture,
        lda,
        gamma_poisson,
    )
}

_STARTS = {"initial_assignment": "z", "initial_phi": "phi"}


def oracle_case(name: str) -> tuple[Callable, tuple[Tensor, ...], dict[str, Tensor], dict[str, Any]]:
    """(model, its arguments, the stated initial values, what an independent program reached)."""
    data, expected = oracle(name)
    tensors = {key: torch.as_tensor(value) for key, value in data.items()}
    init = {_STARTS[key]: tensors.pop(key) for key in list(tensors) if key in _STARTS}
    return ORACLES[name], tuple(tensors.values()), init, expected
