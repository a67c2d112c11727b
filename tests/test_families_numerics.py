"""What families promise beyond their laws: accuracies, symbolic Fisher matrices, refusals, the registry."""

import math
import warnings

import mpmath
import pyro.distributions as dist
import pytest
import sympy
import torch
from family_cases import F64, NAMES, close, make, mean
from pyro.distributions import constraints
from torch import Tensor

from pyro_blr.families import Normal as NormalFamily
from pyro_blr.families import TransformedNormal, family_of, pushforward_family


def test_contains_knows_the_boundary_of_every_parameter() -> None:
    outside = {
        "Gamma": [(-1.0, -1.0), (1.0, 0.0)],
        "InverseGamma": [(-1.0, -1.0), (-3.0, 0.0)],
        "Beta": [(-1.0, 0.0), (0.0, -1.0)],
        "MultivariateNormal covariance": [(0.0, 0.0, -1.0, 3.0, -1.0), (0.0, 0.0, 1.0, 0.0, -1.0)],
        "Wishart": [(-1.0, -1.0, 0.0, -1.0), (1.0, -1.0, 2.5, -1.0)],
    }
    for name, rows in outside.items():
        family = make(name)[0]
        assert not family.contains(torch.tensor(rows, dtype=F64)).any(), name
        assert not family.contains(torch.tensor(rows)).any(), name


def test_the_retraction_of_a_gaussian_is_the_improved_rules() -> None:
    """S + dS + ½ dS S⁻¹ dS, m + S⁻¹ (dη − dS m) (Lin, Schmidt and Khan 2020)."""
    family, natural, distribution = make("MultivariateNormal precision")
    precision, location = distribution.precision_matrix, distribution.loc
    factor = torch.linalg.cholesky(precision)
    change = factor @ torch.diag(torch.tensor([-1.5, 0.4], dtype=F64)) @ factor.mT
    packed = torch.stack([-0.5 * change[0, 0], -change[1, 0], -0.5 * change[1, 1]])
    direction = torch.cat([mean(2), packed])
    assert not family.contains(natural + direction)
    moved = family.to_distribution(family.retract(natural, direction))
    close(moved.precision_matrix, precision + change + 0.5 * change @ precision.inverse() @ change)
    close(moved.loc, location + precision.inverse() @ (direction[:2] - change @ location))
    scalar = NormalFamily().retract(torch.tensor([2.0, -0.5], dtype=F64), torch.tensor([0.5, 0.75], dtype=F64))
    close(scalar, torch.tensor([0.625 * (2 + 0.5 + 1.5 * 2), -0.3125], dtype=F64))


SYMBOLIC = {
    "Normal": (2, lambda a, b: -(a**2) / (4 * b) - sympy.log(-2 * b) / 2),
    "LogNormal": (2, lambda a, b: -((a + 1) ** 2) / (4 * b) - sympy.log(-2 * b) / 2),
    "Gamma": (2, lambda a, b: sympy.loggamma(a + 1) - (a + 1) * sympy.log(-b)),
    "InverseGamma": (2, lambda a, b: sympy.loggamma(-a - 1) + (a + 1) * sympy.log(-b)),
    "Beta": (2, lambda a, b: sympy.loggamma(a + 1) + sympy.loggamma(b + 1) - sympy.loggamma(a + b + 2)),
    "Dirichlet": (4, lambda *a: sum(sympy.loggamma(x + 1) for x in a) - sympy.loggamma(sum(a) + 4)),
    "Bernoulli": (1, lambda a: sympy.log(1 + sympy.exp(a))),
    "Categorical": (3, lambda *a: sympy.log(1 + sum(sympy.exp(x) for x in a))),
    "MultivariateNormal covariance": (
        5,
        lambda a, b, p, q, r: (q * a * b - r * a**2 - p * b**2) / (4 * p * r - q**2) - sympy.log(4 * p * r - q**2) / 2,
    ),
    "Wishart": (
        4,
        lambda a, p, q, r: (
            sympy.loggamma(a + sympy.Rational(3, 2))
            + sympy.loggamma(a + 1)
            - (a + sympy.Rational(3, 2)) * sympy.log(p * r - q**2 / 4)
        ),
    ),
}


@pytest.mark.parametrize("name", SYMBOLIC)
def test_fisher_is_the_symbolic_hessian(name: str) -> None:
    count, log_partition = SYMBOLIC[name]
    symbols = sympy.symbols(f"x:{count}")
    hessian = sympy.lambdify(symbols, sympy.hessian(log_partition(*symbols), symbols), "mpmath")
    family, natural, _ = make(name)
    expected = hessian(*map(mpmath.mpf, natural.tolist())).tolist()
    expected = torch.tensor([[float(x) for x in row] for row in expected], dtype=F64)
    close(family.fisher(natural), expected, 1e-11)


def simplex_condition(expectation: Tensor, total: Tensor) -> Tensor:
    return (1 + total) * (1 + expectation.abs().amax(-1))


def scale_condition(expectation: Tensor, total: Tensor) -> Tensor:
    return (1 + total) * (1 + expectation[..., 0].abs() + expectation[..., 1].log().abs())


def wishart_condition(expectation: Tensor, excess: Tensor) -> Tensor:
    return 1 + (2 + excess) * (1 + expectation[..., 0].abs() + 3 * expectation[..., 1].log().abs())


RANGES = {  # α = |λ + 1| in the first so many parameters, the distribution, the stated condition number
    "Gamma": (1, lambda a: dist.Gamma(a[..., 0], a[..., 1].sqrt()), scale_condition),
    "InverseGamma": (1, lambda a: dist.InverseGamma(a[..., 0], a[..., 1].sqrt()), scale_condition),
    "Beta": (2, lambda a: dist.Beta(a[..., 0], a[..., 1]), simplex_condition),
    "Dirichlet": (3, dist.Dirichlet, simplex_condition),
    "Wishart": (
        1,
        lambda a: dist.Wishart(2 + 2 * a[..., 0], torch.eye(3, dtype=a.dtype) * a[..., 1, None, None].sqrt()),
        wishart_condition,
    ),
}


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("name", RANGES)
def test_to_natural_holds_over_the_stated_range(name: str, dtype: torch.dtype) -> None:
    """Relative error in α ≤ 1e-12 + 32 ε κ, for α in [1e-3, 1e6] wherever that is below one."""
    count, build, condition = RANGES[name]
    corners = torch.cartesian_prod(*[torch.tensor([1e-3, 1.0, 1e6], dtype=F64)] * 3)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Low df values")
        distribution = build(torch.cat([10 ** (9 * torch.rand(2000, 3, dtype=F64) - 3), corners]))
    family = family_of(distribution)
    natural = family.from_distribution(distribution).to(dtype)
    expectation = family.to_expectation(natural)
    concentration = (natural.double()[..., :count] + 1).abs()
    error = (family.to_natural(expectation).double() - natural.double())[..., :count].abs() / concentration
    bound = 1e-12 + 32 * torch.finfo(dtype).eps * condition(expectation.double(), concentration.sum(-1))
    stated = (bound < 1) & family.contains(natural)
    assert stated.sum() > 500
    assert (error.amax(-1) <= bound)[stated].all(), (error.amax(-1) / bound)[stated].max()


def test_expectations_of_nothing_are_not_mistaken_for_parameters() -> None:
    impossible = {
        "Normal": [(1.0, 0.5), (1.0, 1.0)],
        "MultivariateNormal covariance": [(1.0, 1.0, 1.0, 0.0, 1.0)],
        "Gamma": [(0.0, 0.5), (0.0, 1.0)],
        "InverseGamma": [(0.0, 0.5), (0.0, 1.0)],
        "Beta": [(0.0, -600.0), (-0.1, -0.1), (1.0, -1.0)],
        "Dirichlet": [(-1.0, -1.0, -1.0, -1.0)],
        "Bernoulli": [(1.0,), (0.0,), (1.5,)],
        "Categorical": [(0.5, 0.5, 0.0), (0.5, 0.5, 0.5)],
        "Wishart": [(1.0, 1.0, 0.0, 1.0), (0.0, 1.0, 2.0, 1.0)],
    }
    for name, rows in impossible.items():
        family = make(name)[0]
        assert not family.contains(family.to_natural(torch.tensor(rows, dtype=F64))).any(), name


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_vague_concentrations_have_finite_moments(dtype: torch.dtype) -> None:
    vague = torch.tensor(1e-3, dtype=dtype)
    for distribution in (
        dist.Gamma(vague, vague),
        dist.InverseGamma(vague, vague),
        dist.Beta(vague, vague),
        dist.Dirichlet(torch.full((10,), 0.01, dtype=dtype)),
    ):
        family = family_of(distribution)
        natural = family.from_distribution(distribution)
        exact = family.moments(family.from_distribution(family.to_distribution(natural.double())))
        for key, value in family.moments(natural).items():
            assert value.dtype == dtype and value.isfinite().all()
            torch.testing.assert_close(value.double(), exact[key], rtol=1e-4, atol=0)
        assert family.entropy(natural).isfinite() and family.kl(natural, natural) == 0


def test_float32_keeps_a_narrow_normal_far_from_zero() -> None:
    """N(1000, 0.1²): the second moment has lost the variance, moments and messages have not."""
    loc, scale = torch.tensor(1000.0, dtype=torch.float32), torch.tensor(0.1, dtype=torch.float32)
    natural = NormalFamily().from_distribution(dist.Normal(loc, scale))
    moments = NormalFamily().moments(natural)
    torch.testing.assert_close(moments["variance"], scale**2, rtol=1e-6, atol=0)
    torch.testing.assert_close(moments["mean"], loc, rtol=1e-6, atol=0)
    torch.testing.assert_close(NormalFamily().entropy(natural), dist.Normal(loc, scale).entropy())
    wide = dist.Normal(loc.double(), scale.double())
    torch.testing.assert_close(
        NormalFamily().log_prob(natural, loc + scale).double(),
        wide.log_prob((loc + scale).double()),
        rtol=0,
        atol=2e-3,
    )


def test_registry_refuses_other_laws_and_equal_families_are_equal() -> None:
    class Other(dist.Gamma):
        def log_prob(self, value: Tensor) -> Tensor:
            return super().log_prob(value) + 1

    class Same(dist.Gamma):
        pass

    one, zero = torch.tensor(1.0), torch.tensor(0.0)
    assert family_of(Other(one, one)) is None and family_of(Same(one, one)) == family_of(dist.Exponential(one))
    assert family_of(torch.distributions.Normal(zero, one)) == NormalFamily()
    trials = (dist.Binomial(3, one / 2), dist.Multinomial(2, torch.ones(3)))
    for stranger in (dist.HalfCauchy(one), dist.Uniform(zero, 2 * one), dist.Poisson(one), *trials):
        assert family_of(stranger) is None
    for name in NAMES:
        assert make(name)[0] == make(name)[0] and hash(make(name)[0]) == hash(make(name)[0])
    bounded = [pushforward_family(constraints.interval(zero, high * one), ()) for high in (2, 2, 3)]
    assert bounded[0] == bounded[1] != bounded[2]
    assert pushforward_family(constraints.boolean, ()) is None
    assert pushforward_family(constraints.sphere, (3,)) is None
    gaussian = dist.MultivariateNormal(torch.zeros(3), torch.eye(3))
    assert pushforward_family(constraints.real_vector, (3,)) == family_of(gaussian)
    with pytest.raises(ValueError, match="found .*Normal.* expected a distribution of the family"):
        bounded[0].from_distribution(dist.Normal(zero, one))
    with pytest.raises(ValueError, match="found Uniform.* expected a distribution of the family Beta"):
        family_of(dist.Uniform(zero, one)).from_distribution(dist.Uniform(zero, 2 * one))


def test_wishart_draws_flow_back_to_its_parameters() -> None:
    """∇ E tr X = ∇ tr E X along λ -> distribution -> rsample, within five standard errors."""
    family, natural, _ = make("Wishart")
    leaf = natural.clone().requires_grad_()
    draws = family.to_distribution(leaf).rsample((3000,))
    traces = draws.diagonal(dim1=-2, dim2=-1).sum(-1)
    blocks = [block.mean() for block in traces.chunk(30)]
    rows = torch.stack([torch.autograd.grad(block, leaf, retain_graph=True)[0] for block in blocks])
    exact = family.fisher(natural) @ family.message(natural, {"mean": torch.eye(2, dtype=F64)})
    assert ((rows.mean(0) - exact).abs() <= 5 * rows.std(0) / math.sqrt(30)).all()


def test_index_tensors_made_in_inference_mode_serve_autograd() -> None:
    natural = dist.MultivariateNormal(torch.zeros(7, dtype=F64), torch.eye(7, dtype=F64))
    family = family_of(natural)
    with torch.inference_mode():
        family.moments(family.from_distribution(natural))
    leaf = family.from_distribution(natural).requires_grad_()
    torch.autograd.grad(family.moments(leaf)["covariance"].sum(), leaf)


@pytest.mark.parametrize("dimension", [2, 3, 5])
def test_the_bijection_of_correlations_is_torchs_and_can_be_batched(dimension: int) -> None:
    u = torch.randn(4, dimension * (dimension - 1) // 2, dtype=torch.float64)
    theirs = torch.distributions.transforms.CorrCholeskyTransform()
    family = pushforward_family(constraints.corr_cholesky, torch.Size([dimension, dimension]))
    assert isinstance(family, TransformedNormal)
    value, jacobian = theirs(u), theirs.log_abs_det_jacobian(u, theirs(u))
    for each in (lambda f: f(u), lambda f: torch.func.vmap(f)(u)):
        assert torch.allclose(each(family.constrain), value, atol=1e-14)
        assert torch.allclose(each(family.log_abs_det_jacobian), jacobian, atol=1e-12)
    assert torch.allclose(family.unconstrain(value), u, atol=1e-10)
