"""Laws × likelihoods: E_q[log f] is log f at points, and its gradient is right and finite, at edges too."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_blr.likelihoods import (
    Constant,
    Expectation,
    Likelihood,
    Linear,
    Matrix,
    Normal,
    Positive,
    Vector,
    likelihood_of,
)

Arguments = dict[str, Any]
SHAPES: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
    ((), ()),
    ((5,), ()),
    ((4, 1), (3,)),
    ((6, 5), (2, 1, 5)),
]


def real(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape)


def positive(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape).exp()


def unit(shape: tuple[int, ...]) -> Tensor:
    return torch.rand(shape) * 0.9 + 0.05


def vector(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(*shape, 3)


def simplex(shape: tuple[int, ...]) -> Tensor:
    return torch.softmax(torch.randn(*shape, 3), -1)


def unnormalised(shape: tuple[int, ...]) -> Tensor:
    return 4 * torch.rand(*shape, 3) + 0.1


def definite(shape: tuple[int, ...]) -> Tensor:
    factor = torch.randn(*shape, 3, 4)
    return factor @ factor.mT + 0.1 * torch.eye(3)


def tril(shape: tuple[int, ...]) -> Tensor:
    return torch.linalg.cholesky(definite(shape))


def degrees(shape: tuple[int, ...]) -> Tensor:
    return 3 + positive(shape)


def count(shape: tuple[int, ...]) -> Tensor:
    return torch.randint(8, shape).double()


def bit(shape: tuple[int, ...]) -> Tensor:
    return torch.randint(2, shape).double()


def index(shape: tuple[int, ...]) -> Tensor:
    return torch.randint(3, shape)


def one_hot(shape: tuple[int, ...]) -> Tensor:
    return torch.nn.functional.one_hot(index(shape), 3).double()


def total(shape: tuple[int, ...]) -> Tensor:
    return 7 + count(shape)


def below(shape: tuple[int, ...]) -> Tensor:
    return -positive(shape)


def above(shape: tuple[int, ...]) -> Tensor:
    return 1 + positive(shape)


def counts(shape: tuple[int, ...]) -> Tensor:
    return dist.Multinomial(7, torch.ones(*shape, 3)).sample()


@dataclass(frozen=True)
class Row:
    """A parametrisation of a distribution, and how to draw its value and arguments."""

    distribution: Any
    value: Callable[[tuple[int, ...]], Tensor]
    arguments: dict[str, Callable[[tuple[int, ...]], Tensor]]

    @property
    def likelihood(self) -> Likelihood:
        likelihood = likelihood_of(self.distribution)
        assert likelihood is not None
        return likelihood

    def __str__(self) -> str:
        return f"{self.distribution.__name__}({', '.join(self.arguments)})"


ROWS = [
    Row(dist.Normal, real, {"loc": real, "scale": positive}),
    Row(dist.MultivariateNormal, vector, {"loc": vector, "covariance_matrix": definite}),
    Row(dist.MultivariateNormal, vector, {"loc": vector, "precision_matrix": definite}),
    Row(dist.MultivariateNormal, vector, {"loc": vector, "scale_tril": tril}),
    Row(dist.LogNormal, positive, {"loc": real, "scale": positive}),
    Row(dist.Gamma, positive, {"concentration": positive, "rate": positive}),
    Row(dist.Chi2, positive, {"df": positive}),
    Row(dist.InverseGamma, positive, {"concentration": positive, "rate": positive}),
    Row(dist.Exponential, positive, {"rate": positive}),
    Row(dist.Poisson, count, {"rate": positive}),
    Row(dist.Bernoulli, bit, {"probs": unit}),
    Row(dist.Bernoulli, bit, {"logits": real}),
    Row(dist.Binomial, count, {"total_count": total, "probs": unit}),
    Row(dist.Binomial, count, {"total_count": total, "logits": real}),
    Row(dist.Geometric, count, {"probs": unit}),
    Row(dist.Geometric, count, {"logits": real}),
    Row(dist.NegativeBinomial, count, {"total_count": positive, "probs": unit}),
    Row(dist.NegativeBinomial, count, {"total_count": positive, "logits": real}),
    Row(dist.Categorical, index, {"probs": simplex}),
    Row(dist.Categorical, index, {"probs": unnormalised}),
    Row(dist.Categorical, index, {"logits": vector}),
    Row(dist.OneHotCategorical, one_hot, {"probs": unnormalised}),
    Row(dist.OneHotCategorical, one_hot, {"logits": vector}),
    Row(dist.Multinomial, counts, {"probs": unnormalised}),
    Row(dist.Multinomial, counts, {"logits": vector}),
    Row(dist.Beta, unit, {"concentration1": positive, "concentration0": positive}),
    Row(dist.Uniform, unit, {"low": below, "high": above}),
    Row(dist.Dirichlet, simplex, {"concentration": unnormalised}),
    Row(dist.Wishart, definite, {"df": degrees, "covariance_matrix": definite}),
    Row(dist.Wishart, definite, {"df": degrees, "precision_matrix": definite}),
    Row(dist.Wishart, definite, {"df": degrees, "scale_tril": tril}),
]
rows = pytest.mark.parametrize("row", ROWS, ids=str)
shapes = pytest.mark.parametrize("value_shape, shape", SHAPES, ids=str)


def make(row: Row, arguments: Arguments) -> Any:
    extra = {"total_count": 7} if row.distribution is dist.Multinomial else {}
    return row.distribution(**arguments, **extra, validate_args=False)


def draw(row: Row, value_shape: tuple[int, ...], shape: tuple[int, ...]) -> tuple[Tensor, Arguments]:
    return row.value(value_shape), {name: argument(shape) for name, argument in row.arguments.items()}


def at(row: Row, value: Tensor, arguments: Arguments) -> dict[str, Expectation]:
    canonical = row.likelihood.canonical(value, arguments)
    return {name: row.likelihood.roles[name].of(argument) for name, argument in canonical.items()}


@rows
@shapes
def test_is_log_prob_at_points(row: Row, value_shape: tuple[int, ...], shape: tuple[int, ...]) -> None:
    value, arguments = draw(row, value_shape, shape)
    expected = make(row, arguments).log_prob(value)
    for points in (at(row, value, arguments), row.likelihood.points(value, arguments)):
        assert points.keys() == row.likelihood.roles.keys()
        actual = row.likelihood.expected_log_prob(points, 0)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@rows
def test_numbers_are_arguments(row: Row) -> None:
    value, arguments = draw(row, (2,), ())
    numbers = {name: a.item() if a.dim() == 0 else a for name, a in arguments.items()}
    torch.testing.assert_close(
        row.likelihood.expected_log_prob(row.likelihood.points(value, numbers)),
        make(row, arguments).log_prob(value),
        rtol=1e-12,
        atol=1e-12,
    )


@rows
@pytest.mark.parametrize("num_event_dims", [0, 1, 2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    "value_shape, shape",
    [((40, 6), (20, 1, 6)), ((40, 2, 6), (20, 1, 1, 6)), ((40, 6, 7), (20, 1, 1, 1)), ((3, 6), (3, 1))],
)
def test_event_sum(
    row: Row, num_event_dims: int, weighted: bool, value_shape: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    value, arguments = draw(row, value_shape, shape)
    elementwise = make(row, arguments).log_prob(value)
    weights = torch.rand(elementwise.shape[-2:]) if weighted else None
    weighted_sum = elementwise if weights is None else elementwise * weights
    expected = weighted_sum.sum(tuple(range(-num_event_dims, 0))) if num_event_dims else weighted_sum
    actual = row.likelihood.expected_log_prob(row.likelihood.points(value, arguments), num_event_dims, weights)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@rows
def test_empty_plate_is_zero(row: Row) -> None:
    if row.distribution is dist.Multinomial:
        value, arguments = one_hot((0, 4)), {"probs": simplex((3, 1, 4))}
    else:
        value, arguments = draw(row, (0, 4), (3, 1, 4))
    for num_event_dims, shape in enumerate([(3, 0, 4), (3, 0), (3,)]):
        actual = row.likelihood.expected_log_prob(at(row, value, arguments), num_event_dims)
        torch.testing.assert_close(actual, torch.zeros(shape))


def random_arguments(row: Row, value_shape: tuple[int, ...], shape: tuple[int, ...]) -> dict[str, Expectation]:
    """Expectations as under a q with some spread, fields that require gradients except in constants."""
    arguments = at(row, *draw(row, value_shape, shape))
    for name, argument in arguments.items():
        if isinstance(argument, Linear):
            arguments[name] = Linear(argument.mean, argument.mean.square() + 0.1)
        elif isinstance(argument, Vector):
            arguments[name] = Vector(argument.mean, definite(argument.mean.shape[:-1]))
        elif isinstance(argument, Positive):
            arguments[name] = Positive(argument.mean, argument.log - 0.2)
        elif isinstance(argument, Matrix):
            arguments[name] = Matrix(argument.mean, argument.logdet - 0.2)
    return arguments


def leaves(arguments: dict[str, Expectation]) -> list[tuple[str, str, Tensor]]:
    return [
        (name, field.name, getattr(argument, field.name).detach())
        for name, argument in arguments.items()
        if not isinstance(argument, Constant)
        for field in fields(argument)
        if getattr(argument, field.name) is not None
    ]


def as_function(
    row: Row, arguments: dict[str, Expectation], num_event_dims: int
) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """E_q[log f] as a function of the fields of its expectations."""
    names = leaves(arguments)

    def function(*tensors: Tensor) -> Tensor:
        changed = dict(arguments)
        for (name, field, _), tensor in zip(names, tensors, strict=True):
            changed[name] = replace(changed[name], **{field: tensor})
        return row.likelihood.expected_log_prob(changed, num_event_dims)

    return function, [tensor for *_, tensor in names]


@rows
@pytest.mark.parametrize("value_shape, shape, num_event_dims", [((3, 2), (2, 1, 2), 0), ((20, 2), (20, 1, 2), 1)])
def test_gradients(row: Row, value_shape: tuple[int, ...], shape: tuple[int, ...], num_event_dims: int) -> None:
    function, tensors = as_function(row, random_arguments(row, value_shape, shape), num_event_dims)
    assert torch.autograd.gradcheck(function, [tensor.requires_grad_() for tensor in tensors], fast_mode=True)


EDGES = [
    (dist.Poisson, [0.0, 0.0, 2.0], {"rate": [0.0, 1.0, 1e-300]}),
    (dist.Bernoulli, [0.0, 1.0, 1.0], {"probs": [0.0, 1.0, 1e-300]}),
    (dist.Bernoulli, [0.0, 1.0, 1.0], {"logits": [-800.0, 800.0, 40.0]}),
    (dist.Binomial, [0.0, 9.0, 9.0], {"total_count": [9.0, 9.0, 9.0], "probs": [0.0, 1.0, 0.5]}),
    (dist.Binomial, [0.0, 9.0, 0.0], {"total_count": [9.0, 9.0, 0.0], "logits": [-800.0, 800.0, 1.0]}),
    (dist.Geometric, [0.0, 0.0], {"probs": [1.0, 0.5]}),
    (dist.NegativeBinomial, [0.0, 0.0], {"total_count": [0.0, 3.0], "probs": [0.3, 0.0]}),
    (dist.Exponential, [0.0], {"rate": [2.0]}),
    (dist.Gamma, [0.0], {"concentration": [1.0], "rate": [2.0]}),
    (dist.Beta, [0.0, 1.0], {"concentration1": [1.0, 3.0], "concentration0": [3.0, 1.0]}),
    (dist.Dirichlet, [[0.0, 1.0]], {"concentration": [[1.0, 3.0]]}),
    (dist.Categorical, [1, 0], {"probs": [[0.0, 1.0], [2.0, 0.0]]}),
    (dist.Categorical, [1, 0], {"logits": [[-2000.0, 1000.0], [-1000.0, 0.0]]}),
    (dist.OneHotCategorical, [[0.0, 1.0]], {"probs": [[0.0, 3.0]]}),
    (dist.Multinomial, [[0.0, 7.0], [0.0, 7.0]], {"probs": [[0.0, 1.0], [3.0, 1.0]]}),
    (dist.Multinomial, [[0.0, 7.0]], {"logits": [[-math.inf, 1.0]]}),
]


@pytest.mark.parametrize("distribution, value, arguments", EDGES, ids=lambda a: getattr(a, "__name__", None))
def test_edges_of_the_support(distribution: Any, value: Any, arguments: dict[str, Any]) -> None:
    row = Row(distribution, real, {})
    value, arguments = torch.tensor(value), {name: torch.tensor(a) for name, a in arguments.items()}
    expected = make(row, arguments).log_prob(value)
    points = row.likelihood.points(value, arguments)
    torch.testing.assert_close(row.likelihood.expected_log_prob(points), expected, rtol=1e-12, atol=1e-12)
    function, tensors = as_function(row, points, 1)
    gradients = torch.autograd.functional.jacobian(function, tuple(tensors))
    assert all(gradient.isfinite().all() for gradient in gradients)
    if all(a.isfinite().all() for a in row.likelihood.canonical(value, arguments).values()):
        assert row.likelihood.expected_log_prob(at(row, value, arguments)).isfinite().all()


@rows
def test_traces_and_batches(row: Row) -> None:
    """The program does not depend on numbers: it can be captured, and mapped over a batch of parameters."""
    function, tensors = as_function(row, random_arguments(row, (7, 2), (3, 1, 2)), 1)
    traced = make_fx(function)(*tensors)
    others = [tensor + 0.1 for tensor in tensors]
    torch.testing.assert_close(traced(*others), function(*others))
    batched = torch.func.vmap(function)(*(torch.stack(pair) for pair in zip(tensors, others, strict=True)))
    torch.testing.assert_close(batched, torch.stack([function(*tensors), function(*others)]))


@rows
def test_counts_may_be_integers(row: Row) -> None:
    value, arguments = draw(row, (4, 2), (2,))
    if row.value not in (count, bit, one_hot, counts):
        return
    points = row.likelihood.points(value.long(), arguments)
    torch.testing.assert_close(
        row.likelihood.expected_log_prob(points, 1), make(row, arguments).log_prob(value).sum(-1)
    )


@rows
def test_names_agree(row: Row) -> None:
    """Roles, canonical arguments and the parameters of the template are the same; requirements are said."""
    roles = row.likelihood.roles
    assert list(inspect.signature(row.likelihood.terms).parameters) == list(roles)
    assert list(row.likelihood.canonical(*draw(row, (), ()))) == list(roles)
    assert all(role.requirement for role in roles.values())


def test_subclasses() -> None:
    """A subclass with another density or constructor has no template; torch's classes have Pyro's."""

    class Plain(dist.Normal):
        pass

    class Shifted(dist.Normal):
        def log_prob(self, value: Tensor) -> Tensor:
            return super().log_prob(value - 1)

    class Standard(dist.Normal):
        def __init__(self) -> None:
            super().__init__(0.0, 1.0)

    assert isinstance(likelihood_of(Plain), Normal)
    assert isinstance(likelihood_of(torch.distributions.Normal), Normal)
    for other in (Shifted, Standard, dist.ExtendedBinomial, dist.HalfNormal, dist.Cauchy, dist.Delta):
        assert likelihood_of(other) is None
