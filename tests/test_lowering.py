"""Functions as flat lists of operations: the same values as the function, for any arguments, at every call."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import oracle_case
from torch import Tensor

from pyro_blr import BLRInference
from pyro_blr.lowering import flattened, lowered
from pyro_blr.unrolling import unrolled

WEIGHTS = torch.arange(1.0, 10.0, dtype=torch.float64)


def gradient(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """What only the derivative needs of its value is dropped, and the derivative's own start is a constant."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        value = (WEIGHTS * leaf.square() * y.exp()).sum() + (leaf.float() * 2).sum() + (leaf**1.0).sum()
        return value.detach(), *torch.autograd.grad(value, leaf)


def pieces(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """Lookups of entries in order, in another order, all of them, and sums back into their places."""
    some, back, every = torch.arange(2, 6), torch.tensor([5, 2, 2]), torch.arange(9)
    zeros = torch.zeros_like(x)
    return (
        x.index_select(0, some) + 1,
        x.index_select(0, back),
        x.index_select(0, every) * y,
        zeros.index_add(0, some, y[:4]),
        zeros.index_add(0, every, y),
        torch.ones_like(y).index_add(0, every, y),
        x[0:9:2],
        torch.cat([y]),
    )


def forms(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    matrix = torch.outer(x, x) + 20 * torch.eye(9, dtype=x.dtype)
    factor, info = torch.linalg.cholesky_ex(matrix)
    solved = torch.cholesky_solve(y.unsqueeze(-1), factor).squeeze(-1)
    wide = x.new_zeros(3, 9) + y.expand(3, 9) * torch.full_like(y, 2.0)
    one = x[0].float()
    ends = torch.stack([x[0], x[0] / 0, -y[1] / 0, y[1] * float("nan")])
    return (
        solved,
        info == 0,
        wide.float().sum(0, dtype=torch.float64),
        x.digamma() * 1 + 0,
        y.isfinite().all(),
        ends.isfinite(),
        (one + 1).sum(dtype=torch.float64),
        one.sum().double(),
        (one > 0).all(),
        torch.tensor(True) & (one > 0.5).any(),
    )


def shorter(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """Lookups and additions by indexing, expansions before products, matrices times one column, sums with what is negative."""
    order, back, matrix = torch.arange(3, 6), torch.tensor([5, 2, 2]), torch.outer(y, y)
    added = (back,), y[:3] * 2, True
    return (
        *(x[order], x[back], matrix[back], matrix.reshape(-1)[back], x[torch.tensor([-1, 2])]),
        *(
            x.index_put(*added),
            torch.zeros_like(x).index_put(*added),
            torch.zeros_like(x).index_put((order,), y[:3], True),
        ),
        *(matrix.index_put((back,), matrix[1:4], True), x.index_put((back,), y[0], True)),
        *(
            x[0].expand(9, 9) * matrix,
            matrix / y[:1].expand(9, 9),
            matrix - y.expand(9, 9),
            y.float().expand(9, 9) * matrix,
        ),
        *((matrix @ x.unsqueeze(-1)).squeeze(-1), (matrix[:1] @ x.unsqueeze(-1)).squeeze(0)),
        *(x + -y, -x + y, matrix + -y, x[0] + -y[0]),
    )


def numbers(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """A few numbers, in and out of vectors: arithmetic, comparisons, what goes where, sums, zeros that are filled in."""
    a, b, pair = x[0], y[1] - 0.5, x[2:4]
    table = torch.stack([pair * b, torch.cat([a.unsqueeze(0), (b - pair).sum(0, keepdim=True)])])
    inside = (a > 0) & (b < 2).logical_and(pair.eq(pair).all()) & (table >= -100).all(-1).any()
    (slope,) = torch.ops.aten.select_backward.default(a * 3, [3], 0, 1).unsqueeze(0)
    return (
        ((1 - a) / (a + 2)).neg().abs() ** 2 + a.reciprocal() * a.sqrt() * a.rsqrt() - a**-0.5,
        a.log() + (a + 1).lgamma() + a.log1p() + b.exp() + a.digamma() * 2,
        torch.where(inside, table.T @ torch.ones(2, dtype=x.dtype), 0.5),
        table.diagonal() + table.transpose(0, 1)[1, :1],
        slope + table.sum(0).sum() + x[:3] * a,
        b + x,
        inside,
        torch.stack([a, b]).expand(3, 2).contiguous(),
    )


def ends_of_numbers(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """Where torch gives an infinity or a NaN and Python's numbers raise."""
    a, b = (x[0] * 0).clone(), y[0] - 2
    one = (a + 1) / a
    return (
        one,
        (1 / one + b).log(),
        b.sqrt() + 1,
        a.reciprocal() * 2 - one,
        (b * -1e4).exp() * 3,
        torch.stack([a.log(), b]),
    )


@pytest.mark.parametrize("function", [gradient, pieces, forms, shorter, numbers, ends_of_numbers])
def test_replay_is_the_function(function: Callable) -> None:
    generator = torch.Generator().manual_seed(0)
    example, *others = (torch.rand(2, 9, generator=generator, dtype=torch.float64) for _ in range(4))
    flat = lowered(function, list(example))
    for arguments in (*others, example):
        for found, expected in zip(flat(*arguments), function(*arguments), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-14, atol=0, equal_nan=True)
            assert not found.is_inference()


def test_numbers_need_no_tensors() -> None:
    """What is left to torch of arithmetic on two numbers: what makes the tensor at the end."""

    def gamma(natural: Tensor) -> tuple[Tensor]:
        shape, rate = natural[0] + 1, -natural[1]
        return (torch.stack([shape + 4, -(rate + shape / rate * 2 + shape.log())]),)

    flat = lowered(gamma, [torch.tensor([1.0, -3.0], dtype=torch.float64)])
    for example in ([2.0, -0.5], [7.0, -4.0]):
        natural = torch.tensor(example, dtype=torch.float64)
        torch.testing.assert_close(flat(natural), gamma(natural), rtol=1e-15, atol=0)
    module = flattened(gamma, [natural])
    numbers = unrolled(module)
    assert numbers is not None
    called = [node.target for node in numbers.graph.nodes if node.op == "call_function"]
    assert [target for target in called if target not in PYTHON] == [torch.tensor]


PYTHON = {operator.add, operator.sub, operator.neg, operator.mul, operator.truediv, operator.getitem, math.log}


def test_numbers_of_single_precision() -> None:
    """They are numbers of double precision between the tensors, so no less exact; what comes out is what it was."""

    def function(x: Tensor) -> tuple[Tensor, ...]:
        third = x[0] / 3 + x[1]
        return third, (third.double() - 1) * 2, torch.stack([third * 2, x[1]])

    flat = lowered(function, [torch.tensor([1.0, 2.0])])
    found = flat(torch.tensor([5.0, 0.25]))
    expected = [torch.tensor(5 / 3 + 0.25), torch.tensor((5 / 3 - 0.75) * 2, dtype=torch.float64)]
    expected += [torch.tensor([10 / 3 + 0.5, 0.25])]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=0)


def test_one_number_alone_stays_a_tensor() -> None:
    """In and out costs more than one operation."""
    assert unrolled(flattened(lambda x: (x.cumsum(0)[0] * 2,), [torch.ones(3, 3)])) is None


def test_a_result_is_its_own() -> None:
    """Neither the argument's memory nor a constant's: what a caller writes into it reaches no later call."""
    flat = lowered(lambda x: (x, torch.zeros_like(x)), [torch.ones(3)])
    start = torch.ones(3)
    for found in flat(start):
        found.add_(5)
    assert start.tolist() == [1, 1, 1]
    assert [found.tolist() for found in flat(start)] == [[1, 1, 1], [0, 0, 0]]


def test_writes_are_refused() -> None:
    """A constant that is written into would be another one at the next call."""

    def counting(x: Tensor) -> tuple[Tensor]:
        return (torch.zeros(3).add_(x),)

    with pytest.raises(NotImplementedError, match="writes into its operand"):
        lowered(counting, [torch.ones(3)])


def schools(effects: Tensor, errors: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
    precision = pyro.sample("precision", dist.Gamma(2.0, 20.0))
    with pyro.plate("schools", len(effects)):
        school = pyro.sample("school", dist.Normal(mean, precision.rsqrt()))
        pyro.sample("effect", dist.Normal(school, errors), obs=effects)


EFFECTS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
CASES = [*(("schools", blocks) for blocks in ("auto", "sites", "elements"))]
CASES += [("normal_mean_precision", "auto"), ("linear_regression", "auto"), ("ard_regression", "sites")]


@pytest.mark.parametrize(("name", "blocks"), CASES)
def test_sweeps_are_replayed_as_they_are(name: str, blocks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The flat sweep against the sweep that it was traced from: λ and the bound, from starts that it was not traced at."""
    monkeypatch.setattr("pyro_blr.program.Sweeps.MANY", 3)
    model, data = oracle_case(name)[:2] if name != "schools" else (schools, (EFFECTS, EFFECTS.abs() + 9))
    engine = BLRInference(model, blocks=blocks)
    for _ in range(2):
        engine.step(*data)
    program = engine._program(data, {})
    for _ in range(4):
        flat, plain = engine._ascent(program), engine._ascent(program)
        assert flat._replayed_sweep()
        program.sweeps.suited = False
        plain.sweep()
        program.sweeps.suited = True
        coarse = any(block.dtype == torch.float32 for block in program.blocks.values())
        relative = 1e-5 if coarse else 1e-10
        for block, natural in plain.beliefs.naturals.items():
            size = float(natural.abs().max())
            torch.testing.assert_close(flat.beliefs.naturals[block], natural, rtol=relative, atol=relative * size)
        assert flat.bound_before() == pytest.approx(plain.bound_before(), rel=relative)
        engine._commit(flat)
