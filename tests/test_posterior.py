"""A posterior is distributions with the model's shapes, and one file that gives them back bit for bit."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conjugate import PAIRS
from pyro.distributions import constraints
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scipy import integrate, stats
from torch import Tensor

from pyro_blr.guides import AutoExponentialFamily
from pyro_blr.posterior import Posterior

every_pair = pytest.mark.parametrize("pair", list(PAIRS.values()), ids=list(PAIRS))


def perturbed(model: Callable, blocks: Any = "sites") -> Posterior:
    """q somewhere inside its domain, no two elements equal: λ moved a little from where it starts."""
    guide = AutoExponentialFamily(model, blocks)
    start = guide.get_posterior()
    naturals = {}
    for name, block in start.blocks.items():
        natural = start.natural[name]
        naturals[name] = block.family.retract(natural, 0.1 * torch.randn_like(natural))
    return Posterior(
        start.blocks, naturals, elbo=-12.5, elbo_kind="exact bound", history=[-20.0, -12.5], converged=True,
        stop_reason="remaining gain below 0.001 nats", num_steps=2,
    )  # fmt: skip


def named(posterior: Posterior) -> list[tuple[str, Any]]:
    return [(name, posterior[name]) for name in posterior]


def many() -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))
    pyro.sample("s", dist.HalfCauchy(torch.ones(3)).to_event(1))
    pyro.sample("v", dist.Uniform(torch.zeros(2), torch.tensor([1.0, 3.0])).to_event(1))
    pyro.sample("f", dist.LKJCholesky(3, torch.tensor(1.0)))
    pyro.sample("m", dist.MultivariateNormal(torch.zeros(2), torch.eye(2)).expand([3]).to_event(1))
    theta = pyro.sample("theta", dist.Dirichlet(torch.ones(2)))
    with pyro.plate("columns", 3, dim=-2), pyro.plate("rows", 4, subsample_size=2):
        pyro.sample("z", dist.Categorical(theta))
        pyro.sample("n", dist.Binomial(3, 0.4))
        pyro.sample("k", dist.OneHotCategorical(torch.tensor([0.2, 0.3, 0.5])))
        pyro.sample("b", dist.Beta(2.0, 3.0))
        pyro.sample("g", dist.Gamma(2.0, torch.ones(2)).to_event(1))
        pyro.sample("h", dist.HalfNormal(1.0))
        pyro.sample("x", dist.Normal(w[..., 0, 0], 1.0))


SHAPES = {
    "w": ((), (2, 3)),
    "s": ((), (3,)),
    "v": ((), (2,)),
    "f": ((), (3, 3)),
    "m": ((), (3, 2)),
    "theta": ((), (2,)),
    "z": ((3, 4), ()),
    "n": ((3, 4), ()),
    "k": ((3, 4), (3,)),
    "b": ((3, 4), ()),
    "g": ((3, 4), (2,)),
    "h": ((3, 4), ()),
    "x": ((3, 4), ()),
}

FACTORISATIONS = ["sites", "elements", [["w", "s"], ["x", "h"]], [["f", "theta", "m"]]]
every_factorisation = pytest.mark.parametrize("blocks", FACTORISATIONS, ids=str)


# ------------------------------------------------------------------------------------------------------------
# Distributions


@every_factorisation
def test_shapes_are_the_models_with_plates_full(blocks: Any) -> None:
    posterior = perturbed(many, blocks)
    assert {name: (tuple(q.batch_shape), tuple(q.event_shape)) for name, q in named(posterior)} == SHAPES
    draws = posterior.sample((5,))
    assert {name: tuple(value.shape) for name, value in draws.items()} == {
        name: (5, *batch, *event) for name, (batch, event) in SHAPES.items()
    }
    for name, (batch, event) in SHAPES.items():
        q = posterior[name]
        assert q.mean.shape == q.variance.shape == q.stddev.shape == (*batch, *event)
        assert q.log_prob(draws[name]).shape == (5, *batch)
        assert bool(torch.as_tensor(q.support.check(draws[name])).all())
    assert posterior.log_prob(draws).shape == (5,)


@every_factorisation
def test_moments_are_those_of_draws(blocks: Any) -> None:
    posterior = perturbed(many, blocks)
    count = 20_000
    draws = posterior.sample((count,))
    for name in SHAPES:
        q, value = posterior[name], draws[name].double()
        error = value.std(0) / count**0.5
        assert bool(((value.mean(0) - q.mean).abs() <= 5 * error + 2e-3).all()), name
        if name not in ("s", "h"):  # log-Normal: draws say little about the variance
            torch.testing.assert_close(value.var(0), q.variance.to(value.dtype), rtol=0.15, atol=1e-3)


@pytest.mark.parametrize("scale", [0.01, 1.0, 3.0, 30.0])
def test_moments_of_pushed_gaussians_are_integrals(scale: float) -> None:
    supports = [constraints.interval(-1.0, 3.0), constraints.unit_interval, constraints.less_than(2.0)]

    def model() -> None:
        for index, support in enumerate(supports):
            pyro.sample(f"x{index}", dist.ImproperUniform(support, (), ()))

    guide = AutoExponentialFamily(model)
    guide()
    law = dist.Normal(torch.tensor(0.4), torch.tensor(scale))
    for name, block in guide.blocks.items():
        guide.naturals[name] = block.family.base.from_distribution(law)
    posterior = guide.get_posterior()
    gaussian = stats.norm(0.4, scale)

    def expect(f: Callable) -> float:
        points = sorted([0.0, 0.4 - 2 * scale, 0.4 + 2 * scale])
        low, high = 0.4 - 12 * scale, 0.4 + 12 * scale
        options: dict[str, Any] = {"points": points, "limit": 500, "epsabs": 1e-13}
        return integrate.quad(lambda u: f(u) * gaussian.pdf(u), low, high, **options)[0]

    for name, low, width in (("x0", -1.0, 4.0), ("x1", 0.0, 1.0)):
        mean = expect(lambda u, a=low, b=width: a + b / (1 + np.exp(-u)))
        second = expect(lambda u, a=low, b=width, m=mean: (a + b / (1 + np.exp(-u)) - m) ** 2)
        np.testing.assert_allclose(posterior[name].mean, mean, rtol=1e-9, atol=1e-10)
        np.testing.assert_allclose(posterior[name].variance, second, rtol=1e-7)
    if scale <= 3:
        q = posterior["x2"]
        np.testing.assert_allclose(2 - q.mean, stats.lognorm(scale, scale=np.exp(0.4)).mean(), rtol=1e-8)
        np.testing.assert_allclose(q.variance, stats.lognorm(scale, scale=np.exp(0.4)).var(), rtol=1e-6)


def test_moments_of_discrete_sites_are_those_of_their_values() -> None:
    probs = torch.tensor([0.2, 0.5, 0.3])

    def model() -> None:
        pyro.sample("z", dist.Categorical(probs))
        pyro.sample("n", dist.Binomial(6, 0.4))
        pyro.sample("v", dist.InverseGamma(1.5, 2.0))

    posterior = AutoExponentialFamily(model).get_posterior()
    np.testing.assert_allclose([posterior["z"].mean, posterior["z"].variance], [1.1, 0.49])
    np.testing.assert_allclose([posterior["n"].mean, posterior["n"].variance], [2.4, 1.44])
    np.testing.assert_allclose([posterior["v"].mean, posterior["v"].variance], [4.0, np.inf])
    assert isinstance(posterior["z"], dist.Categorical)


@every_pair
def test_plates_and_events_have_the_same_density(pair: Callable) -> None:
    exact = pair()
    if isinstance(exact.prior, dist.Binomial):
        pytest.skip("Pyro enumerates no Binomial inside to_event")
    models = (exact.plate_model(), exact.event_model())
    plate, event = (AutoExponentialFamily(model).get_posterior() for model in models)
    value = plate.sample((4,))["z"]
    torch.testing.assert_close(plate.log_prob({"z": value}), event.log_prob({"z": value}))
    torch.testing.assert_close(plate["z"].log_prob(value).sum(-1), event["z"].log_prob(value))


# ------------------------------------------------------------------------------------------------------------
# Joint and marginal


def test_marginals_of_a_joint_block_are_its_rows() -> None:
    posterior = perturbed(many, [["w", "m"]])
    joint = posterior.joint(["w", "m"])
    assert isinstance(joint, dist.MultivariateNormal)
    np.testing.assert_allclose(joint.mean[:6], posterior["w"].mean.flatten())
    np.testing.assert_allclose(joint.variance[6:], posterior["m"].variance.flatten())
    block = posterior.blocks["w+m"].family.to_distribution(posterior.natural["w+m"])
    np.testing.assert_allclose(joint.covariance_matrix, block.covariance_matrix)
    turned = posterior.joint(["m", "w"])
    np.testing.assert_allclose(turned.covariance_matrix[:6, 6:], joint.covariance_matrix[6:, :6])


def test_joint_of_sites_of_several_blocks_and_supports() -> None:
    posterior = perturbed(many, [["w", "s"]])
    joint = posterior.joint(["x", "s", "w", "h"])
    assert joint.event_shape == (12 + 3 + 6 + 12,)
    expected = torch.cat([posterior[name].mean.flatten() for name in ("x", "s", "w", "h")])
    torch.testing.assert_close(joint.mean, expected)
    draws = posterior.sample((4,))
    flat = torch.cat([draws[name].flatten(1) for name in ("x", "s", "w", "h")], -1)
    others = [posterior[name].log_prob(draws[name]).flatten(1).sum(-1) for name in ("x", "h")]
    joined = posterior.joint(["s", "w"]).log_prob(torch.cat([draws["s"], draws["w"].flatten(1)], -1))
    torch.testing.assert_close(joint.log_prob(flat), joined + others[0] + others[1])


def test_a_joint_block_in_a_plate_keeps_it_as_batch() -> None:
    joint = perturbed(many, [["x", "h"]]).joint(["h", "x"])
    assert joint.batch_shape == (3, 4) and joint.event_shape == (2,)


@every_factorisation
def test_log_prob_is_the_sum_over_independent_blocks(blocks: Any) -> None:
    posterior = perturbed(many, blocks)
    draws = posterior.sample((3,))
    grouped = {name for group in blocks for name in group} if not isinstance(blocks, str) else set()
    alone = [n for n in SHAPES if n not in grouped]
    rest = sum(posterior[n].log_prob(draws[n]).reshape(3, -1).sum(-1) for n in alone)
    if not grouped:
        torch.testing.assert_close(posterior.log_prob(draws), rest)
    elif "f" not in grouped:
        joints = 0.0
        for group in blocks:
            parts = [draws[n].reshape(3, *SHAPES[n][0], -1) for n in group]
            joints = joints + posterior.joint(group).log_prob(torch.cat(parts, -1)).reshape(3, -1).sum(-1)
        torch.testing.assert_close(posterior.log_prob(draws), rest + joints)


# ------------------------------------------------------------------------------------------------------------
# Files


@every_factorisation
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_file_gives_back_every_bit(blocks: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    torch.set_default_dtype(dtype)
    posterior = perturbed(many, blocks)
    posterior.save(tmp_path / "q.safetensors")
    loaded = Posterior.load(tmp_path / "q.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["q.safetensors"]
    same_posterior(loaded, posterior)
    loaded.save(tmp_path / "again.safetensors")
    same_posterior(Posterior.load(tmp_path / "again.safetensors"), posterior)


@every_pair
@pytest.mark.parametrize("mode", ["plate", "event", "subsample"])
def test_every_family_is_stored(pair: Callable, mode: str, tmp_path: Path) -> None:
    exact = pair()
    if mode == "event" and isinstance(exact.prior, dist.Binomial):
        pytest.skip("Pyro enumerates no Binomial inside to_event")
    model = exact.event_model() if mode == "event" else exact.plate_model(2 if mode == "subsample" else None)
    posterior = perturbed(model)
    posterior.save(tmp_path / "q")
    same_posterior(Posterior.load(tmp_path / "q"), posterior)


def test_copies_and_pickles_are_the_same() -> None:
    posterior = perturbed(many)
    same_posterior(copy.deepcopy(posterior), posterior)
    same_posterior(pickle.loads(pickle.dumps(posterior)), posterior)


def same_posterior(one: Posterior, other: Posterior) -> None:
    assert repr(one) == repr(other)
    for name in ("elbo", "elbo_kind", "elbo_se", "history", "converged", "stop_reason", "num_steps"):
        assert getattr(one, name) == getattr(other, name)
    for name, natural in other.natural.items():
        assert torch.equal(one.natural[name], natural) and one.natural[name].dtype == natural.dtype
    draws = []
    for posterior in (one, other):
        pyro.set_rng_seed(7)
        draws.append(posterior.sample((2,)))
    for name, value in draws[1].items():
        assert torch.equal(draws[0][name], value) and draws[0][name].dtype == value.dtype
        assert torch.equal(one[name].log_prob(value), other[name].log_prob(value))
        assert torch.equal(one[name].mean, other[name].mean)
    assert torch.equal(one.log_prob(draws[0]), other.log_prob(draws[0]))


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def _overwrite(path: Path) -> None:
    path.write_bytes(b"no tensors here")


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))


def _foreign(path: Path) -> None:
    save_file({"weight": torch.ones(2)}, path)


def _stripped(path: Path) -> None:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors.pop(next(name for name in tensors if name.startswith("natural/")))
    save_file(tensors, path, metadata=metadata)


@pytest.mark.parametrize("damage", [_truncate, _overwrite, _flip, _foreign, _stripped])
def test_a_damaged_file_is_refused(damage: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "q.safetensors"
    perturbed(many).save(path)
    damage(path)
    with pytest.raises(ValueError, match="q.safetensors: .*(found|read)"):
        Posterior.load(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Posterior.load(tmp_path / "nothing")


# ------------------------------------------------------------------------------------------------------------
# What a user sees


def test_a_posterior_is_a_snapshot() -> None:
    guide = AutoExponentialFamily(many)
    posterior = guide.get_posterior()
    before = posterior["b"].mean.clone()
    guide.naturals["b"].add_(1.0)
    assert torch.equal(posterior["b"].mean, before)
    with pytest.raises(TypeError):
        posterior.natural["b"] = torch.zeros(1)  # type: ignore[index]


def test_draws_come_from_the_global_generator_and_nothing_else_does() -> None:
    posterior = perturbed(many)
    state = torch.get_rng_state()
    for name in posterior:
        _ = posterior[name].mean, posterior[name].stddev
    repr(posterior)
    assert torch.equal(torch.get_rng_state(), state)
    posterior.sample()
    assert not torch.equal(torch.get_rng_state(), state)


def test_a_posterior_prints_as_a_table() -> None:
    lines = repr(perturbed(many, [["w", "s"]])).splitlines()
    assert lines[0] == "Posterior: elbo -12.5 (exact bound), 2 steps, remaining gain below 0.001 nats"
    assert lines[1].split() == ["site", "q", "batch", "event"]
    assert len(lines) == 2 + len(SHAPES)
    assert "MultivariateNormal of w+s" in lines[2]


def test_unknown_sites_are_named() -> None:
    posterior = perturbed(many)
    with pytest.raises(KeyError, match="found site 'nobody', expected a latent site"):
        posterior["nobody"]
    with pytest.raises(KeyError, match="nobody"):
        posterior.joint(["w", "nobody"])


def test_values_that_are_missing_unknown_or_of_another_shape_are_named() -> None:
    posterior = perturbed(many)
    draws = posterior.sample()
    short = {name: value for name, value in draws.items() if name != "b"}
    with pytest.raises(ValueError, match=r"no values of sites \['b'\]"):
        posterior.log_prob(short)
    with pytest.raises(ValueError, match=r"unknown sites \['q'\]"):
        posterior.log_prob({**draws, "q": torch.ones(())})
    with pytest.raises(ValueError, match=r"site 'b': found a value of shape \(2,\), expected .*3, 4"):
        posterior.log_prob({**draws, "b": torch.full((2,), 0.5)})


@pytest.mark.parametrize(
    "names, message", [(["z", "w"], "family Categorical"), (["f"], "free and"), ([], "one or more")]
)
def test_joints_that_are_no_gaussian_are_refused(names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        perturbed(many).joint(names)


@every_factorisation
def test_float32_sites_keep_float32(blocks: Any) -> None:
    torch.set_default_dtype(torch.float32)
    posterior = perturbed(many, blocks)
    naturals = {name: natural.double() for name, natural in posterior.natural.items()}
    wide = Posterior(posterior.blocks, naturals)
    draws: dict[str, Tensor] = wide.sample()
    assert all(value.dtype in (torch.float32, torch.int64) for value in draws.values())
    torch.testing.assert_close(wide.log_prob(draws).float(), posterior.log_prob(draws), rtol=1e-4, atol=1e-3)


def test_an_ill_conditioned_float32_gaussian_is_factored_in_the_precision_of_its_natural_parameters() -> None:
    torch.set_default_dtype(torch.float32)
    x = torch.linspace(0, 1, 50, dtype=torch.float64)
    design = torch.stack([x**k for k in range(6)], -1)
    precision = design.mT @ design * 1e6 + 1e-3 * torch.eye(6, dtype=torch.float64)

    def model() -> None:
        pyro.sample("w", dist.Normal(torch.zeros(6), 1.0).to_event(1))

    guide = AutoExponentialFamily(model)
    guide()
    exact = dist.MultivariateNormal(torch.zeros(6, dtype=torch.float64), precision_matrix=precision)
    guide.naturals["w"] = guide.blocks["w"].family.from_distribution(exact)
    q = guide.get_posterior()["w"]
    assert q.mean.dtype == torch.float32 and guide()["w"].dtype == torch.float32
    torch.testing.assert_close(q.stddev.double(), exact.stddev, rtol=1e-3, atol=0)
