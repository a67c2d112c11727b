"""∇_μ E_q[f] from draws: Bonnet and Price's theorems for Gaussians, reparameterised gradients along μ → λ →
sample for other families, and the centred score function where no gradient flows.

Everything here is a function of a log factor f(u) over one block's variable u and of draws from q(u); it
knows neither models nor rules. Every estimator is exact, whatever the draws, for f that are quadratic
(Gaussians) or linear in T (other families).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, jvp, vjp, vmap

from pyro_blr.batches import BUDGET, Function, batched, gradient_and_products, gradients_at, row
from pyro_blr.families import ExponentialFamily

__all__ = [
    "bonnet_price",
    "enumerated",
    "gaussian_leaves",
    "reparameterised",
    "score_function",
    "standard_error",
]

_HESSIAN_DIM = 200  # directions at most for a Hessian; beyond, Price's theorem by parts


def gaussian_leaves(moments: dict[str, Tensor], noise: Tensor) -> Tensor:
    """m + V^{1/2} ε for stacked ε of shape (S, *shape of m)."""
    if "covariance" in moments:
        root = torch.linalg.cholesky(moments["covariance"])
        return moments["mean"] + (root @ noise.unsqueeze(-1)).squeeze(-1)
    return moments["mean"] + moments["variance"].sqrt() * noise


def standard_error(values: Tensor) -> float:
    """The standard error of the mean of (S,) values, of which the two halves may be antithetic."""
    half = values.shape[0] // 2
    if half >= 2 and values.shape[0] == 2 * half:
        values = 0.5 * (values[:half] + values[half:])
    return float(values.std() / math.sqrt(values.shape[0])) if values.shape[0] > 1 else 0.0


# -- Gaussians -----------------------------------------------------------------------------------------------


def bonnet_price(
    function: Function,
    moments: dict[str, Tensor],
    leaves: Tensor,
    others: Any,
    seed: int = 0,
    elements: int = 0,
    twice: bool = True,
) -> dict[str, Tensor]:
    """∇_m E f = E ∇f, ∇_V E f = ½ E ∇²f (Bonnet, Price; Khan and Rue 2023, eq. 9) over stacked draws.

    `function(u, other)` is a scalar that sums over the batch of u; `others` is a pytree of draws of other
    blocks with the same leading dim; `elements` counts the numbers in the largest intermediate result of one
    call.  Where f has kinks (not `twice` differentiable) its Hessian is not what Price's theorem asks for,
    and its gradient serves for both.
    """
    event = "covariance" in moments
    if leaves.shape[0] > 1 and (not twice or (event and leaves.shape[-1] > _HESSIAN_DIM)):
        return _stein(function, moments, leaves, others, elements)
    basis, signs = _directions(function, leaves, others, event, seed)
    whole = basis.shape[0] > (
        leaves.shape[-1] if event else 1
    )  # directions for the Hessian of all batch elements together
    inner = max(1, BUDGET // max(elements, leaves[0].numel(), 1))

    def derivatives(leaf: Tensor, other: Any) -> tuple[Tensor, Tensor]:
        other, tangent = other[0], basis * other[1]
        gradient, products = _products(lambda u: function(u, other), leaf, tangent, inner)
        return gradient, products if whole else _diagonal_blocks(tangent, products, event)

    def one_by_one(leaf: Tensor, other: Any) -> tuple[Tensor, Tensor]:
        other, tangent = other[0], basis * other[1]
        gradient, products = gradient_and_products(function, leaf, other, tangent)
        return gradient, products if whole else _diagonal_blocks(tangent, products, event)

    size = max(elements, leaves[0].numel()) * min(basis.shape[0], inner)
    with torch.no_grad():  # of what is around: a learned parameter's graph ends here
        gradients, hessian = batched(derivatives, leaves, (others, signs), size, one_by_one)
    hessian, result = hessian.mean(0), {"mean": gradients.mean(0)}
    if whole:
        flat = hessian.flatten(1)
        result["hessian"] = 0.5 * (flat + flat.mT)
        hessian = _diagonal_blocks(basis, hessian, event)
    if event:
        return {**result, "covariance": 0.25 * (hessian + hessian.mT)}
    return {**result, "variance": 0.5 * hessian}


def _products(
    function: Callable[[Tensor], Tensor], leaf: Tensor, tangents: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """∇f and stacked Hessian-vector products, backwards over backwards: half to a quarter of the time that
    forwards over backwards takes, which remains for operations that are differentiated backwards once only.
    """
    gradient = grad(function)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="An output with one or more elements was resized")  # torch's own
            slope, pull = vjp(gradient, leaf)[:2]
            return slope, vmap(lambda t: pull(t)[0], chunk_size=chunk)(tangents)
    except (RuntimeError, NotImplementedError):
        products = vmap(lambda t: jvp(gradient, (leaf,), (t,))[1], chunk_size=chunk)(tangents)
        return gradient(leaf), products


def _directions(function: Function, leaves: Tensor, others: Any, event: bool, seed: int) -> tuple[Tensor, Tensor]:
    """Directions (R, *leaf) and signs (S, *batch) for Hessian-vector products from which each batch element's
    block is read.

    Where batch elements do not interact, one set of directions serves all at once.  Where they do, each
    element has its own; if these are too many, signs that differ from draw to draw make the other elements'
    part average out.
    """
    shape, dim = leaves.shape[1:], leaves.shape[-1] if event else 1
    batch = shape[:-1] if event else shape
    tail = (1,) if event else ()
    ones = torch.ones((), dtype=leaves.dtype, device=leaves.device).expand(leaves.shape[0], *batch, *tail)
    basis = torch.eye(dim, dtype=leaves.dtype, device=leaves.device).reshape(
        dim, *[1] * len(batch), *([dim] if event else [])
    )
    basis = basis.expand(dim, *shape)
    if batch.numel() == 1:
        return basis, ones
    generator = torch.Generator().manual_seed(seed)
    signs = (
        torch.randint(0, 2, (leaves.shape[0], *batch, *tail), generator=generator, device="cpu", dtype=torch.int8).to(
            leaves
        )
        * 2
        - 1
    )
    if not _elements_interact(function, leaves, others, signs):
        return basis, ones
    if shape.numel() <= _HESSIAN_DIM:
        every = torch.eye(shape.numel(), dtype=leaves.dtype, device=leaves.device)
        return every.reshape(shape.numel(), *shape), ones
    return basis, signs


def _elements_interact(function: Function, leaves: Tensor, others: Any, signs: Tensor) -> bool:
    """Whether a Hessian-vector product at one draw depends on the signs of other batch elements."""
    ones = torch.ones_like(signs[0])
    mixed = signs[0] if bool((signs[0] != signs[0].flatten()[0]).any()) else _one_flipped(ones)
    pair = torch.stack([ones, mixed]).expand(2, *leaves.shape[1:])
    products = gradient_and_products(function, leaves[0], row(others, 0), pair)[1] * pair
    return not torch.allclose(
        products[0], products[1], rtol=1e-6, atol=1e-9 * float(products.abs().max().clamp_min(1e-30))
    )


def _one_flipped(ones: Tensor) -> Tensor:
    flipped = ones.flatten().clone()
    flipped[0] = -1.0
    return flipped.reshape(ones.shape)


def _diagonal_blocks(tangents: Tensor, products: Tensor, event: bool) -> Tensor:
    """Σ_r t_r (H t_r): each batch element's own block of the Hessian, (*batch, d, d) for an event and
    (*batch) without.
    """
    if event:
        return torch.einsum("r...i,r...j->...ij", tangents, products)
    return (tangents * products).sum(0)


def _stein(
    function: Function, moments: dict[str, Tensor], leaves: Tensor, others: Any, elements: int
) -> dict[str, Tensor]:
    """∇_V E f = ½ E[V⁻¹ (u − m) ∇f(u)ᵀ], the same by integration by parts: one gradient a draw."""
    gradients = gradients_at(function, leaves, others, elements)
    apart, bend = leaves - moments["mean"], gradients - gradients.mean(0)
    if "variance" in moments:
        return {"mean": gradients.mean(0), "variance": 0.5 * (apart / moments["variance"] * bend).mean(0)}
    white = torch.linalg.solve(moments["covariance"], apart.unsqueeze(-1)).squeeze(-1)
    outer = torch.einsum("s...i,s...j->...ij", white, bend) / leaves.shape[0]
    return {"mean": gradients.mean(0), "covariance": 0.25 * (outer + outer.mT)}


# -- other families ------------------------------------------------------------------------------------------


def reparameterised(
    function: Function,
    family: ExponentialFamily,
    natural: Tensor,
    draw: Callable[[Tensor], Tensor],
    others: Any,
    elements: int = 0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """∇_μ E f = F(λ)⁻¹ ∇_λ E f, the gradient taken along λ → (implicitly reparameterised) draws.

    `draw(λ)` is (S, *batch, *event), differentiable in λ; f takes it in `dtype`.  F is estimated from the same draws, column
    by column as the gradient of E T_k, wherever they are many enough: then ⟨m, T⟩ has the message m, whatever the draws
    (Salimans and Knowles 2013, section 5).
    """
    leaf_natural = natural.detach().requires_grad_()
    with torch.enable_grad():
        samples = draw(leaf_natural)
        count = samples.shape[0]
        gradients = gradients_at(function, samples.detach().to(dtype or samples.dtype), others, elements)

        def along(cotangent: Tensor) -> Tensor:
            return torch.autograd.grad(samples, leaf_natural, cotangent.detach() / count, retain_graph=True)[0]

        direction = along(gradients.to(samples.dtype))
        if count < 4 * family.num_parameters:
            return family.natural_gradient(natural, direction)
        points = samples.detach().requires_grad_()
        statistics = family.sufficient_statistics(points)
        columns = [
            along(torch.autograd.grad(statistics[..., k].sum(), points, retain_graph=True)[0])
            for k in range(family.num_parameters)
        ]
    return _solved(family, natural, torch.stack(columns, -1), direction)


def score_function(family: ExponentialFamily, natural: Tensor, values: Tensor, statistics: Tensor) -> Tensor:
    """∇_μ E f = F(λ)⁻¹ Cov_q[T(u), f(u)], f centred: no gradient of f is needed.

    `values` (S,) or (S, *batch), `statistics` T(u) (S, *batch, p).  F = Cov T is taken over the same draws
    where they are many enough, which makes this the linear regression of f on T (Salimans and Knowles 2013).
    """
    count = values.shape[0]
    centred = values - values.mean(0)
    centred = centred.reshape(*centred.shape, *[1] * (statistics.dim() - centred.dim()))
    spread = statistics - statistics.mean(0)
    covariance = (centred * spread).sum(0) / max(count - 1, 1)
    if count < 4 * family.num_parameters:
        return family.natural_gradient(natural, covariance)
    fisher = torch.einsum("s...i,s...j->...ij", spread, spread) / (count - 1)
    return _solved(family, natural, fisher, covariance)


def _solved(family: ExponentialFamily, natural: Tensor, fisher: Tensor, gradient: Tensor) -> Tensor:
    """F̂⁻¹ g; with the family's own F where the estimate F̂ is not positive definite."""
    white = torch.linalg.cholesky_ex(0.5 * (fisher + fisher.mT))[1] == 0
    safe = torch.where(
        white[..., None, None], fisher, torch.eye(fisher.shape[-1], dtype=fisher.dtype, device=fisher.device)
    )
    solved = torch.linalg.solve_ex(safe, gradient.unsqueeze(-1))[0].squeeze(-1)
    usable = (white & solved.isfinite().all(-1)).unsqueeze(-1)
    if bool(usable.all()):
        return solved
    return torch.where(usable, solved, family.natural_gradient(natural, gradient))


def enumerated(function: Function, num_states: int, leaves: Tensor, others: Any) -> Tensor:
    """E[f | state k of element e] for every batch element of a discrete block, (*batch, K), over stacked
    draws of the rest.
    """
    batch = leaves.shape[1:]
    table = torch.zeros(batch.numel(), num_states, dtype=torch.float64, device=leaves.device)
    for s in range(leaves.shape[0]):
        for e in range(batch.numel()):
            for k in range(num_states):
                leaf = leaves[s].flatten().clone()
                leaf[e] = k
                table[e, k] += function(leaf.reshape(batch), row(others, s)).double() / leaves.shape[0]
    return table.reshape(*batch, num_states)
