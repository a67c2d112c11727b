"""Exact messages are ∇_μ E_q[log f]: each likelihood template × each argument, by quadrature and
enumeration to 1e-8.

Every model has one likelihood and one latent, or one pair of latents, in the argument that is
named; q is random, not the prior.
"""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from definitions import default_dtype
from programs import Written, seeded
from pyro import poutine
from soundness import Report, check, check_messages, understood
from torch import Tensor

from pyro_blr import BLRInference

N = 3


def data(seed: int, shape: tuple[int, ...] = (N,), kind: str = "real") -> Tensor:
    """In float64, although modules are imported before tests set it."""
    with default_dtype(torch.float64):
        return seeded(seed, shape, kind)


X, Y, P = data(1), data(2), data(3, kind="positive")
BITS, COUNTS, INDEX = data(4, kind="bit"), data(5, kind="count"), data(6, kind="index")
VECTORS, DESIGN = data(7, (N, 2)), data(8, (N, 2))
MATRIX, OTHER = data(9, (2, 2), "matrix"), data(10, (2, 2), "matrix")

Statement = Callable[[], None]


def real(name: str = "r") -> Tensor:
    return pyro.sample(name, dist.Normal(0.3, 1.2))


def tau(name: str = "t") -> Tensor:
    return pyro.sample(name, dist.Gamma(2.0, 1.5))


def variance() -> Tensor:
    return pyro.sample("v", dist.InverseGamma(2.5, 1.2))


def unit() -> Tensor:
    return pyro.sample("p", dist.Beta(1.5, 2.5))


def simplex() -> Tensor:
    return pyro.sample("s", dist.Dirichlet(torch.tensor([1.0, 2.0, 0.5])))


def vector() -> Tensor:
    return pyro.sample("u", dist.MultivariateNormal(torch.zeros(2), precision_matrix=MATRIX))


def weights() -> Tensor:
    return pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))


def wishart() -> Tensor:
    return pyro.sample("W", dist.Wishart(torch.tensor(4.0), precision_matrix=MATRIX))


def means() -> Tensor:
    with pyro.plate("components", 2):
        return pyro.sample("m", dist.Normal(0.0, 2.0))


def state() -> Tensor:
    return pyro.sample("z", dist.Categorical(torch.tensor([0.3, 0.7])))


def observe(make: Callable[[], object], data: Tensor) -> Statement:
    """A model of N data; `make` is called outside the plate."""

    def model() -> None:
        distribution = make()
        with pyro.plate("rows", N):
            pyro.sample("y", distribution, obs=data)

    return model


def enumerated(make: Callable[[Tensor, Tensor], object], data: Tensor) -> Statement:
    def model() -> None:
        m = means()
        with pyro.plate("rows", N):
            pyro.sample("y", make(m, state()), obs=data)

    return model


def latent_value(make: Callable[[], object]) -> Statement:
    """The factor of a latent whose own prior has latent arguments."""

    def model() -> None:
        pyro.sample("x", make())

    return model


def masked() -> None:
    r, data = real(), torch.where(BITS.bool(), Y, torch.nan)
    with pyro.plate("rows", N), poutine.mask(mask=BITS.bool()):
        pyro.sample("y", dist.Normal(r, 1.0), obs=data)


def subsampled() -> None:
    r = real()
    with pyro.plate("rows", 15, subsample=torch.tensor([4, 9, 2])), poutine.scale(scale=2.5):
        pyro.sample("y", dist.Normal(r, tau("local").rsqrt()), obs=Y)


MODELS: dict[str, Statement] = {
    "Normal loc": observe(lambda: dist.Normal(real(), 0.7), Y),
    "Normal loc and precision": observe(lambda: dist.Normal(X * real(), tau().rsqrt()), Y),
    "Normal variance": observe(lambda: dist.Normal(X, variance().sqrt()), Y),
    "Normal loc, a dot product": observe(lambda: dist.Normal(DESIGN @ weights(), 0.7), Y),
    "Normal loc, a product of sites": observe(lambda: dist.Normal(real("a") * (X * real("b") + 1), 0.7), Y),
    "Normal value": latent_value(lambda: dist.Normal(real(), tau().rsqrt())),
    "Normal, two precisions": observe(lambda: dist.Normal(X, (tau("a") * tau("b")).rsqrt()), Y),
    "Normal, Gamma over InverseGamma": observe(lambda: dist.Normal(X, (variance() / tau()).sqrt()), Y),
    "LogNormal loc and precision": observe(lambda: dist.LogNormal(real(), tau() ** -0.5), P),
    "LogNormal value": latent_value(lambda: dist.LogNormal(real(), tau() ** -0.5)),
    "LogNormal inside a loc": observe(
        lambda: dist.Normal(X * pyro.sample("l", dist.LogNormal(0.1, 0.5)).log(), 1.0), Y
    ),
    "Gamma rate": observe(lambda: dist.Gamma(2.5, P * tau()), P),
    "Gamma value": latent_value(lambda: dist.Gamma(2.5, tau())),
    "InverseGamma rate": observe(lambda: dist.InverseGamma(2.5, tau()), P),
    "InverseGamma value": latent_value(lambda: dist.InverseGamma(2.5, 2 * tau())),
    "Exponential rate": observe(lambda: dist.Exponential(1 / variance()), P),
    "Exponential value": latent_value(lambda: dist.Exponential(tau())),
    "Poisson rate": observe(lambda: dist.Poisson(P * tau()), COUNTS),
    "Bernoulli probs": observe(lambda: dist.Bernoulli(unit()), BITS),
    "Bernoulli complement": observe(lambda: dist.Bernoulli(1 - unit()), BITS),
    "Bernoulli logits": observe(lambda: dist.Bernoulli(logits=torch.logit(unit())), BITS),
    "Binomial probs": observe(lambda: dist.Binomial(9, unit()), COUNTS),
    "Geometric probs": observe(lambda: dist.Geometric(unit()), COUNTS),
    "NegativeBinomial probs": observe(lambda: dist.NegativeBinomial(3.0, probs=unit()), COUNTS),
    "Categorical probs": observe(lambda: dist.Categorical(simplex()), INDEX),
    "Categorical logits": observe(lambda: dist.Categorical(logits=simplex().log()), INDEX),
    "OneHotCategorical probs": observe(lambda: dist.OneHotCategorical(simplex()), torch.eye(3, dtype=torch.float64)),
    "Multinomial probs": observe(
        lambda: dist.Multinomial(4, pyro.sample("s", dist.Dirichlet(torch.tensor([1.0, 2.0])))),
        torch.tensor([[4.0, 0.0], [1.0, 3.0], [2.0, 2.0]], dtype=torch.float64),
    ),
    "Beta value": latent_value(lambda: dist.Beta(1.5, 2.5)),
    "Uniform value": latent_value(lambda: dist.Uniform(0.0, 1.0)),
    "Dirichlet value": latent_value(lambda: dist.Dirichlet(torch.tensor([1.0, 2.0, 0.5]))),
    "Wishart value": latent_value(lambda: dist.Wishart(torch.tensor(4.0), covariance_matrix=MATRIX)),
    "MultivariateNormal loc": observe(lambda: dist.MultivariateNormal(vector() @ OTHER, MATRIX), VECTORS),
    "MultivariateNormal value": latent_value(lambda: dist.MultivariateNormal(vector(), MATRIX)),
    "MultivariateNormal precision_matrix": observe(
        lambda: dist.MultivariateNormal(torch.zeros(2), precision_matrix=wishart()), VECTORS
    ),
    "MultivariateNormal covariance_matrix": observe(
        lambda: dist.MultivariateNormal(torch.zeros(2), torch.linalg.inv(wishart())), VECTORS
    ),
    "MultivariateNormal scale_tril": observe(
        lambda: dist.MultivariateNormal(torch.zeros(2), scale_tril=torch.linalg.cholesky(torch.inverse(wishart()))),
        VECTORS,
    ),
    "MultivariateNormal through cholesky_inverse": observe(
        lambda: dist.MultivariateNormal(torch.zeros(2), torch.cholesky_inverse(torch.linalg.cholesky(tau() * MATRIX))),
        VECTORS,
    ),
    "MultivariateNormal A W Aᵀ": observe(
        lambda: dist.MultivariateNormal(torch.zeros(2), precision_matrix=DESIGN[:2] @ wishart() @ DESIGN[:2].T),
        VECTORS,
    ),
    "mixture of means": enumerated(lambda m, z: dist.Normal(m[z], 0.7), Y),
    "a state beside a fixed index": enumerated(lambda m, z: dist.Normal(m[z] + X * m[0], 0.7), Y),
    "a state as a number": enumerated(lambda m, z: dist.Normal(m[0] + z * m[1], 0.7), Y),
    "a difference of gathered elements": observe(lambda: dist.Normal((m := means())[INDEX] - m[1 - INDEX], 0.7), Y),
    "masked data that are NaN": masked,
    "a subsampled plate with a local site": subsampled,
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("seed", [0, 1])
def test_exact_messages_are_their_definition(name: str, seed: int) -> None:
    model, report = MODELS[name], Report()
    found = understood(model)
    verdicts = [v for plan in found.plans.values() for v in plan.verdicts]
    assert verdicts and all(v.exact for v in verdicts), [v for v in verdicts if not v.exact]
    check_messages(model, torch.float64, found, seed, report)
    assert not report.unsound, report.unsound
    assert report.counts["factors by draws"] == 0


PRECISION = "    t = pyro.sample('t', dist.Gamma(2.0, 1.5))\n"
SINGLE = {
    "mean and precision": f"    r = pyro.sample('r', dist.Normal(0.3, 1.2))\n{PRECISION}"
    "    y = pyro.sample('y', dist.Normal(r, t.rsqrt()), obs=torch.tensor(0.4))\n",
    "counts": f"{PRECISION}    y = pyro.sample('y', dist.Poisson(2.0 * t), obs=torch.tensor(3.0))\n",
}


@pytest.mark.parametrize("name", SINGLE)
def test_float32_messages_agree_to_their_precision(name: str) -> None:
    program = Written(f"def model():\n{SINGLE[name]}", {}, frozenset(), torch.float32)
    assert not check(program).failures


def test_rows_of_very_different_sizes_are_judged_each_by_its_own() -> None:
    """The second row, small beside the first, is the only one that combines two elements of w."""
    source = """
def model():
    with pyro.plate("k", 2):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("n", 2):
        loc = torch.stack([3e5 * w[0], (w * torch.ones(2)).sum()])
        pyro.sample("y", dist.Normal(loc, torch.tensor([3e5, 1.0])), obs=torch.tensor([1e5, 0.7]))
"""
    report = check(Written(source, {("y", "w"): True}, frozenset()))
    assert not report.failures
    assert report.counts["factors by quadrature"] == 2


def test_a_small_row_is_not_taken_for_affine_because_a_large_one_is() -> None:
    """`hypot` is unknown to the structural judge, and a billionth of the other row."""
    source = """
def model():
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("n", 2):
        loc = torch.stack([1e9 * w, torch.hypot(w, torch.ones(()))])
        pyro.sample("y", dist.Normal(loc, torch.tensor([1e9, 1.0])), obs=torch.tensor([1e3, 0.7]))
"""
    report = check(Written(source, {("y", "w"): False}, frozenset()))
    assert not report.failures
    assert report.counts["not exact"] == 1


@pytest.mark.parametrize("events", [2, 4], ids=["fewer events than rows", "as many"])
def test_weights_of_rows_are_not_weights_of_events(events: int) -> None:
    """`poutine.scale` by row around a regression of several outputs: P = I + Xᵀ diag(c) X / σ² for each of them."""
    rows, counts = 4, torch.tensor([3.0, 1.0, 2.0, 4.0])
    generator = torch.Generator().manual_seed(3)
    design, outputs = torch.randn(rows, 3, generator=generator), torch.randn(rows, events, generator=generator)

    def model() -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(3, events), 1.0).to_event(2))
        with pyro.plate("n", rows), poutine.scale(scale=counts):
            pyro.sample("x", dist.Normal(design @ w, 0.5).to_event(1), obs=outputs)

    engine = BLRInference(model, blocks="sites")
    engine.step()
    precision = torch.eye(3) + 4 * (design.T * counts) @ design
    mean = torch.linalg.solve(precision, 4 * (design.T * counts) @ outputs)
    q = engine.posterior.joint(["w"])
    assert torch.allclose(q.mean.reshape(3, events), mean, rtol=1e-10, atol=1e-12)
    covariance = q.covariance_matrix.reshape(3, events, 3, events)
    for event in range(events):
        assert torch.allclose(covariance[:, event, :, event], torch.linalg.inv(precision), rtol=1e-10, atol=1e-12)
