"""Regressions: ruggedness and wealth by five guides, working memory, counts, growth of variants."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoDiagonalNormal, AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule, PyroSample
from pyro.optim import Adam, ClippedAdam
from torch import Tensor, nn
from torch.distributions import constraints

from acceptance.scripts import Script, program

positive = constraints.positive


def nations() -> tuple[Tensor, Tensor, Tensor]:
    """170 nations (is African, ruggedness, log GDP), drawn from the fit that the tutorial prints."""
    african = (torch.arange(170) < 49).float()
    rugged = dist.Gamma(1.2, 0.9).sample((170,))
    mean = 9.18 - 1.85 * african - 0.19 * rugged + 0.35 * african * rugged
    return african, rugged, dist.Normal(mean, 0.95).sample()


def wealth(is_cont_africa: Tensor, ruggedness: Tensor, log_gdp: Tensor) -> None:
    a = pyro.sample("a", dist.Normal(0.0, 10.0))
    b_a = pyro.sample("bA", dist.Normal(0.0, 1.0))
    b_r = pyro.sample("bR", dist.Normal(0.0, 1.0))
    b_ar = pyro.sample("bAR", dist.Normal(0.0, 1.0))
    sigma = pyro.sample("sigma", dist.Uniform(0.0, 10.0))
    mean = a + b_a * is_cont_africa + b_r * ruggedness + b_ar * is_cont_africa * ruggedness
    with pyro.plate("data", len(ruggedness)):
        pyro.sample("obs", dist.Normal(mean, sigma), obs=log_gdp)


@program("wealth of nations", "intro_long.ipynb", "AutoNormal")
def wealth_autonormal() -> Script:
    return Script(wealth, AutoNormal(wealth), nations(), Adam({"lr": 0.02}), steps=1000)


@program("wealth of nations, correlated", "intro_long.ipynb", "AutoMultivariateNormal")
def wealth_multivariate() -> Script:
    return Script(wealth, AutoMultivariateNormal(wealth), nations(), Adam({"lr": 0.02}), steps=1000)


@program("wealth of nations, by hand", "intro_long.ipynb", "Normals with indexed parameters, LogNormal of fixed scale")
def wealth_by_hand() -> Script:
    def guide(is_cont_africa: Tensor, ruggedness: Tensor, log_gdp: Tensor) -> None:
        a_loc = pyro.param("a_loc", lambda: torch.tensor(0.0))
        a_scale = pyro.param("a_scale", lambda: torch.tensor(1.0), constraint=positive)
        sigma_loc = pyro.param("sigma_loc", lambda: torch.tensor(0.0))
        loc = pyro.param("weights_loc", lambda: torch.randn(3))
        scale = pyro.param("weights_scale", lambda: torch.ones(3), constraint=positive)
        pyro.sample("a", dist.Normal(a_loc, a_scale))
        pyro.sample("bA", dist.Normal(loc[0], scale[0]))
        pyro.sample("bR", dist.Normal(loc[1], scale[1]))
        pyro.sample("bAR", dist.Normal(loc[2], scale[2]))
        pyro.sample("sigma", dist.LogNormal(sigma_loc, torch.tensor(0.05)))

    return Script(wealth, guide, nations(), Adam({"lr": 0.02}), steps=1000)


@program("regression as a PyroModule", "bayesian_regression.ipynb", "AutoDiagonalNormal")
def regression_module() -> Script:
    class BayesianRegression(PyroModule):
        def __init__(self, inputs: int, outputs: int):
            super().__init__()
            self.linear = PyroModule[nn.Linear](inputs, outputs)
            self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([outputs, inputs]).to_event(2))
            self.linear.bias = PyroSample(dist.Normal(0.0, 10.0).expand([outputs]).to_event(1))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            sigma = pyro.sample("sigma", dist.Uniform(0.0, 10.0))
            mean = self.linear(x).squeeze(-1)
            with pyro.plate("data", x.shape[0]):
                pyro.sample("obs", dist.Normal(mean, sigma), obs=y)
            return mean

    african, rugged, log_gdp = nations()
    x = torch.stack([african, rugged, african * rugged], -1)
    model = BayesianRegression(3, 1)
    return Script(model, AutoDiagonalNormal(model), (x, log_gdp), Adam({"lr": 0.03}), steps=1500)


@program("working memory", "working_memory.ipynb", "Normal")
def working_memory() -> Script:
    def model(lengths: Tensor) -> None:
        with pyro.plate_stack("plate", lengths.shape[:-1]):
            theta = pyro.sample("theta", dist.Normal(torch.tensor(7.0), torch.tensor(2.0))).unsqueeze(-1)
            pyro.sample("y", dist.Bernoulli(logits=theta - lengths).to_event(1))

    def guide(lengths: Tensor) -> None:
        mean = pyro.param("posterior_mean", torch.tensor(7.0))
        sd = pyro.param("posterior_sd", torch.tensor(2.0), constraint=positive)
        pyro.sample("theta", dist.Normal(mean, sd))

    conditioned = pyro.condition(model, {"y": torch.tensor([1.0, 1.0, 0.0])})
    return Script(conditioned, guide, (torch.tensor([5.0, 7.0, 9.0]),), Adam({"lr": 0.001}), steps=5000)


def counts() -> tuple[Tensor, Tensor]:
    """One feature and a hundred counts that grow with it."""
    x = torch.randn(100, 1)
    return x, dist.Poisson((3.0 + 0.5 * x[:, 0]).exp()).sample()


def overdispersed(features: Tensor, counts: Tensor) -> None:
    n, p = features.shape
    scale = pyro.sample("scale", dist.LogNormal(0, 1))
    coef = pyro.sample("coef", dist.Normal(0, scale).expand([p]).to_event(1))
    rate = pyro.deterministic("rate", torch.nn.functional.softplus(coef @ features.T))
    concentration = pyro.sample("concentration", dist.LogNormal(0, 1))
    with pyro.plate("bins", n):
        pyro.sample("counts", dist.GammaPoisson(concentration, rate), obs=counts)


@program("GammaPoisson regression", "predictive_deterministic.ipynb", "AutoNormal")
def overdispersed_autonormal() -> Script:
    optim = Adam({"lr": 0.005, "betas": (0.90, 0.999)})
    return Script(overdispersed, AutoNormal(overdispersed), counts(), optim, steps=3001)


@program(
    "GammaPoisson regression, by hand",
    "predictive_deterministic.ipynb",
    "points, and a Normal whose scale is one",
    points=True,
)
def overdispersed_by_hand() -> Script:
    def guide(features: Tensor, counts: Tensor) -> None:
        scale = pyro.sample("scale", dist.Delta(pyro.param("scale_param", torch.tensor(0.1), constraint=positive)))
        loc = pyro.param("loc_param", torch.tensor(0.0))
        pyro.sample("coef", dist.Normal(loc, scale).expand([features.shape[1]]).to_event(1))
        concentration = pyro.param("concentration_param", torch.tensor(0.1), constraint=positive)
        pyro.sample("concentration", dist.Delta(concentration))

    optim = Adam({"lr": 0.005, "betas": (0.90, 0.999)})
    return Script(overdispersed, guide, counts(), optim, steps=5001)


def decaying(lr: float, steps: int) -> ClippedAdam:
    return ClippedAdam({"lr": lr, "lrd": 0.1 ** (1 / steps)})


@program("growth of two variants", "logistic-growth.ipynb", "AutoNormal")
def growth() -> Script:
    times = torch.arange(25.0) * 14 / 5.5
    logits = torch.tensor([3.0, -4.0]) + torch.tensor([0.0, 0.2]) * times[:, None]
    totals = dist.Poisson(400.0).sample((25,)).int()
    variants = torch.stack([dist.Multinomial(int(n), logits=x).sample() for n, x in zip(totals, logits, strict=True)])

    def model() -> None:
        with pyro.plate("lineages", 2, dim=-1):
            rate = pyro.sample("rate", dist.Normal(0, 1))
            init = pyro.sample("init", dist.Normal(0, 1))
        probs = torch.softmax(init + rate * times[:, None], dim=-1)
        with pyro.plate("time", 25, dim=-2):
            law = dist.Multinomial(probs=probs.unsqueeze(-2), validate_args=False)
            pyro.sample("obs", law, obs=variants.unsqueeze(-2))

    return Script(model, AutoNormal(model, init_scale=0.01), (), decaying(0.1, 1501), steps=1501)


def regions() -> Tensor:
    """Counts of two variants at 20 times in 30 regions."""
    times = torch.arange(20.0) * 14 / 5.5
    start = torch.stack([torch.randn(30), torch.randn(30) - 4], -1)
    rate = torch.stack([torch.zeros(30), 0.2 + 0.02 * torch.randn(30)], -1)
    logits = start + rate * times[:, None, None]
    return torch.stack([dist.Multinomial(50, logits=x).sample() for x in logits])


def regional(two_levels: bool) -> Callable:
    def model(counts: Tensor) -> None:
        t, r, n = counts.shape
        lineages = pyro.plate("lineages", n, dim=-1)
        places, instants = pyro.plate("region", r, dim=-2), pyro.plate("time", t, dim=-3)
        rate_scale = pyro.sample("rate_scale", dist.LogNormal(-4, 2)) if two_levels else None
        init_scale = pyro.sample("init_scale", dist.LogNormal(0, 2))
        with lineages:
            rate = pyro.sample("rate_loc", dist.Normal(0, 1))
        with places, lineages:
            if two_levels:
                rate = pyro.sample("rate", dist.Normal(rate, rate_scale))
            init = pyro.sample("init", dist.Normal(0, init_scale))
        logits = init + rate * (torch.arange(float(t)) * 14 / 5.5)[:, None, None]
        with instants, places:
            law = dist.Multinomial(logits=logits.unsqueeze(-2), validate_args=False)
            pyro.sample("obs", law, obs=counts.unsqueeze(-2))

    return model


@program("growth in regions", "logistic-growth.ipynb", "AutoNormal")
def growth_in_regions() -> Script:
    model = regional(two_levels=False)
    return Script(model, AutoNormal(model, init_scale=0.01), (regions(),), decaying(0.1, 3001), steps=3001)


@program("growth in regions, two levels", "logistic-growth.ipynb", "AutoNormal")
def growth_in_regions_two_levels() -> Script:
    model = regional(two_levels=True)
    return Script(model, AutoNormal(model, init_scale=0.01), (regions(),), decaying(0.1, 3001), steps=3001)
