"""∇_μ E_q[f] from draws: unbiased, exact on what is linear in T, for every family; and what keeps a batch of
draws small.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from family_cases import DISTRIBUTIONS, SUPPORTS, make
from torch import Tensor

from pyro_blr.batches import batched, gradients_at
from pyro_blr.estimators import (
    bonnet_price,
    enumerated,
    gaussian_leaves,
    reparameterised,
    score_function,
    standard_error,
)
from pyro_blr.families import Gamma
from pyro_blr.likelihoods._expectations import Matrix
from pyro_blr.likelihoods._parametrisations import inverse_point
from pyro_blr.sequences import balanced, standard_normals, uniform_levels

GAUSSIAN = ["Normal", "MultivariateNormal", "MultivariateNormal precision", "LogNormal", *SUPPORTS]
CONTINUOUS = [n for n in DISTRIBUTIONS if n in ("Gamma", "Exponential", "Chi2", "InverseGamma", "Beta", "Dirichlet")]
CONTINUOUS += ["Uniform", "Wishart precision", "Wishart"]
DISCRETE = ["Bernoulli", "Categorical", "OneHotCategorical"]


def linear_in(family, message: Tensor) -> Callable[[Tensor, dict], Tensor]:
    """f(x) = ⟨m, T(x)⟩, summed over the batch: ∇_μ E f = m."""
    return lambda x, other: (family.sufficient_statistics(x) * message).sum()


def gaussian_of(family):
    """The Gaussian over the variable that the engine differentiates in."""
    return family.base if hasattr(family, "base") else family


def leaves_of(moments: dict[str, Tensor], count: int, seed: int) -> Tensor:
    shape = moments["mean"].shape
    noise = standard_normals(uniform_levels(count, shape.numel(), seed))
    return gaussian_leaves(moments, noise.reshape(count, *shape))


def five_standard_errors(estimates: Tensor, expected: Tensor, floor: float = 1e-9) -> None:
    """The mean of independent (R, ...) estimates is `expected` within five of its standard errors."""
    error = estimates.std(0) / math.sqrt(estimates.shape[0])
    assert bool(((estimates.mean(0) - expected).abs() <= 5 * error + floor * (1 + expected.abs())).all())


@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("name", [n for n in GAUSSIAN if n != "LogNormal"])
def test_bonnet_price_has_no_error_on_linear_functions_of_the_statistics(name: str, batch: tuple[int, ...]) -> None:
    family, natural, _ = make(name, batch)
    family = gaussian_of(family)
    target = torch.randn_like(natural)
    moments = family.moments(natural)
    gradients = bonnet_price(linear_in(family, target), moments, leaves_of(moments, 16, 0), {})
    torch.testing.assert_close(family.message(natural, gradients), target, rtol=1e-8, atol=1e-8)


def test_bonnet_price_in_the_logarithm_of_a_log_normal() -> None:
    family, natural, _ = make("LogNormal", (3,))
    target = torch.randn_like(natural)
    moments = family.moments(natural)
    function = linear_in(family, target)
    gradients = bonnet_price(lambda u, o: function(u.exp(), o), moments, leaves_of(moments, 16, 0), {})
    torch.testing.assert_close(family.message(natural, gradients), target, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["Normal", "MultivariateNormal", "simplex", "positive"])
def test_bonnet_price_is_unbiased_on_what_is_not_quadratic(name: str) -> None:
    """Against Gauss–Hermite on f(u) = Σ exp(a'u): ∇_m E f = a E f, ∇_V E f = ½ a aᵀ E f."""
    family = gaussian_of(make(name)[0])
    natural = make(name)[1]
    moments = family.moments(natural)
    a = 0.5 * torch.randn_like(moments["mean"])
    estimates = []
    for seed in range(40):
        leaves = leaves_of(moments, 32, seed)
        estimates.append(
            family.message(natural, bonnet_price(lambda u, _: (a * u).sum().exp(), moments, leaves, {}, seed))
        )
    if "covariance" in moments:
        value = (a @ moments["mean"] + 0.5 * a @ moments["covariance"] @ a).exp()
        exact = {"mean": a * value, "covariance": 0.5 * torch.outer(a, a) * value}
    else:
        value = (a * moments["mean"] + 0.5 * a**2 * moments["variance"]).exp()
        exact = {"mean": a * value, "variance": 0.5 * a**2 * value}
    five_standard_errors(torch.stack(estimates), family.message(natural, exact))


def test_elements_that_interact_have_their_own_blocks_of_the_hessian() -> None:
    """f(u) = exp(Σ u) over three independent Normals: ∇_{v_e} E f = ½ E f for each; signs shared by all draws
    would add 2 E f.
    """
    family, natural, _ = make("Normal", (3,))
    natural = family.from_distribution(torch.distributions.Normal(torch.zeros(3), torch.tensor([0.2, 0.3, 0.4])))
    moments = family.moments(natural)
    value = (0.5 * moments["variance"].sum()).exp()
    gradients = bonnet_price(lambda u, _: u.sum().exp(), moments, leaves_of(moments, 4096, 3), {})
    torch.testing.assert_close(gradients["variance"], 0.5 * value.expand(3), rtol=5e-3, atol=0)
    torch.testing.assert_close(gradients["hessian"], value.expand(3, 3), rtol=5e-3, atol=0)


def test_many_interacting_elements_are_unbiased() -> None:
    """More elements than there are directions for: signs differ from draw to draw."""
    size = 300
    moments = {"mean": torch.zeros(size), "variance": torch.full((size,), 0.5 / size)}
    value = (0.5 * moments["variance"].sum()).exp()
    rows = [
        bonnet_price(lambda u, _: u.sum().exp(), moments, leaves_of(moments, 64, s), {}, s)["variance"]
        for s in range(20)
    ]
    estimates = torch.stack(rows)
    five_standard_errors(estimates.mean(1), 0.5 * value)
    assert "hessian" not in bonnet_price(lambda u, _: u.sum().exp(), moments, leaves_of(moments, 4, 0), {})


def test_large_events_use_the_gradient_alone() -> None:
    """½ E[V⁻¹ (u − m) ∇fᵀ] of a 210-dimensional Gaussian on f(u) = ½ Σ c u²: ∇_m = c m, ∇_V = ½ diag c."""
    size = 210
    root = torch.eye(size) + 0.02 * torch.randn(size, size)
    moments = {"mean": torch.randn(size), "covariance": root @ root.mT}
    c = torch.rand(size)
    parts = [
        bonnet_price(lambda u, _: 0.5 * (c * u**2).sum(), moments, leaves_of(moments, 64, seed), {})
        for seed in range(24)
    ]
    means = torch.stack([p["mean"] for p in parts])
    torch.testing.assert_close(means.mean(0), c * moments["mean"], rtol=1e-8, atol=1e-8)  # antithetic: no error
    covariances = torch.stack([p["covariance"] for p in parts])
    probes = torch.randn(6, size)
    found = torch.einsum("pi,rij,pj->rp", probes, covariances, probes)
    five_standard_errors(found, 0.5 * (c * probes**2).sum(-1))


def rejected(family, count: int) -> Callable[[Tensor], Tensor]:
    """λ ↦ torch's draws."""
    return lambda natural: family.to_distribution(natural).rsample((count,))


def quantiles(family, batch: tuple[int, ...], count: int, seed: int) -> Callable[[Tensor], Tensor]:
    """λ ↦ draws at low-discrepancy levels."""
    shape = torch.Size([*batch, family.num_levels])
    levels = uniform_levels(count, shape.numel(), seed).reshape(count, *shape)
    return lambda natural: family.at_levels(natural, levels)


@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("name", CONTINUOUS)
def test_reparameterised_has_no_error_on_linear_functions_of_the_statistics(name: str, batch: tuple[int, ...]) -> None:
    family, natural, _ = make(name, batch)
    target = torch.randn_like(natural)
    count = 4 * family.num_parameters + 8
    for draw in (rejected(family, count), quantiles(family, batch, count, 0)):
        message = reparameterised(linear_in(family, target), family, natural, draw, {})
        torch.testing.assert_close(message, target, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_reparameterised_is_unbiased_with_few_draws(name: str) -> None:
    """Fewer draws than the regression asks for: the family's own Fisher matrix."""
    family, natural, _ = make(name)
    target = torch.randn_like(natural)
    count = 4 * family.num_parameters - 1
    function = linear_in(family, target)
    for make_draw in (lambda seed: rejected(family, count), lambda seed: quantiles(family, (), count, seed)):
        rows = [reparameterised(function, family, natural, make_draw(seed), {}) for seed in range(150)]
        estimates = torch.stack(rows)
        assert float(estimates.std(0).max()) > 1e-6  # not the regression
        five_standard_errors(estimates, target, floor=1e-3)  # torch's derivative of a Gamma draw in α is right to 5e-4


@pytest.mark.parametrize("name", CONTINUOUS + GAUSSIAN + DISCRETE)
def test_score_function_has_no_error_on_linear_functions_of_the_statistics(name: str) -> None:
    family, natural, distribution = make(name)
    family = gaussian_of(family)
    target = torch.randn_like(natural)
    statistics = family.sufficient_statistics(family.to_distribution(natural).sample((2000,))).to(natural.dtype)
    values = (statistics * target).sum(-1) + 7.0
    torch.testing.assert_close(score_function(family, natural, values, statistics), target, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", CONTINUOUS + ["Normal", "MultivariateNormal"] + DISCRETE)
def test_score_function_is_unbiased_with_few_draws(name: str) -> None:
    family, natural, _ = make(name)
    target = torch.randn_like(natural)
    count = max(4 * family.num_parameters - 1, 2)
    estimates = []
    for _ in range(1500):
        statistics = family.sufficient_statistics(family.to_distribution(natural).sample((count,))).to(natural.dtype)
        estimates.append(score_function(family, natural, (statistics * target).sum(-1) + 7.0, statistics))
    five_standard_errors(torch.stack(estimates), target)


def test_reparameterised_agrees_with_quadrature_on_a_gamma() -> None:
    """∇_μ E log(1 + x) of a Gamma, differentiated under SciPy's quadrature."""
    integrate, stats = pytest.importorskip("scipy.integrate"), pytest.importorskip("scipy.stats")
    family, natural, _ = make("Gamma")
    natural = torch.tensor([1.5, -0.8])

    def mean(point: Tensor) -> float:
        law = stats.gamma(float(point[0]) + 1, scale=-1 / float(point[1]))
        return integrate.quad(lambda x: law.pdf(x) * math.log1p(x), 0, math.inf, epsabs=1e-12)[0]

    step = 1e-4
    sides = [(mean(natural + step * e) - mean(natural - step * e)) / (2 * step) for e in torch.eye(2)]
    exact = family.natural_gradient(natural, torch.tensor(sides))
    draw = rejected(family, 2000)
    estimates = [reparameterised(lambda x, _: x.log1p().sum(), family, natural, draw, {}) for _ in range(30)]
    five_standard_errors(torch.stack(estimates), exact, floor=2e-3)  # the regression's bias is O(1 / draws)
    for seed in range(5):  # on low-discrepancy levels 4,096 draws have a standard error of 5e-4 of it (twenty seeds)
        draw = quantiles(family, (), 4096, seed)
        found = reparameterised(lambda x, _: x.log1p().sum(), family, natural, draw, {})
        torch.testing.assert_close(found, exact, rtol=2.5e-3, atol=0)


@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("name", CONTINUOUS)
def test_values_at_levels_are_draws_of_the_family(name: str, batch: tuple[int, ...]) -> None:
    """E T = μ within five standard errors of pseudo-random levels, and ten times as close at low-discrepancy ones."""
    family, natural, _ = make(name, batch)
    expected = family.to_expectation(natural)
    levels = torch.rand(4000, *batch, family.num_levels)
    five_standard_errors(family.sufficient_statistics(family.at_levels(natural, levels)), expected)
    errors = []
    for seed in range(10):
        statistics = family.sufficient_statistics(quantiles(family, batch, 4096, seed)(natural))
        errors.append((statistics.mean(0) - expected) / (statistics.std(0) / 64))
    assert float(torch.stack(errors).square().mean().sqrt()) < 0.1


@pytest.mark.parametrize("alpha", [1e-3, 0.05, 0.3, 0.7, 1.0, 3.0, 30.0, 1e4, 1e7])
def test_gamma_quantiles_are_the_inverse_of_the_distribution_function(alpha: float) -> None:
    """P(α, x) = u in both tails, and ∂x/∂α is the difference quotient."""
    special = pytest.importorskip("scipy.special")
    family = Gamma()
    levels = torch.cat([torch.tensor([1e-9, 1e-4, 0.4999, 0.5, 0.5001, 0.9999, 1 - 1e-9]), torch.rand(200)])

    def values(natural: Tensor) -> Tensor:
        return family.at_levels(natural, levels.unsqueeze(-1))

    natural = torch.tensor([alpha - 1, -1.0])
    x = values(natural)
    usable = x > 1e-300
    low, high = special.gammainc(alpha, x.numpy()), special.gammaincc(alpha, x.numpy())
    torch.testing.assert_close(torch.as_tensor(low)[usable], levels[usable], rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.as_tensor(high)[usable], (1 - levels)[usable], rtol=1e-6, atol=0)
    leaf = natural.expand(len(levels), 2).clone().requires_grad_()  # a λ for each level
    (slope,) = torch.autograd.grad(family.at_levels(leaf, levels[None, :, None]).sum(), leaf)
    step = torch.tensor([1e-4 * alpha, 0.0])
    near, far = (values(natural + k * step) - values(natural - k * step) for k in (1, 2))
    usable &= (
        levels - 0.5
    ).abs() < 0.49995  # torch's derivative is an approximation, and loses digits in the far tails
    torch.testing.assert_close(slope[usable, 0], ((8 * near - far) / (12e-4 * alpha))[usable], rtol=1e-3, atol=0)


def test_enumerated_is_the_table_of_every_state() -> None:
    table = torch.randn(2, 3)
    leaves = torch.randint(0, 3, (5, 2))
    found = enumerated(lambda k, _: table[torch.arange(2), k].sum(), 3, leaves, {})
    expected = table + torch.stack([table[1, leaves[:, 1]].mean(), table[0, leaves[:, 0]].mean()]).unsqueeze(-1)
    torch.testing.assert_close(found, expected)


def test_draws_are_antithetic_and_those_of_different_seeds_independent() -> None:
    one, other = (standard_normals(uniform_levels(256, 5, seed)) for seed in (0, 1))
    assert bool((one[:128] == -one[128:]).all())
    torch.testing.assert_close(one.square().mean(0), torch.ones(5), rtol=0.05, atol=0)
    assert not torch.equal(one, other)
    levels = uniform_levels(8, 1100, 0)
    assert levels.shape == (8, 1100)
    assert bool((levels[:4] + levels[4:] == 1).all())


def test_standard_error_takes_antithetic_pairs_as_one() -> None:
    half = torch.randn(50)
    assert standard_error(torch.cat([half, -half])) == 0.0
    pairs = 0.5 * (half + half.square())
    assert standard_error(torch.cat([half, half.square()])) == pytest.approx(float(pairs.std() / math.sqrt(50)))


def test_gradients_where_a_program_cannot_be_batched() -> None:
    def function(u: Tensor, other: dict) -> Tensor:
        sign = 1.0 if float(u.detach().sum()) > 0 else -1.0  # no batch of draws has one sign
        return (sign * u**2 * other["c"]).sum()

    leaves, scale = torch.tensor([[1.0, 2.0], [-3.0, 1.0]]), torch.tensor([2.0, 5.0])
    expected = torch.tensor([[4.0, 8.0], [30.0, -10.0]])
    torch.testing.assert_close(gradients_at(function, leaves, {"c": scale}), expected)
    moments = {"mean": torch.zeros(2), "variance": torch.ones(2)}
    found = bonnet_price(function, moments, leaves, {"c": scale})
    torch.testing.assert_close(found["mean"], expected.mean(0))
    torch.testing.assert_close(found["variance"], torch.tensor([0.5 * (4.0 - 10.0) / 2] * 2))


def test_batches_are_cut_by_the_numbers_of_a_factor_not_of_a_leaf() -> None:
    """1,024 draws of two weights against 100,000 rows: never more than some forty draws at once."""
    rows = torch.ones(100_000)
    sizes = []

    class Seen(torch.autograd.Function):
        generate_vmap_rule = False

        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def setup_context(ctx, inputs, output) -> None:
            pass

        @staticmethod
        def vmap(info, in_dims, x: Tensor):
            sizes.append(info.batch_size)
            return x.clone(), in_dims[0]

    values = batched(lambda u, _: Seen.apply(u).sum() * rows.sum(), torch.ones(1024, 2), {}, elements=100_000)
    assert values.shape == (1024,)
    assert sum(sizes) == 1024
    assert max(sizes) <= 40


def test_second_derivatives_of_a_matrix_in_batches() -> None:
    """log|L Lᵀ| = 2 (u₁ + u₂) whatever is below the diagonal; its square has the Hessian 8 in u₁ and u₂, the inverse's corner the
    second derivative 4 exp(−2 u₂) in u₂.
    """

    def function(u: Tensor, _: object) -> Tensor:
        first, second = torch.stack([u[1].exp(), 0 * u[0]]), torch.stack([u[0], u[2].exp()])
        tril = torch.stack([first, second])
        points = (Matrix.of(tril @ tril.mT), inverse_point({"scale_tril": tril}))
        return points[0].logdet.square() + points[1].mean[1, 1]

    mean, covariance = torch.tensor([0.4, -0.2, 0.3], dtype=torch.float64), 0.01 * torch.eye(3, dtype=torch.float64)
    leaves = gaussian_leaves({"mean": mean, "covariance": covariance}, standard_normals(uniform_levels(64, 3, 0)))
    found = bonnet_price(function, {"mean": mean, "covariance": covariance}, leaves, {})
    expected = torch.zeros(3, 3, dtype=torch.float64)
    expected[1:, 1:] = 4.0
    expected[2, 2] += 2 * (-2 * leaves[:, 2]).exp().mean()
    torch.testing.assert_close(found["covariance"], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dims", [1, 5, 40])
def test_balanced_draws_integrate_cubes_exactly(dims: int) -> None:
    """z and −z with zᵀz = h I; h is too small for all second moments of 40 dims, whose variances are 1."""
    levels = uniform_levels(16, dims, 3)
    found = balanced(standard_normals(levels)[:8])
    second = found.mT @ found / 16
    assert bool((found[:8] == -found[8:]).all())
    if dims <= 5:
        torch.testing.assert_close(second, torch.eye(dims, dtype=torch.float64))
    torch.testing.assert_close(second.diagonal(), torch.ones(dims, dtype=torch.float64))
