"""Large Gaussians with sparse precisions: chains, hierarchies, and their evidence by other ways."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Predictive, Trace_ELBO
from torch import Tensor

from pyro_blr import BLRInference, Posterior
from pyro_blr import groups as groups_of
from pyro_blr.families import Pattern, SparseNormal
from pyro_blr.program import Programs


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any joint Gaussian is large, so that dense algebra can follow."""
    monkeypatch.setattr(groups_of, "MOST", {"affine": 3, "quadrature": 3, "draws": 200})
    monkeypatch.setattr("pyro_blr.families._pattern._SMALL", 4)


def fit(model: Callable, *args: Any, blocks: Any = "auto", **options: Any) -> Posterior:
    return BLRInference(model, blocks=blocks).run(*args, progress=False, **options)


def is_sparse(posterior: Posterior) -> bool:
    return any(isinstance(block.family, SparseNormal) for block in posterior.blocks.values())


# -- the algebra -----------------------------------------------------------------------------------------------------------


def lag(size: int, *steps: int) -> tuple[Tensor, Tensor]:
    later = [torch.arange(step, size) for step in steps]
    return torch.cat(later), torch.cat([rows - step for rows, step in zip(later, steps, strict=True)])


def grid(side: int) -> tuple[Tensor, Tensor]:
    place = torch.arange(side * side).reshape(side, side)
    return torch.cat([place[1:].flatten(), place[:, 1:].flatten()]), torch.cat(
        [place[:-1].flatten(), place[:, :-1].flatten()]
    )


def with_hubs(size: int, hubs: int) -> tuple[Tensor, Tensor]:
    """A chain of which every element is coupled with a few at its end."""
    rows, columns = lag(size - hubs, 1)
    others = torch.arange(size - hubs)
    ends = [torch.full_like(others, size - 1 - hub) for hub in range(hubs)]
    return torch.cat([rows, *ends]), torch.cat([columns, *[others] * hubs])


PATTERNS = {
    "chain": (300, lag(300, 1)),
    "two lags": (301, lag(301, 1, 2)),
    "season": (200, lag(200, 1, 12)),
    "grid": (144, grid(12)),
    "hubs": (250, with_hubs(250, 3)),
    "hubs alone": (200, (torch.full((199,), 199), torch.arange(199))),
    "loose": (90, (torch.tensor([5]), torch.tensor([3]))),
    "random": (150, tuple(torch.randint(0, 150, (2, 220), generator=torch.Generator().manual_seed(1)))),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_elimination_is_dense_algebra(name: str) -> None:
    """Products, solutions, determinants, inverses at the pattern, and the way back, against torch."""
    size, (rows, columns) = PATTERNS[name]
    solved = Pattern.of(size, rows, columns).elimination
    assert solved is not None
    i, j = solved.ends
    values = torch.zeros(solved.size)
    values[size:] = 0.3 * torch.randn(solved.size - size)
    dense = torch.zeros(size, size)
    dense[i, j] = dense[j, i] = values
    values[:size] = dense.abs().sum(1) + 0.5
    dense[i, j] = dense[j, i] = values
    inverse, vector, factor = torch.linalg.inv(dense), torch.randn(size), solved.factor(values)
    assert not factor.failed
    torch.testing.assert_close(solved.times(values, vector), dense @ vector)
    torch.testing.assert_close(solved.solve(factor, vector), inverse @ vector)
    torch.testing.assert_close(solved.half_logdet(factor), 0.5 * torch.logdet(dense))
    torch.testing.assert_close(solved.inverse(factor), inverse[i, j])
    torch.testing.assert_close(solved.precision(inverse[i, j]), values)
    root = solved.colour(factor, torch.eye(size))
    torch.testing.assert_close(root.mT @ root, inverse)
    values[size // 2] *= -1
    assert solved.factor(values).failed


def test_a_pattern_that_fills_in_is_refused() -> None:
    """Ten thousand variables, each coupled with eight others at random: what is left of elimination is dense."""
    ends = torch.randint(0, 10_000, (2, 40_000), generator=torch.Generator().manual_seed(0))
    assert Pattern.of(10_000, *ends).elimination is None


# -- chains ------------------------------------------------------------------------------------------------------------------


def level(y: Tensor, step: float = 0.3, noise: float = 0.5) -> None:
    """A random walk, vectorised."""
    size = len(y)
    with pyro.plate("time", size):
        z = pyro.sample("z", dist.Normal(0.0, 10.0))
        pyro.sample("y", dist.Normal(z, noise), obs=y)
    pyro.sample("walk", dist.Normal(z[1:] - z[:-1], step).to_event(1), obs=torch.zeros(size - 1))


def kalman(y: Tensor, transition: Tensor, spread: Tensor, start: Tensor, seen: Tensor, noise: float) -> tuple:
    """log p(y), and mean and variance of what is seen of every state given all data (Rauch, Tung and Striebel 1965)."""
    mean, covariance = torch.zeros(len(start)), start
    evidence, filtered, predicted = torch.zeros(()), [], []
    for t, datum in enumerate(y):
        if t:
            mean, covariance = transition @ mean, transition @ covariance @ transition.mT + spread
        predicted.append((mean, covariance))
        total = seen @ covariance @ seen + noise**2
        evidence = evidence + dist.Normal(seen @ mean, total.sqrt()).log_prob(datum)
        gain = covariance @ seen / total
        mean, covariance = mean + gain * (datum - seen @ mean), covariance - torch.outer(gain, gain) * total
        filtered.append((mean, covariance))
    smoothed = [filtered[-1]]
    for (m, v), (m_next, v_next) in zip(reversed(filtered[:-1]), reversed(predicted[1:]), strict=True):
        gain = v @ transition.mT @ torch.linalg.inv(v_next)
        after = smoothed[-1]
        smoothed.append((m + gain @ (after[0] - m_next), v + gain @ (after[1] - v_next) @ gain.mT))
    smoothed.reverse()
    means = torch.stack([seen @ m for m, _ in smoothed])
    return evidence, means, torch.stack([seen @ v @ seen for _, v in smoothed])


def walked(y: Tensor) -> None:
    """The walk of `level` as a state-space model: its prior is its first state's."""
    size = len(y)
    with pyro.plate("time", size):
        z = pyro.sample("z", dist.ImproperUniform(dist.constraints.real, (), ()))
        pyro.sample("y", dist.Normal(z, 0.5), obs=y)
    pyro.sample("first", dist.Normal(z[0], 1.0), obs=torch.tensor(0.0))
    pyro.sample("walk", dist.Normal(0.9 * z[:-1] - z[1:], 0.3).to_event(1), obs=torch.zeros(size - 1))


def test_a_state_space_model_of_five_thousand_steps_has_its_exact_evidence() -> None:
    """The Kalman filter's evidence, and the smoother's means and variances, after one sweep."""
    y = (0.3 * torch.randn(5000)).cumsum(0) * 0.5 + 0.5 * torch.randn(5000)
    posterior = fit(walked, y)
    assert is_sparse(posterior) and posterior.num_steps == 1
    one = torch.ones(1)
    evidence, mean, variance = kalman(y, 0.9 * one[:, None], 0.09 * one[:, None], one[:, None], one, 0.5)
    assert posterior.elbo == pytest.approx(float(evidence), rel=1e-10)
    torch.testing.assert_close(posterior["z"].mean, mean)
    torch.testing.assert_close(posterior["z"].variance, variance)


def local_trend(y: Tensor) -> None:
    """Level and slope in one state of two numbers a step, as a loop writes it."""
    turn, root = torch.tensor([[1.0, 1.0], [0.0, 1.0]]), torch.tensor([0.2, 0.1])
    z = pyro.sample("z_0", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    for t, datum in enumerate(y):
        if t:
            z = pyro.sample(f"z_{t}", dist.Normal(turn @ z, root).to_event(1))
        pyro.sample(f"y_{t}", dist.Normal(z[0], 0.5), obs=datum)


@pytest.mark.usefixtures("small")
def test_a_loop_over_states_of_two_numbers_is_sparse_too() -> None:
    y = torch.randn(12).cumsum(0)
    posterior = fit(local_trend, y)
    turn, first = torch.tensor([[1.0, 1.0], [0.0, 1.0]]), torch.tensor([1.0, 0.0])
    evidence, mean, variance = kalman(y, turn, torch.diag(torch.tensor([0.04, 0.01])), torch.eye(2), first, 0.5)
    assert is_sparse(posterior) and posterior.elbo == pytest.approx(float(evidence), abs=1e-9)
    for t in range(len(y)):
        law = posterior[f"z_{t}"]
        torch.testing.assert_close(law.mean[0], mean[t])
        torch.testing.assert_close(law.variance[0], variance[t])


def gamma_level(y: Tensor) -> None:
    size = len(y)
    tau, noise = pyro.sample("tau", dist.Gamma(2.0, 1.0)), pyro.sample("noise", dist.Gamma(2.0, 1.0))
    with pyro.plate("time", size):
        z = pyro.sample("z", dist.Normal(0.0, 10.0))
        pyro.sample("y", dist.Normal(z, noise.rsqrt()), obs=y)
    pyro.sample("walk", dist.Normal(z[1:] - z[:-1], tau.rsqrt()).to_event(1), obs=torch.zeros(size - 1))


def poisson_level(y: Tensor) -> None:
    size = len(y)
    with pyro.plate("time", size):
        z = pyro.sample("z", dist.Normal(0.0, 2.0))
        pyro.sample("y", dist.Poisson(z.exp()), obs=y.round().abs())
    pyro.sample("walk", dist.Normal(z[1:] - z[:-1], 0.3).to_event(1), obs=torch.zeros(size - 1))


def funnel_level(y: Tensor) -> None:
    """A latent scale that joins the Gaussian whose scale it is: a hub, by quadrature over two predictors."""
    size = len(y)
    s = pyro.sample("s", dist.LogNormal(-1.0, 0.5))
    with pyro.plate("time", size):
        z = pyro.sample("z", dist.Normal(0.0, 2.0))
        pyro.sample("y", dist.StudentT(4.0, z, 0.5), obs=y)
    pyro.sample("walk", dist.Normal(z[1:] - z[:-1], s).to_event(1), obs=torch.zeros(size - 1))


def hierarchy(y: Tensor) -> None:
    """Groups of two coefficients, crossed with three of all."""
    size, count = len(y), 7
    group = torch.arange(size) % count
    design = torch.cos(torch.arange(size * 3.0).reshape(size, 3))
    tau, noise = pyro.sample("tau", dist.Gamma(2.0, 1.0)), pyro.sample("noise", dist.Gamma(2.0, 1.0))
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 2.0).to_event(1))
    with pyro.plate("groups", count):
        b = pyro.sample("b", dist.Normal(torch.zeros(2), tau.rsqrt().unsqueeze(-1)).to_event(1))
    with pyro.plate("rows", size):
        each = b[group]
        loc = design @ w + each[:, 0] + each[:, 1] * design[:, 0]
        pyro.sample("y", dist.Normal(loc, noise.rsqrt()), obs=y)


@pytest.mark.parametrize("model", [level, gamma_level, poisson_level, funnel_level, hierarchy])
def test_a_sparse_gaussian_is_the_dense_one(model: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bound, marginals, joints and densities at the optimum are those of the same blocks with all covariances."""
    y = torch.randn(30).cumsum(0)
    dense = fit(model, y)
    assert not is_sparse(dense)
    monkeypatch.setattr(groups_of, "MOST", {"affine": 3, "quadrature": 3, "draws": 200})
    monkeypatch.setattr("pyro_blr.families._pattern._SMALL", 4)
    sparse = fit(model, y)
    assert is_sparse(sparse) and list(sparse.blocks) == list(dense.blocks)
    assert sparse.elbo == pytest.approx(dense.elbo, abs=2e-4)
    for name in dense.keys():
        torch.testing.assert_close(sparse[name].mean, dense[name].mean, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(sparse[name].stddev, dense[name].stddev, rtol=1e-3, atol=1e-4)
    inside = [name for name in ("z", "w", "b") if name in dense.keys()]
    torch.testing.assert_close(
        sparse.joint(inside).covariance_matrix, dense.joint(inside).covariance_matrix, rtol=5e-3, atol=1e-3
    )
    values = dense.sample((3,))
    torch.testing.assert_close(sparse.log_prob(values), dense.log_prob(values), rtol=1e-3, atol=2e-2)


# -- hierarchies -----------------------------------------------------------------------------------------------------------


def test_ten_thousand_groups_have_their_exact_evidence() -> None:
    """Random intercepts crossed with coefficients of all, against the same evidence with the intercepts integrated out."""
    count, size, width, between, noise = 10_000, 40_000, 4, 0.7, 0.5
    design, group = torch.randn(size, width), torch.randint(0, count, (size,))
    y = design @ torch.randn(width) + between * torch.randn(count)[group] + noise * torch.randn(size)

    def model() -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(width), 3.0).to_event(1))
        with pyro.plate("groups", count):
            a = pyro.sample("a", dist.Normal(0.0, between))
        with pyro.plate("rows", size):
            pyro.sample("y", dist.Normal(design @ w + a[group], noise), obs=y)

    posterior = fit(model)
    rows = torch.bincount(group, minlength=count).double()
    shrunk = between**2 / (noise**2 + rows * between**2)
    sum_y, sum_x = torch.zeros(count).index_add(0, group, y), torch.zeros(count, width).index_add(0, group, design)
    precision = (design.mT @ design - sum_x.mT @ (shrunk[:, None] * sum_x)) / noise**2 + torch.eye(width) / 9
    score = (design.mT @ y - sum_x.mT @ (shrunk * sum_y)) / noise**2
    mean = torch.linalg.solve(precision, score)
    determinant = size * math.log(noise**2) + torch.log1p(rows * between**2 / noise**2).sum()
    determinant = determinant + torch.logdet(precision) + width * math.log(9.0)
    square = (y @ y - shrunk @ sum_y**2) / noise**2 - score @ mean
    evidence = -0.5 * (size * math.log(2 * math.pi) + determinant + square)
    assert is_sparse(posterior) and posterior.num_steps == 1
    assert posterior.elbo == pytest.approx(float(evidence), rel=1e-11)
    torch.testing.assert_close(posterior["w"].mean, mean)
    torch.testing.assert_close(posterior["w"].covariance_matrix, precision.inverse())


# -- what a posterior does ---------------------------------------------------------------------------------------------------


def test_draws_of_a_long_chain_have_its_moments() -> None:
    y = torch.randn(2500).cumsum(0) * 0.3
    posterior = fit(level, y)
    draws = posterior.sample((400,))["z"]
    law = posterior["z"]
    assert is_sparse(posterior) and draws.shape == (400, 2500)
    assert float(((draws.mean(0) - law.mean) / law.stddev).abs().max()) * math.sqrt(400) < 5.5
    rows = torch.arange(2499)
    precision = torch.eye(2500) * (0.01 + 4)
    for i, j, sign in ((rows, rows, 1), (rows + 1, rows + 1, 1), (rows, rows + 1, -1), (rows + 1, rows, -1)):
        precision[i, j] += sign / 0.09
    covariance = precision.inverse()
    spread = covariance.diagonal()[1:] + covariance.diagonal()[:-1] - 2 * covariance[rows, rows + 1]
    ratio = (draws[:, 1:] - draws[:, :-1]).var(0) / spread
    assert float((ratio - 1).abs().max()) < 6 * math.sqrt(2 / 399)


def test_it_is_saved_and_loaded(tmp_path: Path) -> None:
    y = torch.randn(2200).cumsum(0) * 0.3
    posterior = fit(gamma_level, y, max_steps=3)
    posterior.save(tmp_path / "walk")
    again = Posterior.load(tmp_path / "walk")
    values = posterior.sample((2,))
    assert is_sparse(again)
    torch.testing.assert_close(again.log_prob(values), posterior.log_prob(values), rtol=0, atol=0)
    torch.testing.assert_close(again["z"].variance, posterior["z"].variance, rtol=0, atol=0)


def test_the_guide_is_a_pyro_guide() -> None:
    """Its ELBO by Pyro's own estimator is the bound, which is exact, so that every draw gives it; and it predicts."""
    y = torch.randn(2100).cumsum(0) * 0.3
    engine = BLRInference(level)
    posterior = engine.run(y, progress=False)
    assert is_sparse(posterior)
    assert -Trace_ELBO().loss(level, engine.guide, y) == pytest.approx(posterior.elbo, rel=1e-9)
    assert Predictive(level, guide=engine.guide, num_samples=3)(y)["z"].shape == (3, 2100)


def test_it_is_exported_and_explained() -> None:
    y = torch.randn(2100).cumsum(0) * 0.3
    engine = BLRInference(level)
    posterior = engine.run(y, progress=False)
    data = posterior.to_arviz(num_samples=30)
    assert data["posterior"]["z"].shape == (1, 30, 2100)
    text = " ".join(str(engine.explain(y)).split())
    assert "SparseNormal(2100)" in text and "one Gaussian of 2,100 dimensions over z" in text
    assert "sparse: of 2,100 dimensions, 2,099 pairs are coupled given the rest" in text


def test_what_fills_in_stays_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elements that meet at random, six each: where the dense rest would be too large, the plate stays a batch."""
    monkeypatch.setattr("pyro_blr.families._pattern._LARGEST_CORE", 100)
    size = 3000
    ends = torch.randint(0, size, (2, 9000), generator=torch.Generator().manual_seed(0))

    def model() -> None:
        with pyro.plate("elements", size):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("pairs", 9000):
            pyro.sample("y", dist.Normal(z[ends[0]] - z[ends[1]], 1.0), obs=torch.ones(9000))

    blocks = Programs(model, "auto").run((), {}).blocks
    assert blocks["z"].batch_shape == (size,)


@pytest.mark.usefixtures("small")
def test_its_linear_response_is_refused() -> None:
    posterior = fit(gamma_level, torch.randn(20).cumsum(0))
    with pytest.raises(ValueError, match="z: a sparse Gaussian's response is not solved for"):
        posterior.linear_response()
