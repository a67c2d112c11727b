"""Programs of a handful of unknowns: coins and eight schools."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.testing.fakes import NonreparameterizedBeta
from pyro.infer import TraceGraph_ELBO
from pyro.infer.autoguide import AutoDelta
from pyro.optim import Adam
from torch import Tensor
from torch.distributions import constraints, transforms

from acceptance.scripts import Script, program

positive, unit = constraints.positive, constraints.unit_interval


def tosses() -> Tensor:
    return torch.tensor([1.0] * 6 + [0.0] * 4)


@program("coin", "svi_part_i.ipynb", "Beta")
def coin() -> Script:
    def model(data: list[Tensor]) -> None:
        f = pyro.sample("latent_fairness", dist.Beta(torch.tensor(10.0), torch.tensor(10.0)))
        for i in range(len(data)):
            pyro.sample(f"obs_{i}", dist.Bernoulli(f), obs=data[i])

    def guide(data: list[Tensor]) -> None:
        alpha = pyro.param("alpha_q", torch.tensor(15.0), constraint=positive)
        beta = pyro.param("beta_q", torch.tensor(15.0), constraint=positive)
        pyro.sample("latent_fairness", dist.Beta(alpha, beta))

    optim = Adam({"lr": 0.0005, "betas": (0.90, 0.999)})
    return Script(model, guide, (list(tosses()),), optim, steps=2000)


@program("coin, score function", "svi_part_iii.ipynb", "NonreparameterizedBeta, decaying baseline", minutes=True)
def coin_by_score_function() -> Script:
    data = tosses()

    def model(use_decaying_avg_baseline: bool) -> None:
        f = pyro.sample("latent_fairness", dist.Beta(10.0, 10.0))
        with pyro.plate("data_plate"):
            pyro.sample("obs", dist.Bernoulli(f), obs=data)

    def guide(use_decaying_avg_baseline: bool) -> None:
        alpha = pyro.param("alpha_q", torch.tensor(15.0), constraint=positive)
        beta = pyro.param("beta_q", torch.tensor(15.0), constraint=positive)
        baseline = {"use_decaying_avg_baseline": use_decaying_avg_baseline, "baseline_beta": 0.90}
        pyro.sample("latent_fairness", NonreparameterizedBeta(alpha, beta), infer={"baseline": baseline})

    optim = Adam({"lr": 0.0005, "betas": (0.93, 0.999)})
    return Script(model, guide, (True,), optim, TraceGraph_ELBO(), steps=10000)


def tossed(data: Tensor) -> None:
    f = pyro.sample("latent_fairness", dist.Beta(10.0, 10.0))
    with pyro.plate("data", data.size(0)):
        pyro.sample("obs", dist.Bernoulli(f), obs=data)


@program("coin, MAP", "mle_map.ipynb", "Delta", points=True, draws=1)
def coin_map() -> Script:
    def guide(data: Tensor) -> None:
        f = pyro.param("f_map", torch.tensor(0.5), constraint=unit)
        pyro.sample("latent_fairness", dist.Delta(f))

    return Script(tossed, guide, (tosses(),), Adam({"lr": 0.005}), steps=201)


@program("coin, MAP by AutoDelta", "mle_map.ipynb", "AutoDelta", points=True, draws=1)
def coin_autodelta() -> Script:
    return Script(tossed, AutoDelta(tossed), (tosses(),), Adam({"lr": 0.005}), steps=201)


@program("coin, maximum likelihood", "mle_map.ipynb", "empty: a parameter of the model", points=True, draws=1)
def coin_maximum_likelihood() -> Script:
    def model(data: Tensor) -> None:
        f = pyro.param("latent_fairness", torch.tensor(0.5), constraint=unit)
        with pyro.plate("data", data.size(0)):
            pyro.sample("obs", dist.Bernoulli(f), obs=data)

    def guide(data: Tensor) -> None:
        pass

    return Script(model, guide, (tosses(),), Adam({"lr": 0.005}), steps=201)


@program("coin, prior masked", "mle_map.ipynb", "AutoDelta", points=True, draws=1)
def coin_masked() -> Script:
    def model(data: Tensor) -> None:
        f = pyro.sample("latent_fairness", dist.Beta(10.0, 10.0).mask(False))
        with pyro.plate("data", data.size(0)):
            pyro.sample("obs", dist.Bernoulli(f), obs=data)

    return Script(model, AutoDelta(model), (tosses(),), Adam({"lr": 0.005}), steps=201)


@program("eight schools", "examples/eight_schools/svi.py", "Normals, LogNormal")
def eight_schools() -> Script:
    y = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12])
    sigma = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18])

    def model(data: Tensor) -> None:
        y, sigma = data[:, 0], data[:, 1]
        with pyro.plate("data", 8):
            eta = pyro.sample("eta", dist.Normal(torch.zeros(8), torch.ones(8)))
            mu = pyro.sample("mu", dist.Normal(torch.zeros(1), 10 * torch.ones(1)))
            tau = pyro.sample("tau", dist.HalfCauchy(scale=25 * torch.ones(1)))
            pyro.sample("obs", dist.Normal(mu + tau * eta, sigma), obs=y)

    def guide(data: Tensor) -> None:
        eta = dist.Normal(
            pyro.param("loc_eta", torch.randn(8)),
            pyro.param("scale_eta", 0.1 * torch.rand(8), constraint=positive),
        )
        mu = dist.Normal(
            pyro.param("loc_mu", torch.randn(1)),
            pyro.param("scale_mu", 0.1 * torch.rand(1), constraint=positive),
        )
        log_tau = dist.Normal(
            pyro.param("loc_logtau", torch.randn(1)),
            pyro.param("scale_logtau", 0.1 * torch.rand(1), constraint=positive),
        )
        with pyro.plate("data", 8):
            pyro.sample("eta", eta)
            pyro.sample("mu", mu)
            pyro.sample("tau", dist.TransformedDistribution(log_tau, transforms=transforms.ExpTransform()))

    return Script(model, guide, (torch.stack([y, sigma], dim=1),), Adam({"lr": 0.01}), steps=1000)
