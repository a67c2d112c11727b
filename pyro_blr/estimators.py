"""∇_μ E_q[f] from draws: Bonnet and Price's theorems for Gaussians, reparameterised gradients along μ → λ → sample for
other families, and the centred score function where no gradient flows.

Everything here is a function of a log factor f(u) over one block's variable u and of draws from q(u); it knows neither models nor rules.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

from pyro_blr.families import ExponentialFamily

__all__ = ["batched", "bonnet_price", "gaussian_leaves", "reparameterised", "score_function", "standard_normal_draws"]

_HESSIAN_DIM = 200  # events up to this size get Hessians by automatic differentiation, larger ones Price's theorem by parts


def standard_normal_draws(num_samples: int, dim: int, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(num_samples, dim) standard normals, antithetic: scrambled Sobol points where they exist, pseudo-random ones beyond."""
    half = (num_samples + 1) // 2
    if dim <= torch.quasirandom.SobolEngine.MAXDIM and dim <= 1024:
        uniform = torch.quasirandom.SobolEngine(dim, scramble=True, seed=seed).draw(half, dtype=torch.float64)
        normal = torch.special.ndtri(uniform.clamp(1e-12, 1 - 1e-12))
    else:
        generator = torch.Generator().manual_seed(seed)
        normal = torch.randn(half, dim, generator=generator, dtype=torch.float64)
    return torch.cat([normal, -normal])[:num_samples].to(dtype=dtype, device=device)


def gaussian_leaves(moments: dict[str, Tensor], noise: Tensor) -> Tensor:
    """m + V^{1/2} ε for stacked ε of shape (S, *shape of m)."""
    if "covariance" in moments:
        root = torch.linalg.cholesky(moments["covariance"])
        return moments["mean"] + (root @ noise.unsqueeze(-1)).squeeze(-1)
    return moments["mean"] + moments["variance"].sqrt() * noise


def bonnet_price(
    function: Callable[[Tensor, Any], Tensor],
    moments: dict[str, Tensor],
    leaves: Tensor,
    others: Any,
    seed: int = 0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """E f, and ∇_m E f = E ∇f, ∇_V E f = ½ E ∇²f (Bonnet, Price; Khan and Rue 2023, eq. 9) over stacked draws.

    `function(u, other)` is a scalar that sums over the batch of u; `others` is a pytree of draws of other blocks with the same
    leading dim.  The Hessian's blocks, one for each batch element, come by Hessian-vector products with random signs over the batch: exact
    when batch elements do not interact, unbiased when they do.
    """
    if "covariance" in moments and leaves.shape[-1] > _HESSIAN_DIM:
        return _stein(function, moments, leaves, others)
    generator = torch.Generator().manual_seed(seed)
    signs = (torch.randint(0, 2, moments["mean"].shape, generator=generator) * 2 - 1).to(moments["mean"])
    if "covariance" in moments:
        signs = signs[..., :1].expand_as(moments["mean"])
        tangents = torch.eye(leaves.shape[-1], dtype=leaves.dtype, device=leaves.device)
        tangents = tangents.reshape(-1, *[1] * (leaves.dim() - 2), leaves.shape[-1]) * signs
    else:
        tangents = signs.unsqueeze(0)

    def derivatives(leaf: Tensor, other: Any) -> tuple[Tensor, Tensor, Tensor]:
        gradient = grad(function)
        products = vmap(lambda t: jvp(lambda u: gradient(u, other), (leaf,), (t,))[1])(tangents)
        return function(leaf, other), gradient(leaf, other), products

    values, gradients, products = batched(derivatives, leaves, others)
    hessian = products.mean(0)
    if "covariance" in moments:
        hessian = (hessian * signs).movedim(0, -1)
        return values, {"mean": gradients.mean(0), "covariance": 0.25 * (hessian + hessian.mT)}
    return values, {"mean": gradients.mean(0), "variance": 0.5 * (hessian[0] * signs)}


def _stein(
    function: Callable[[Tensor, Any], Tensor], moments: dict[str, Tensor], leaves: Tensor, others: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """∇_V E f = ½ E[V⁻¹ (u − m) ∇f(u)ᵀ], the same by integration by parts: one gradient a draw."""
    values, gradients = batched(lambda leaf, other: (function(leaf, other), grad(function)(leaf, other)), leaves, others)
    white = torch.linalg.solve(moments["covariance"], (leaves - moments["mean"]).unsqueeze(-1)).squeeze(-1)
    outer = torch.einsum("s...i,s...j->...ij", white, gradients) / leaves.shape[0]
    return values, {"mean": gradients.mean(0), "covariance": 0.25 * (outer + outer.mT)}


def reparameterised(
    function: Callable[[Tensor, Any], Tensor],
    family: ExponentialFamily,
    natural: Tensor,
    num_samples: int,
    others: Any,
) -> tuple[Tensor, Tensor]:
    """E f and ∇_μ E f = F(λ)⁻¹ ∇_λ E f, the gradient taken along λ → distribution → (implicitly reparameterised) sample.

    Draws come from torch's generator: fix its state to draw alike at another λ.
    """
    leaf_natural = natural.detach().requires_grad_()
    with torch.enable_grad():
        samples = family.to_distribution(leaf_natural).rsample((num_samples,))
        detached = samples.detach()
        values, gradients = batched(lambda leaf, other: (function(leaf, other), grad(function)(leaf, other)), detached, others)
        (direction,) = torch.autograd.grad((samples * gradients.detach()).sum() / num_samples, leaf_natural)
    return values, family.natural_gradient(natural, direction)


def score_function(family: ExponentialFamily, natural: Tensor, values: Tensor, leaves: Tensor) -> Tensor:
    """∇_μ E f = F(λ)⁻¹ Cov_q[T(u), f(u)], f centred: no gradient of f is needed.

    `values` (S,) or (S, *batch), `leaves` (S, *batch, *event).
    """
    statistics = family.sufficient_statistics(leaves)
    centred = values - values.mean(0)
    centred = centred.reshape(*centred.shape, *[1] * (statistics.dim() - centred.dim()))
    covariance = (centred * (statistics - statistics.mean(0))).sum(0) / max(values.shape[0] - 1, 1)
    return family.natural_gradient(natural, covariance)


def batched(function: Callable[..., Any], leaves: Tensor, others: Any) -> Any:
    """`function` over the leading dim of its arguments: one batched call, or a loop where an operation cannot be batched."""
    try:
        return vmap(function, randomness="same", chunk_size=_chunk(leaves))(leaves, others)
    except (RuntimeError, ValueError, NotImplementedError):
        count = leaves.shape[0]
        rows = [function(leaves[s], _row(others, s)) for s in range(count)]
        if isinstance(rows[0], Tensor):
            return torch.stack(rows)
        return tuple(torch.stack(parts) for parts in zip(*rows, strict=True))


def _chunk(leaves: Tensor) -> int | None:
    size = leaves[0].numel() if leaves.shape[0] else 1
    return max(1, 2_000_000 // size) if size * leaves.shape[0] > 2_000_000 else None


def _row(tree: Any, index: int) -> Any:
    if isinstance(tree, dict):
        return {key: _row(value, index) for key, value in tree.items()}
    return tree[index]


