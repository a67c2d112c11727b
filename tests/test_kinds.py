"""The structural judge: every claim is checked by a numerical one that knows nothing of operations."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyro.ops.indexing import Vindex
from torch import Tensor
from torch.nn import functional

from pyro_blr.expressions import Recording
from pyro_blr.kinds import Form, Kind, Sort, kind_of
from pyro_blr.recorded import Recorded
from pyro_blr.tape import Ref, Tape

REAL, POSITIVE, PROBABILITY, SIMPLEX, MATRIX = Sort

SHAPES = {REAL: (4,), POSITIVE: (4,), PROBABILITY: (4,), SIMPLEX: (3, 4), MATRIX: (2, 3, 3)}


def draw(sort: Sort, shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + seed)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    if sort is MATRIX:
        return noise @ noise.mT + 0.5 * torch.eye(shape[-1], dtype=torch.float64)
    maps = {
        REAL: lambda x: x,
        POSITIVE: torch.exp,
        PROBABILITY: torch.sigmoid,
        SIMPLEX: lambda x: x.softmax(-1),
    }
    return maps[sort](noise)


def judge(function: Callable, sort: Sort, shape: tuple[int, ...] | None = None) -> tuple[Kind, Tape]:
    recording = Recording()
    with recording:
        result = function(recording.latent("z", draw(sort, SHAPES[sort] if shape is None else shape, 0)))
    return kind_of(recording.tape, recording.reference(result), "z", sort), recording.tape


# -- the numerical check -------------------------------------------------------------------------


class Draws(NamedTuple):
    """Values z (draw, *shape) of the site, and what the expression is at each."""

    sites: Tensor
    values: Tensor


def holds(kind: Kind, sort: Sort, function: Callable[[Tensor], Tensor], shape: tuple[int, ...] | None = None) -> bool:
    """Whether the claim is true at random points; where the expression is not finite it says nothing."""
    shape = SHAPES[sort] if shape is None else shape
    sites = torch.stack([draw(sort, shape, seed) for seed in range(5)])
    if kind.form is Form.OTHER:
        return True
    try:
        values = torch.stack([torch.as_tensor(function(site.clone())) for site in sites])
    except torch.linalg.LinAlgError:
        return True
    draws = Draws(sites, values)
    if not values.isfinite().all():
        return True
    if kind.form is Form.CONSTANT:
        number = values[:1] if kind.coefficient is None else torch.tensor(kind.coefficient, dtype=values.dtype)
        return close(values, number.expand_as(values))
    if kind.form is Form.AFFINE:
        return is_affine(draws, function)
    if kind.form in (Form.MATRIX, Form.CHOLESKY):
        return is_matrix(draws, kind, function)
    return is_elementwise(draws, kind, sort)


def close(a: Tensor, b: Tensor) -> bool:
    scale = max(float(a.abs().max()), float(b.abs().max())) if a.numel() else 1.0
    return bool(((a - b).abs() <= 1e-8 * scale + 1e-12).all())


def is_affine(draws: Draws, function: Callable) -> bool:
    x, y = draws.sites[0], draws.sites[1]
    fx, fy = draws.values[0], draws.values[1]
    return all(close(function(t * x + (1 - t) * y), t * fx + (1 - t) * fy) for t in (0.25, 0.6))


def statistic(draws: Draws, kind: Kind) -> tuple[Tensor, Tensor]:
    """(what the elements must be proportional to, the elements), LOG as its exponential."""
    sites = draws.sites.reshape(len(draws.sites), -1)
    values = draws.values
    if kind.form is Form.COMPLEMENT:
        return sites, 1 - values
    if kind.form is Form.SELECTION:
        return sites, values
    return sites**kind.power, values.exp() if kind.form is Form.LOG else values


def is_elementwise(draws: Draws, kind: Kind, sort: Sort) -> bool:
    """Every element is c times one element of the statistic, or a constant if PARTIAL: which, is the same at all draws."""
    sites, values = statistic(draws, kind)
    flat = values.reshape(len(values), -1, 1)
    ratio = flat / sites[:, None, :]
    expected = ratio[:1]
    if kind.form in (Form.SELECTION, Form.COMPLEMENT):
        expected = torch.ones_like(expected)
    elif kind.coefficient is not None:
        expected = torch.full_like(expected, kind.coefficient)
    tolerance = 1e-7 * expected.abs() + 1e-12
    fits = ((ratio - expected).abs() <= tolerance).all(0).reshape(*values.shape[1:], -1)
    if kind.form is Form.PARTIAL:
        fits |= ((flat - flat[:1]).abs() <= 1e-8 * flat[:1].abs()).all(0).reshape(*values.shape[1:], 1)
    if not fits.any(-1).all():
        return False
    if kind.is_diagonal and not close(values.diagonal(dim1=-2, dim2=-1).diag_embed(), values):
        return False
    if kind.shared_dims:
        dims = tuple(range(fits.dim() - 1 - kind.shared_dims, fits.dim() - 1))
        together = fits
        for dim in dims:
            together = together.all(dim, keepdim=True)
        if not together.any(-1).all():
            return False
    if sort is SIMPLEX and kind.form is not Form.LOG:
        size = draws.sites.shape[-1]
        rows = fits.reshape(*fits.shape[:-1], -1, size)
        if values.shape[-1] != size:
            return False
        return bool(rows.diagonal(dim1=-3, dim2=-1).all(-1).any(-1).all())
    return True


def is_matrix(draws: Draws, kind: Kind, function: Callable) -> bool:
    """X (or X Xᵀ of a factor X) is symmetric, X^power linear in a W, and log |X| - power log |W| constant."""

    def matrix(z: Tensor) -> Tensor:
        value = function(z)
        if kind.form is Form.CHOLESKY:
            assert close(value, value.tril())
            value = value @ value.mT
        return value

    def power(z: Tensor) -> Tensor:
        return matrix(z) if kind.power == 1 else matrix(z).inverse()

    value = matrix(draws.sites[0])
    x, y = draws.sites[0], draws.sites[1]
    linear = close(power(x + 2 * y), power(x) + 2 * power(y))
    logdets = torch.stack([matrix(z).det().abs().log().reshape(-1, 1) for z in draws.sites])
    known = kind.power * draws.sites.det().log().reshape(len(draws.sites), 1, -1)
    difference = logdets - known
    follows = ((difference - difference[:1]).abs() < 1e-7).all(0).any(-1).all()
    return close(value, value.mT) and linear and bool(follows)


# -- the table -----------------------------------------------------------------------------------

_random = torch.Generator().manual_seed(7)
X = torch.randn(5, 4, generator=_random, dtype=torch.float64)
V = torch.randn(4, generator=_random, dtype=torch.float64)
A = torch.randn(3, 3, generator=_random, dtype=torch.float64)
PD = A @ A.mT + torch.eye(3, dtype=torch.float64)
L = torch.linalg.cholesky(PD)
EYE3 = torch.eye(3, dtype=torch.float64)
ONES = torch.ones(4, dtype=torch.float64)
MASK = torch.tensor([True, False, True, True])
G = torch.tensor([0, 1, 1, 3, 2])
H = torch.tensor([1, 1, 0, 3, 3])
ROWS = torch.tensor([0, 2, 2, 1])


def written(z: Tensor, base: Tensor, *writes: tuple[Any, Any]) -> Tensor:
    base = base.clone()
    for index, part in writes:
        base[index] = z[part]
    return base


def in_place(z: Tensor, function: Callable) -> Tensor:
    copy = z.clone()
    function(copy)
    return copy


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


def gram(x: Tensor) -> Tensor:
    return x @ x.mT


def both_factors(w: Tensor) -> Tensor:
    inverse = torch.linalg.cholesky(w).inverse()
    return inverse.mT @ inverse


ANY = "real positive probability simplex matrix"

# sorts | expected form (and power) | expression
SELECTIONS: list[tuple[str, Callable]] = [
    ("real positive probability simplex", lambda z: z),
    ("real positive", lambda z: z[G]),
    ("real positive", lambda z: z[2]),
    ("real positive", lambda z: z[1:3]),
    ("real positive", lambda z: z[None, :, None]),
    ("real positive", lambda z: z[MASK]),
    ("real positive", lambda z: z[[0, 3, 3]]),
    ("real positive", lambda z: z[..., torch.tensor([[0, 1], [2, 3]])]),
    ("real positive", lambda z: Vindex(z)[..., G]),
    ("real positive", lambda z: z.index_select(0, G)),
    ("real positive", lambda z: z.gather(0, G)),
    ("real positive", lambda z: torch.take_along_dim(z, G, 0)),
    ("real positive", lambda z: functional.embedding(G, z[:, None])),
    ("real positive", lambda z: z.expand(5, 4)),
    ("real positive", lambda z: z.expand_as(X)),
    ("real positive", lambda z: torch.broadcast_to(z, (5, 4))),
    ("real positive", lambda z: torch.broadcast_tensors(z, X)[0]),
    ("real positive", lambda z: z.reshape(2, 2).mT),
    ("real positive", lambda z: z.view(2, 2).permute(1, 0).flatten()),
    ("real positive", lambda z: z.unflatten(0, (2, 2)).transpose(0, 1).movedim(0, 1)),
    ("real positive", lambda z: z.flip(0).roll(1, 0)),
    ("real positive", lambda z: z.unsqueeze(-1).squeeze(-1)),
    ("real positive", lambda z: torch.stack([z[0], z[3]])),
    ("real positive", lambda z: torch.cat([z, z[G]])),
    ("real positive", lambda z: torch.hstack([z, z])),
    ("real positive", lambda z: torch.stack(z.unbind())),
    ("real positive", lambda z: z.split(2)[1]),
    ("real positive", lambda z: z.chunk(2)[0]),
    ("real positive", lambda z: torch.stack(list(z))),
    ("real positive", lambda z: torch.tensor([z[0], z[1]])),
    ("real positive", lambda z: z.clone().detach().to(torch.float64).double()),
    ("real positive", lambda z: torch.where(MASK, z, z[0])),
    ("real positive", lambda z: z.repeat(3, 1).diagonal()),
    ("real positive", lambda z: 2 * z / 2),
    ("real positive", lambda z: z * torch.ones_like(z)),
    ("real positive", lambda z: z.neg().neg() + 0),
    ("real positive", lambda z: sum([z])),
    ("real positive", lambda z: 1 - (1 - z)),
    ("real positive", lambda z: written(z, zeros(4), (slice(None), slice(None)))),
    ("positive", lambda z: z.sqrt() ** 2),
    ("positive", lambda z: z.rsqrt() ** -2),
    ("positive", lambda z: (1 / z.sqrt()).reciprocal().square()),
    ("positive", lambda z: z.log().exp()),
    ("real positive", lambda z: z.reciprocal().reciprocal()),
    ("simplex", lambda z: z[0]),
    ("simplex", lambda z: z[ROWS]),
    ("simplex", lambda z: z[torch.tensor([True, False, True])]),
    ("simplex", lambda z: Vindex(z)[ROWS, :]),
    ("simplex", lambda z: z.unsqueeze(-2).expand(3, 5, 4).transpose(0, 1)),
    ("simplex", lambda z: z / z.sum(-1, keepdim=True)),
    ("simplex", lambda z: z.log().softmax(-1)),
    ("simplex", lambda z: (z.log() - z.log().logsumexp(-1, keepdim=True)).exp()),
    ("simplex", lambda z: torch.stack([z[2], z[0]])),
    ("simplex", lambda z: torch.cat([z, z])),
    ("simplex", lambda z: functional.embedding(ROWS, z)),
    ("simplex", lambda z: torch.where(torch.tensor([[True], [False], [True]]), z, z[0])),
    ("simplex", lambda z: z.reshape(1, 3, 4).flatten(0, 1)),
    ("simplex", lambda z: 3 * z / (3 * z).sum(-1, keepdim=True)),
]

COMPLEMENTS: list[tuple[str, Callable]] = [
    ("probability", lambda z: 1 - z),
    ("probability", lambda z: ONES - z),
    ("probability", lambda z: torch.ones_like(z) - z[...]),
    ("probability", lambda z: (1 - z)[G]),
    ("probability", lambda z: -z + 1),
    ("probability", lambda z: torch.sub(1.0, z).clone()),
    ("probability", lambda z: torch.rsub(z, 1)),
    ("probability", lambda z: (1 - z[G]).expand(2, 5)),
    ("probability", lambda z: torch.stack([1 - z, 1 - z])),
]

MONOMIALS: list[tuple[str, float, Callable]] = [
    ("real positive", 1, lambda z: 2 * z),
    ("real positive", 1, lambda z: z * V),
    ("real positive", 1, lambda z: X * z[None]),
    ("real positive", 1, lambda z: z / V),
    ("real positive", 1, lambda z: -z),
    ("real positive", 1, lambda z: z + 2 * z),
    ("real positive", 1, lambda z: torch.diag_embed(z)),
    ("real positive", 1, lambda z: z.diag()),
    ("real positive", 1, lambda z: torch.outer(V, z)),
    ("real positive", 1, lambda z: torch.einsum("i,ji->ij", z, X)),
    ("real positive", 1, lambda z: (z[0] * X).sum()),
    ("real positive", 1, lambda z: X @ z[0].expand(4)),
    ("real positive", 1, lambda z: z[:, None, None] * X),
    ("real positive", 1, lambda z: (z[:, None] * V).sum(-1)),
    ("real positive", 1, lambda z: torch.where(MASK, z, 2 * z)),
    ("real positive", 1, lambda z: z.masked_fill(MASK, 0.0)),
    ("real positive", 1, lambda z: written(z, zeros(6), (slice(1, 5), slice(None)))),
    ("real positive", 1, lambda z: in_place(z, lambda x: x.mul_(3))),
    ("real positive", 2, lambda z: z * z),
    ("real positive", 2, lambda z: z[G] * (3 * z[G])),
    ("real positive", 2, lambda z: z.square()),
    ("real positive", 3, lambda z: z**3),
    ("real positive", -1, lambda z: 1 / z),
    ("real positive", -2, lambda z: z / z**3),
    ("real positive", 1, lambda z: z[0] * EYE3),
    ("real positive", 1, lambda z: (z[0] * EYE3) @ PD),
    ("real positive", -1, lambda z: torch.linalg.inv(z[0] * PD)),
    ("positive", -0.5, lambda z: z.rsqrt()),
    ("positive", -0.5, lambda z: 1 / z.sqrt()),
    ("positive", -0.5, lambda z: (2 * z) ** -0.5),
    ("positive", 1, lambda z: (1 / (2 * z).sqrt()) ** -2),
    ("positive", -0.5, lambda z: (-0.5 * z.log()).exp()),
    ("positive", 1.5, lambda z: (z.log() + 0.5 * z.log() - 2).exp()),
    ("positive", -1, lambda z: (V - z.log()).exp()),
    ("positive", 0.5, lambda z: z.pow(torch.tensor(0.5, dtype=torch.float64))),
    ("positive", 1, lambda z: z.sqrt() * z.sqrt() * 2),
    ("positive", 1, lambda z: torch.cholesky_inverse(torch.diag_embed(z.rsqrt()))),
    ("positive", -1, lambda z: gram(z.rsqrt().diag())),
    ("positive", -0.5, lambda z: z.rsqrt() * torch.eye(4, dtype=torch.float64)),
    ("positive", 0.5, lambda z: torch.linalg.cholesky(z[:, None, None] * PD)),
    ("positive", 1, lambda z: A @ (z[1] * PD) @ A.mT),
    ("positive", 1, lambda z: gram(z[0].sqrt() * L)),
    ("positive", 1, lambda z: torch.cholesky_inverse(z[:, None, None].rsqrt() * L)),
    ("positive", -1, lambda z: torch.cholesky_solve(EYE3, (z[0].sqrt() * L))),
    ("simplex", 1, lambda z: 2 * z),
    ("simplex", 1, lambda z: z * V),
]

LOGS: list[tuple[str, float, Callable]] = [
    ("positive probability simplex", 1, lambda z: z.log()),
    ("positive", -0.5, lambda z: -0.5 * z.log() + V),
    ("positive", 2, lambda z: (3 * z**2).log()[G]),
    ("positive", 2, lambda z: z.log() + z.log()),
]

AFFINES: list[tuple[str, Callable]] = [
    ("real positive", lambda z: 1 + z),
    ("real positive", lambda z: X @ z),
    ("real positive", lambda z: z @ X.mT),
    ("real positive", lambda z: X.matmul(z) + z[0]),
    ("real positive", lambda z: torch.mv(X, z) - 3),
    ("real positive", lambda z: functional.linear(X, z[None], z[1:2])),
    ("real positive", lambda z: torch.einsum("ij,j->i", X, z)),
    ("real positive", lambda z: torch.einsum("i,i", V, z)),
    ("real positive", lambda z: torch.dot(V, z)),
    ("real positive", lambda z: torch.tensordot(X, z, 1)),
    ("real positive", lambda z: torch.addmv(V[:1], X, z)),
    ("real positive", lambda z: torch.baddbmm(X[None], X[None, :, :1], z[None, None])),
    ("real positive", lambda z: torch.bmm(X[None], z[None, :, None])),
    ("real positive", lambda z: z.sum() + 1),
    ("real positive", lambda z: z.reshape(2, 2).mean(0)),
    ("real positive", lambda z: z.cumsum(0)),
    ("real positive", lambda z: z.diff()),
    ("real positive", lambda z: z[G] - z[H]),
    ("real positive", lambda z: z - z.mean()),
    ("real", lambda z: torch.where(MASK, z, V)),
    ("real", lambda z: torch.stack([z, V])),
    ("real positive", lambda z: torch.cat([z, 1 - z])),
    ("real", lambda z: written(z, torch.ones(4).double(), (0, 1), (2, 3))),
    ("real positive", lambda z: in_place(z, lambda x: x.add_(1))),
    ("real positive", lambda z: z.lerp(2 * z + 1, 0.3)),
    ("probability", lambda z: 2 - z),
    ("probability", lambda z: V - z),
    ("probability", lambda z: 2 * (1 - z)),
    ("simplex", lambda z: z @ V),
    ("simplex", lambda z: z.sum(0)),
    ("simplex", lambda z: torch.cat([z, zeros(1, 4) + 0.25])),
    ("matrix", lambda z: z[0, 1]),
    ("matrix", lambda z: z @ PD),
    ("matrix", lambda z: A @ z),
    ("matrix", lambda z: A @ z @ A),
    ("matrix", lambda z: z.diagonal(dim1=-2, dim2=-1)),
    ("matrix", lambda z: z + EYE3),
    ("matrix", lambda z: z * PD),
    ("matrix", lambda z: z[:, :2, :2]),
]

MATRICES: list[tuple[float, Callable]] = [
    (1, lambda w: w),
    (1, lambda w: w[0]),
    (1, lambda w: w[torch.tensor([1, 1, 0])]),
    (1, lambda w: w.mT),
    (1, lambda w: 3 * w),
    (1, lambda w: w.unsqueeze(1).expand(2, 4, 3, 3)),
    (1, lambda w: torch.stack([w[1], w[0], w[1]])),
    (1, lambda w: A @ w @ A.mT),
    (1, lambda w: A @ (w @ A.mT)),
    (1, lambda w: PD @ w @ PD),
    (-1, lambda w: torch.linalg.inv(w)),
    (-1, lambda w: w.inverse()),
    (-1, lambda w: torch.linalg.inv_ex(w)[0]),
    (-1, lambda w: A @ w.inverse() @ A.mT),
    (1, lambda w: torch.linalg.inv(A @ w.inverse() @ A.mT)),
    (1, lambda w: gram(torch.linalg.cholesky(w))),
    (-1, lambda w: gram(torch.linalg.cholesky(w.inverse()))),
    (-1, lambda w: torch.cholesky_inverse(torch.linalg.cholesky(w))),
    (
        -1,
        lambda w: torch.cholesky_solve(EYE3.expand(2, 3, 3), torch.linalg.cholesky(w)).mT.inverse().inverse(),
    ),
    (-1, lambda w: torch.cholesky_solve(EYE3, torch.linalg.cholesky(w))),
    (-1, both_factors),
    (1, lambda w: torch.cholesky_inverse(torch.linalg.cholesky_ex(w.inverse())[0])),
    (1, lambda w: gram(2 * torch.linalg.cholesky(w))),
    (1, lambda w: gram(torch.linalg.cholesky(w)[torch.tensor([1, 0, 0])])),
]

OTHERS: list[tuple[str, Callable]] = [
    ("real positive", torch.exp),
    ("real positive", torch.relu),
    ("real positive", torch.sigmoid),
    ("real positive", lambda z: z.clamp(min=0.1)),
    ("real positive", lambda z: z.abs()),
    ("real positive", lambda z: z.abs() + 1),
    ("real positive", lambda z: z[G] * z[H]),
    ("real positive", lambda z: z[:, None] * z),
    ("real positive", lambda z: z @ z),
    ("real positive", lambda z: 1 + 1 / z),
    ("real positive", lambda z: z.square().sum()),
    ("real positive", lambda z: z.prod()),
    ("real positive", lambda z: z / z.sum()),
    ("real positive", lambda z: z.max()),
    ("real positive", lambda z: z.softmax(-1)),
    ("real positive", lambda z: z // 0.5),
    ("real positive", lambda z: torch.div(z, 0.5, rounding_mode="floor")),
    ("real positive", lambda z: z.round()),
    ("real positive", lambda z: z.long()),
    ("real positive", lambda z: V[z.abs().clamp(0, 3).long()]),
    ("real positive", lambda z: torch.where(z > 0.5, z, -z)),
    ("real positive", lambda z: z**V),
    ("real positive", lambda z: 2**z),
    ("real", lambda z: z.square().sqrt()),
    ("real", lambda z: (z.square().log() / 2).exp()),
    ("positive", lambda z: (1 + z).rsqrt()),
    ("positive", lambda z: z.rsqrt() + 1e-6),
    ("positive", lambda z: (V * z.log()).exp()),
    ("positive", lambda z: z.log1p()),
    ("positive", lambda z: torch.linalg.inv(z[:3] * PD)),
    ("positive", lambda z: torch.linalg.cholesky(torch.diag_embed(z) + torch.eye(4))),
    ("simplex", lambda z: 1 / z.log().logsumexp(-1)),
    ("simplex", lambda z: z[..., :2]),
    ("simplex", lambda z: z[:, 0]),
    ("simplex", lambda z: z.flip(-1)),
    ("simplex", lambda z: z.mT),
    ("simplex", lambda z: z.gather(0, torch.tensor([[0, 1, 2, 0]]))),
    ("simplex", lambda z: z[ROWS, torch.tensor([0, 1, 2, 3])]),
    ("simplex", lambda z: z.reshape(4, 3)),
    ("simplex", lambda z: z[:, torch.tensor([0, 1, 2, 3])]),
    ("simplex", lambda z: torch.where(MASK, z[0], z[1])),
    ("simplex", lambda z: z / z.sum(0)),
    ("matrix", lambda z: z.logdet()),
    ("matrix", lambda z: z @ z),
    ("matrix", lambda z: z.inverse()[:, 0]),
    ("matrix", lambda z: (z + EYE3).inverse()),
    ("matrix", lambda z: torch.linalg.cholesky(z).mT @ torch.linalg.cholesky(z)),
    ("matrix", lambda z: A @ z.inverse() @ A),
    ("matrix", lambda z: z.sqrt()),
    ("matrix", lambda z: torch.linalg.solve_triangular(z, EYE3, upper=False)),
]

PARTIALS: list[tuple[str, float, Callable]] = [
    ("positive", 1, lambda z: torch.where(MASK, z, V)),
    ("positive", 1, lambda z: torch.stack([z, V])),
    ("positive", 1, lambda z: torch.stack([z, V]).T[G]),
    ("positive", 1, lambda z: written(z, torch.ones(4).double(), (0, 1), (2, 3))),
    ("positive", 1, lambda z: 3 * torch.where(MASK, z[G[:4]], 2 * torch.cat([z[:2], V[:2]]))),
    ("positive", -1, lambda z: V / torch.where(MASK, z, V)),
    ("positive", -2, lambda z: torch.where(MASK, z, V) ** -2),
    ("positive", 0.5, lambda z: torch.cat([z, V]).sqrt()),
    ("positive", -0.5, lambda z: torch.where(MASK, z.rsqrt(), V)),
]

Row = tuple[Sort, Form, float, Callable]


def rows() -> list[Row]:
    table: list[Row] = []
    for form, entries in (
        (Form.SELECTION, SELECTIONS),
        (Form.COMPLEMENT, COMPLEMENTS),
        (Form.AFFINE, AFFINES),
        (Form.OTHER, OTHERS),
    ):
        table += [(Sort(sort), form, 1.0, function) for sorts, function in entries for sort in sorts.split()]
    for form, powered in ((Form.MONOMIAL, MONOMIALS), (Form.PARTIAL, PARTIALS), (Form.LOG, LOGS)):
        table += [(Sort(sort), form, power, function) for sorts, power, function in powered for sort in sorts.split()]
    return table + [(MATRIX, Form.MATRIX, power, function) for power, function in MATRICES]


def row_id(row: Row) -> str:
    sort, form, power, function = row
    code = getattr(function, "__code__", None)
    place = function.__name__ if code is None else code.co_firstlineno
    return f"{sort.value}-{form.value}-{power:g}-{place}"


@pytest.mark.parametrize("row", rows(), ids=row_id)
def test_every_expression_has_the_kind_it_should(row: Row) -> None:
    sort, form, power, function = row
    kind, _ = judge(function, sort)
    assert (kind.form, kind.power) == (form, power), kind
    assert holds(kind, sort, function), kind


@pytest.mark.parametrize("sort", [POSITIVE, PROBABILITY], ids=lambda sort: sort.value)
def test_a_scalar_site_is_aligned_with_itself(sort: Sort) -> None:
    cases: list[tuple[float, Callable]] = [
        (2.0, lambda z: z * z[None].expand(5)),
        (1.5, lambda z: z.expand(5) * z.sqrt()),
        (2.0, lambda z: (z * V) @ (z * V)),
        (0.5, lambda z: torch.linalg.cholesky(z * PD)),
        (1.0, lambda z: z * V + z.expand(4)),
        (1.0, lambda z: (z * V).cumsum(0)),
    ]
    for power, function in cases:
        kind, _ = judge(function, sort, ())
        assert (kind.form, kind.power) == (Form.MONOMIAL, power), kind
        assert holds(kind, sort, function, ()), kind


def test_what_of_a_monomial_scales_a_matrix() -> None:
    for function, expected in [
        (lambda z: z[0] * PD, True),
        (lambda z: z[:, None, None] * PD, True),
        (lambda z: z.diag(), True),
        (lambda z: z * torch.eye(4, dtype=torch.float64), True),
        (lambda z: A @ (z[0] * PD) @ A.mT, True),
        (lambda z: z[:3] * PD, False),
        (lambda z: torch.diag_embed(z[0].expand(4)) - z[0], True),
        (lambda z: z.diag() + z.diag().roll(1, 0), False),
        (lambda z: z.reshape(2, 2), False),
    ]:
        kind, _ = judge(function, POSITIVE)
        assert kind.scales_matrix is expected, kind
        assert holds(kind, POSITIVE, function)


def test_a_cholesky_factor_is_one() -> None:
    for function, form in [
        (torch.linalg.cholesky, Form.CHOLESKY),
        (lambda w: torch.linalg.cholesky_ex(w.inverse())[0], Form.CHOLESKY),
        (lambda w: torch.linalg.cholesky(w).mT, Form.OTHER),
        (lambda w: torch.linalg.cholesky(w).inverse(), Form.OTHER),
        (lambda w: torch.linalg.cholesky(w, upper=True), Form.OTHER),
    ]:
        kind, _ = judge(function, MATRIX)
        assert kind.form is form
        assert holds(kind, MATRIX, function)


def test_other_latents_are_constants() -> None:
    recording = Recording()
    with recording:
        z, a, index = (recording.latent(name, draw(REAL, (4,), 1)) for name in ("z", "a", "index"))
        product = a * z + a.exp()
        gathered = z[index.abs().clamp(0, 3).long()]
        congruence = recording.latent("A", A)
        w = recording.latent("w", PD)
        sandwich = congruence @ w @ congruence.mT
        twice = congruence @ w @ congruence
    assert kind_of(recording.tape, recording.reference(product), "z", REAL).form is Form.AFFINE
    assert kind_of(recording.tape, recording.reference(product), "a", REAL).operation == "exp"
    assert kind_of(recording.tape, recording.reference(product), "w", MATRIX).form is Form.CONSTANT
    assert kind_of(recording.tape, recording.reference(gathered), "z", REAL).form is Form.SELECTION
    assert kind_of(recording.tape, recording.reference(gathered), "index", REAL).form is Form.OTHER
    assert kind_of(recording.tape, recording.reference(sandwich), "w", MATRIX) == Kind(
        Form.MATRIX, 1.0, "matmul", _line(sandwich)
    )
    assert kind_of(recording.tape, recording.reference(twice), "w", MATRIX).form is Form.AFFINE
    assert kind_of(recording.tape, 3.0, "w", MATRIX).form is Form.CONSTANT


def _line(value: Tensor) -> str:
    assert isinstance(value, Recorded)
    return value._recording.tape.nodes[value._index].source


def test_a_refusal_names_the_first_operation_and_its_line() -> None:
    def model(z: Tensor) -> Tensor:
        squashed = torch.relu(z)
        return (squashed + 1).exp() @ V

    kind, _ = judge(model, REAL)
    line = model.__code__.co_firstlineno + 1
    assert (kind.form, kind.operation, kind.source) == (Form.OTHER, "relu", f"test_kinds.py:{line}")
    for function, sort, operation in [
        (lambda z: z[..., :2], SIMPLEX, "selects part of the simplex"),
        (lambda z: V[(z - z).long()], REAL, "index by a latent"),
        (lambda z: z.long() + 1, REAL, "long"),
        (lambda z: torch.where(z > 0, z, V), REAL, "gt"),
        (lambda z: 1 + z.rsqrt(), POSITIVE, "add"),
        (lambda z: torch.linalg.eigvalsh(z), MATRIX, "linalg.eigvalsh"),
    ]:
        assert judge(function, sort)[0].operation == operation


def test_an_index_that_is_the_site_is_refused() -> None:
    recording = Recording()
    with recording:
        state = recording.latent("state", torch.tensor([0, 1, 1]))
        mu = recording.latent("mu", V)
        picked = mu[state]
    assert kind_of(recording.tape, recording.reference(picked), "state", REAL).operation == "index by a latent"
    assert kind_of(recording.tape, recording.reference(picked), "mu", REAL).form is Form.SELECTION


def test_a_claim_says_which_values_it_rests_on() -> None:
    kind, tape = judge(lambda z: ONES - z * V, PROBABILITY)
    assert kind.form is Form.AFFINE
    kind, tape = judge(lambda z: ONES - z, PROBABILITY)
    assert [tape.inputs[index] is ONES for index in kind.assumes] == [True]
    kind, tape = judge(lambda z: A @ z @ A.mT, MATRIX)
    assert len(kind.assumes) == 2
    assert judge(lambda z: X @ z[G[:4]], REAL)[0].assumes == frozenset()


def test_what_the_operation_is_not_known_for_is_no_error() -> None:
    kind, _ = judge(lambda z: torch.special.bessel_j0(z).cumprod(0).std(), REAL)
    assert (kind.form, kind.operation) == (Form.OTHER, "special_bessel_j0")


def test_long_chains_are_judged_without_recursion() -> None:
    def chain(z: Tensor) -> Tensor:
        total = z
        for _ in range(3000):
            total = total + 1
        return total

    assert judge(chain, REAL)[0].form is Form.AFFINE


# -- random programs: whatever is claimed holds ---------------------------------------------------

UNARY: list[Callable[[Tensor, random.Random], Tensor]] = [
    lambda x, r: x[r.choice([0, -1, slice(1, None), slice(None), Ellipsis, None])],
    lambda x, r: x[torch.tensor([r.randrange(x.shape[0]) for _ in range(r.randint(1, 4))])],
    lambda x, r: x[..., torch.tensor([r.randrange(x.shape[-1]) for _ in range(3)])],
    lambda x, r: x[torch.arange(x.shape[0]) % 2 == 0],
    lambda x, r: x.mT if x.dim() > 1 else x.t(),
    lambda x, r: x.transpose(r.choice([0, -1]), r.choice([-2, -1, 1])),
    lambda x, r: x.unsqueeze(r.choice([0, 1, -1])),
    lambda x, r: x.squeeze(),
    lambda x, r: x.reshape(r.choice([(-1,), (2, -1), (-1, 2), (-1, *x.shape[1:])])),
    lambda x, r: x.expand(r.choice([2, 3]), *x.shape),
    lambda x, r: x.expand(*x.shape[:-1], 3),
    lambda x, r: x.flip(r.choice([0, -1])),
    lambda x, r: x.repeat(2, *(1 for _ in x.shape)),
    lambda x, r: x.movedim(0, -1),
    lambda x, r: x.diagonal(dim1=-2, dim2=-1),
    lambda x, r: torch.diag_embed(x, offset=r.choice([0, 0, 1])),
    lambda x, r: x.tril(),
    lambda x, r: x.unbind(r.choice([0, -1]))[r.choice([0, 1])],
    lambda x, r: x.split(2, r.choice([0, -1]))[-1],
    lambda x, r: x.gather(0, torch.zeros_like(x, dtype=torch.long) + 1) if r.random() < 0.5 else x.take(G),
    lambda x, r: x.index_select(-1, torch.tensor([1, 0])),
    lambda x, r: x.sum(r.choice([0, -1]), keepdim=r.random() < 0.5),
    lambda x, r: x.sum(),
    lambda x, r: x.mean(-1, keepdim=True),
    lambda x, r: x.cumsum(r.choice([0, -1])),
    lambda x, r: x.diff(dim=-1),
    lambda x, r: x.diff(dim=-1, prepend=torch.ones_like(x[..., :1])),
    lambda x, r: -x,
    lambda x, r: 1 - x,
    lambda x, r: 1 / x,
    lambda x, r: x * r.choice([2.0, 0.5, -1.0, 1.0]),
    lambda x, r: x + r.choice([1.0, 0.0, -1.0]),
    lambda x, r: x ** r.choice([2, -1, 0.5, -0.5, 1, 0]),
    lambda x, r: x.sqrt(),
    lambda x, r: x.rsqrt(),
    lambda x, r: x.square(),
    lambda x, r: x.log(),
    lambda x, r: x.exp(),
    lambda x, r: x.softmax(-1),
    lambda x, r: x.logsumexp(-1, keepdim=True),
    lambda x, r: x.abs(),
    lambda x, r: x.inverse(),
    lambda x, r: torch.linalg.cholesky(x),
    lambda x, r: torch.cholesky_inverse(x),
    lambda x, r: torch.linalg.solve(x, EYE3),
    lambda x, r: torch.cholesky_solve(r.choice([EYE3, A]), x),
    lambda x, r: x @ x.transpose(-1, -2),
    lambda x, r: x.transpose(-1, -2) @ x,
    lambda x, r: A @ x @ A.mT,
    lambda x, r: x @ r.choice([A, A.mT, PD, V[:3]]),
    lambda x, r: r.choice([A, A.mT, PD, X, V, V[:3]]) @ x,
    lambda x, r: x * r.choice([V, X, A, EYE3, EYE3[0], X[:, :1], PD[:, None]]),
    lambda x, r: x + r.choice([V, X, A, torch.ones_like(x), torch.zeros_like(x)]),
    lambda x, r: torch.where(r.choice([MASK, MASK[:, None], torch.tensor(True)]), x, r.choice([V, 0.0, 1.0])),
    lambda x, r: x.masked_fill(MASK, r.choice([0.0, 2.0])),
    lambda x, r: in_place(x, lambda y: y.add_(y.clone())),
    lambda x, r: in_place(x, lambda y: y.__setitem__(r.choice([0, (Ellipsis, 0), slice(1, 3)]), r.choice([0.0, 1.5]))),
    lambda x, r: torch.einsum("...i,i->...", x, V),
    lambda x, r: torch.einsum("i,ij->ij", x, X.mT),
    lambda x, r: torch.outer(V, x),
    lambda x, r: functional.embedding(torch.tensor([1, 0, 1]), x),
]
BINARY: list[Callable[[Tensor, Tensor, random.Random], Tensor]] = [
    lambda x, y, r: x + y,
    lambda x, y, r: torch.sub(x, y, alpha=r.choice([1, 2])),
    lambda x, y, r: x * y,
    lambda x, y, r: x / y,
    lambda x, y, r: x @ y,
    lambda x, y, r: x @ y.transpose(-2, -1),
    lambda x, y, r: torch.stack([x, y], r.choice([0, -1])),
    lambda x, y, r: torch.cat([x, y], r.choice([0, -1])),
    lambda x, y, r: torch.where(r.choice([MASK, MASK[:, None], torch.tensor(False)]), x, y),
    lambda x, y, r: torch.outer(x, y),
    lambda x, y, r: torch.broadcast_tensors(x, y)[1],
    lambda x, y, r: in_place(x, lambda z: z.__setitem__(r.choice([0, Ellipsis, slice(0, 2), (Ellipsis, 1)]), y)),
]


def run(seed: int, z: Tensor, length: int) -> list[Tensor]:
    """A random program: what each of its steps gives; a step that cannot be done is left out."""
    r, pool = random.Random(seed), [z]
    for _ in range(length):
        state = r.getrandbits(32)
        step = random.Random(state)
        recent = pool[-1] if step.random() < 0.6 else step.choice(pool)
        try:
            if step.random() < 0.72:
                result = step.choice(UNARY)(recent, step)
            else:
                result = step.choice(BINARY)(recent, step.choice(pool), step)
        except (RuntimeError, IndexError, ValueError, TypeError, ZeroDivisionError):
            continue
        if isinstance(result, Tensor) and 0 < result.numel() <= 400:
            pool.append(result)
    return pool


PROGRAM_SHAPES = {
    REAL: [(), (1,), (4,), (2, 2)],
    POSITIVE: [(), (4,), (3, 1, 1), (2, 3)],
    PROBABILITY: [(), (4,)],
    SIMPLEX: [(4,), (3, 4), (3, 3), (2, 1, 4)],
    MATRIX: [(3, 3), (2, 3, 3), (3, 3, 3)],
}


@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**31), sort=st.sampled_from(Sort), which=st.integers(0, 3), length=st.integers(1, 7))
def test_whatever_is_claimed_of_a_random_program_holds(seed: int, sort: Sort, which: int, length: int) -> None:
    shape = PROGRAM_SHAPES[sort][which % len(PROGRAM_SHAPES[sort])]
    plain = run(seed, draw(sort, shape, 0), length)
    recording = Recording()
    with recording:
        recorded = run(seed, recording.latent("z", draw(sort, shape, 0)), length)
    assert len(recorded) == len(plain)
    for position, value in enumerate(recorded):
        ref = recording.reference(value)
        if not isinstance(ref, Ref):
            continue
        kind = kind_of(recording.tape, ref, "z", sort)

        def evaluate(z: Tensor, ref: Ref = ref) -> Tensor:
            return recording.tape.evaluate([ref], {"z": z})[0]

        names = [node.name for node in recording.tape.nodes]
        assert holds(kind, sort, evaluate, shape), (position, kind, names)
