"""The baseball example's four models on its 18 players (Efron and Morris 1975). Published with NUTS; SVI's settings are ours."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam
from torch import Tensor

from acceptance.scripts import Script, program

SOURCE = "examples/baseball.py"


def players() -> tuple[Tensor, Tensor]:
    """At bats and hits."""
    hits = torch.tensor([18.0, 17, 16, 15, 14, 14, 13, 12, 11, 11, 10, 10, 10, 10, 10, 9, 8, 7])
    return torch.full((18,), 45.0), hits


def script(model) -> Script:
    return Script(model, AutoNormal(model), players(), Adam({"lr": 0.01}), steps=2000)


@program("baseball, fully pooled", SOURCE, "AutoNormal")
def fully_pooled() -> Script:
    def model(at_bats: Tensor, hits: Tensor) -> None:
        phi = pyro.sample("phi", dist.Uniform(torch.tensor(0.0), torch.tensor(1.0)))
        with pyro.plate("num_players", len(at_bats)):
            pyro.sample("obs", dist.Binomial(at_bats, phi), obs=hits)

    return script(model)


@program("baseball, not pooled", SOURCE, "AutoNormal")
def not_pooled() -> Script:
    def model(at_bats: Tensor, hits: Tensor) -> None:
        with pyro.plate("num_players", len(at_bats)):
            phi = pyro.sample("phi", dist.Uniform(torch.tensor(0.0), torch.tensor(1.0)))
            pyro.sample("obs", dist.Binomial(at_bats, phi), obs=hits)

    return script(model)


@program("baseball, partially pooled", SOURCE, "AutoNormal")
def partially_pooled() -> Script:
    def model(at_bats: Tensor, hits: Tensor) -> None:
        m = pyro.sample("m", dist.Uniform(torch.tensor(0.0), torch.tensor(1.0)))
        kappa = pyro.sample("kappa", dist.Pareto(torch.tensor(1.0), torch.tensor(1.5)))
        with pyro.plate("num_players", len(at_bats)):
            phi = pyro.sample("phi", dist.Beta(m * kappa, (1 - m) * kappa))
            pyro.sample("obs", dist.Binomial(at_bats, phi), obs=hits)

    return script(model)


@program("baseball, partially pooled logits", SOURCE, "AutoNormal")
def partially_pooled_with_logit() -> Script:
    def model(at_bats: Tensor, hits: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(torch.tensor(-1.0), torch.tensor(1.0)))
        scale = pyro.sample("scale", dist.HalfCauchy(scale=torch.tensor(1.0)))
        with pyro.plate("num_players", len(at_bats)):
            alpha = pyro.sample("alpha", dist.Normal(loc, scale))
            pyro.sample("obs", dist.Binomial(at_bats, logits=alpha), obs=hits)

    return script(model)
