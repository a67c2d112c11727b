"""Improper posteriors raise, at the first step where they can be seen there; proper ones never do, and nothing ends in NaN."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints

from pyro_blr import BLRInference, ImproperPosteriorError
from pyro_blr.ascent import Ascent
from pyro_blr.beliefs import Beliefs
from pyro_blr.climbs import climb, guarded_sweep
from pyro_blr.draws import Draws
from pyro_blr.program import Programs
from pyro_blr.rules import gap

Y = torch.tensor([1.3, -0.4, 0.7], dtype=torch.float64)
BITS = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
DESIGN = torch.tensor([[1.0, 2.0], [1.0, 3.0], [1.0, -1.0], [1.0, -2.0]], dtype=torch.float64)


def flat(name: str, support: object = constraints.real, shape: tuple[int, ...] = ()) -> torch.Tensor:
    return pyro.sample(name, dist.ImproperUniform(support, (), shape))


# -- a fixed point of the retraction that is no optimum -------------------------------------------------------------


def well() -> None:
    """log f = −½ (z² − 5)² − ½ z²/100² + c: two modes, and E f'' = 10 − 6 (m² + v) − 1e-4."""
    z = pyro.sample("z", dist.Normal(torch.tensor(0.0, dtype=torch.float64), 100.0))
    pyro.sample("x", dist.Normal(z * z, 1.0), obs=torch.tensor(5.0, dtype=torch.float64))


def curvature(mean: float, variance: float) -> float:
    return 10 - 6 * (mean**2 + variance) - 1e-4


def between_the_modes(variance: float) -> Ascent:
    program = Programs(well, "sites").run((), {})
    natural = torch.tensor([0.0, -0.5 / variance], dtype=torch.float64)
    return Ascent(program, Beliefs(program.blocks, {"z": natural}))


SPURIOUS = (10 - 1e-4 - math.sqrt((10 - 1e-4) ** 2 - 24)) / 12  # v with −E f'' = −1/v


def test_a_target_of_minus_the_precision_is_a_fixed_point_far_from_its_target():
    ascent = between_the_modes(SPURIOUS)
    draws = Draws(0, 4096)
    moved = guarded_sweep(ascent, draws, 1.0, ascent.finite_estimates(draws))
    assert moved is not None
    assert moved.rate == 1.0
    assert moved.distance < 1e-4
    assert moved.astray == pytest.approx(1.0, rel=0.02)  # ½ · ½ · (2S/S)²


def test_a_climb_does_not_end_there():
    """It goes on to where λ is its own target: v = −1 / E f''."""
    ascent = between_the_modes(SPURIOUS)
    found = climb(ascent, Draws(0, 1024), 1e-6, 200, lambda *_: None)
    assert found.converged
    best = (10 + math.sqrt(124)) / 12  # 6 v² − 10 v − 1 = 0
    assert curvature(0.0, best) == pytest.approx(-1 / best, rel=1e-3)
    assert float(ascent.beliefs.wide["z"]["variance"]) == pytest.approx(best, rel=0.03)


@pytest.mark.parametrize("start", [None, 0.1, 3.0], ids=["prior", "narrow", "wide"])
def test_a_proper_posterior_between_two_modes_is_not_refused(start: float | None):
    pyro.set_rng_seed(0)
    init = None if start is None else {"z": dist.Normal(torch.tensor(0.0, dtype=torch.float64), start)}
    posterior = BLRInference(well, init=init).run(progress=False)
    assert posterior.converged
    mean, variance = float(posterior["z"].mean), float(posterior["z"].variance)
    assert curvature(mean, variance) + 1 / variance == pytest.approx(0.0, abs=0.05 * (6 * variance + 1 / variance))
    slope = -2 * (mean**3 + 3 * mean * variance) + 10 * mean - 1e-4 * mean
    assert abs(slope) * math.sqrt(variance) < 0.05


def test_gap_is_the_divergence_of_a_small_step():
    family = between_the_modes(1.0).program.blocks["z"].family
    natural = torch.tensor([0.3, -0.8], dtype=torch.float64)
    target = natural + 1e-4 * torch.tensor([1.0, -2.0], dtype=torch.float64)
    assert float(gap(family, natural, target)) == pytest.approx(float(family.kl(natural, target)), rel=1e-3)


# -- flat priors ----------------------------------------------------------------------------------------------------


def scale(count: int) -> Callable[[], None]:
    """p(s | x) ∝ s^−n for large s: proper from two observations on."""

    def model() -> None:
        s = flat("s", constraints.positive)
        with pyro.plate("n", count):
            pyro.sample("x", dist.Normal(torch.zeros((), dtype=torch.float64), s), obs=Y[:count])

    return model


def hierarchy(count: int) -> Callable[[], None]:
    """Its marginal in s is that of `scale` for large s."""

    def model() -> None:
        s = flat("s", constraints.positive)
        with pyro.plate("n", count):
            t = pyro.sample("t", dist.Normal(torch.zeros((), dtype=torch.float64), s))
            pyro.sample("x", dist.Normal(t, 1.0), obs=Y[:count])

    return model


def separable() -> None:
    w = flat("w", constraints.real_vector, (2,))
    with pyro.plate("n", 4):
        pyro.sample("y", dist.Bernoulli(logits=DESIGN @ w), obs=BITS)


def only_ones() -> None:
    w = flat("w")
    with pyro.plate("n", 4):
        pyro.sample("y", dist.Bernoulli(logits=w), obs=torch.ones(4, dtype=torch.float64))


def grouped() -> None:
    s, m = flat("s", constraints.positive), pyro.sample("m", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
    pyro.sample("x", dist.Normal(m, s), obs=Y[0])


IMPROPER = {
    "scale of one observation": (scale(1), "s", "the end of its support"),
    "scale of one effect": (hierarchy(1), "s", "the end of its support"),
    "separable": (separable, "w", "infinity"),
    "only ones": (only_ones, "w", "infinity"),
    "in a group": (grouped, "s", "the end of its support"),
}


@pytest.mark.parametrize("method", ["step", "run"])
@pytest.mark.parametrize("name", IMPROPER)
def test_flat_tails_raise_at_the_first_step(name: str, method: str):
    model, site, where = IMPROPER[name]
    engine = BLRInference(model, blocks=[["s", "m"]] if model is grouped else "auto")
    with pytest.raises(
        ImproperPosteriorError,
        match=f"site '{site}': its prior ImproperUniform is improper.* on the way to {where}, expected a proper posterior. "
        "Give the site a proper prior, or data",
    ):
        engine.run(progress=False) if method == "run" else engine.step()
    with pytest.raises(RuntimeError, match="there is no posterior yet"):
        _ = engine.posterior


def both() -> None:
    w = flat("w")
    with pyro.plate("n", 4):
        pyro.sample("y", dist.Bernoulli(logits=w), obs=BITS)


def heavy() -> None:
    """Tails fall as 1 / m², from far away."""
    m = flat("m")
    pyro.sample("x", dist.Cauchy(m, 1.0), obs=1e6 * Y[0])


def location() -> None:
    pyro.sample("x", dist.Normal(flat("m"), 1.0), obs=Y[0])


def chance() -> None:
    """Where b = 0, its mean at the start, no datum speaks of m; elsewhere one does, and |b|^(−1/2) has an integral."""
    m, b = flat("m"), pyro.sample("b", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
    pyro.sample("x", dist.StudentT(3.0, m * b.abs().sqrt(), 1.0), obs=Y[0])


PROPER = {
    "scale": (scale(2), "s"),
    "scale of effects": (hierarchy(3), "s"),
    "both outcomes": (both, "w"),
    "heavy": (heavy, "m"),
    "location": (location, "m"),
    "chance": (chance, "m"),
}


@pytest.mark.parametrize("name", PROPER)
def test_flat_priors_of_proper_posteriors_are_taken(name: str):
    model, site = PROPER[name]
    engine = BLRInference(model)
    for _ in range(3):
        assert math.isfinite(engine.step())
    assert bool(torch.isfinite(engine.posterior[site].mean)) and float(engine.posterior[site].stddev) > 0


# -- no prior is to blame --------------------------------------------------------------------------------------------


def growing(power: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], None]:
    """A factor that grows as fast as the prior falls, or faster."""

    def model() -> None:
        a = pyro.sample("a", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        pyro.factor("f", power(a))

    return model


GROWING = {"as fast": lambda a: 0.5 * a.square(), "faster": lambda a: a.square(), "much faster": torch.exp}


@pytest.mark.parametrize("name", GROWING)
def test_steps_on_an_improper_posterior_are_never_nan(name: str):
    """No single step can tell: it raises, or λ stays inside its domain, wide or far out."""
    engine = BLRInference(growing(GROWING[name]))
    for _ in range(30):
        try:
            engine.step()
        except ImproperPosteriorError as error:
            assert "site 'a'" in str(error)
            break
        q = engine.posterior["a"]
        assert bool(torch.isfinite(q.mean)) and 0 < float(q.stddev) < math.inf


@pytest.mark.parametrize("name", ["faster", "much faster"])
def test_a_run_on_an_improper_posterior_raises(name: str):
    with pytest.raises(ImproperPosteriorError, match="site 'a'"):
        BLRInference(growing(GROWING[name])).run(progress=False)


def silenced() -> torch.Tensor:
    with poutine.mask(mask=torch.tensor(False)):
        return pyro.sample("w", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))


@pytest.mark.parametrize("prior", [silenced, lambda: flat("w", constraints.real_vector, (2,))])
@pytest.mark.parametrize("method", ["step", "run"])
def test_an_exact_block_raises_at_the_first_step(method: str, prior: Callable[[], torch.Tensor]):
    """No prior, and data that determine one direction of two: all messages are exact, and add up to no Gaussian."""

    def model() -> None:
        pyro.sample("x", dist.Normal(prior().sum(), 1.0), obs=Y[0])

    engine = BLRInference(model)
    assert engine.explain().exact
    message = "site 'w': its factors add up to no proper distribution of the family MultivariateNormal"
    with pytest.raises(ImproperPosteriorError, match=message):
        engine.run(progress=False) if method == "run" else engine.step()


def test_a_flat_prior_has_a_closed_form():
    """∫ Π N(y_i | z, s) dz, and the least-squares posterior: exact, in one step."""
    noise = 0.7

    def model() -> None:
        coefficients = flat("coefficients", constraints.real_vector, (2,))
        with pyro.plate("rows", len(DESIGN)):
            pyro.sample("x", dist.Normal(DESIGN @ coefficients, noise), obs=BITS)

    posterior = BLRInference(model).run(progress=False)
    assert (posterior.elbo_kind, posterior.num_steps) == ("exact evidence", 1)
    covariance = noise**2 * torch.linalg.inv(DESIGN.mT @ DESIGN)
    mean = torch.linalg.lstsq(DESIGN, BITS).solution
    torch.testing.assert_close(posterior["coefficients"].mean, mean)
    torch.testing.assert_close(posterior["coefficients"].covariance_matrix, covariance)
    at_mode = dist.Normal(DESIGN @ mean, noise).log_prob(BITS).sum()
    evidence = at_mode + math.log(2 * math.pi) + 0.5 * torch.logdet(covariance)
    assert posterior.elbo == pytest.approx(float(evidence), abs=1e-10)
