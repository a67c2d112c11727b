"""`blocks="auto"`: which sites form one Gaussian, that it is the exact posterior where it can be, and what explain says of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Predictive, Trace_ELBO
from torch import Tensor

from pyro_blr import BLRInference, Posterior
from pyro_blr.groups import MOST
from pyro_blr.guides import AutoExponentialFamily

pytestmark = pytest.mark.usefixtures("float64")

SCORES = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], dtype=torch.float64)
ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0], dtype=torch.float64)


@pytest.fixture
def float64() -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(0)
    yield
    torch.set_default_dtype(before)


def fit(model: Callable, *args: Any, blocks: Any = "auto", **options: Any) -> Posterior:
    return BLRInference(model, blocks=blocks).run(*args, progress=False, **options)


def groups(model: Callable, *args: Any) -> list[str]:
    return list(fit(model, *args, max_steps=1).blocks)


def evidence(design: Tensor, prior: Tensor, noise: Tensor, data: Tensor, centre: Tensor | float = 0.0) -> Tensor:
    """log N(data | design centre, design prior designᵀ + noise), by dense algebra."""
    mean = design @ (torch.zeros(design.shape[1]) + centre)
    return dist.MultivariateNormal(mean, design @ prior @ design.mT + noise).log_prob(data)


def exact_posterior(design: Tensor, prior: Tensor, noise: Tensor, data: Tensor) -> tuple[Tensor, Tensor]:
    precision = prior.inverse() + design.mT @ noise.inverse() @ design
    covariance = precision.inverse()
    return covariance @ design.mT @ noise.inverse() @ data, covariance


# -- chains and pyramids ------------------------------------------------------------------------------------------------


def chain(length: int, data: Tensor) -> None:
    z: Any = torch.tensor(0.3)
    for t in range(length):
        z = pyro.sample(f"z{t}", dist.Normal(0.9 * z, 0.7))
        if t % 2:
            pyro.sample(f"x{t}", dist.Normal(2 * z - 1, 0.5), obs=data[t])
    pyro.sample("x", dist.Normal(z, 0.4), obs=data[-1])


@pytest.mark.parametrize("length", [3, 4, 7, 10, 17])
def test_a_gaussian_chain_is_exact_in_one_sweep(length: int) -> None:
    data = torch.randn(length + 1)
    posterior = fit(chain, length, data)
    transition = torch.linalg.inv(torch.eye(length) - 0.9 * torch.diag(torch.ones(length - 1), -1))
    mean = transition[:, 0] * 0.9 * 0.3
    prior = 0.49 * transition @ transition.mT
    odd = [t for t in range(length) if t % 2]
    design = torch.eye(length)[[*odd, length - 1]] * torch.tensor([*(2.0 for _ in odd), 1.0])[:, None]
    noise = torch.diag(torch.tensor([*(0.25 for _ in odd), 0.16]))
    seen = torch.stack([*(data[t] + 1 for t in odd), data[-1]])
    assert posterior.num_steps <= 2
    assert posterior.elbo_kind == "exact evidence"
    assert posterior.elbo == pytest.approx(float(evidence(design, prior, noise, seen, mean)), abs=1e-9)
    shift, covariance = exact_posterior(design, prior, noise, seen - design @ mean)
    joint = posterior.joint([f"z{t}" for t in range(length)])
    torch.testing.assert_close(joint.mean, mean + shift)
    torch.testing.assert_close(joint.covariance_matrix, covariance)


def pyramid(layers: int, data: Tensor) -> None:
    """Each site of a layer is around the mean of two neighbours in the wider layer below it."""
    below = [pyro.sample(f"z0_{i}", dist.Normal(0.1 * i, 1.0)) for i in range(2**layers)]
    for layer in range(1, layers + 1):
        pairs = zip(below[::2], below[1::2], strict=True)
        below = [pyro.sample(f"z{layer}_{i}", dist.Normal(0.5 * (a + b), 0.6)) for i, (a, b) in enumerate(pairs)]
    pyro.sample("x", dist.Normal(below[0], 0.3), obs=data)


@pytest.mark.parametrize("layers", [2, 3, 4])
def test_a_gaussian_pyramid_is_exact_in_two_sweeps(layers: int) -> None:
    data, width = torch.tensor(1.7), 2**layers
    posterior = fit(pyramid, layers, data)
    mean, variance = torch.arange(width) * 0.1, torch.ones(width)
    for _ in range(layers):
        mean, variance = mean.reshape(-1, 2).mean(1), variance.reshape(-1, 2).sum(1) / 4 + 0.36
    assert posterior.num_steps <= 2
    assert posterior.elbo == pytest.approx(
        float(dist.Normal(mean[0], (variance[0] + 0.09).sqrt()).log_prob(data)), abs=1e-9
    )


# -- hierarchical linear models -------------------------------------------------------------------------------------------


def schools(tau: float = 5.0) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("schools", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, ERRORS), obs=SCORES)


def test_a_hierarchy_is_exact_given_its_precisions() -> None:
    posterior = fit(schools)
    design = torch.cat([torch.zeros(8, 1), torch.eye(8)], 1)
    lift = torch.cat([torch.ones(9, 1), torch.cat([torch.zeros(1, 8), torch.eye(8)])], 1)
    prior = lift @ torch.diag(torch.full((9,), 25.0)) @ lift.mT
    noise = torch.diag(ERRORS**2)
    assert posterior.elbo_kind == "exact evidence" and posterior.num_steps == 1
    assert posterior.elbo == pytest.approx(float(evidence(design, prior, noise, SCORES)), abs=1e-9)
    mean, covariance = exact_posterior(design, prior, noise, SCORES)
    joint = posterior.joint(["mu", "theta"])
    torch.testing.assert_close(joint.mean, mean)
    torch.testing.assert_close(joint.covariance_matrix, covariance)
    assert posterior["theta"].batch_shape == (8,) and posterior["mu"].batch_shape == ()
    torch.testing.assert_close(posterior["theta"].stddev, covariance.diagonal()[1:].sqrt())


def mixed_model(x: Tensor, group: Tensor, other: Tensor, y: Tensor) -> None:
    """Coefficients, a random effect around a mean, and a crossed one."""
    w = pyro.sample("w", dist.Normal(torch.zeros(3), torch.tensor([1.0, 2.0, 0.5])).to_event(1))
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("others", 4):
        b = pyro.sample("b", dist.Normal(0.0, 0.7))
    with pyro.plate("groups", 5):
        a = pyro.sample("a", dist.Normal(mu, 0.6))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(x @ w + a[group] - 2 * b[other] + 0.5, 0.8), obs=y)


def test_crossed_effects_and_coefficients_are_one_gaussian() -> None:
    x, group, other, y = torch.randn(40, 3), torch.arange(40) % 5, torch.arange(40) % 4, torch.randn(40)
    posterior = fit(mixed_model, x, group, other, y)
    # in the order w, mu, a − mu, b
    eye5, eye4 = torch.eye(5)[group], torch.eye(4)[other]
    design = torch.cat([x, torch.ones(40, 1), eye5, -2 * eye4], 1)
    prior = torch.diag(torch.tensor([1.0, 4.0, 0.25, 4.0, *[0.36] * 5, *[0.49] * 4]))
    noise = 0.64 * torch.eye(40)
    assert posterior.elbo_kind == "exact evidence"
    assert posterior.elbo == pytest.approx(float(evidence(design, prior, noise, y - 0.5)), abs=1e-8)
    mean, covariance = exact_posterior(design, prior, noise, y - 0.5)
    lift = torch.eye(13)
    lift[4:9, 3] = 1.0
    joint = posterior.joint(["w", "mu", "a", "b"])
    torch.testing.assert_close(joint.mean, lift @ mean)
    torch.testing.assert_close(joint.covariance_matrix, lift @ covariance @ lift.mT)


def unknown_precisions(y: Tensor, errors: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.Gamma(2.0, 20.0))
    with pyro.plate("groups", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau.rsqrt()))
        pyro.sample("y", dist.Normal(theta, errors), obs=y)


def test_with_unknown_precisions_the_bound_is_better_and_the_sds_are_those_of_quadrature() -> None:
    """mu and tau on a fine grid, theta integrated out by hand; sds of mean field are too small by a factor."""
    y, errors = torch.tensor([1.0, 6.0, -2.0, 3.5, 2.0, 4.0, 0.5, 5.0, 3.0, 1.5]), torch.full((10,), 1.0)
    joint, apart = (fit(unknown_precisions, y, errors, blocks=blocks) for blocks in ("auto", "sites"))
    mu = torch.linspace(-15, 20, 1401)[:, None]
    log_tau = torch.linspace(-9, 5, 1401)
    variance = (-log_tau).exp()
    log_p = dist.Normal(0.0, 5.0).log_prob(mu) + dist.Gamma(2.0, 20.0).log_prob(log_tau.exp()) + log_tau
    log_p = log_p + sum(dist.Normal(mu, (variance + s**2).sqrt()).log_prob(v) for v, s in zip(y, errors, strict=True))
    weight = log_p.flatten().softmax(0).reshape(log_p.shape)
    step = (mu[1, 0] - mu[0, 0]).log() + (log_tau[1] - log_tau[0]).log()
    marginal = log_p.flatten().logsumexp(0) + step
    mean = (weight * mu).sum()
    deviation = (weight * (mu - mean) ** 2).sum().sqrt()
    assert apart.elbo < joint.elbo < float(marginal)
    assert float(marginal) - joint.elbo < 0.15 < float(marginal) - apart.elbo
    assert float(joint["mu"].mean) == pytest.approx(float(mean), abs=0.03 * float(deviation))
    assert float(joint["mu"].stddev) == pytest.approx(float(deviation), rel=0.1)
    assert float(apart["mu"].stddev) < 0.9 * float(deviation) < float(joint["mu"].stddev)


def test_the_draws_of_the_guide_are_those_of_the_joint_posterior() -> None:
    engine = BLRInference(schools)
    posterior = engine.run(progress=False)
    draws = Predictive(schools, guide=engine.guide, num_samples=1000)()
    stacked = torch.cat([draws["mu"].reshape(-1, 1), draws["theta"].reshape(-1, 8)], 1)
    joint = posterior.joint(["mu", "theta"])
    scale = joint.covariance_matrix.diagonal().sqrt()
    assert ((stacked.mean(0) - joint.mean) / scale).abs().max() < 5 / 1000**0.5
    assert ((torch.cov(stacked.mT) - joint.covariance_matrix) / (scale[:, None] * scale)).abs().max() < 10 / 1000**0.5
    assert -Trace_ELBO().loss(schools, engine.guide) == pytest.approx(
        posterior.elbo, abs=1e-8
    )  # any draw is the evidence


# -- random linear Gaussian programs -------------------------------------------------------------------------------------


def random_program(seed: int) -> Callable[[], None]:
    """Scalars, plates and vectors, each around an affine function of some before it, in plates that need not be theirs."""
    draw = torch.Generator().manual_seed(seed)

    def pick(count: int) -> int:
        return int(torch.randint(count, (), generator=draw))

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    sizes = {"g": 3, "h": 4}
    latent = [
        ("scalar", None),
        *((("scalar", None), ("plate", "g"), ("plate", "h"), ("vector", None))[pick(4)] for _ in range(4)),
    ]
    statements: list[tuple[str, str, str | None, list[tuple[int, Tensor]], Tensor, Tensor | None]] = []
    for number, (kind, plate) in enumerate([*latent, ("rows", None), ("rows", None)]):
        length = {"scalar": 1, "vector": 2, "rows": 7}.get(kind) or sizes[plate or ""]
        parents = [p for p in range(min(number, len(latent))) if pick(2) or kind == "rows"]
        terms = []
        for p in parents:
            width = {"scalar": 1, "vector": 2}.get(latent[p][0]) or sizes[latent[p][1] or ""]
            terms.append(
                (p, torch.randint(width, (length,), generator=draw) if width > 1 else torch.zeros(length).long())
            )
        data = numbers(7) if kind == "rows" else None
        coefficients = [(p, index) for p, index in terms]
        statements.append((f"s{number}", kind, plate, coefficients, numbers(len(terms) + 1, length), data))

    def model() -> None:
        values: list[Tensor] = []
        for name, kind, plate, terms, coefficient, data in statements:
            loc = coefficient[-1]
            for row, (parent, index) in zip(coefficient, terms, strict=False):
                loc = loc + row * values[parent].reshape(-1)[index]
            if kind == "scalar":
                values.append(pyro.sample(name, dist.Normal(loc.sum(), 0.8)))
            elif kind == "plate":
                with pyro.plate(f"{plate}_{name}", sizes[str(plate)]):
                    values.append(pyro.sample(name, dist.Normal(loc, 0.9)))
            elif kind == "vector":
                values.append(pyro.sample(name, dist.Normal(loc, 1.1).to_event(1)))
            else:
                with pyro.plate("rows_" + name, 7):
                    pyro.sample(name, dist.Normal(loc, 0.7), obs=data)

    return model


def laplace_evidence(model: Callable) -> float:
    """log p(z*) + ½ D log 2π − ½ log|−∇² log p|, exact for a Gaussian joint, from the model's own log density."""
    trace = pyro.poutine.trace(model).get_trace()
    sites = {k: n["value"].shape for k, n in trace.iter_stochastic_nodes() if n["value"].is_floating_point()}

    def log_joint(flat: Tensor) -> Tensor:
        parts = flat.split([shape.numel() for shape in sites.values()])
        values = {name: part.reshape(shape) for (name, shape), part in zip(sites.items(), parts, strict=True)}
        return pyro.poutine.trace(pyro.poutine.condition(model, data=values)).get_trace().log_prob_sum()

    start = torch.zeros(sum(shape.numel() for shape in sites.values()))
    hessian = torch.autograd.functional.hessian(log_joint, start)
    leaf = start.clone().requires_grad_()
    mode = -torch.linalg.solve(hessian, torch.autograd.grad(log_joint(leaf), leaf)[0])
    normaliser = 0.5 * len(start) * torch.log(torch.tensor(2 * torch.pi))
    return float(log_joint(mode) + normaliser - 0.5 * torch.linalg.slogdet(-hessian).logabsdet)


@pytest.mark.parametrize("seed", range(12))
def test_a_random_linear_gaussian_program_is_exact(seed: int) -> None:
    model = random_program(seed)
    posterior = fit(model)
    assert posterior.elbo_kind == "exact evidence" and posterior.num_steps == 1
    assert posterior.elbo == pytest.approx(laplace_evidence(model), rel=1e-9, abs=1e-7)


# -- which sites belong together ------------------------------------------------------------------------------------------


def data_of_pairs() -> tuple[Tensor, ...]:
    torch.manual_seed(3)
    return torch.randint(0, 4, (60,)), torch.randint(0, 4, (60,)), torch.randn(60), torch.randn(60)


def pairs(group: Tensor, other: Tensor, x: Tensor, y: Tensor) -> None:
    with pyro.plate("groups", 4):
        a, b = pyro.sample("a", dist.Normal(0.0, 1.0)), pyro.sample("b", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(a[group] + b[group] * x, 1.0).to_event(1), obs=y)


def test_an_intercept_and_a_slope_for_each_group_keep_their_plate() -> None:
    group, other, x, y = data_of_pairs()
    posterior = fit(pairs, group, other, x, y)
    block = posterior.blocks["a+b"]
    assert block.batch_shape == (4,) and block.family.event_shape == (2,)
    eye = torch.eye(4)[group]
    design = torch.cat([eye, eye * x[:, None]], 1)
    assert posterior.elbo == pytest.approx(float(evidence(design, torch.eye(8), torch.eye(60), y)), abs=1e-9)


def attack_and_defence(group: Tensor, other: Tensor, x: Tensor, y: Tensor) -> None:
    with pyro.plate("teams", 4):
        a, d = pyro.sample("a", dist.Normal(0.0, 1.0)), pyro.sample("d", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(a[group] - d[other], 1.0).to_event(1), obs=y)


def paired_comparison(group: Tensor, other: Tensor, x: Tensor, y: Tensor) -> None:
    with pyro.plate("players", 4):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(a[group] - a[other], 1.0).to_event(1), obs=y)


@pytest.mark.parametrize("model, name, joined", [(attack_and_defence, "a+d", True), (paired_comparison, "a", False)])
def test_elements_of_a_plate_that_meet_are_dependent(model: Callable, name: str, joined: bool) -> None:
    group, other, x, y = data_of_pairs()
    posterior = fit(model, group, other, x, y)
    assert posterior.blocks[name].batch_shape == () and posterior.blocks[name].is_joint
    first, second = torch.eye(4)[group], -torch.eye(4)[other]
    design = torch.cat([first, second], 1) if joined else first + second
    size = design.shape[1]
    assert posterior.elbo_kind == "exact evidence"
    assert posterior.elbo == pytest.approx(float(evidence(design, torch.eye(size), torch.eye(60), y)), abs=1e-9)
    _, covariance = exact_posterior(design, torch.eye(size), torch.eye(60), y)
    torch.testing.assert_close(posterior.joint(name.split("+")).covariance_matrix, covariance)
    values = posterior.sample((3,))
    assert values["a"].shape == (3, 4) and posterior.log_prob(values).shape == (3,)


def product(group: Tensor, other: Tensor, x: Tensor, y: Tensor) -> None:
    with pyro.plate("groups", 4):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("others", 4):
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(a[group] * b[other], 1.0).to_event(1), obs=y)


def product_and_mean(group: Tensor, other: Tensor, x: Tensor, y: Tensor) -> None:
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("groups", 40):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("others", 4):
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(m + a[group] * b[other], 1.0).to_event(1), obs=y)


def mixture(group: Tensor, other: Tensor, x: Tensor, y: Tensor) -> None:
    with pyro.plate("components", 3):
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    with pyro.plate("rows", 60):
        z = pyro.sample("z", dist.Categorical(torch.ones(3)))
        pyro.sample("y", dist.Normal(mu[z], 0.5), obs=y)


def mixture_of_lines(group: Tensor, other: Tensor, x: Tensor, y: Tensor) -> None:
    with pyro.plate("components", 3):
        a, b = pyro.sample("a", dist.Normal(0.0, 3.0)), pyro.sample("b", dist.Normal(0.0, 3.0))
    with pyro.plate("rows", 60):
        z = pyro.sample("z", dist.Categorical(torch.ones(3)))
        pyro.sample("y", dist.Normal(a[z] + b[z] * x, 0.5), obs=y)


def unknown_scale(group: Tensor, other: Tensor, x: Tensor, y: Tensor) -> None:
    w, b = pyro.sample("w", dist.Normal(0.0, 1.0)), pyro.sample("b", dist.Normal(0.0, 1.0))
    precision = pyro.sample("precision", dist.Gamma(2.0, 2.0))
    with pyro.plate("rows", 60):
        pyro.sample("y", dist.Normal(w * x + b, precision.rsqrt()), obs=y)


def own_wish(group: Tensor, other: Tensor, x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0), infer={"blr": {"block": "sites"}})
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 60):
        pyro.sample("y", dist.Normal(w * x + b, 1.0), obs=y)


def logistic(group: Tensor, other: Tensor, x: Tensor, y: Tensor) -> None:
    w, b = pyro.sample("w", dist.Normal(0.0, 1.0)), pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 60):
        pyro.sample("y", dist.Bernoulli(logits=w * x + b), obs=(y > 0).double())


def alone(group: Tensor, other: Tensor, x: Tensor, y: Tensor) -> None:
    with pyro.plate("groups", 4):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 60):
        pyro.sample("y", dist.Normal(a[group], 1.0), obs=y)


def shared_scale(group: Tensor, other: Tensor, x: Tensor, y: Tensor) -> None:
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("components", 3):
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    with pyro.plate("rows", 60):
        z = pyro.sample("z", dist.Categorical(torch.ones(3)))
        pyro.sample("y", dist.Normal(mu[z], scale), obs=y)


def horseshoe(group: Tensor, other: Tensor, x: Tensor, y: Tensor) -> None:
    tau = pyro.sample("tau", dist.HalfCauchy(1.0))
    with pyro.plate("columns", 4):
        local = pyro.sample("local", dist.HalfCauchy(1.0))
        w = pyro.sample("w", dist.Normal(0.0, tau * local))
    pyro.sample("y", dist.Normal(w[group] + w[other] * x, 1.0).to_event(1), obs=y)


GROUPS: list[tuple[Callable, list[str]]] = [
    (shared_scale, ["scale", "mu", "z"]),  # the scale would settle on the first assignment
    (horseshoe, ["tau+local", "w"]),  # a funnel in draws: the scales together, what they scale by itself
    (product, ["a", "b"]),  # each is exact given the other
    (product_and_mean, ["a", "m+b"]),  # the mean joins the smaller one
    (mixture, ["mu", "z"]),
    (mixture_of_lines, ["a+b", "z"]),
    (unknown_scale, ["w+b", "precision"]),
    (own_wish, ["b", "w"]),
    (logistic, ["w+b"]),
    (alone, ["a"]),
]


@pytest.mark.parametrize("model, expected", GROUPS, ids=[model.__name__ for model, _ in GROUPS])
def test_which_sites_form_one_gaussian(model: Callable, expected: list[str]) -> None:
    posterior = fit(model, *data_of_pairs(), max_steps=1)
    assert sorted(posterior.blocks) == sorted(expected)
    if model in (mixture, alone):
        assert not any(block.is_joint for block in posterior.blocks.values())
    if model is mixture_of_lines:
        assert posterior.blocks["a+b"].batch_shape == (3,)


@pytest.mark.parametrize(
    "model", [product, product_and_mean, mixture_of_lines, unknown_scale], ids=lambda m: m.__name__
)
def test_every_message_stays_exact_and_the_bound_is_no_worse(model: Callable) -> None:
    data = data_of_pairs()
    explanation = BLRInference(model).explain(*data)
    assert explanation.exact
    pyro.set_rng_seed(1)
    joint = fit(model, *data, tol=1e-6, num_restarts=2)
    pyro.set_rng_seed(1)
    apart = fit(model, *data, tol=1e-6, num_restarts=2, blocks="sites")
    assert joint.elbo >= apart.elbo - 1e-4


def test_minibatches_group_what_is_in_the_same_plates() -> None:
    def model(y: Tensor) -> None:
        mu, nu = pyro.sample("mu", dist.Normal(0.0, 1.0)), pyro.sample("nu", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y), subsample_size=5) as rows:
            a = pyro.sample("a", dist.Normal(mu + nu, 1.0))
            b = pyro.sample("b", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(a + b, 1.0), obs=y[rows])

    engine = BLRInference(model)
    engine.step(torch.randn(20))
    assert list(engine.posterior.blocks) == ["mu+nu", "a+b"]
    assert engine.posterior.blocks["a+b"].batch_shape == (20,)


# -- eight schools ----------------------------------------------------------------------------------------------------------


def centred() -> None:
    mu, tau = pyro.sample("mu", dist.Normal(0.0, 5.0)), pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, ERRORS), obs=SCORES)


def noncentred() -> None:
    mu, tau = pyro.sample("mu", dist.Normal(0.0, 5.0)), pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * eta, ERRORS), obs=SCORES)


@pytest.mark.parametrize("model", [centred, noncentred], ids=lambda m: m.__name__)
def test_a_positive_site_joins_the_gaussian_whose_scale_it_is(model: Callable) -> None:
    joint, apart = fit(model), fit(model, blocks="sites")
    assert list(joint.blocks) == ["mu+tau+" + ("theta" if model is centred else "eta")]
    assert joint.elbo > apart.elbo + 0.02
    tau = torch.linspace(-12, 7, 4001)
    log_p = dist.HalfCauchy(5.0).log_prob(tau.exp()) + tau
    for i, t in enumerate(tau.exp()):
        covariance = torch.diag(ERRORS**2 + t**2) + 25.0
        log_p[i] += dist.MultivariateNormal(torch.zeros(8), covariance).log_prob(SCORES)
    assert joint.elbo < float(log_p.logsumexp(0) + (tau[1] - tau[0]).log())


# -- size and words ---------------------------------------------------------------------------------------------------------


def large(size: int) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("groups", size):
        a = pyro.sample("a", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(a, 1.0), obs=torch.zeros(size))


def test_explain_says_which_block_and_why() -> None:
    told = BLRInference(schools).explain()
    assert "one Gaussian of 9 dimensions over mu, theta: jointly affine in theta" in " ".join(str(told).split())
    assert told.to_dict()["sites"]["mu"]["block"] == "mu+theta"
    told = BLRInference(centred).explain()
    assert "over mu, tau, theta: share the non-conjugate theta" in " ".join(str(told).split())


def of_two_precisions(dtype: torch.dtype) -> None:
    slope = pyro.sample("slope", dist.Normal(torch.tensor(0.0, dtype=dtype), 1.0))
    level = pyro.sample("level", dist.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0))
    with pyro.plate("data", 5):
        loc = level + slope * torch.arange(5.0, dtype=torch.float64)
        pyro.sample("y", dist.Normal(loc, 1.0), obs=torch.ones(5, dtype=torch.float64))


def test_explain_says_that_dtypes_keep_sites_apart() -> None:
    apart = BLRInference(of_two_precisions).explain(torch.float32)
    said = "level float64 and slope float32 belong together, and are kept apart by their dtype"
    assert said in " ".join(str(apart).split())
    assert apart.to_dict()["sites"]["slope"]["block"] == "slope"
    together = BLRInference(of_two_precisions).explain(torch.float64)
    assert "dtype" not in str(together) and together.to_dict()["sites"]["slope"]["block"] == "slope+level"


def test_a_block_beyond_the_limit_is_kept_apart_and_explain_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where sparse ones are not taken either: else it is one (`test_sparse_blocks`)."""
    monkeypatch.setitem(MOST, "affine", 20)
    monkeypatch.setattr("pyro_blr.groups.SPARSE", 0)
    assert groups(large, 19) == ["mu+a"]
    assert groups(large, 20) == ["mu", "a"]
    told = " ".join(str(BLRInference(large).explain(20)).split())
    assert "a joint block of mu and a would have 21 dimensions, beyond 20: kept apart" in told


# -- the guide, and files ---------------------------------------------------------------------------------------------------


def test_a_guide_by_itself_makes_the_same_groups() -> None:
    guide = AutoExponentialFamily(schools)
    guide()
    assert list(guide.blocks) == ["mu+theta"]
    engine = BLRInference(schools, guide)
    assert engine.run(progress=False).elbo == pytest.approx(fit(schools).elbo, abs=1e-10)


def test_a_flattened_plate_is_saved_and_loaded(tmp_path: Any) -> None:
    data = data_of_pairs()
    posterior = fit(paired_comparison, *data)
    posterior.save(tmp_path / "q.safetensors")
    again = Posterior.load(tmp_path / "q.safetensors")
    torch.testing.assert_close(again.joint(["a"]).covariance_matrix, posterior.joint(["a"]).covariance_matrix)
    engine = BLRInference(paired_comparison)
    engine.run(*data, progress=False)
    draws = Predictive(paired_comparison, guide=engine.guide, num_samples=10)(*data)
    assert draws["y"].reshape(10, 60).std() > 0.5
    assert {k: tuple(v.shape) for k, v in engine.guide.median(*data).items()} == {"a": (4,)}


def test_start_values_reach_a_joint_block() -> None:
    engine = BLRInference(schools, init={"mu": torch.tensor(3.0), "theta": torch.arange(8.0)})
    engine.explain()
    torch.testing.assert_close(engine.posterior["theta"].mean, torch.arange(8.0))
    engine = BLRInference(schools, init={"theta": torch.arange(8.0)})
    engine.explain()
    torch.testing.assert_close(engine.posterior["theta"].mean, torch.arange(8.0))
    assert engine.run(progress=False).elbo == pytest.approx(fit(schools).elbo, abs=1e-9)


def test_float32_models_keep_their_sums_in_float64() -> None:
    x, group, other, y = torch.randn(40, 3), torch.arange(40) % 5, torch.arange(40) % 4, torch.randn(40)
    wide = fit(mixed_model, x, group, other, y)
    torch.set_default_dtype(torch.float32)
    narrow = fit(mixed_model, x.float(), group, other, y.float())
    assert narrow["w"].mean.dtype == torch.float32
    torch.testing.assert_close(narrow["a"].mean.double(), wide["a"].mean, rtol=1e-4, atol=1e-5)
    assert narrow.elbo == pytest.approx(wide.elbo, abs=1e-3)
