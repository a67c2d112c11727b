"""Posteriors that are hard for a Gaussian, each with the mean and sd of its scalars from elsewhere; some easy ones beside them.

A reference is a closed form (what is drawn without data: the moments of its own program), or a sum over a grid of one
or two latents of Pyro's own log density, or both: a grid over a scale, closed forms given it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import pyro
import pyro.distributions as dist
import torch
from posteriors import Draws
from pyro import poutine
from pyro.distributions import constraints
from torch import Tensor

Reference = dict[str, tuple[float, float]]  # scalar -> (mean, sd)
Model = Callable[[], None]
Scalars = Callable[[Draws], dict[str, Tensor]]

CHUNK = 4096  # points of a grid at once


@dataclass(frozen=True)
class Axis:
    """Nodes of one latent, equally spaced in the image of `by`: its own value, its logarithm, or asinh of it."""

    low: float
    high: float
    count: int = 400
    by: str = "value"

    def nodes(self, every: int = 1) -> tuple[Tensor, Tensor]:
        """(nodes, weights) of the trapezoid rule, on every so manieth node."""
        into, back, slope = {
            "value": (lambda t: t, lambda t: t, torch.ones_like),
            "log": (torch.log, torch.exp, torch.exp),
            "asinh": (torch.asinh, torch.sinh, torch.cosh),
        }[self.by]
        ends = into(torch.tensor([self.low, self.high], dtype=torch.float64))
        count = (self.count - 1) // every + 1
        t = torch.linspace(float(ends[0]), float(ends[1]), count, dtype=torch.float64)
        return back(t), slope(t) * (t[1] - t[0])


Axes = Mapping[str, "Axis | tuple[Axis, ...]"]  # several for the elements of a vector


@dataclass(frozen=True)
class Target:
    """A model without arguments, the reference of its scalars, and whether it is one of the easy ones."""

    name: str
    model: Model
    exact: Callable[[], Reference] | None = None
    axes: Axes | None = None
    scalars: Scalars = lambda draws: elements_of(draws)  # noqa: E731
    easy: bool = False
    modes: int = 1  # that hold a tenth of the mass or more, and are apart

    def reference(self) -> Reference:
        if self.exact is not None:
            return self.exact()
        assert self.axes is not None
        return on_grid(self.model, self.axes, self.scalars)


def elements_of(draws: Draws) -> dict[str, Tensor]:
    """Every element of every latent."""
    flat = {name: value.reshape(len(value), -1) for name, value in draws.items()}
    return {f"{n}[{i}]" if v.shape[1] > 1 else n: v[:, i] for n, v in flat.items() for i in range(v.shape[1])}


def moments(values: Mapping[str, Tensor], weights: Tensor) -> Reference:
    """Mean and sd under weights that need not be normalised."""
    share = weights / weights.sum()
    result = {}
    for name, value in values.items():
        mean = float((share * value).sum())
        result[name] = mean, math.sqrt(float((share * (value - mean) ** 2).sum()))
    return result


def on_grid(model: Model, axes: Axes, scalars: Scalars, every: int = 1) -> Reference:
    """Moments of the scalars under the model's own density at the nodes of a grid."""
    lines = [axis.nodes(every) for one in axes.values() for axis in (one if isinstance(one, tuple) else (one,))]
    points = torch.stack([m.flatten() for m in torch.meshgrid(*(n for n, _ in lines), indexing="ij")], -1)
    weights = torch.stack([m.flatten() for m in torch.meshgrid(*(w for _, w in lines), indexing="ij")], -1).prod(-1)
    latents, start = {}, 0
    for name, one in axes.items():
        size = len(one) if isinstance(one, tuple) else 1
        latents[name] = points[:, start : start + size] if isinstance(one, tuple) else points[:, start]
        start += size

    def log_density(values: dict[str, Tensor]) -> Tensor:
        return poutine.trace(poutine.condition(model, data=values)).get_trace().log_prob_sum()

    with pyro.validation_enabled(False):  # its checks branch on values, which vmap cannot
        heights = torch.func.vmap(log_density, chunk_size=CHUNK)(latents)
    heights = heights.nan_to_num(-torch.inf)
    return moments(scalars(latents), weights * (heights - heights.max()).exp())


def flat_vector(name: str, size: int) -> Tensor:
    return pyro.sample(name, dist.ImproperUniform(constraints.real_vector, (), (size,)))


def normals(name: str, size: int, scale: float = 1.0) -> Tensor:
    return pyro.sample(name, dist.Normal(torch.zeros(size, dtype=torch.float64), scale).to_event(1))


# -- funnels and scales --------------------------------------------------------------------------------------


def funnel() -> None:
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    pyro.sample("x", dist.Normal(torch.zeros(9, dtype=torch.float64), (0.5 * v).exp().unsqueeze(-1)).to_event(1))


def funnel_moments() -> Reference:
    """E exp v = exp(9/2)."""
    return {"v": (0.0, 3.0), **{f"x[{i}]": (0.0, math.exp(2.25)) for i in range(9)}}


WEAK, STRONG = torch.tensor([-2.0, 1.0, 0.0, 3.0, -1.0]), torch.tensor([-2.0, 1.0, 0.5, 3.0, -1.0, 0.2, -0.7, 1.6])


def groups(y: Tensor, noise: float) -> Model:
    def model() -> None:
        tau = pyro.sample("tau", dist.HalfNormal(5.0))
        with pyro.plate("groups", len(y)):
            theta = pyro.sample("theta", dist.Normal(0.0, tau))
            pyro.sample("y", dist.Normal(theta, noise), obs=y.double())

    return model


def groups_moments(y: Tensor, noise: float) -> Reference:
    """A sum over log tau; theta is Gaussian given it."""
    tau, weights = Axis(1e-6, 100.0, 4001, "log").nodes()
    marginal = dist.Normal(0.0, (tau**2 + noise**2).sqrt().unsqueeze(-1)).log_prob(y.double()).sum(-1)
    height = dist.HalfNormal(5.0).log_prob(tau) + marginal
    return through_scale(tau, weights * (height - height.max()).exp(), y.double(), noise, "tau", "theta")


def through_scale(tau: Tensor, weights: Tensor, y: Tensor, noise: float, scale: str, location: str) -> Reference:
    """Moments of tau and of the θ_j ~ N(0, tau²), seen with noise, by the laws of total mean and variance."""
    share, gain = weights / weights.sum(), tau**2 / (tau**2 + noise**2)
    mean = gain.unsqueeze(-1) * y
    whole = (share.unsqueeze(-1) * mean).sum(0)
    variance = (share.unsqueeze(-1) * ((mean - whole) ** 2 + (gain * noise**2).unsqueeze(-1))).sum(0)
    names = [f"{location}[{j}]" for j in range(len(y))] if len(y) > 1 else [location]
    pairs = zip(whole.tolist(), variance.sqrt().tolist(), strict=True)
    return {**moments({scale: tau}, weights), **dict(zip(names, pairs, strict=True))}


def horseshoe() -> None:
    tau = pyro.sample("tau", dist.HalfCauchy(1.0))
    beta = pyro.sample("beta", dist.Normal(0.0, tau))
    pyro.sample("y", dist.Normal(beta, 1.0), obs=torch.tensor(3.0, dtype=torch.float64))


def horseshoe_moments() -> Reference:
    tau, weights = Axis(1e-9, 1e9, 8001, "log").nodes()
    height = dist.HalfCauchy(1.0).log_prob(tau) + dist.Normal(0.0, (1 + tau**2).sqrt()).log_prob(torch.tensor(3.0))
    weights = weights * height.exp()
    found = through_scale(tau, weights, torch.tensor([3.0], dtype=torch.float64), 1.0, "tau", "beta")
    return {"beta": found["beta"], "log tau": moments({"": tau.log()}, weights)[""]}


def two_scales() -> None:
    one = pyro.sample("one", dist.HalfNormal(1.0))
    other = pyro.sample("other", dist.HalfNormal(1.0))
    with pyro.plate("rows", 20):
        y = torch.linspace(-2.5, 2.5, 20, dtype=torch.float64)
        pyro.sample("y", dist.Normal(0.0, (one**2 + other**2).sqrt()), obs=y)


def scale_of_two() -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(10.0))
    with pyro.plate("rows", 2):
        pyro.sample("y", dist.Normal(mu, sigma), obs=torch.tensor([0.0, 0.3], dtype=torch.float64))


def overdispersion() -> None:
    mean = pyro.sample("mean", dist.LogNormal(0.0, 1.0))
    count = pyro.sample("count", dist.LogNormal(0.0, 2.0))
    with pyro.plate("rows", 5):
        y = torch.tensor([0.0, 0.0, 1.0, 0.0, 3.0], dtype=torch.float64)
        pyro.sample("y", dist.NegativeBinomial(count, logits=(mean / count).log()), obs=y)


def gamma_shape_and_rate() -> None:
    shape = pyro.sample("shape", dist.LogNormal(0.0, 2.0))
    rate = pyro.sample("rate", dist.LogNormal(0.0, 2.0))
    with pyro.plate("rows", 5):
        pyro.sample("y", dist.Gamma(shape, rate), obs=torch.tensor([0.8, 1.1, 2.0, 0.4, 1.3], dtype=torch.float64))


# -- bananas, ridges, rings ----------------------------------------------------------------------------------


def banana(bend: float, width: float) -> Model:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(bend * (x**2 - 1), width))

    return model


def banana_moments(bend: float, width: float) -> Reference:
    """Var x² = 2."""
    return {"x": (0.0, 1.0), "y": (0.0, math.sqrt(2 * bend**2 + width**2))}


def product() -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(a * b, 0.2), obs=torch.tensor(1.0, dtype=torch.float64))


def sum_with_square() -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(a + b**2, 0.2), obs=torch.tensor(2.0, dtype=torch.float64))


def ring() -> None:
    z = normals("z", 2, 3.0)
    pyro.sample("y", dist.Normal((z**2).sum(-1).sqrt(), 0.1), obs=torch.tensor(2.0, dtype=torch.float64))


def cubed_sum() -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal((a + b) ** 3, 0.5), obs=torch.tensor(1.0, dtype=torch.float64))


# -- modes ---------------------------------------------------------------------------------------------------


def modes(weights: list[float], locations: list[float]) -> Model:
    def model() -> None:
        z = pyro.sample("z", dist.ImproperUniform(constraints.real, (), ()))
        centres = torch.tensor(locations, dtype=torch.float64)
        each = dist.Normal(centres, 1.0).log_prob(z.unsqueeze(-1)) + torch.tensor(weights, dtype=torch.float64).log()
        pyro.factor("density", each.logsumexp(-1))

    return model


def modes_moments(weights: list[float], locations: list[float]) -> Reference:
    mean = sum(w * m for w, m in zip(weights, locations, strict=True))
    return {"z": (mean, math.sqrt(1 + sum(w * (m - mean) ** 2 for w, m in zip(weights, locations, strict=True))))}


def five_modes() -> None:
    angle = torch.arange(5, dtype=torch.float64) * (2 * math.pi / 5)
    centres = 4 * torch.stack([angle.cos(), angle.sin()], -1)
    z = flat_vector("z", 2)
    pyro.factor("density", dist.Normal(centres, 0.5).log_prob(z.unsqueeze(-2)).sum(-1).logsumexp(-1))


def two_clusters() -> Tensor:
    """Quantiles of N(−2, 1) and N(2, 1)."""
    quantiles = torch.special.ndtri((torch.arange(15, dtype=torch.float64) + 0.5) / 15)
    return torch.cat([quantiles - 2, quantiles + 2])


def relabelled_marginal() -> None:
    loc = normals("loc", 2, 5.0)
    with pyro.plate("rows", 30):
        halves = dist.Categorical(torch.ones(2, dtype=torch.float64))
        pyro.sample("y", dist.MixtureSameFamily(halves, dist.Normal(loc, 1.0)), obs=two_clusters())


def relabelled_enumerated() -> None:
    loc = normals("loc", 2, 5.0)
    with pyro.plate("rows", 30):
        z = pyro.sample("z", dist.Categorical(torch.ones(2, dtype=torch.float64)), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(loc[z], 1.0), obs=two_clusters())


def frequency() -> None:
    w = pyro.sample("w", dist.Uniform(0.0, 10.0))
    t = torch.tensor([0.3, 0.9, 1.4, 2.2, 3.1, 3.7, 4.6, 5.2], dtype=torch.float64)
    with pyro.plate("rows", 8):
        pyro.sample("y", dist.Normal((w * t).sin(), 0.7), obs=(4.0 * t).sin())


def choice() -> None:
    """Spike and slab: y = z b + noise."""
    z = pyro.sample("z", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
    b = pyro.sample("b", dist.Normal(0.0, 2.0))
    pyro.sample("y", dist.Normal(z * b, 0.5), obs=torch.tensor(1.0, dtype=torch.float64))


def choice_moments() -> Reference:
    y = torch.tensor(1.0)
    odds = (dist.Normal(0.0, math.sqrt(4.25)).log_prob(y) - dist.Normal(0.0, 0.5).log_prob(y)).sigmoid()
    p, gain = float(odds), 4 / 4.25
    mean = p * gain
    variance = p * (gain * 0.25 + (gain - mean) ** 2) + (1 - p) * (4.0 + mean**2)
    return {"b": (mean, math.sqrt(variance)), "z": (p, math.sqrt(p * (1 - p)))}


# -- tails and bounds ----------------------------------------------------------------------------------------


def student(df: float, size: int = 1) -> Model:
    def model() -> None:
        if size == 1:
            pyro.sample("z", dist.StudentT(df, 0.0, 1.0))
        else:
            pyro.sample("z", dist.StudentT(df, torch.zeros(size, dtype=torch.float64), 1.0).to_event(1))

    return model


def student_moments(df: float, size: int = 1) -> Reference:
    sd = math.sqrt(df / (df - 2))
    return {f"z[{i}]" if size > 1 else "z": (0.0, sd) for i in range(size)}


def joint_student() -> None:
    eye = torch.eye(5, dtype=torch.float64)
    pyro.sample("z", dist.MultivariateStudentT(torch.tensor(3.0).double(), torch.zeros(5).double(), eye))


def conflict() -> None:
    z = pyro.sample("z", dist.StudentT(3.0, 0.0, 1.0))
    pyro.sample("y", dist.Normal(z, 2.0), obs=torch.tensor(8.0, dtype=torch.float64))


def two_cauchy() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 100.0))
    with pyro.plate("rows", 2):
        pyro.sample("y", dist.Cauchy(z, 1.0), obs=torch.tensor([-8.0, 8.0], dtype=torch.float64))


def wall() -> None:
    z = pyro.sample("z", dist.Uniform(0.0, 10.0))
    pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(-2.0, dtype=torch.float64))


def wide_rate() -> None:
    s = pyro.sample("s", dist.LogNormal(0.0, 2.0))
    pyro.sample("y", dist.Poisson(s), obs=torch.tensor(0.0, dtype=torch.float64))


# -- regressions ---------------------------------------------------------------------------------------------

SPLIT = torch.tensor([-2.0, -1.0, 1.0, 2.0], dtype=torch.float64)


def separated() -> None:
    beta = pyro.sample("beta", dist.Normal(0.0, 10.0))
    with pyro.plate("rows", 4):
        pyro.sample("y", dist.Bernoulli(logits=beta * SPLIT), obs=(SPLIT > 0).double())


def separated_student() -> None:
    alpha = pyro.sample("alpha", dist.StudentT(7.0, 0.0, 10.0))
    beta = pyro.sample("beta", dist.StudentT(7.0, 0.0, 2.5))
    with pyro.plate("rows", 4):
        pyro.sample("y", dist.Bernoulli(logits=alpha + beta * SPLIT), obs=(SPLIT > 0).double())


GRID = torch.linspace(-2.0, 2.0, 60, dtype=torch.float64)
NOISE = torch.special.ndtri((torch.arange(60, dtype=torch.float64) * 0.6180339887 + 0.5) % 1)


def logistic() -> None:
    beta = normals("beta", 2, 2.0)
    with pyro.plate("rows", 60):
        logits = beta[..., 0] + beta[..., 1] * GRID
        pyro.sample("y", dist.Bernoulli(logits=logits), obs=(GRID + NOISE > 0.3).double())


def counts() -> None:
    beta = normals("beta", 2, 2.0)
    with pyro.plate("rows", 60):
        rate = (beta[..., 0] + beta[..., 1] * GRID).exp()
        pyro.sample("y", dist.Poisson(rate), obs=(0.5 + 0.4 * GRID + 0.3 * NOISE).exp().round())


def robust() -> None:
    beta = normals("beta", 2, 5.0)
    with pyro.plate("rows", 60):
        y = 1 + 2 * GRID + 0.5 * NOISE + 8.0 * (torch.arange(60) % 15 == 7)
        pyro.sample("y", dist.StudentT(4.0, beta[..., 0] + beta[..., 1] * GRID, 0.5), obs=y)


def location_and_scale() -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(5.0))
    with pyro.plate("rows", 60):
        pyro.sample("y", dist.Normal(mu, sigma), obs=3 + NOISE)


def coin() -> None:
    p = pyro.sample("p", dist.Beta(2.0, 3.0))
    pyro.sample("y", dist.Binomial(10, p), obs=torch.tensor(7.0, dtype=torch.float64))


def events() -> None:
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("rows", 4):
        pyro.sample("y", dist.Poisson(rate), obs=torch.tensor([3.0, 0.0, 2.0, 4.0], dtype=torch.float64))


def weibull() -> None:
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    shape = pyro.sample("shape", dist.LogNormal(0.0, 1.0))
    with pyro.plate("rows", 60):
        y = 2 * (-torch.log1p(-(torch.arange(60, dtype=torch.float64) + 0.5) / 60)) ** (1 / 1.5)
        pyro.sample("y", dist.Weibull(scale, shape), obs=y)


# -- a Gaussian that is nearly singular ----------------------------------------------------------------------


@cache
def stiff_root() -> tuple[Tensor, Tensor]:
    """(mean, a root of a precision of 200 dimensions and condition number 10⁸)."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(200, 200, generator=generator, dtype=torch.float64))[0]
    scales = torch.logspace(-2, 2, 200, dtype=torch.float64)
    return torch.randn(200, generator=generator, dtype=torch.float64), scales.unsqueeze(-1) * basis.mT


def stiff_factor() -> None:
    mean, root = stiff_root()
    x = flat_vector("x", 200)
    pyro.factor("density", -0.5 * ((root @ (x - mean).unsqueeze(-1)) ** 2).sum((-2, -1)))


def stiff_sample() -> None:
    mean, root = stiff_root()
    pyro.sample("x", dist.MultivariateNormal(mean, precision_matrix=root.mT @ root))


def stiff_moments() -> Reference:
    mean, root = stiff_root()
    inverse = torch.linalg.inv(root)
    sds = (inverse**2).sum(-1).sqrt()
    return {f"x[{i}]": pair for i, pair in enumerate(zip(mean.tolist(), sds.tolist(), strict=True))}


# ------------------------------------------------------------------------------------------------------------

PLANE = (Axis(-9.0, 9.0, 601), Axis(-9.0, 9.0, 601))
THIRDS, FIFTHS = ([0.5, 0.5], [-5.0, 5.0]), ([0.9, 0.1], [0.0, 10.0])
NEAR, THREE = ([0.5, 0.5], [-1.2, 1.2]), ([0.6, 0.3, 0.1], [0.0, 6.0, -7.0])

TARGETS = [
    Target("funnel of ten", funnel, funnel_moments),
    Target("groups, weak data", groups(WEAK, 10.0), lambda: groups_moments(WEAK, 10.0)),
    Target("groups, noise as wide as they", groups(WEAK, 1.0), lambda: groups_moments(WEAK, 1.0)),
    Target("groups, strong data", groups(STRONG, 0.1), lambda: groups_moments(STRONG, 0.1), easy=True),
    Target(
        "horseshoe of one",
        horseshoe,
        horseshoe_moments,
        scalars=lambda d: {"beta": d["beta"], "log tau": d["tau"].log()},
    ),
    Target("two scales, one variance", two_scales, axes={"one": Axis(1e-6, 8.0, 601), "other": Axis(1e-6, 8.0, 601)}),
    Target(
        "scale of two data",
        scale_of_two,
        axes={"mu": Axis(-80.0, 80.0, 1201, "asinh"), "sigma": Axis(1e-3, 80.0, 601, "log")},
    ),
    Target(
        "overdispersion of five",
        overdispersion,
        axes={"mean": Axis(1e-4, 300.0, 401, "log"), "count": Axis(1e-6, 1e6, 601, "log")},
    ),
    Target(
        "gamma, shape and rate of five",
        gamma_shape_and_rate,
        axes={"shape": Axis(1e-3, 300.0, 601, "log"), "rate": Axis(1e-3, 300.0, 601, "log")},
    ),
    Target("banana, mild", banana(0.3, 1.0), lambda: banana_moments(0.3, 1.0)),
    Target("banana", banana(1.0, 0.5), lambda: banana_moments(1.0, 0.5)),
    Target("banana, sharp", banana(5.0, 0.1), lambda: banana_moments(5.0, 0.1)),
    Target("product of two", product, axes={"a": Axis(-6.0, 6.0, 801), "b": Axis(-6.0, 6.0, 801)}, modes=2),
    Target("sum with a square", sum_with_square, axes={"a": Axis(-7.0, 7.0, 701), "b": Axis(-6.0, 6.0, 701)}, modes=2),
    Target("ring", ring, axes={"z": (Axis(-4.0, 4.0, 601), Axis(-4.0, 4.0, 601))}),
    Target("cube of a sum", cubed_sum, axes={"a": Axis(-6.0, 6.0, 801), "b": Axis(-6.0, 6.0, 801)}),
    Target("two modes, far", modes(*THIRDS), lambda: modes_moments(*THIRDS), modes=2),
    Target("two modes, near", modes(*NEAR), lambda: modes_moments(*NEAR)),
    Target("two modes, one small", modes(*FIFTHS), lambda: modes_moments(*FIFTHS), modes=2),
    Target("three modes", modes(*THREE), lambda: modes_moments(*THREE), modes=3),
    Target("five modes on a circle", five_modes, axes={"z": PLANE}, modes=5),
    Target(
        "mixture, labels exchanged", relabelled_marginal, axes={"loc": (Axis(-7, 7, 401), Axis(-7, 7, 401))}, modes=2
    ),
    Target(
        "mixture, labels exchanged, enumerated",
        relabelled_enumerated,
        lambda: on_grid(relabelled_marginal, {"loc": (Axis(-7, 7, 401), Axis(-7, 7, 401))}, elements_of),
        scalars=lambda d: elements_of({"loc": d["loc"]}),
        modes=2,
    ),
    Target("frequency of a sine", frequency, axes={"w": Axis(1e-6, 10.0 - 1e-6, 8001)}, modes=2),
    Target("spike and slab", choice, choice_moments),
    Target("Student t, three degrees", student(3.0), lambda: student_moments(3.0)),
    Target("Student t, ten by themselves", student(2.5, 10), lambda: student_moments(2.5, 10)),
    Target("Student t, five together", joint_student, lambda: student_moments(3.0, 5)),
    Target("prior against data", conflict, axes={"z": Axis(-100.0, 100.0, 8001, "asinh")}),
    Target("two Cauchy data", two_cauchy, axes={"z": Axis(-1000.0, 1000.0, 20001, "asinh")}, modes=2),
    Target("at a wall", wall, axes={"z": Axis(1e-9, 10.0 - 1e-9, 8001, "log")}),
    Target("wide rate", wide_rate, axes={"s": Axis(1e-6, 100.0, 4001, "log")}),
    Target("separated, wide prior", separated, axes={"beta": Axis(-100.0, 100.0, 8001, "asinh")}),
    Target(
        "separated, Student prior",
        separated_student,
        axes={"alpha": Axis(-400.0, 400.0, 801, "asinh"), "beta": Axis(-200.0, 200.0, 801, "asinh")},
    ),
    Target("stiff Gaussian, a factor", stiff_factor, stiff_moments),
    Target("stiff Gaussian, a sample", stiff_sample, stiff_moments, easy=True),
    Target("logistic regression", logistic, axes={"beta": (Axis(-4, 4, 401), Axis(-3, 7, 401))}, easy=True),
    Target("Poisson regression", counts, axes={"beta": (Axis(-2, 3, 501), Axis(-2, 3, 501))}, easy=True),
    Target("Student regression", robust, axes={"beta": (Axis(-1, 3, 601), Axis(0, 4, 601))}, easy=True),
    Target(
        "location and scale", location_and_scale, axes={"mu": Axis(0, 6, 601), "sigma": Axis(0.2, 5, 601)}, easy=True
    ),
    Target("coin", coin, axes={"p": Axis(1e-6, 1 - 1e-6, 4001)}, easy=True),
    Target("events", events, axes={"rate": Axis(1e-6, 30.0, 8001)}, easy=True),
    Target(
        "Weibull, scale and shape",
        weibull,
        axes={"scale": Axis(0.3, 8.0, 501, "log"), "shape": Axis(0.2, 8.0, 501, "log")},
        easy=True,
    ),
]
