"""Functions over stacked draws: many at once where a program can be batched, one after the other where it
cannot.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vmap

__all__ = ["BUDGET", "Function", "batched", "gradient_and_products", "gradients_at", "row"]

BUDGET = 2_000_000  # numbers in one intermediate result of a batched call

Function = Callable[[Tensor, Any], Tensor]


def batched(
    function: Callable[..., Any],
    leaves: Tensor,
    others: Any,
    elements: int = 0,
    one_by_one: Callable[..., Any] | None = None,
) -> Any:
    """`function` over the leading dim of its arguments: one batched call, or a loop where an operation cannot
    be batched.

    `elements` counts the numbers in the largest intermediate result of one call: as many draws are taken at
    once as memory allows. `one_by_one` is what the loop calls instead.
    """
    count = leaves.shape[0]
    chunk = max(1, BUDGET // max(elements, leaves[:1].numel(), 1))
    try:
        with warnings.catch_warnings():  # torch's own, of an operation that it batches slowly: a loop is slower still
            warnings.filterwarnings("ignore", message="There is a performance drop")
            return vmap(function, randomness="same", chunk_size=chunk if chunk < count else None)(leaves, others)
    except Exception:  # a program may object to batches in any way; if it objects to single draws too, the loop raises
        rows = [(one_by_one or function)(leaves[s], row(others, s)) for s in range(count)]
        if isinstance(rows[0], Tensor):
            return torch.stack(rows)
        return tuple(torch.stack(parts) for parts in zip(*rows, strict=True))


def row(tree: Any, index: int) -> Any:
    if isinstance(tree, dict):
        return {key: row(value, index) for key, value in tree.items()}
    if isinstance(tree, tuple):
        return tuple(row(value, index) for value in tree)
    return tree[index]


def gradients_at(function: Function, leaves: Tensor, others: Any, elements: int = 0) -> Tensor:
    """∇f at stacked draws."""

    def one_by_one(leaf: Tensor, other: Any) -> Tensor:
        return gradient_and_products(
            function, leaf, other, leaf[:0].reshape(0, *leaf.shape) if leaf.dim() else leaf.new_zeros(0)
        )[0]

    return batched(grad(function), leaves, others, elements, one_by_one)


def gradient_and_products(function: Function, leaf: Tensor, other: Any, tangents: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient and stacked Hessian-vector products by plain autograd: for programs that cannot be
    batched.
    """
    leaf = leaf.detach().requires_grad_()
    with torch.enable_grad():
        value = function(leaf, other)
        zero = torch.zeros_like(leaf)
        if not value.requires_grad:
            return zero, torch.zeros_like(tangents)
        (gradient,) = torch.autograd.grad(value, leaf, create_graph=True, allow_unused=True, materialize_grads=True)
        if not gradient.requires_grad:
            return gradient.detach(), torch.zeros_like(tangents)
        products = [
            torch.autograd.grad(gradient, leaf, t, retain_graph=True, allow_unused=True, materialize_grads=True)[0]
            for t in tangents
        ]
    return gradient.detach(), torch.stack(products).detach() if products else torch.zeros_like(tangents)
