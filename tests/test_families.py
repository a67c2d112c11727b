"""Laws × families × batch shapes, against torch, automatic differentiation and samples."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from family_cases import BATCHES, F64, NAMES, close, make
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_blr.families import ExponentialFamily, GaussianField, SparseNormal, TransformedNormal


def law(function: Callable) -> Callable:
    """Runs a law for every family at every batch shape."""
    by_name = pytest.mark.parametrize("name", NAMES)
    return by_name(pytest.mark.parametrize("batch", BATCHES, ids=str)(function))


@law
def test_shapes_and_identity_of_the_distribution(name: str, batch: tuple) -> None:
    family, natural, distribution = make(name, batch)
    again = family.to_distribution(natural)
    assert natural.shape == (*batch, family.num_parameters) and natural.dtype == F64
    assert again.batch_shape == batch and again.event_shape == family.event_shape == distribution.event_shape
    close(family.from_distribution(again), natural, 1e-12)
    assert family.is_discrete == distribution.support.is_discrete
    assert again.expand((5, *batch)).sample().shape == (5, *batch, *family.event_shape)


@law
def test_log_prob_is_the_distributions(name: str, batch: tuple) -> None:
    family, natural, distribution = make(name, batch)
    value = family.to_distribution(natural).sample((4,))
    close(family.log_prob(natural, value), distribution.log_prob(value))
    statistics = family.sufficient_statistics(value).to(F64)
    canonical = (natural * statistics).sum(-1) - family.log_partition(natural)
    if isinstance(family, TransformedNormal):
        canonical = canonical - family.log_abs_det_jacobian(family.unconstrain(value))
    close(canonical, family.log_prob(natural, value))


@law
def test_expectation_is_the_gradient_of_the_log_partition_and_fisher_the_hessian(name: str, batch: tuple) -> None:
    family, natural, _ = make(name, batch)
    leaf = natural.requires_grad_()
    (gradient,) = torch.autograd.grad(family.log_partition(leaf).sum(), leaf)
    close(family.to_expectation(natural), gradient)
    flat = natural.detach().reshape(-1, family.num_parameters)
    hessian = torch.stack([torch.autograd.functional.hessian(family.log_partition, row) for row in flat])
    fisher = family.fisher(natural.detach())
    close(fisher.reshape(hessian.shape), hessian, 1e-7)  # torch's trigamma is right to 1e-9
    close(ExponentialFamily.fisher(family, natural.detach()), fisher, 1e-7)
    assert (torch.linalg.eigvalsh(fisher) > 0).all()


@law
def test_the_two_maps_are_inverse(name: str, batch: tuple) -> None:
    family, natural, _ = make(name, batch)
    expectation = family.to_expectation(natural)
    close(family.to_natural(expectation), natural)
    gradient = torch.randn_like(natural)
    leaf = expectation.detach().requires_grad_()
    (derivative,) = torch.autograd.grad(family.to_natural(leaf), leaf, gradient)
    close(derivative, family.natural_gradient(natural, gradient), 1e-8)


@law
def test_natural_gradient_solves_with_the_fisher_matrix(name: str, batch: tuple) -> None:
    family, natural, _ = make(name, batch)
    gradient = torch.randn_like(natural)
    step = family.natural_gradient(natural, gradient)
    close((family.fisher(natural) @ step.unsqueeze(-1)).squeeze(-1), gradient, 1e-9)
    close(ExponentialFamily.natural_gradient(family, natural, gradient), step, 1e-6)


def dense(law: Any) -> Any:
    """A sparse Gaussian as torch's own."""
    return dist.MultivariateNormal(law.mean, law.covariance_matrix) if isinstance(law, GaussianField) else law


@law
def test_kl_and_entropy_are_torchs(name: str, batch: tuple) -> None:
    (family, natural, _), (_, other, _) = make(name, batch), make(name, batch)
    inner = family.base if isinstance(family, TransformedNormal) else family
    q, p = (dense(inner.to_distribution(at)) for at in (natural, other))
    close(family.kl(natural, natural), torch.zeros(batch, dtype=F64), 1e-12)
    close(ExponentialFamily.kl(inner, natural, other), family.kl(natural, other))
    close(ExponentialFamily.entropy(inner, natural), inner.entropy(natural))
    close(inner.entropy_from(natural, inner.moments(natural)), inner.entropy(natural))
    if not name.startswith("Wishart"):  # torch has no KL of Wisharts
        close(family.kl(natural, other), torch.distributions.kl_divergence(q, p))
    close(family.entropy(natural), q.entropy())


@law
def test_message_is_the_gradient_in_the_expectation(name: str, batch: tuple) -> None:
    family, natural, _ = make(name, batch)
    moments = {key: value.detach() for key, value in family.moments(natural).items()}
    weights = {key: torch.randn_like(value) for key, value in moments.items()}

    def objective(at: dict[str, Tensor]) -> Tensor:
        return sum((weights[key] * (value + 0.1 * value**2)).sum() for key, value in at.items())

    leaf = family.to_expectation(natural).detach().requires_grad_()
    (expected,) = torch.autograd.grad(objective(family.moments(family.to_natural(leaf))), leaf)
    gradients = torch.func.grad(objective)(moments)
    close(family.message(natural, gradients), expected, 1e-7)
    parts = [family.message(natural, {key: gradient}) for key, gradient in gradients.items()]
    close(sum(parts), family.message(natural, gradients))
    close(family.message(natural, {}), torch.zeros_like(natural))


@law
def test_retract_stays_inside_and_starts_as_a_straight_line(name: str, batch: tuple) -> None:
    family, natural, _ = make(name, batch)
    for dtype in (F64, torch.float32):
        start = natural.to(dtype)
        for scale in (0.1, 1.0, 10.0, 1e3, 1e6, 1e12, 1e30):
            for _ in range(3):
                direction = scale * torch.randn_like(start)
                moved = family.retract(start, direction)
                assert family.contains(moved).all()
                straight = family.contains(start + direction)
                close(moved[straight], (start + direction)[straight])
    if not family.is_discrete:  # the curve taken where a straight line leaves the domain
        direction, time = torch.randn_like(natural), torch.tensor(1e-10, dtype=F64)
        tangent = torch.func.jacrev(lambda t: family._bend(natural, t * direction))(time)
        close(tangent, direction, 1e-6)
    close(family.retract(natural, torch.full_like(natural, torch.nan)), natural)


@law
def test_contains_rejects_bad_parameters(name: str, batch: tuple) -> None:
    family, natural, _ = make(name, batch)
    inside = family.contains(natural)
    assert inside.shape == batch and inside.dtype == torch.bool and inside.all()
    for bad in (math.nan, math.inf, -math.inf):
        for index in range(family.num_parameters):
            wrong = natural.clone()
            wrong[..., index] = bad
            assert not family.contains(wrong).any()
    boundary = {"Beta": -1.0, "Dirichlet": -1.0}.get(type(family).__name__, 0.0)
    if not family.is_discrete:
        wrong = natural.clone()
        # the last of λ, of a sparse Gaussian the last of the diagonal: it has covariances after that
        wrong[..., 2 * family.dimension - 1 if isinstance(family, SparseNormal) else -1] = boundary
        assert not family.contains(wrong).any()


@law
def test_samples_average_to_the_expectation(name: str, batch: tuple) -> None:
    family, natural, _ = make(name, batch)
    count = 4000
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        value = family.to_distribution(natural).sample((count,))
    statistics = family.sufficient_statistics(value).to(F64)
    error = (statistics.mean(0) - family.to_expectation(natural)) * math.sqrt(count)
    spread = family.fisher(natural).diagonal(dim1=-2, dim2=-1).sqrt()
    assert (error.abs() <= 5 * spread).all()


@law
def test_hot_functions_trace_batch_and_keep_float32(name: str, batch: tuple) -> None:
    family, natural, _ = make(name, batch)

    def hot(natural: Tensor) -> list[Tensor]:
        moments = family.moments(natural)
        message = family.message(natural, moments)
        return [*moments.values(), message, family.log_partition(natural), family.entropy(natural)]

    for traced, plain in zip(make_fx(hot)(natural)(natural), hot(natural), strict=True):
        close(traced, plain, 1e-14)
    stacked = torch.stack([natural, natural])
    for batched, plain in zip(torch.func.vmap(hot)(stacked), hot(natural), strict=True):
        close(batched[1], plain, 1e-13)
    assert all(result.dtype == torch.float32 for result in hot(natural.float()))
    for single, plain in zip(hot(natural.float()), hot(natural.float().double()), strict=True):
        torch.testing.assert_close(single.double(), plain, rtol=2e-4, atol=2e-4)
