"""Large broadcasts: contractions and look-ups equal their elementwise definition, accurate and small."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_blr.likelihoods import Expectation, contract, likelihood_of, select


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest result of any operation."""

    def __init__(self) -> None:
        super().__init__()
        self.storage = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self.storage = max(self.storage, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def at(distribution: Any, value: Tensor, **arguments: Any) -> Callable[[int], tuple[Tensor, list[Tensor]]]:
    """num_event_dims -> E log f at points, and its gradients in the floating arguments."""
    likelihood = likelihood_of(distribution)
    assert likelihood is not None
    floating = {name: a.detach().requires_grad_() for name, a in arguments.items() if isinstance(a, Tensor)}

    def run(num_event_dims: int) -> tuple[Tensor, list[Tensor]]:
        points: dict[str, Expectation] = likelihood.points(value, {**arguments, **floating})
        result = likelihood.expected_log_prob(points, num_event_dims)
        return result, list(torch.autograd.grad(result.square().sum(), list(floating.values())))

    return run


EVENT_SHAPES = [
    ((5, 4), (3, 1, 4), 1),
    ((200, 4), (30, 1, 4), 1),
    ((200, 4), (30, 1, 1), 1),
    ((200, 1), (30, 1, 4), 1),
    ((200, 4), (4,), 1),
    ((200, 4), (), 2),
    ((4,), (30, 1, 4), 2),
    ((50, 2, 3), (20, 1, 2, 3), 2),
    ((50, 2, 3), (20, 1, 1, 3), 2),
    ((50, 2, 1), (20, 1, 1, 3), 2),
    ((6, 50, 8), (6, 20, 1, 1, 8), 1),
    ((0, 4), (3, 1, 4), 1),
]


@pytest.mark.parametrize("left, right, num_event_dims", EVENT_SHAPES, ids=str)
def test_contract_is_the_sum_of_the_product(left: tuple[int, ...], right: tuple[int, ...], num_event_dims: int) -> None:
    a, b = torch.randn(left), torch.randn(right)
    product = a * b
    expected = product.sum(tuple(range(-min(num_event_dims, product.dim()), 0)))
    for x, y in ((a, b), (b, a)):
        torch.testing.assert_close(contract(x, y, num_event_dims), expected, rtol=1e-12, atol=1e-12)


SELECT_SHAPES = [
    ((), ()),
    ((4,), (4,)),
    ((4,), ()),
    ((), (5,)),
    ((3, 1), (7,)),
    ((7,), (3, 1)),
    ((3, 7), (7,)),
    ((2, 1, 7), (5, 7)),
    ((2, 1, 1, 7), (3, 5, 1)),
    ((7, 1, 2), (4, 1, 5, 1)),
    ((3, 1), (0,)),
    ((0,), (3, 1)),
]


@pytest.mark.parametrize("batch, index_shape", SELECT_SHAPES, ids=str)
def test_select_is_indexing(batch: tuple[int, ...], index_shape: tuple[int, ...]) -> None:
    log = torch.randn(*batch, 6, requires_grad=True)
    index = torch.randint(6, index_shape)
    shape = torch.broadcast_shapes(batch, index_shape)
    expected = log.expand(*shape, 6).gather(-1, index.expand(shape).unsqueeze(-1)).squeeze(-1)
    actual = select(log, index)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    weights = torch.randn(shape)
    gradients = [torch.autograd.grad((x * weights).sum(), log, retain_graph=True)[0] for x in (actual, expected)]
    torch.testing.assert_close(*gradients)


K, N, D, V = 20, 500, 12, 300


def probs(*shape: int) -> Tensor:
    return torch.rand(*shape) * 0.9 + 0.05


LARGE: dict[str, tuple[Callable[[], Callable[[int], tuple[Tensor, list[Tensor]]]], int, int]] = {
    # name: (log f at points, num_event_dims, the largest tensor allowed)
    "Normal": (
        lambda: at(dist.Normal, torch.randn(N, D), loc=torch.randn(K, 1, D), scale=probs(K, 1, D)),
        1,
        K * N,
    ),
    "Normal, one scale": (
        lambda: at(dist.Normal, torch.randn(N, D), loc=torch.randn(K, 1, D), scale=torch.tensor(0.5)),
        1,
        K * N,
    ),
    "Bernoulli": (lambda: at(dist.Bernoulli, torch.ones(N, D), probs=probs(K, 1, D)), 1, K * N),
    "Binomial": (
        lambda: at(dist.Binomial, torch.ones(N, D), total_count=7, logits=torch.randn(K, 1, D)),
        1,
        K * N,
    ),
    "Poisson": (lambda: at(dist.Poisson, torch.ones(N, D), rate=probs(K, 1, D)), 1, K * N),
    "Multinomial": (lambda: at(dist.Multinomial, torch.ones(N, D), probs=probs(K, 1, D)), 0, K * N),
    "Categorical": (
        lambda: at(dist.Categorical, torch.randint(V, (N,)), logits=torch.randn(K, 1, V)),
        0,
        K * N,
    ),
    "enumerated Categorical": (
        lambda: at(dist.Categorical, torch.arange(V).reshape(V, 1), probs=probs(N, V)),
        0,
        N * V,
    ),
    "MultivariateNormal": (
        lambda: at(
            dist.MultivariateNormal,
            torch.randn(N, D),
            loc=torch.randn(K, 1, D),
            precision_matrix=torch.eye(D).expand(K, 1, D, D).contiguous(),
        ),
        0,
        K * N * D,
    ),
}


@pytest.mark.parametrize("name", LARGE)
def test_no_large_broadcast(name: str) -> None:
    """Neither forward nor backward holds a tensor of data times parameters times event."""
    make, num_event_dims, limit = LARGE[name]
    run = make()
    with LargestTensor() as largest:
        run(num_event_dims)
    assert 0 < largest.storage <= limit


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-3), (torch.float64, 1e-9)])
def test_contraction_is_accurate_far_from_zero(dtype: torch.dtype, tolerance: float) -> None:
    """Means of 1000, standard deviation 0.1: in float32 expanded squares would be off by hundreds of nats."""
    rtol = 1e-4 if dtype == torch.float32 else 1e-9
    loc = (1000 + torch.randn(K, 1, D)).to(dtype)
    value = (1000 + 0.1 * torch.randn(N, D)).to(dtype)
    scale = torch.tensor(0.1, dtype=dtype)
    actual, gradients = at(dist.Normal, value, loc=loc, scale=scale)(1)
    loc64, scale64 = loc.double().requires_grad_(), scale.double().requires_grad_()
    expected = dist.Normal(loc64, scale64).log_prob(value.double()).sum(-1)
    assert actual.dtype == dtype
    # relative to the nearest component, whose log density is of the order of one, absolutely
    near = expected > -1000
    assert near.any()
    torch.testing.assert_close(actual.double()[near], expected[near], rtol=0, atol=tolerance)
    for gradient, reference in zip(
        gradients, torch.autograd.grad(expected.square().sum(), [loc64, scale64]), strict=True
    ):
        torch.testing.assert_close(gradient.double(), reference, rtol=rtol, atol=1e-6)
