"""The guide is an ordinary Pyro guide; at the exact posterior every draw of its ELBO is the evidence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conjugate import PAIRS, SIZE, Pair, expanded
from pyro import poutine
from pyro.infer import Predictive, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO, config_enumerate
from pyro.infer.autoguide import AutoGuideList, AutoNormal, init_to_median, init_to_value
from scipy import stats
from torch import Tensor
from torch.distributions import constraints

from pyro_blr.capture import capture
from pyro_blr.families import TransformedNormal
from pyro_blr.guides import AutoExponentialFamily
from pyro_blr.initial import diagonal_natural, initial_natural, moments_at, natural_of
from pyro_blr.running import generic_value, run_model
from pyro_blr.starts import apply_init, point_natural

every_pair = pytest.mark.parametrize("pair", [make for make in PAIRS.values()], ids=list(PAIRS))
continuous = pytest.mark.parametrize(
    "pair",
    [make for name, make in PAIRS.items() if name not in ("bernoulli", "categorical", "one_hot", "binomial")],
    ids=[name for name in PAIRS if name not in ("bernoulli", "categorical", "one_hot", "binomial")],
)


def graph_of(model: Callable, *args: Any) -> Any:
    return capture(model, args, {}, run_model(model, args, {}, generic_value))


def fitted(model: Callable, pair: Pair, blocks: Any = "sites") -> AutoExponentialFamily:
    """A guide whose λ is the exact posterior's."""
    guide = AutoExponentialFamily(model, blocks)
    guide.setup(graph_of(model))
    block = guide.blocks["z"]
    if isinstance(block.family, TransformedNormal):
        u = pair.posterior.base_dist
        natural: Tensor | None = diagonal_natural(block.family.base, u.loc, u.scale.square().expand_as(u.loc))
    elif block.batch_shape == block.full_shape:
        natural = natural_of(block, posterior_of(pair, block))
    else:
        natural = block.family.from_distribution(posterior_of(pair, block))
    assert natural is not None and natural.shape == guide.naturals["z"].shape
    guide.naturals["z"] = natural
    return guide


def posterior_of(pair: Pair, block: Any) -> Any:
    return pair.posterior


def elbos(model: Callable, guide: Any, count: int = 3, **options: Any) -> np.ndarray:
    return np.array([-Trace_ELBO(**options).loss(model, guide) for _ in range(count)])


# ------------------------------------------------------------------------------------------------------------
# Densities, scales, plates


@every_pair
@pytest.mark.parametrize("blocks", ["sites", "elements"])
def test_elbo_of_the_exact_posterior_is_the_evidence_at_every_draw(pair: Callable, blocks: str) -> None:
    exact = pair()
    if blocks == "elements" and isinstance(exact.prior, dist.MultivariateNormal):
        pytest.skip("its posterior does not factorise")
    model = exact.plate_model()
    guide = fitted(model, exact, blocks)
    np.testing.assert_allclose(elbos(model, guide), exact.evidence.sum(), rtol=1e-10)


@every_pair
def test_event_dimensions_count_as_plates_do(pair: Callable) -> None:
    exact = pair()
    model = exact.event_model()
    if isinstance(exact.prior, dist.Binomial):
        pytest.skip("Pyro enumerates no Binomial inside to_event")
    guide = AutoExponentialFamily(model)
    guide.setup(graph_of(model))
    block = guide.blocks["z"]
    if isinstance(block.family, TransformedNormal):
        u = exact.posterior.base_dist
        natural = diagonal_natural(block.family.base, u.loc, u.scale.square().expand_as(u.loc))
    else:
        natural = natural_of(block, exact.posterior.to_event(1))
    guide.naturals["z"] = natural
    np.testing.assert_allclose(elbos(model, guide), exact.evidence.sum(), rtol=1e-10)


@every_pair
def test_a_subsampled_plate_uses_the_rows_it_drew_and_their_scale(pair: Callable) -> None:
    exact = pair()
    model = exact.plate_model(subsample_size=2)
    guide = fitted(model, exact)
    seen = set()
    for _ in range(6):
        trace = poutine.trace(guide).get_trace()
        rows = trace.nodes["rows"]["value"]
        replayed = poutine.trace(poutine.replay(model, trace=trace)).get_trace()
        assert torch.equal(replayed.nodes["rows"]["value"], rows)
        assert trace.nodes["z"]["scale"] == replayed.nodes["z"]["scale"] == SIZE / 2
        found = replayed.log_prob_sum() - trace.log_prob_sum()
        np.testing.assert_allclose(found.item(), exact.evidence[rows].sum() * SIZE / 2, rtol=1e-10)
        seen.add(tuple(rows.tolist()))
    assert len(seen) > 1


@continuous
def test_vectorised_particles_and_closed_form_entropy(pair: Callable) -> None:
    exact = pair()
    model = exact.plate_model()
    guide = fitted(model, exact)
    expected = exact.evidence.sum()
    found = elbos(model, guide, 1, num_particles=5, vectorize_particles=True, max_plate_nesting=1)
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    mean_field = TraceMeanField_ELBO(num_particles=200, vectorize_particles=True, max_plate_nesting=1)
    assert abs(-mean_field.loss(model, guide) - expected) < 1.0


@pytest.mark.parametrize("name", ["bernoulli", "categorical", "one_hot", "binomial"])
def test_enumeration_of_the_guide(name: str) -> None:
    exact = PAIRS[name]()
    model = exact.plate_model()
    guide = config_enumerate(fitted(model, exact))
    found = -TraceEnum_ELBO(max_plate_nesting=1).loss(model, guide)
    np.testing.assert_allclose(found, exact.evidence.sum(), rtol=1e-10)


# ------------------------------------------------------------------------------------------------------------
# Joint blocks


def joint_model(y: Tensor, in_plate: bool) -> Callable:
    """y ~ N(b + log a, 1) with a positive, b real: (log a, b) is Gaussian given y."""

    def model() -> None:
        plate = pyro.plate("rows", len(y))
        if in_plate:
            with plate:
                a = pyro.sample("a", dist.LogNormal(0.3, 1.0))
                b = pyro.sample("b", dist.Normal(-1.0, 2.0))
                pyro.sample("y", dist.Normal(a.log() + b, 1.0), obs=y)
        else:
            b = pyro.sample("b", dist.Normal(-1.0, 2.0))
            with plate:
                a = pyro.sample("a", dist.LogNormal(0.3, 1.0))
                pyro.sample("y", dist.Normal(a.log() + b, 1.0), obs=y)

    return model


def joint_gaussian(y: Tensor, design: Tensor, mean: Tensor, variance: Tensor) -> tuple[Any, float]:
    precision = torch.diag(1 / variance) + design.mT @ design
    centre = torch.linalg.solve(precision, mean / variance + design.mT @ y)
    covariance = torch.eye(len(y)) + design * variance @ design.mT
    evidence = stats.multivariate_normal((design @ mean).numpy(), covariance.numpy()).logpdf(y.numpy())
    return dist.MultivariateNormal(centre, precision_matrix=precision), float(evidence)


def test_a_joint_block_inside_a_plate_has_the_density_of_its_sites() -> None:
    y = torch.tensor([0.3, -1.0, 2.0])
    model = joint_model(y, in_plate=True)
    guide = AutoExponentialFamily(model, [["a", "b"]])
    guide.setup(graph_of(model))
    exact = [joint_gaussian(v[None], torch.ones(1, 2), torch.tensor([0.3, -1.0]), torch.tensor([1.0, 4.0])) for v in y]
    family = guide.blocks["a+b"].family
    guide.naturals["a+b"] = torch.stack([family.from_distribution(q) for q, _ in exact])
    expected = sum(evidence for _, evidence in exact)
    np.testing.assert_allclose(elbos(model, guide), expected, rtol=1e-10)
    options = {"num_particles": 4, "vectorize_particles": True, "max_plate_nesting": 1}
    np.testing.assert_allclose(elbos(model, guide, **options), expected, rtol=1e-10)


def test_a_joint_block_across_a_plate() -> None:
    y = torch.tensor([0.3, -1.0, 2.0])
    model = joint_model(y, in_plate=False)
    guide = AutoExponentialFamily(model, [["b", "a"]])
    guide.setup(graph_of(model))
    design = torch.cat([torch.ones(3, 1), torch.eye(3)], -1)
    mean, variance = torch.tensor([-1.0, 0.3, 0.3, 0.3]), torch.tensor([4.0, 1.0, 1.0, 1.0])
    q, expected = joint_gaussian(y, design, mean, variance)
    guide.naturals["b+a"] = guide.blocks["b+a"].family.from_distribution(q)
    np.testing.assert_allclose(elbos(model, guide), expected, rtol=1e-10)
    options = {"num_particles": 4, "vectorize_particles": True, "max_plate_nesting": 1}
    np.testing.assert_allclose(elbos(model, guide, **options), expected, rtol=1e-10)
    values = guide()
    assert values["a"].shape == (3,) and values["b"].shape == ()


def test_one_gaussian_over_a_matrix_of_weights() -> None:
    x, y = torch.randn(6, 4), torch.randn(6)

    def model() -> None:
        w = pyro.sample("w", dist.Normal(0.0, 2.0).expand([2, 2]).to_event(2))
        with pyro.plate("data", 6):
            pyro.sample("y", dist.Normal(w.flatten(-2) @ x.mT, 1.0), obs=y)

    guide = AutoExponentialFamily(model)
    guide.setup(graph_of(model))
    q, expected = joint_gaussian(y, x, torch.zeros(4), torch.full((4,), 4.0))
    guide.naturals["w"] = guide.blocks["w"].family.from_distribution(q)
    np.testing.assert_allclose(elbos(model, guide), expected, rtol=1e-10)
    assert guide()["w"].shape == (2, 2)


# ------------------------------------------------------------------------------------------------------------
# A guide as Pyro's are


def many(x: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))
    tau = pyro.sample("tau", dist.HalfCauchy(1.0))
    theta = pyro.sample("theta", dist.Dirichlet(torch.ones(2)))
    with pyro.plate("rows", 4):
        z = pyro.sample("z", dist.Categorical(theta))
        n = pyro.sample("n", dist.Binomial(3, 0.4))
        pyro.sample("x", dist.Normal(w[..., 0, 0] + z + n, tau), obs=x)


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("blocks", ["sites", "elements", [["w", "tau"]]], ids=str)
def test_predictive(parallel: bool, blocks: Any) -> None:
    guide = AutoExponentialFamily(many, blocks)
    found = Predictive(many, guide=guide, num_samples=5, parallel=parallel)()
    shapes = {name: tuple(value.shape) for name, value in found.items() if not name.startswith("_")}
    first = {"w": (5, 1, 2, 3), "tau": (5, 1), "theta": (5, 1, 2)}
    assert shapes == {**first, "z": (5, 4), "n": (5, 4), "x": (5, 4)}


def test_predictive_on_more_data_than_the_guide_saw() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(w * x, 1.0), obs=y)

    guide = AutoExponentialFamily(model)
    guide(torch.randn(3), torch.randn(3))
    forecast = Predictive(model, guide=guide, num_samples=2)(torch.randn(7))
    assert forecast["y"].shape == (2, 7)


def test_the_models_own_indices_choose_the_rows() -> None:
    exact = PAIRS["normal"]()

    def model(index: Tensor) -> None:
        with pyro.plate("rows", SIZE, subsample=index):
            z = pyro.sample("z", expanded(exact.prior, len(index)))
            pyro.sample("y", exact.likelihood(z), obs=exact.data[index])

    index = torch.tensor([2, 0])
    guide = AutoExponentialFamily(model)
    guide(torch.tensor([0, 1]))
    guide.naturals["z"] = guide.blocks["z"].family.from_distribution(exact.posterior)
    for index in (torch.tensor([2, 0]), torch.tensor([1]), torch.tensor([2, 1, 0])):
        found = -Trace_ELBO().loss(model, guide, index)
        np.testing.assert_allclose(found, exact.evidence[index].sum() * SIZE / len(index), rtol=1e-10)


def test_create_plates_gives_the_plates() -> None:
    exact = PAIRS["normal"]()
    model = exact.plate_model(subsample_size=2)
    guide = AutoExponentialFamily(model, create_plates=lambda: pyro.plate("rows", SIZE, subsample=torch.tensor([2, 1])))
    guide()
    guide.naturals["z"] = guide.blocks["z"].family.from_distribution(exact.posterior)
    np.testing.assert_allclose(elbos(model, guide), exact.evidence[[2, 1]].sum() * 1.5, rtol=1e-10)


@pytest.mark.parametrize("where", ["handler", "distribution"])
def test_masked_elements_count_neither_in_the_model_nor_in_the_guide(where: str) -> None:
    exact = PAIRS["normal"]()
    mask = torch.tensor([True, False, True])

    def model() -> None:
        with pyro.plate("rows", SIZE):
            if where == "handler":
                with poutine.mask(mask=mask):
                    z = pyro.sample("z", exact.prior)
                    pyro.sample("y", exact.likelihood(z), obs=exact.data)
            else:
                z = pyro.sample("z", expanded(exact.prior, SIZE).mask(mask))
                pyro.sample("y", exact.likelihood(z).mask(mask), obs=exact.data)

    guide = fitted(model, exact)
    np.testing.assert_allclose(elbos(model, guide), exact.evidence[mask.numpy()].sum(), rtol=1e-10)


def test_poutine_scale_is_the_factors_alone() -> None:
    exact = PAIRS["normal"]()
    guide = AutoExponentialFamily(poutine.scale(exact.plate_model(), 0.1))
    assert poutine.trace(guide).get_trace().nodes["z"]["scale"] == 1.0


def test_in_an_autoguide_list() -> None:
    guide = AutoGuideList(many)
    guide.append(AutoExponentialFamily(poutine.block(many, expose=["w", "theta", "z", "n"])))
    guide.append(AutoNormal(poutine.block(many, expose=["tau"])))
    assert set(guide(torch.zeros(4))) == {"w", "theta", "z", "n", "tau"}
    assert np.isfinite(Trace_ELBO().loss(many, guide, torch.zeros(4)))


def test_setting_up_leaves_random_state_and_parameters_alone() -> None:
    state = torch.get_rng_state()
    guide = AutoExponentialFamily(many)
    guide.median(torch.zeros(4))
    assert torch.equal(torch.get_rng_state(), state)
    assert len(pyro.get_param_store()) == 0


def test_state_dict_restores_draws_bit_for_bit() -> None:
    guide = AutoExponentialFamily(many)
    guide()
    guide.naturals = {name: natural * 1.5 for name, natural in guide.naturals.items()}
    other = AutoExponentialFamily(many)
    other.load_state_dict(guide.state_dict())
    pyro.set_rng_seed(1)
    one = guide()
    pyro.set_rng_seed(1)
    assert all(torch.equal(value, one[name]) for name, value in other().items())


def test_state_of_another_model_is_refused() -> None:
    def smaller() -> None:
        pyro.sample("w", dist.Normal(0.0, 1.0))

    guide, other = AutoExponentialFamily(smaller), AutoExponentialFamily(many)
    guide()
    other.load_state_dict(guide.state_dict())
    with pytest.raises(ValueError, match="block 'w': found λ of shape"):
        other()


def test_gradients_reach_natural_parameters() -> None:
    exact = PAIRS["gamma"]()
    model = exact.plate_model()
    guide = fitted(model, exact)
    natural = guide.naturals["z"].clone().requires_grad_()
    guide.naturals["z"] = natural
    Trace_ELBO().differentiable_loss(model, guide).backward()
    assert natural.grad is not None and natural.grad.isfinite().all() and (natural.grad != 0).any()


# ------------------------------------------------------------------------------------------------------------
# Medians and quantiles

LEVELS = [0.001, 0.05, 0.5, 0.9, 0.9999]
MARGINALS = {
    "normal": (lambda: dist.Normal(1.0, 3.0), stats.norm(1, 3)),
    "log_normal": (lambda: dist.LogNormal(0.3, 0.7), stats.lognorm(0.7, scale=np.exp(0.3))),
    "gamma": (lambda: dist.Gamma(0.05, 3.0), stats.gamma(0.05, scale=1 / 3)),
    "large gamma": (lambda: dist.Gamma(1e5, 3.0), stats.gamma(1e5, scale=1 / 3)),
    "inverse_gamma": (lambda: dist.InverseGamma(2.5, 3.0), stats.invgamma(2.5, scale=3)),
    "beta": (lambda: dist.Beta(0.3, 4.0), stats.beta(0.3, 4)),
    "large beta": (lambda: dist.Beta(3e4, 5e4), stats.beta(3e4, 5e4)),
    "uniform": (lambda: dist.Uniform(0.0, 1.0), stats.uniform()),
    "bernoulli": (lambda: dist.Bernoulli(0.3), stats.bernoulli(0.3)),
    "binomial": (lambda: dist.Binomial(6, 0.4), stats.binom(6, 0.4)),
}


@pytest.mark.parametrize("name", MARGINALS)
def test_quantiles_are_those_of_scipy(name: str) -> None:
    prior, reference = MARGINALS[name]
    guide = AutoExponentialFamily(lambda: pyro.sample("z", prior()))
    np.testing.assert_allclose(guide.quantiles(LEVELS)["z"], reference.ppf(LEVELS), rtol=1e-7, atol=1e-300)
    np.testing.assert_allclose(guide.median()["z"], reference.ppf(0.5), rtol=1e-7)


@pytest.mark.parametrize(
    "support, push",
    [
        (constraints.interval(-1.0, 3.0), lambda u: -1 + 4 / (1 + np.exp(-u))),
        (constraints.greater_than(2.0), lambda u: 2 + np.exp(u)),
        (constraints.less_than(2.0), lambda u: 2 - np.exp(-u)),
    ],
    ids=["interval", "greater_than", "less_than"],
)
def test_quantiles_of_pushed_gaussians(support: Any, push: Callable) -> None:
    guide = AutoExponentialFamily(lambda: pyro.sample("z", dist.ImproperUniform(support, (), ())))
    np.testing.assert_allclose(guide.quantiles(LEVELS)["z"], push(stats.norm.ppf(LEVELS)), rtol=1e-9)


def test_quantiles_of_simplices_and_matrices() -> None:
    alpha = np.array([0.5, 2.0, 4.0])
    guide = AutoExponentialFamily(lambda: pyro.sample("z", dist.Dirichlet(torch.tensor(alpha))))
    expected = np.stack([stats.beta(a, alpha.sum() - a).ppf(LEVELS) for a in alpha], -1)
    np.testing.assert_allclose(guide.quantiles(LEVELS)["z"], expected, rtol=1e-7)
    np.testing.assert_allclose(guide.median()["z"].sum(), 1.0)
    scale = torch.tensor([[1.0, 0.3], [0.3, 0.5]])
    prior = dist.Wishart(torch.tensor(4.0), covariance_matrix=scale)
    guide = AutoExponentialFamily(lambda: pyro.sample("z", prior))
    found = guide.quantiles([0.1, 0.5])["z"]
    np.testing.assert_allclose(found[:, 0, 0], stats.chi2(4).ppf([0.1, 0.5]), rtol=1e-7)
    np.testing.assert_allclose(found[:, 1, 1], 0.5 * stats.chi2(4).ppf([0.1, 0.5]), rtol=1e-7)


@every_pair
def test_medians_are_in_the_support_and_quantiles_in_full_shape(pair: Callable) -> None:
    exact = pair()
    model = exact.plate_model(subsample_size=2)
    guide = AutoExponentialFamily(model)
    median, quantiles = guide.median()["z"], guide.quantiles([0.1, 0.9])["z"]
    assert median.shape == expanded(exact.prior, SIZE).shape()
    assert quantiles.shape == (2, *median.shape)
    assert (quantiles[1] >= quantiles[0]).all()
    support = exact.prior.support
    assert bool(torch.as_tensor(support.check(median)).all())


def test_levels_outside_zero_and_one_are_refused() -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        AutoExponentialFamily(many).quantiles([5, 95], torch.zeros(4))


# ------------------------------------------------------------------------------------------------------------
# Starts


@every_pair
@pytest.mark.parametrize("subsample_size", [None, 2])
def test_starts_at_a_prior_of_the_family(pair: Callable, subsample_size: int | None) -> None:
    exact = pair()
    guide = AutoExponentialFamily(exact.plate_model(subsample_size))
    posterior = guide.get_posterior()
    value = generic_value("z", expanded(exact.prior, SIZE))
    found, expected = posterior["z"].log_prob(value), expanded(exact.prior, SIZE).log_prob(value)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


@pytest.mark.parametrize(
    "prior",
    [dist.HalfCauchy(1.0), dist.StudentT(3.0, 2.0, 1.0), dist.Cauchy(0.0, 1.0), dist.Uniform(-2.0, 5.0)],
    ids=lambda prior: type(prior).__name__,
)
def test_starts_somewhere_proper_without_one(prior: Any) -> None:
    guide = AutoExponentialFamily(lambda: pyro.sample("z", prior))
    guide()
    assert guide.blocks["z"].family.contains(guide.naturals["z"]).all()


@every_pair
@pytest.mark.parametrize("mode", ["plate", "event"])
def test_moments_of_a_point_are_the_limit_of_narrow_members(pair: Callable, mode: str) -> None:
    exact = pair()
    if mode == "event" and isinstance(exact.prior, dist.Binomial):
        pytest.skip("Pyro enumerates no Binomial inside to_event")
    graph = graph_of(exact.plate_model() if mode == "plate" else exact.event_model())
    guide = AutoExponentialFamily(None)
    guide.setup(graph)
    block = guide.blocks["z"]
    point = moments_at(block, graph.values)
    narrow = block.family.moments(point_natural(block, graph.values))
    assert {name: value.shape for name, value in point.items()} == {k: v.shape for k, v in narrow.items()}
    for name, value in point.items():
        torch.testing.assert_close(narrow[name], value, rtol=0.2, atol=0.05)


def test_init_by_value_by_distribution_and_by_function() -> None:
    graph = graph_of(many)
    guide = AutoExponentialFamily(many, [["w", "tau"]])
    guide.setup(graph)
    init = {"theta": dist.Dirichlet(torch.tensor([3.0, 4.0])), "tau": 2.5, "z": torch.tensor([1, 0, 0, 1])}
    function = init_to_value(values={"w": torch.ones(2, 3)})
    naturals, points = apply_init(graph, guide.blocks, guide.naturals, init, function)
    guide.naturals = naturals
    median = guide.median()
    assert set(points) == {"tau", "z", "w", "x"}
    torch.testing.assert_close(naturals["theta"], torch.tensor([2.0, 3.0]))
    torch.testing.assert_close(median["tau"], torch.tensor(2.5))
    torch.testing.assert_close(median["w"], torch.ones(2, 3))
    assert median["z"].tolist() == [1, 0, 0, 1]


def test_init_reaches_rows_that_a_subsample_left_out() -> None:
    exact = PAIRS["normal"]()
    model = exact.plate_model(subsample_size=2)
    graph = graph_of(model)
    guide = AutoExponentialFamily(model)
    guide.setup(graph)
    naturals, _ = apply_init(graph, guide.blocks, guide.naturals, None, init_to_median(num_samples=3))
    assert naturals["z"].shape == (SIZE, 2)


@pytest.mark.parametrize(
    "init, message",
    [
        ({"nobody": 1.0}, "init names"),
        ({"tau": torch.ones(3)}, "init of site 'tau': found shape"),
        ({"tau": -1.0}, "outside its support"),
        ({"theta": dist.Gamma(1.0, 1.0)}, "init of site 'theta': found Gamma"),
    ],
    ids=["unknown", "shape", "support", "family"],
)
def test_a_start_that_cannot_be_is_refused(init: dict, message: str) -> None:
    graph = graph_of(many)
    guide = AutoExponentialFamily(many)
    guide.setup(graph)
    with pytest.raises(ValueError, match=message):
        apply_init(graph, guide.blocks, guide.naturals, init)


def test_initial_natural_is_what_the_guide_starts_at() -> None:
    guide = AutoExponentialFamily(many)
    guide()
    for name, block in guide.blocks.items():
        torch.testing.assert_close(initial_natural(block), guide.naturals[name])
