"""`to_arviz`: groups, names and numbers of an export, and ArviZ's own functions on it, of either line."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

from pyro_blr.blocks import build_blocks
from pyro_blr.capture import capture
from pyro_blr.export import _runs, to_arviz
from pyro_blr.posterior import Posterior
from pyro_blr.running import generic_value, run_model

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of ArviZ itself, on import
    import arviz as az

IS_TREE = "InferenceData" not in vars(az)
only_trees = pytest.mark.skipif(not IS_TREE, reason="ArviZ is of the 0.2x line; this needs 1.0 or later")

Y = torch.tensor([0.3, -0.4, 1.2, 0.8, 0.1, 2.0, -0.6, 0.9], dtype=torch.float64)
X = torch.linspace(-1, 1, 8, dtype=torch.float64)


def posterior_of(model: Callable, *args: Any, **marginals: Any) -> Posterior:
    """q with the given marginals, set by hand; sites that are not named keep their prior."""
    graph = capture(model, args, {}, run_model(model, args, {}, generic_value))
    blocks = build_blocks(graph)
    naturals = {}
    for name, block in blocks.items():
        marginal = marginals.get(name, graph.sites[name].distribution)
        while isinstance(marginal, (dist.MaskedDistribution, torch.distributions.Independent)):
            marginal = marginal.base_dist
        if type(block.family).__name__ == "MultivariateNormal" and isinstance(marginal, torch.distributions.Normal):
            marginal = dist.MultivariateNormal(marginal.mean, scale_tril=torch.diag_embed(marginal.stddev))
        natural = block.family.from_distribution(marginal)
        for axis, size in enumerate(block.full_shape):
            natural = natural if natural.shape[axis] == size else natural.narrow(axis, 0, 1)
        naturals[name] = natural.expand(*block.full_shape, -1)
    history = [-20.0, -15.0, -14.5]
    return Posterior(
        blocks, naturals, elbo=-14.5, elbo_kind="exact evidence", history=history, converged=True,
        stop_reason="one exact block", num_steps=3, model=model, args=args,
    )  # fmt: skip


def mean_model(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.deterministic("twice", 2 * mu)
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def exact_mean(y: Tensor = Y) -> Posterior:
    """mu | y ~ N(Σy / (n + 1), 1 / (n + 1))."""
    precision = len(y) + 1.0
    return posterior_of(mean_model, y, mu=dist.Normal(y.sum() / precision, precision**-0.5))


@pytest.fixture
def data() -> Any:
    return to_arviz(exact_mean(), 2000)


def group(data: Any, name: str) -> Any:
    return data[name].to_dataset() if IS_TREE else data[name]


def elpd(loo: Any) -> float:
    return float(loo["elpd"] if IS_TREE else loo["elpd_loo"])


def groups(data: Any) -> set[str]:
    return set(data.children) if IS_TREE else set(data.groups())


# --------------------------------------------------------------------------------------------------
# Numbers


def test_groups(data: Any) -> None:
    said = "posterior posterior_predictive log_likelihood log_prior sample_stats observed_data variational"
    assert groups(data) == set(said.split())


def test_draws_have_the_moments_of_q(data: Any) -> None:
    precision = len(Y) + 1.0
    mu = group(data, "posterior")["mu"]
    assert mu.dims == ("chain", "draw") and mu.shape == (1, 2000)
    error = 4 * (1 / precision / 2000) ** 0.5
    assert float(mu.mean()) == pytest.approx(float(Y.sum()) / precision, abs=error)
    assert float(mu.var()) == pytest.approx(1 / precision, rel=4 * (2 / 2000) ** 0.5)


def test_deterministic_sites_are_evaluated_at_each_draw(data: Any) -> None:
    posterior = group(data, "posterior")
    np.testing.assert_allclose(posterior["twice"], 2 * posterior["mu"], rtol=1e-12)


def test_log_likelihood_is_the_density_of_each_element(data: Any) -> None:
    mu = group(data, "posterior")["mu"].values
    found = group(data, "log_likelihood")["y"]
    expected = -0.5 * (Y.numpy() - mu[..., None]) ** 2 - 0.5 * np.log(2 * np.pi)
    assert found.dims == ("chain", "draw", "data")
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_log_prior_and_joint(data: Any) -> None:
    mu = group(data, "posterior")["mu"].values
    prior = -0.5 * mu**2 - 0.5 * np.log(2 * np.pi)
    np.testing.assert_allclose(group(data, "log_prior")["mu"], prior, rtol=1e-12)
    likelihood = group(data, "log_likelihood")["y"].sum("data").values
    np.testing.assert_allclose(group(data, "sample_stats")["lp"], prior + likelihood, rtol=1e-12)


def test_lp_minus_lq_is_the_evidence_when_q_is_exact(data: Any) -> None:
    stats = group(data, "sample_stats")
    evidence = dist.MultivariateNormal(torch.zeros(8), torch.eye(8) + torch.ones(8, 8)).log_prob(Y)
    np.testing.assert_allclose(stats["lp"] - stats["lq"], float(evidence), rtol=1e-10)


def test_posterior_predictive_has_the_moments_of_new_data(data: Any) -> None:
    y = group(data, "posterior_predictive")["y"]
    assert y.dims == ("chain", "draw", "data")
    precision = len(Y) + 1.0
    np.testing.assert_allclose(y.mean(("chain", "draw")), float(Y.sum()) / precision, atol=4 * (1.2 / 2000) ** 0.5)
    np.testing.assert_allclose(y.var(("chain", "draw")), 1 + 1 / precision, rtol=4 * (2 / 2000) ** 0.5)


def test_observed_data_and_how_it_was_fitted(data: Any) -> None:
    np.testing.assert_array_equal(group(data, "observed_data")["y"], Y)
    fit = group(data, "variational")
    np.testing.assert_array_equal(fit["elbo_trace"], [[-20.0, -15.0, -14.5]])
    assert bool(fit["converged"][0]) and int(fit["num_steps"][0]) == 3
    assert str(fit["elbo_kind"].values[0]) == "exact evidence"
    assert str(fit["stop_reason"].values[0]) == "one exact block"


def test_prior(data: Any) -> None:
    data = to_arviz(exact_mean(), 2000, prior=True)
    prior = group(data, "prior")
    assert float(prior["mu"].var()) == pytest.approx(1, rel=4 * (2 / 2000) ** 0.5)
    np.testing.assert_allclose(prior["twice"], 2 * prior["mu"])
    assert float(group(data, "prior_predictive")["y"].var()) == pytest.approx(2, rel=0.2)


def test_the_same_seed_gives_the_same_export() -> None:
    first, second = (pyro.set_rng_seed(3) or to_arviz(exact_mean(), 50, prior=True) for _ in range(2))
    for name in groups(first):
        assert group(first, name).drop_attrs().identical(group(second, name).drop_attrs()), name


@pytest.mark.parametrize("parallel", [True, False])
def test_draw_by_draw_is_the_same_as_all_at_once(parallel: bool) -> None:
    posterior = exact_mean()
    pyro.set_rng_seed(1)
    all_at_once = to_arviz(posterior, 20)
    pyro.set_rng_seed(1)
    other = to_arviz(posterior, 20, parallel=parallel)
    for name in ("posterior", "log_likelihood", "sample_stats", "log_prior"):
        for variable, values in group(all_at_once, name).items():
            np.testing.assert_allclose(values, group(other, name)[variable], rtol=1e-12)


@pytest.mark.parametrize(("indexed", "most"), [(False, 30), (True, 2100)])
def test_all_draws_are_one_run_where_the_model_vectorises(indexed: bool, most: int) -> None:
    calls = 0

    def model(y: Tensor) -> None:
        nonlocal calls
        calls += 1
        mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu[0] if indexed else mu[..., 0], 1.0), obs=y)

    posterior, calls = posterior_of(model, Y), 0
    to_arviz(posterior, 1000)
    assert calls <= most and (calls > 1000) == indexed


# --------------------------------------------------------------------------------------------------
# ArviZ's own functions


def test_a_recursion_never_pairs_draws_with_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.stack` of a recursion puts the draws beside its times: single runs, or a map, and no (draws, draws, times)."""

    def recursion(y: Tensor) -> None:
        phi = pyro.sample("phi", dist.Normal(0.0, 0.5))
        mu = pyro.sample("mu", dist.Normal(0.0, 0.5))
        states = [mu]
        for t in range(1, len(y)):
            states.append(phi * states[-1] + y[t - 1])
        with pyro.plate("times", len(y)):
            pyro.sample("y", dist.Normal(mu, torch.stack(states, -1).exp()), obs=y)

    sizes = []
    plain = _runs.log_density

    def noted(node: Any) -> Any:
        sizes.append(node["fn"].batch_shape.numel())
        return plain(node)

    monkeypatch.setattr(_runs, "log_density", noted)
    draws = {"phi": torch.randn(50), "mu": torch.randn(50)}
    joint = _runs.ModelRuns(recursion, (Y,), {}).run(draws, 50).joint
    assert max(sizes) <= 50 * len(Y)
    for i in (0, 17, 49):
        given = poutine.condition(recursion, data={name: value[i] for name, value in draws.items()})
        assert float(joint[i]) == pytest.approx(float(poutine.trace(given).get_trace(Y).log_prob_sum()))


def test_summary(data: Any) -> None:
    table = az.summary(data, var_names=["mu", "twice"], kind="stats", round_to=6)
    expected = float(group(data, "posterior")["mu"].mean())
    assert float(table.loc["mu", "mean"]) == pytest.approx(expected, abs=1e-5)


def test_loo_and_compare(data: Any) -> None:
    def offset_model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(5.0, 0.1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    loo = az.loo(data)
    # log p(y_i | y_-i) is Normal with mean Σ_{j≠i} y_j / n and variance 1 + 1 / n.
    rest = (Y.sum() - Y) / len(Y)
    exact = float(dist.Normal(rest, (1 + 1 / len(Y)) ** 0.5).log_prob(Y).sum())
    assert elpd(loo) == pytest.approx(exact, abs=0.15)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the worse model's Pareto k are what it should be told by
        table = az.compare({"good": data, "bad": to_arviz(posterior_of(offset_model, Y), 500)})
    assert list(table.index) == ["good", "bad"]


def test_plots(data: Any) -> None:
    plt = pytest.importorskip("matplotlib.pyplot")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ArviZ's own, about matplotlib
        if IS_TREE:
            az.plot_ppc_dist(data, num_samples=20, backend="matplotlib")
            az.plot_trace_dist(data, var_names=["mu"], backend="matplotlib")
            az.plot_dist(data, var_names=["mu"], backend="matplotlib")
        else:
            az.plot_ppc(data, num_pp_samples=20)
            az.plot_trace(data, var_names=["mu"])
            az.plot_posterior(data, var_names=["mu"])
    plt.close("all")


@only_trees
def test_importance_corrected_loo_finds_what_it_asks_for(data: Any) -> None:
    stats = data["sample_stats"]
    loo = az.loo_approximate_posterior(data, log_p=stats["lp"], log_q=stats["lq"])
    assert elpd(loo) == pytest.approx(elpd(az.loo(data)), abs=0.05)


@only_trees
def test_prior_sensitivity_finds_what_it_asks_for(data: Any) -> None:
    table = az.psense_summary(data, var_names=["mu"])
    assert "mu" in table.index


@pytest.mark.parametrize("engine", ["h5netcdf", "netcdf4"])
def test_to_netcdf_and_back(data: Any, tmp_path: Path, engine: str) -> None:
    pytest.importorskip("h5py" if engine == "h5netcdf" else "netCDF4")
    pytest.importorskip(engine if engine == "h5netcdf" else "netCDF4")
    path = tmp_path / "posterior.nc"
    data.to_netcdf(str(path), engine=engine)
    back = az.from_netcdf(str(path))
    assert groups(back) == groups(data)
    for name in groups(data):
        for variable, values in group(data, name).items():
            assert values.dims == group(back, name)[variable].dims
            assert np.array_equal(values.values, group(back, name)[variable].values), (name, variable)


# --------------------------------------------------------------------------------------------------
# Plates, names, events


def nested_model(y: Tensor) -> None:
    groups = pyro.plate("groups", y.shape[-2], dim=-2)
    members = pyro.plate("members", y.shape[-1], dim=-1)
    scale = pyro.sample("scale", dist.Gamma(2.0, 2.0))
    with groups:
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(4)))
        with members:
            z = pyro.sample("z", dist.Normal(theta, 1.0))
            pyro.deterministic("shifted", z + weights[..., 0])
            pyro.sample("y", dist.Normal(z, scale), obs=y)


def test_plates_are_dimensions() -> None:
    y = torch.randn(3, 5)
    data = to_arviz(posterior_of(nested_model, y), 10, prior=True)
    expected = {
        "scale": ("chain", "draw"),
        "theta": ("chain", "draw", "groups"),  # (3, 1) in the model: the 1 only pads
        "weights": ("chain", "draw", "groups", "weights_dim_0"),
        "z": ("chain", "draw", "groups", "members"),
        "shifted": ("chain", "draw", "groups", "members"),
    }
    for name in ("posterior", "prior"):
        assert {variable: values.dims for variable, values in group(data, name).items()} == expected
    assert group(data, "log_prior")["weights"].dims == ("chain", "draw", "groups")
    assert group(data, "log_likelihood")["y"].dims == ("chain", "draw", "groups", "members")
    assert group(data, "observed_data")["y"].dims == ("groups", "members")
    np.testing.assert_array_equal(group(data, "posterior")["members"], range(5))


def test_log_likelihood_with_nested_plates_is_that_of_single_runs() -> None:
    y = torch.randn(3, 5)
    data = to_arviz(posterior_of(nested_model, y), 30)
    draws = group(data, "posterior")
    expected = dist.Normal(torch.tensor(draws["z"].values), torch.tensor(draws["scale"].values)[..., None, None])
    np.testing.assert_allclose(group(data, "log_likelihood")["y"], expected.log_prob(y), rtol=1e-10)


def test_coords_and_dims_override() -> None:
    y = torch.randn(3, 5)
    data = to_arviz(
        posterior_of(nested_model, y),
        5,
        coords={"groups": ["a", "b", "c"], "kind": list("wxyz")},
        dims={"weights": [None, "kind"]},
    )
    posterior = group(data, "posterior")
    assert posterior["weights"].dims == ("chain", "draw", "groups", "kind")
    assert float(posterior["weights"].sel(groups="b", kind="x", draw=0, chain=0)) > 0
    assert list(group(data, "observed_data")["groups"].values) == ["a", "b", "c"]


def test_events_without_plates() -> None:
    def regression(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(w[0] + w[1] * x, 1.0).to_event(1), obs=y)  # w[0] is a draw when vectorised

    data = to_arviz(posterior_of(regression, X, Y), 12)
    assert group(data, "posterior")["w"].dims == ("chain", "draw", "w_dim_0")
    w = torch.tensor(group(data, "posterior")["w"].values)
    loc = w[..., :1] + w[..., 1:] * X
    expected = dist.Normal(loc, 1.0).to_event(1).log_prob(Y)
    np.testing.assert_allclose(group(data, "log_likelihood")["y"], expected, rtol=1e-10)
    np.testing.assert_allclose(group(data, "constant_data")["x"], X)
    assert group(data, "posterior_predictive")["y"].dims == ("chain", "draw", "y_dim_0")


def test_control_flow_on_a_latent_is_run_draw_by_draw() -> None:
    def branching(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        scale = 1.0 if mu > 0 else 2.0
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, scale), obs=y)

    data = to_arviz(posterior_of(branching, Y), 40)
    mu = torch.tensor(group(data, "posterior")["mu"].values)[..., None]
    expected = dist.Normal(mu, torch.where(mu > 0, 1.0, 2.0)).log_prob(Y)
    np.testing.assert_allclose(group(data, "log_likelihood")["y"], expected, rtol=1e-10)


def test_discrete_sites_and_batches_without_plates() -> None:
    def mixture(y: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.3, 0.7])))
            pyro.sample("y", dist.Normal(torch.where(z == 0, loc[..., 0], loc[..., 1]), 1.0), obs=y)
        pyro.sample("free", dist.Normal(torch.zeros(3), 1.0))

    posterior = posterior_of(mixture, Y, loc=dist.Normal(torch.tensor([-1.0, 1.0]), 0.1))
    data = to_arviz(posterior, 25)
    draws = group(data, "posterior")
    assert draws["z"].dtype.kind == "i" and draws["free"].dims == ("chain", "draw", "free_dim_0")
    loc = np.where(draws["z"] == 0, draws["loc"][..., :1], draws["loc"][..., 1:])
    expected = -0.5 * (Y.numpy() - loc) ** 2 - 0.5 * np.log(2 * np.pi)
    np.testing.assert_allclose(group(data, "log_likelihood")["y"], expected, rtol=1e-10)


# --------------------------------------------------------------------------------------------------
# Masks, scales, factors, subsamples, minibatches


def masked_model(y: Tensor, mask: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)), poutine.mask(mask=mask), poutine.scale(scale=3.0):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def test_masked_elements_are_no_data() -> None:
    y, mask = Y.clone(), torch.tensor([True, True, False, True, True, False, True, True])
    y[~mask] = torch.nan
    with pyro.validation_enabled(False):
        posterior = posterior_of(masked_model, y, mask)
    data = to_arviz(posterior, 200)
    found = group(data, "log_likelihood")["y"]
    assert found.dims == ("chain", "draw", "y_observed")
    np.testing.assert_array_equal(found["y_observed"], mask.nonzero()[:, 0])
    np.testing.assert_array_equal(found["y_data"], mask.nonzero()[:, 0])
    mu = torch.tensor(group(data, "posterior")["mu"].values)[..., None]
    np.testing.assert_allclose(found, dist.Normal(mu, 1.0).log_prob(y[mask]), rtol=1e-10)
    observed = group(data, "observed_data")["y"]
    np.testing.assert_array_equal(np.isnan(observed), ~mask.numpy())
    assert not np.isnan(group(data, "posterior_predictive")["y"]).any()
    # The joint is masked and scaled, as in the ELBO; the pointwise densities are not scaled.
    joint = dist.Normal(0.0, 1.0).log_prob(mu[..., 0]) + 3 * dist.Normal(mu, 1.0).log_prob(y[mask]).sum(-1)
    np.testing.assert_allclose(group(data, "sample_stats")["lp"], joint, rtol=1e-10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # six data have high Pareto k
        assert np.isfinite(elpd(az.loo(data)))


def test_a_mask_inside_the_distribution_counts_too() -> None:
    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0).mask(y > 0), obs=y)

    data = to_arviz(posterior_of(model, Y), 10)
    assert group(data, "log_likelihood")["y"].shape == (1, 10, int((Y > 0).sum()))


def test_partly_observed_data() -> None:
    def model(y: Tensor, seen: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y, obs_mask=seen)

    seen = torch.arange(8) < 6
    data = to_arviz(posterior_of(model, Y, seen), 10)
    np.testing.assert_allclose(group(data, "posterior")["y"][0, :, :6], Y[:6].expand(10, 6))
    assert group(data, "log_likelihood")["y_observed"].shape == (1, 10, 6)


def test_factors_and_scales_are_in_the_joint_only() -> None:
    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.factor("penalty", -(mu**2))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    data = to_arviz(posterior_of(model, Y), 10)
    assert set(group(data, "log_likelihood")) == {"y"}
    mu = torch.tensor(group(data, "posterior")["mu"].values)
    parts = dist.Normal(0.0, 1.0).log_prob(mu) - mu**2 + dist.Normal(mu[..., None], 1.0).log_prob(Y).sum(-1)
    np.testing.assert_allclose(group(data, "sample_stats")["lp"], parts, rtol=1e-10)


def test_a_subsampled_plate_keeps_one_set_of_indices() -> None:
    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y), subsample_size=3) as index:
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y[index])

    data = to_arviz(posterior_of(model, Y), 10)
    draws = group(data, "posterior")
    assert draws["z"].shape == (1, 10, 8)
    found = group(data, "log_likelihood")["y"]
    index = found["data"].values.copy()
    assert found.shape == (1, 10, 3) and len(set(index)) == 3
    expected = dist.Normal(torch.tensor(draws["z"].values)[..., index], 1.0).log_prob(Y[index])
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    labelled = to_arviz(posterior_of(model, Y), 10, coords={"data": list("abcdefgh")})
    assert set(group(labelled, "log_likelihood")["data"].values) < set("abcdefgh")


def test_other_arguments_give_the_log_likelihood_of_new_data() -> None:
    data = to_arviz(exact_mean(), 10, args=(Y[:3] + 1,))
    assert group(data, "log_likelihood")["y"].shape == (1, 10, 3)
    np.testing.assert_allclose(group(data, "observed_data")["y"], Y[:3] + 1)


def test_arguments_that_are_not_observed_are_constant_data() -> None:
    def model(batch: dict[str, Tensor], z: np.ndarray, size: int = 3) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(batch["y"])):
            pyro.sample("y", dist.Normal(mu * batch["x"], 1.0), obs=batch["y"])

    data = to_arviz(posterior_of(model, {"x": X, "y": Y}, np.arange(2)), 5)
    constants = group(data, "constant_data")
    assert set(constants) == {"batch_x", "z"}
    np.testing.assert_allclose(constants["batch_x"], X)


# --------------------------------------------------------------------------------------------------
# Chains, names that clash, errors


def test_restarts_are_chains() -> None:
    one, other = exact_mean(), exact_mean()
    other.history = [-30.0]
    data = to_arviz([one, other], 100)
    assert group(data, "posterior")["mu"].shape == (2, 100)
    assert group(data, "log_likelihood")["y"].shape == (2, 100, 8)
    assert group(data, "observed_data")["y"].shape == (8,)
    trace = group(data, "variational")["elbo_trace"].values
    np.testing.assert_array_equal(trace, [[-20.0, -15.0, -14.5], [-30.0, np.nan, np.nan]])
    assert "mu" in az.summary(data, var_names=["mu"]).index


def test_names_that_clash_or_hold_a_slash() -> None:
    def model(rows: Tensor, y: Tensor) -> None:
        with pyro.plate("rows", len(y)):
            mu = pyro.sample("scope/mu", dist.Normal(0.0, 1.0))
            pyro.sample("obs", dist.Normal(mu * rows, 1.0), obs=y)
        with pyro.plate("draw", 2):
            pyro.sample("b", dist.Normal(0.0, 1.0))

    data = to_arviz(posterior_of(model, X, Y), 5, dims={"rows": ["rows"]})
    assert group(data, "posterior")["scope.mu"].dims == ("chain", "draw", "rows")
    assert group(data, "posterior")["b"].dims == ("chain", "draw", "draw_dim")
    assert group(data, "constant_data")["rows"].dims == ("rows_dim",)


def test_a_loaded_posterior_exports_what_it_knows(tmp_path: Path) -> None:
    exact_mean().save(tmp_path / "q.safetensors")
    loaded = Posterior.load(tmp_path / "q.safetensors")
    with pytest.warns(UserWarning, match=r"has no model .* pass model=, args= and kwargs="):
        data = to_arviz(loaded, 10)
    assert groups(data) == {"posterior", "sample_stats", "variational"}
    full = to_arviz(loaded, 10, model=mean_model, args=(Y,))
    assert group(full, "log_likelihood")["y"].shape == (1, 10, 8)


def test_it_is_a_method_of_the_posterior() -> None:
    data = exact_mean().to_arviz(7, prior=True)
    assert group(data, "posterior")["mu"].shape == (1, 7) and "prior" in groups(data)


def test_groups_can_be_left_out() -> None:
    data = to_arviz(exact_mean(), 5, log_likelihood=False, posterior_predictive=False)
    assert not {"log_likelihood", "posterior_predictive", "prior"} & groups(data)


def other_model(y: Tensor) -> None:
    pyro.sample("nu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)


ERRORS = [
    (lambda: to_arviz(exact_mean(), 0), "num_samples=0: expected the number of draws"),
    (lambda: to_arviz([]), "empty list: expected a posterior"),
    (lambda: to_arviz([exact_mean(), posterior_of(other_model, Y)]), "chains are restarts of one model"),
    (
        lambda: to_arviz(exact_mean(), 5, model=other_model),
        r"sites \['mu'\], which the model does not have; it has \['nu'\]",
    ),
    (
        lambda: to_arviz(exact_mean(), 5, dims={"nu": ["a"]}),
        r"dims names \['nu'\]: expected variables of the export",
    ),
    (
        lambda: to_arviz(exact_mean(), 5, dims={"mu": ["a", "b"]}),
        r"dims\['mu'\] = .* names 2 axes; expected at most 0",
    ),
    (
        lambda: to_arviz(exact_mean(), 5, coords={"data": [1, 2]}),
        r"coords\['data'\] has 2 labels; expected 8",
    ),
    (lambda: to_arviz(exact_mean(), 5, args=(Y * torch.nan,)), r"statements \['y'\] have log density NaN"),
]


@pytest.mark.parametrize(("call", "message"), ERRORS, ids=[message[:30] for _, message in ERRORS])
def test_errors_say_what_was_found_and_expected(call: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_site_that_the_posterior_lacks_is_said() -> None:
    def larger(y: Tensor) -> None:
        pyro.sample("extra", dist.Normal(0.0, 1.0))
        mean_model(y)

    with pytest.warns(UserWarning, match=r"has no sites \['extra'\] of the model"):
        data = to_arviz(exact_mean(), 5, model=larger)
    assert "extra" not in group(data, "posterior")
