"""Real data with reference posteriors: the fourteen programs of posteriordb in Pyro, one function each.

The programs are Stan's. A flat prior is `ImproperUniform`; what Stan declares with bounds and no prior is uniform there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from oracles import posteriordb
from pyro.distributions import constraints
from torch import Tensor

Data = Mapping[str, Any]
Draws = Mapping[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One posterior: where its reference is, its model, and its scalars as functions of draws of the latents."""

    file: str
    model: Callable[[Data], None]
    scalars: Callable[[Draws, Data], dict[str, Tensor]]
    floor: float = 0.0  # the larger error of the best full-rank Gaussian: tests/benchmarks/floors.py
    linear: bool = False  # of the group that is held to the narrower bar
    form: str = ""  # where one posterior is written in two ways

    @property
    def name(self) -> str:
        return self.file.split("-")[0] + (f" ({self.form})" if self.form else "")

    @property
    def bar(self) -> float:
        """The largest error, in sds of the reference, that is near enough to what a Gaussian can do."""
        return max(0.10, self.floor + 0.03) if self.linear else max(0.20, self.floor + 0.05)


def reference_of(case: Case) -> tuple[dict[str, Any], dict[str, Any]]:
    """The data as tensors, and mean and sd of every scalar in 10,000 reference draws."""
    found = posteriordb(case.file)
    return as_tensors(found["data"]), found["reference"]


def errors(
    found: Mapping[str, Tensor], reference: Mapping[str, Any], weights: Tensor | None = None
) -> tuple[float, float]:
    """The largest |Δ mean| / sd and |Δ sd| / sd over the scalars, of draws that may be weighted."""
    mean_error, sd_error = 0.0, 0.0
    for name, wanted in reference.items():
        draws = found[name]
        share = torch.full_like(draws, 1 / len(draws)) if weights is None else weights
        mean = float((share * draws).sum())
        sd = float((share * (draws - mean) ** 2).sum().sqrt())
        mean_error = max(mean_error, abs(mean - wanted["mean"]) / wanted["sd"])
        sd_error = max(sd_error, abs(sd - wanted["sd"]) / wanted["sd"])
    return mean_error, sd_error


def as_tensors(data: Data) -> dict[str, Any]:
    """Lists as float64 tensors, numbers as they are."""
    return {k: torch.as_tensor(v, dtype=torch.float64) if isinstance(v, list) else v for k, v in data.items()}


def flat(name: str, *shape: int, support: constraints.Constraint = constraints.real) -> Tensor:
    """A site whose density is constant on its support."""
    event = shape if shape else ()
    wide = constraints.independent(support, len(event)) if event and support.event_dim == 0 else support
    return pyro.sample(name, dist.ImproperUniform(wide, (), event))


def named(draws: Draws, *vectors: str, scalars: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """`beta` of shape (S, 3) as beta[1], beta[2], beta[3], counted as Stan counts."""
    result = {f"{v}[{i + 1}]": draws[v][..., i] for v in vectors for i in range(draws[v].shape[-1])}
    return {**result, **{s: draws[s] for s in scalars}}


# -- linear regressions ------------------------------------------------------------------------------------


def flat_regression(x: Tensor, y: Tensor, sigma: Callable[[], Tensor]) -> None:
    """y = x β + noise, β without a prior."""
    beta = flat("beta", x.shape[-1])
    scale = sigma()
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(x @ beta, scale), obs=y)


def flat_scale() -> Tensor:
    return flat("sigma", support=constraints.positive)


def blr(data: Data) -> None:
    beta = pyro.sample("beta", dist.Normal(0.0, 10.0).expand([data["D"]]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(10.0))
    with pyro.plate("rows", data["N"]):
        pyro.sample("y", dist.Normal(data["X"] @ beta, sigma), obs=data["y"])


def kidscore_interaction(data: Data) -> None:
    high, iq = data["mom_hs"], data["mom_iq"]
    design = torch.stack([torch.ones_like(iq), high, iq, high * iq], -1)
    flat_regression(design, data["kid_score"], lambda: pyro.sample("sigma", dist.HalfCauchy(2.5)))


def logearn_interaction(data: Data) -> None:
    height, male = data["height"], data["male"]
    design = torch.stack([torch.ones_like(height), height, male, height * male], -1)
    flat_regression(design, data["earn"].log(), flat_scale)


def mesquite(data: Data) -> None:
    columns = [data[k] for k in ("diam1", "diam2", "canopy_height", "total_height", "density", "group")]
    flat_regression(torch.stack([torch.ones_like(columns[0]), *columns], -1), data["weight"], flat_scale)


def nes(data: Data) -> None:
    age = data["age_discrete"]
    ages = [(age == k).double() for k in (2, 3, 4)]
    columns = [data["real_ideo"], data["race_adj"], *ages, data["educ1"], data["gender"], data["income"]]
    flat_regression(torch.stack([torch.ones_like(age), *columns], -1), data["partyid7"], flat_scale)


def kilpisjarvi(data: Data) -> None:
    alpha = pyro.sample("alpha", dist.Normal(data["pmualpha"], data["psalpha"]))
    beta = pyro.sample("beta", dist.Normal(data["pmubeta"], data["psbeta"]))
    sigma = flat_scale()
    with pyro.plate("rows", data["N"]):
        pyro.sample("y", dist.Normal(alpha + beta * data["x"], sigma), obs=data["y"])


def diamonds(data: Data) -> None:
    x = data["X"][:, 1:]
    centred = x - x.mean(0)
    b = pyro.sample("b", dist.Normal(0.0, 1.0).expand([centred.shape[-1]]).to_event(1))
    intercept = pyro.sample("Intercept", dist.StudentT(3.0, 8.0, 10.0))
    # |t| with three degrees of freedom and scale 10: a folded Student t
    sigma = pyro.sample("sigma", dist.FoldedDistribution(dist.StudentT(3.0, 0.0, 10.0)))
    with pyro.plate("rows", data["N"]):
        pyro.sample("Y", dist.Normal(intercept + centred @ b, sigma), obs=data["Y"])


# -- time series -------------------------------------------------------------------------------------------


def autoregression(data: Data) -> None:
    order, y = data["K"], data["y"]
    alpha = pyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = pyro.sample("beta", dist.Normal(0.0, 10.0).expand([order]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    lags = torch.stack([y[order - k - 1 : len(y) - k - 1] for k in range(order)], -1)
    with pyro.plate("times", len(y) - order):
        pyro.sample("y", dist.Normal(alpha + lags @ beta, sigma), obs=y[order:])


def arma(data: Data) -> None:
    y = data["y"]
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    phi = pyro.sample("phi", dist.Normal(0.0, 2.0))
    theta = pyro.sample("theta", dist.Normal(0.0, 2.0))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    errors = [y[0] - (mu + phi * mu)]
    for t in range(1, len(y)):
        errors.append(y[t] - (mu + phi * y[t - 1] + theta * errors[-1]))
    with pyro.plate("times", len(y)):
        pyro.sample("y", dist.Normal(y - torch.stack(errors, -1), sigma), obs=y)


def garch(data: Data) -> None:
    y = data["y"]
    mu = flat("mu")
    alpha0 = flat("alpha0", support=constraints.positive)
    alpha1 = pyro.sample("alpha1", dist.Uniform(0.0, 1.0))
    share = pyro.sample("share", dist.Uniform(0.0, 1.0))
    beta1 = pyro.deterministic("beta1", share * (1.0 - alpha1))
    pyro.factor("triangle", torch.log1p(-alpha1))  # (alpha1, beta1) is uniform where alpha1 + beta1 < 1
    variance = torch.as_tensor(data["sigma1"], dtype=y.dtype) ** 2 + 0 * mu
    variances = [variance]
    for t in range(1, len(y)):
        variances.append(alpha0 + alpha1 * (y[t - 1] - mu) ** 2 + beta1 * variances[-1])
    with pyro.plate("times", len(y)):
        pyro.sample("y", dist.Normal(mu, torch.stack(variances, -1).sqrt()), obs=y)


def garch_scalars(draws: Draws, data: Data) -> dict[str, Tensor]:
    beta1 = draws["share"] * (1 - draws["alpha1"])
    return named({**draws, "beta1": beta1}, scalars=("mu", "alpha0", "alpha1", "beta1"))


# -- hierarchies and processes -----------------------------------------------------------------------------


def eight_schools_noncentered(data: Data) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", data["J"]):
        offset = pyro.sample("offset", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * offset)
        pyro.sample("y", dist.Normal(theta, data["sigma"]), obs=data["y"])


def eight_schools_centered(data: Data) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", data["J"]):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, data["sigma"]), obs=data["y"])


def noncentered_scalars(draws: Draws, data: Data) -> dict[str, Tensor]:
    theta = draws["mu"].unsqueeze(-1) + draws["tau"].unsqueeze(-1) * draws["offset"]
    return named({**draws, "theta": theta}, "theta", scalars=("mu", "tau"))


def covariance_root(x: Tensor, rho: Tensor, alpha: Tensor) -> Tensor:
    """The Cholesky factor of α² exp(−½ (x − x')² / ρ²)."""
    apart = (x.unsqueeze(-1) - x.unsqueeze(-2)) / rho[..., None, None]
    kernel = alpha[..., None, None] ** 2 * torch.exp(-0.5 * apart**2)
    return torch.linalg.cholesky(kernel + 1e-10 * torch.eye(x.shape[-1], dtype=x.dtype))


def gp_pois_regr(data: Data) -> None:
    rho = pyro.sample("rho", dist.Gamma(25.0, 4.0))
    alpha = pyro.sample("alpha", dist.HalfNormal(2.0))
    white = pyro.sample("f_tilde", dist.Normal(0.0, 1.0).expand([data["N"]]).to_event(1))
    f = pyro.deterministic("f", (covariance_root(data["x"], rho, alpha) @ white.unsqueeze(-1)).squeeze(-1))
    with pyro.plate("points", data["N"]):
        pyro.sample("k", dist.Poisson(f.exp()), obs=data["k"])


def process_scalars(draws: Draws, data: Data) -> dict[str, Tensor]:
    root = covariance_root(data["x"], draws["rho"], draws["alpha"])
    f = (root @ draws["f_tilde"].unsqueeze(-1)).squeeze(-1)
    return named({**draws, "f": f}, "f", scalars=("rho", "alpha"))


# -- mixtures ----------------------------------------------------------------------------------------------


def mixture_parameters() -> tuple[Tensor, Tensor, Tensor]:
    mu = flat("mu", 2, support=constraints.ordered_vector)
    pyro.factor("mu_prior", dist.Normal(0.0, 2.0).log_prob(mu).sum(-1))
    sigma = pyro.sample("sigma", dist.HalfNormal(2.0).expand([2]).to_event(1))
    theta = pyro.sample("theta", dist.Beta(5.0, 5.0))
    return mu, sigma, theta


def mixture_marginal(data: Data) -> None:
    mu, sigma, theta = mixture_parameters()
    with pyro.plate("rows", data["N"]):
        weights = torch.stack([theta, 1 - theta], -1)
        pyro.sample("y", dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(mu, sigma)), obs=data["y"])


def mixture_enumerated(data: Data) -> None:
    mu, sigma, theta = mixture_parameters()
    with pyro.plate("rows", data["N"]):
        z = pyro.sample("z", dist.Bernoulli(1 - theta), infer={"enumerate": "parallel"}).long()
        pyro.sample("y", dist.Normal(mu[z], sigma[z]), obs=data["y"])


def hmm_parameters() -> tuple[Tensor, Tensor]:
    mu = flat("mu", 2, support=constraints.ordered_vector)
    pyro.factor("mu_prior", dist.Normal(torch.tensor([3.0, 10.0]).to(mu), 1.0).log_prob(mu).sum(-1))
    first = pyro.sample("theta1", dist.Dirichlet(torch.ones(2, dtype=mu.dtype)))
    second = pyro.sample("theta2", dist.Dirichlet(torch.ones(2, dtype=mu.dtype)))
    return mu, torch.stack([first, second], -2)


def hmm_marginal(data: Data) -> None:
    mu, transition = hmm_parameters()
    emission = dist.Normal(mu, 1.0).log_prob(data["y"].unsqueeze(-1))
    forward = emission[0]
    for t in range(1, data["N"]):
        forward = torch.logsumexp(forward.unsqueeze(-1) + transition.log(), -2) + emission[t]
    pyro.factor("y", torch.logsumexp(forward, -1))


def hmm_enumerated(data: Data) -> None:
    mu, transition = hmm_parameters()
    z = pyro.sample("z_0", dist.Categorical(torch.ones(2, dtype=mu.dtype)), infer={"enumerate": "parallel"})
    pyro.sample("y_0", dist.Normal(mu[z], 1.0), obs=data["y"][0])
    for t in pyro.markov(range(1, data["N"])):
        z = pyro.sample(f"z_{t}", dist.Categorical(transition[z]), infer={"enumerate": "parallel"})
        pyro.sample(f"y_{t}", dist.Normal(mu[z], 1.0), obs=data["y"][t])


CASES = [
    Case("sblrc-blr", blr, lambda d, _: named(d, "beta", scalars=("sigma",)), 0.03, linear=True),
    Case(
        "kidiq-kidscore_interaction",
        kidscore_interaction,
        lambda d, _: named(d, "beta", scalars=("sigma",)),
        0.01,
        linear=True,
    ),
    Case(
        "earnings-logearn_interaction",
        logearn_interaction,
        lambda d, _: named(d, "beta", scalars=("sigma",)),
        0.02,
        linear=True,
    ),
    Case("mesquite-mesquite", mesquite, lambda d, _: named(d, "beta", scalars=("sigma",)), 0.10, linear=True),
    Case("nes2000-nes", nes, lambda d, _: named(d, "beta", scalars=("sigma",)), 0.02, linear=True),
    Case(
        "kilpisjarvi_mod-kilpisjarvi",
        kilpisjarvi,
        lambda d, _: named(d, scalars=("alpha", "beta", "sigma")),
        0.04,
        linear=True,
    ),
    Case("diamonds-diamonds", diamonds, lambda d, _: named(d, "b", scalars=("Intercept", "sigma")), linear=True),
    Case("arK-arK", autoregression, lambda d, _: named(d, "beta", scalars=("alpha", "sigma")), 0.02, linear=True),
    Case("arma-arma11", arma, lambda d, _: named(d, scalars=("mu", "phi", "theta", "sigma")), 0.03),
    Case("garch-garch11", garch, garch_scalars, 0.12),
    Case("eight_schools-eight_schools_noncentered", eight_schools_noncentered, noncentered_scalars, 0.19),
    Case(
        "eight_schools-eight_schools_noncentered",
        eight_schools_centered,
        lambda d, _: named(d, "theta", scalars=("mu", "tau")),
        0.76,
        form="centred",
    ),
    Case("gp_pois_regr-gp_pois_regr", gp_pois_regr, process_scalars, 0.61),
    Case(
        "low_dim_gauss_mix-low_dim_gauss_mix",
        mixture_marginal,
        lambda d, _: named(d, "mu", "sigma", scalars=("theta",)),
        0.03,
    ),
    Case(
        "low_dim_gauss_mix-low_dim_gauss_mix",
        mixture_enumerated,
        lambda d, _: named(d, "mu", "sigma", scalars=("theta",)),
        0.03,
        form="enumerated",
    ),
    Case("hmm_example-hmm_example", hmm_marginal, lambda d, _: named(d, "theta1", "theta2", "mu"), 0.04),
    Case(
        "hmm_example-hmm_example",
        hmm_enumerated,
        lambda d, _: named(d, "theta1", "theta2", "mu"),
        0.04,
        form="enumerated",
    ),
]
