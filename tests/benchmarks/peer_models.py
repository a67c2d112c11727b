"""The programs of `tests/posteriors.py` in NumPyro and in PyMC, with the names of their sites, for `peers.py`.

A model takes the data as arrays.  PyMC's share their parameters' transforms with Stan: a flat prior is `Flat` or `HalfFlat`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pymc as pm
import pytensor.tensor as pt
from jax.scipy.special import logsumexp
from numpyro.distributions import constraints

Data = Mapping[str, Any]

# -- NumPyro ---------------------------------------------------------------------------------------------------


def flat(name: str, *shape: int, support: Any = constraints.real) -> Any:
    return numpyro.sample(name, dist.ImproperUniform(support, (), shape))


def regression(x: Any, y: Any, sigma: Callable[[], Any]) -> None:
    beta = flat("beta", x.shape[-1], support=constraints.real_vector)
    numpyro.sample("y", dist.Normal(x @ beta, sigma()), obs=y)


def flat_scale() -> Any:
    return flat("sigma", support=constraints.positive)


def np_blr(d: Data) -> None:
    beta = numpyro.sample("beta", dist.Normal(0.0, 10.0).expand([int(d["D"])]).to_event(1))
    sigma = numpyro.sample("sigma", dist.HalfNormal(10.0))
    numpyro.sample("y", dist.Normal(d["X"] @ beta, sigma), obs=d["y"])


def kidscore_design(d: Data) -> Any:
    high, iq = d["mom_hs"], d["mom_iq"]
    return np.stack([np.ones_like(iq), high, iq, high * iq], -1)


def np_kidscore(d: Data) -> None:
    sigma = lambda: numpyro.sample("sigma", dist.HalfCauchy(2.5))  # noqa: E731
    regression(kidscore_design(d), d["kid_score"], sigma)


def earnings_design(d: Data) -> Any:
    height, male = d["height"], d["male"]
    return np.stack([np.ones_like(height), height, male, height * male], -1)


def np_earnings(d: Data) -> None:
    regression(earnings_design(d), np.log(d["earn"]), flat_scale)


def mesquite_design(d: Data) -> Any:
    columns = [d[k] for k in ("diam1", "diam2", "canopy_height", "total_height", "density", "group")]
    return np.stack([np.ones_like(columns[0]), *columns], -1)


def np_mesquite(d: Data) -> None:
    regression(mesquite_design(d), d["weight"], flat_scale)


def nes_design(d: Data) -> Any:
    age = d["age_discrete"]
    ages = [(age == k).astype(float) for k in (2, 3, 4)]
    columns = [d["real_ideo"], d["race_adj"], *ages, d["educ1"], d["gender"], d["income"]]
    return np.stack([np.ones_like(age), *columns], -1)


def np_nes(d: Data) -> None:
    regression(nes_design(d), d["partyid7"], flat_scale)


def np_kilpisjarvi(d: Data) -> None:
    alpha = numpyro.sample("alpha", dist.Normal(d["pmualpha"], d["psalpha"]))
    beta = numpyro.sample("beta", dist.Normal(d["pmubeta"], d["psbeta"]))
    numpyro.sample("y", dist.Normal(alpha + beta * d["x"], flat_scale()), obs=d["y"])


def np_diamonds(d: Data) -> None:
    x = d["X"][:, 1:] - d["X"][:, 1:].mean(0)
    b = numpyro.sample("b", dist.Normal(0.0, 1.0).expand([x.shape[-1]]).to_event(1))
    intercept = numpyro.sample("Intercept", dist.StudentT(3.0, 8.0, 10.0))
    sigma = numpyro.sample("sigma", dist.FoldedDistribution(dist.StudentT(3.0, 0.0, 10.0)))
    numpyro.sample("Y", dist.Normal(intercept + x @ b, sigma), obs=d["Y"])


def lags_of(d: Data) -> tuple[int, Any]:
    order, y = int(d["K"]), d["y"]
    return order, np.stack([y[order - k - 1 : len(y) - k - 1] for k in range(order)], -1)


def np_ar(d: Data) -> None:
    order, lags = lags_of(d)
    alpha = numpyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = numpyro.sample("beta", dist.Normal(0.0, 10.0).expand([order]).to_event(1))
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
    numpyro.sample("y", dist.Normal(alpha + lags @ beta, sigma), obs=d["y"][order:])


def np_arma(d: Data) -> None:
    y = d["y"]
    mu = numpyro.sample("mu", dist.Normal(0.0, 10.0))
    phi = numpyro.sample("phi", dist.Normal(0.0, 2.0))
    theta = numpyro.sample("theta", dist.Normal(0.0, 2.0))
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
    first = y[0] - (mu + phi * mu)

    def step(error: Any, pair: Any) -> tuple[Any, Any]:
        error = pair[1] - (mu + phi * pair[0] + theta * error)
        return error, error

    _, rest = jax.lax.scan(step, first, (jnp.asarray(y[:-1]), jnp.asarray(y[1:])))
    numpyro.factor("y", dist.Normal(0.0, sigma).log_prob(jnp.concatenate([first[None], rest])).sum())


def np_garch(d: Data) -> None:
    y = jnp.asarray(d["y"])
    mu, alpha0 = flat("mu"), flat("alpha0", support=constraints.positive)
    alpha1 = numpyro.sample("alpha1", dist.Uniform(0.0, 1.0))
    share = numpyro.sample("share", dist.Uniform(0.0, 1.0))
    numpyro.factor("triangle", jnp.log1p(-alpha1))

    def step(variance: Any, before: Any) -> tuple[Any, Any]:
        variance = alpha0 + alpha1 * (before - mu) ** 2 + share * (1.0 - alpha1) * variance
        return variance, variance

    first = jnp.asarray(float(d["sigma1"]) ** 2)
    _, rest = jax.lax.scan(step, first, y[:-1])
    numpyro.sample("y", dist.Normal(mu, jnp.sqrt(jnp.concatenate([first[None], rest]))), obs=y)


def np_schools(d: Data) -> None:
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("schools", int(d["J"])):
        offset = numpyro.sample("offset", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(mu + tau * offset, d["sigma"]), obs=d["y"])


def np_schools_centred(d: Data) -> None:
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("schools", int(d["J"])):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.sample("y", dist.Normal(theta, d["sigma"]), obs=d["y"])


def np_process(d: Data) -> None:
    rho = numpyro.sample("rho", dist.Gamma(25.0, 4.0))
    alpha = numpyro.sample("alpha", dist.HalfNormal(2.0))
    white = numpyro.sample("f_tilde", dist.Normal(0.0, 1.0).expand([int(d["N"])]).to_event(1))
    x = jnp.asarray(d["x"])
    kernel = alpha**2 * jnp.exp(-0.5 * ((x[:, None] - x) / rho) ** 2)
    f = jnp.linalg.cholesky(kernel + 1e-10 * jnp.eye(len(x))) @ white
    numpyro.sample("k", dist.Poisson(jnp.exp(f)), obs=d["k"])


def np_mixture(d: Data) -> None:
    mu = flat("mu", 2, support=constraints.ordered_vector)
    numpyro.factor("mu_prior", dist.Normal(0.0, 2.0).log_prob(mu).sum())
    sigma = numpyro.sample("sigma", dist.HalfNormal(2.0).expand([2]).to_event(1))
    theta = numpyro.sample("theta", dist.Beta(5.0, 5.0))
    weights = dist.Categorical(probs=jnp.stack([theta, 1 - theta]))
    numpyro.sample("y", dist.MixtureSameFamily(weights, dist.Normal(mu, sigma)), obs=d["y"])


def np_hmm(d: Data) -> None:
    mu = flat("mu", 2, support=constraints.ordered_vector)
    numpyro.factor("mu_prior", dist.Normal(jnp.array([3.0, 10.0]), 1.0).log_prob(mu).sum())
    first = numpyro.sample("theta1", dist.Dirichlet(jnp.ones(2)))
    second = numpyro.sample("theta2", dist.Dirichlet(jnp.ones(2)))
    transition = jnp.log(jnp.stack([first, second]))
    emission = dist.Normal(mu, 1.0).log_prob(jnp.asarray(d["y"])[:, None])

    def step(forward: Any, here: Any) -> tuple[Any, None]:
        return logsumexp(forward[:, None] + transition, 0) + here, None

    forward, _ = jax.lax.scan(step, emission[0], emission[1:])
    numpyro.factor("y", logsumexp(forward))


NUMPYRO: dict[str, Callable[[Data], None]] = {
    "sblrc": np_blr,
    "kidiq": np_kidscore,
    "earnings": np_earnings,
    "mesquite": np_mesquite,
    "nes2000": np_nes,
    "kilpisjarvi_mod": np_kilpisjarvi,
    "diamonds": np_diamonds,
    "arK": np_ar,
    "arma": np_arma,
    "garch": np_garch,
    "eight_schools": np_schools,
    "eight_schools (centred)": np_schools_centred,
    "gp_pois_regr": np_process,
    "low_dim_gauss_mix": np_mixture,
    "hmm_example": np_hmm,
}

# -- PyMC ------------------------------------------------------------------------------------------------------


def pm_regression(x: Any, y: Any, sigma: Callable[[], Any]) -> None:
    beta = pm.Flat("beta", shape=x.shape[-1])
    pm.Normal("y", pt.dot(x, beta), sigma(), observed=y)


def pm_blr(d: Data) -> None:
    beta = pm.Normal("beta", 0.0, 10.0, shape=int(d["D"]))
    pm.Normal("y", pt.dot(d["X"], beta), pm.HalfNormal("sigma", 10.0), observed=d["y"])


def pm_kilpisjarvi(d: Data) -> None:
    alpha = pm.Normal("alpha", d["pmualpha"], d["psalpha"])
    beta = pm.Normal("beta", d["pmubeta"], d["psbeta"])
    pm.Normal("y", alpha + beta * d["x"], pm.HalfFlat("sigma"), observed=d["y"])


def pm_diamonds(d: Data) -> None:
    x = d["X"][:, 1:] - d["X"][:, 1:].mean(0)
    b = pm.Normal("b", 0.0, 1.0, shape=x.shape[-1])
    intercept = pm.StudentT("Intercept", nu=3.0, mu=8.0, sigma=10.0)
    sigma = pm.HalfStudentT("sigma", nu=3.0, sigma=10.0)
    pm.Normal("Y", intercept + pt.dot(x, b), sigma, observed=d["Y"])


def pm_ar(d: Data) -> None:
    order, lags = lags_of(d)
    alpha, beta = pm.Normal("alpha", 0.0, 10.0), pm.Normal("beta", 0.0, 10.0, shape=order)
    pm.Normal("y", alpha + pt.dot(lags, beta), pm.HalfCauchy("sigma", 2.5), observed=d["y"][order:])


def pm_schools(d: Data) -> None:
    mu, tau = pm.Normal("mu", 0.0, 5.0), pm.HalfCauchy("tau", 5.0)
    offset = pm.Normal("offset", 0.0, 1.0, shape=int(d["J"]))
    pm.Normal("y", mu + tau * offset, d["sigma"], observed=d["y"])


def pm_schools_centred(d: Data) -> None:
    mu, tau = pm.Normal("mu", 0.0, 5.0), pm.HalfCauchy("tau", 5.0)
    theta = pm.Normal("theta", mu, tau, shape=int(d["J"]))
    pm.Normal("y", theta, d["sigma"], observed=d["y"])


def pm_process(d: Data) -> None:
    rho, alpha = pm.Gamma("rho", 25.0, 4.0), pm.HalfNormal("alpha", 2.0)
    white, x = pm.Normal("f_tilde", 0.0, 1.0, shape=int(d["N"])), np.asarray(d["x"])
    kernel = alpha**2 * pt.exp(-0.5 * ((x[:, None] - x) / rho) ** 2)
    f = pt.dot(pt.linalg.cholesky(kernel + 1e-10 * np.eye(len(x))), white)
    pm.Poisson("k", pt.exp(f), observed=d["k"])


def pm_mixture(d: Data) -> None:
    mu = pm.Normal("mu", 0.0, 2.0, shape=2, transform=pm.distributions.transforms.ordered, initval=[-1.0, 1.0])
    sigma, theta = pm.HalfNormal("sigma", 2.0, shape=2), pm.Beta("theta", 5.0, 5.0)
    pm.NormalMixture("y", pt.stack([theta, 1 - theta]), mu, sigma=sigma, observed=d["y"])


def pm_kidscore(d: Data) -> None:
    pm_regression(kidscore_design(d), d["kid_score"], lambda: pm.HalfCauchy("sigma", 2.5))


def pm_flat_scale() -> Any:
    return pm.HalfFlat("sigma", initval=1.0)


PYMC: dict[str, Callable[[Data], None]] = {
    "sblrc": pm_blr,
    "kidiq": pm_kidscore,
    "earnings": lambda d: pm_regression(earnings_design(d), np.log(d["earn"]), pm_flat_scale),
    "mesquite": lambda d: pm_regression(mesquite_design(d), d["weight"], pm_flat_scale),
    "nes2000": lambda d: pm_regression(nes_design(d), d["partyid7"], pm_flat_scale),
    "kilpisjarvi_mod": pm_kilpisjarvi,
    "diamonds": pm_diamonds,
    "arK": pm_ar,
    "eight_schools": pm_schools,
    "eight_schools (centred)": pm_schools_centred,
    "gp_pois_regr": pm_process,
    "low_dim_gauss_mix": pm_mixture,
}
