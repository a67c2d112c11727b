"""The full covariance of all weights of a softmax head."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_blr.nn.heads._dense import logit_covariance
from pyro_blr.nn.heads._structures import Statistics, Structure, WeightGaussian

__all__ = ["FullStructure"]


class FullGaussian(WeightGaussian):
    """Λ (C P, C P), dense."""

    def __init__(self, precision: Tensor) -> None:
        self.precision = precision
        self.factor, fault = torch.linalg.cholesky_ex(precision)
        if fault:
            raise ValueError("the precision of the weights is not positive definite; forget only what was observed")
        self.covariance = torch.cholesky_inverse(self.factor)

    def times(self, weights: Tensor) -> Tensor:
        return (self.precision @ weights.reshape(-1)).reshape(weights.shape)

    def solve(self, gradient: Tensor) -> Tensor:
        return torch.cholesky_solve(gradient.reshape(-1, 1), self.factor).reshape(gradient.shape)

    def stddev(self) -> Tensor:
        return self.covariance.diagonal().sqrt()

    def variance(self, rows: Tensor) -> Tensor:
        return logit_covariance(rows, self.covariance).diagonal(dim1=1, dim2=2)

    def contrast(self, rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        shared = (logit_covariance(rows, self.covariance) @ weights[..., None])[..., 0]
        return shared, (shared * weights).sum(-1)

    def draw(self, rows: Tensor, count: int) -> Tensor:
        factor = torch.linalg.cholesky(logit_covariance(rows, self.covariance))
        noise = torch.randn(count, len(rows), factor.shape[-1], dtype=rows.dtype, device=rows.device)
        return (factor @ noise[..., None])[..., 0]


class FullStructure(Structure):
    """Σ H ⊗ φ φᵀ itself, (C P, C P)."""

    sums = ("precision",)

    def zeros(self, like: Tensor) -> Statistics:
        return {"precision": like.new_zeros(like.numel(), like.numel())}

    def curvature(self, draws: Tensor) -> Tensor:
        second = torch.einsum("sna,snb->nab", draws, draws) / len(draws)
        return torch.diag_embed(draws.mean(0)) - second

    def add(self, statistics: Statistics, rows: Tensor, curvature: Tensor, weight: float) -> None:
        classes, width = curvature.shape[-1], rows.shape[1]
        total = statistics["precision"].view(classes, width, classes, width)
        for a in range(classes):
            for b in range(a + 1):
                gram = rows.mT @ (rows * (weight * curvature[:, a, b, None]))
                total[a, :, b, :] += gram
                if b < a:
                    total[b, :, a, :] += gram

    def turned(self, statistics: Statistics) -> Statistics:
        return statistics

    def gaussian(self, statistics: Statistics, prior_precision: float) -> WeightGaussian:
        precision = statistics["precision"]
        return FullGaussian(precision + prior_precision * torch.eye(len(precision)).to(precision))
