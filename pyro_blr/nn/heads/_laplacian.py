"""Class-by-class precisions with a given diagonal that leave the sum of all logits free."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["product_weights"]


def product_weights(degrees: Tensor) -> Tensor:
    """d ≥ 0 with d_c (1 − d_c / Σ d) = h_c, along the first dimension of h = `degrees` (C, ...), by bisection on 1 / Σ d.

    diag(d) − d dᵀ / Σ d is the graph Laplacian whose edges are d_a d_b / Σ d: like diag(p) − p pᵀ, of which it is the generalisation,
    it is zero on what all classes share. There is such a d where no h is above the sum of the others; sums of diag(p) − p pᵀ are so.
    """
    largest, index = degrees.max(0, keepdim=True)
    largest = largest.clamp_min(torch.finfo(degrees.dtype).tiny * 1e4)

    def lesser(x: Tensor) -> Tensor:
        """d of the smaller root, for x = 1 / Σ d."""
        return 2 * degrees / (1 + (1 - 4 * degrees * x).clamp_min(0).sqrt())

    low, high = torch.zeros_like(largest), 1 / (4 * largest)
    # Where even the largest x leaves Σ d x below one, the largest class has more than half of Σ d: the greater root.
    dominated = (lesser(high) * high).sum(0, keepdim=True) < 1
    for _ in range(26 if degrees.dtype == torch.float32 else 52):
        x = 0.5 * (low + high)
        share = lesser(x) * x
        total = share.sum(0, keepdim=True)
        too_large = torch.where(dominated, total - 2 * share.gather(0, index) < 0, total > 1)
        low, high = torch.where(too_large, low, x), torch.where(too_large, x, high)
    weights = lesser(high)
    greater = (1 + (1 - 4 * largest * high).clamp_min(0).sqrt()) / (2 * high)
    return weights.scatter(0, index, torch.where(dominated, greater, weights.gather(0, index)))
