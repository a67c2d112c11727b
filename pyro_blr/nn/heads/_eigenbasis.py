"""Precisions of a softmax head in the eigenbasis of its features: a class-by-class matrix for each direction."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_blr.nn.heads._laplacian import product_weights
from pyro_blr.nn.heads._structures import Statistics, Structure, WeightGaussian

__all__ = ["EigenGaussian", "EigenbasisStructure", "KroneckerStructure"]

# Weights that are worked on at once: what a head of a vocabulary needs on the way is a small part of it.
BLOCK_NUMBERS = 1 << 21


class Block(NamedTuple):
    """Directions j of the basis, with Λ_j⁻¹ = diag(inverse) + shared sharedᵀ: basis (P, b), d, inverse and shared (C, b)."""

    basis: Tensor
    weights: Tensor
    inverse: Tensor
    shared: Tensor


class EigenGaussian(WeightGaussian):
    """Λ_j = diag(d_j) − d_j d_jᵀ / Σ d_j + δ I for the weights along direction j of an orthonormal basis, independent between directions.

        Λ_j⁻¹ = diag(1 / (d + δ)) + u uᵀ / κ,     u = d / (d + δ),     κ = Σ_c δ d_c / (d_c + δ)     (Sherman and Morrison)

    degrees: the diagonal h = d (1 − d / Σ d), (C, P), or two factors of it, (C, 1) and (1, P).
    """

    def __init__(self, basis: Tensor, degrees: tuple[Tensor, Tensor], prior_precision: float) -> None:
        self.basis, self.degrees, self.prior_precision = basis, degrees, prior_precision
        self._kept: list[Block] | None = None

    def times(self, weights: Tensor) -> Tensor:
        total = self.prior_precision * weights
        for block in self.blocks():
            along = weights @ block.basis
            share = (block.weights * along).sum(0) / block.weights.sum(0).clamp_min(tiny(weights))
            total = total.addmm_(block.weights * (along - share), block.basis.mT)
        return total

    def solve(self, gradient: Tensor) -> Tensor:
        step = torch.zeros_like(gradient)
        for block in self.blocks():
            step.addmm_(solved(block, gradient @ block.basis), block.basis.mT)
        return step

    def shift(self, mean: Tensor, residual: Tensor, rows: Tensor, start: Tensor | None, rate: float) -> None:
        """mean += ρ Λ⁻¹ (Rᵀ X − δ (mean − start)), in place, a block of directions at once, with R (n, C) and X (n, P)."""
        for block in self.blocks():
            along = residual.mT @ (rows @ block.basis)
            along.sub_(mean @ block.basis, alpha=self.prior_precision)
            if start is not None:
                along.add_(start @ block.basis, alpha=self.prior_precision)
            mean.addmm_(solved(block, along), block.basis.mT, alpha=rate)

    def stddev(self) -> Tensor:
        total = torch.zeros_like(self.degrees[0] * self.degrees[1])
        for block in self.blocks():
            total.addmm_(block.inverse + block.shared.square(), block.basis.mT.square())
        return total.sqrt_()

    def variance(self, rows: Tensor) -> Tensor:
        total = rows.new_zeros(len(rows), len(self.degrees[0]))
        for block in self.blocks():
            total.addmm_((rows @ block.basis).square(), (block.inverse + block.shared.square()).mT)
        return total

    def contrast(self, rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        shared = torch.zeros_like(weights)
        for block in self.blocks():
            squares = (rows @ block.basis).square()
            shared.addcmul_(weights, squares @ block.inverse.mT)
            shared.addmm_(squares * (weights @ block.shared), block.shared.mT)
        return shared, (shared * weights).sum(-1)

    def draw(self, rows: Tensor, count: int) -> Tensor:
        alone = rows.new_zeros(len(rows), len(self.degrees[0]))
        draws = torch.randn(count, *alone.shape, dtype=rows.dtype, device=rows.device)
        together = torch.zeros_like(draws)
        for block in self.blocks():
            along = rows @ block.basis
            alone.addmm_(along.square(), block.inverse.mT)
            noise = torch.randn(count, *along.shape, dtype=rows.dtype, device=rows.device)
            together.view(-1, alone.shape[1]).addmm_((noise * along).reshape(-1, along.shape[1]), block.shared.mT)
        return draws.mul_(alone.sqrt_()).add_(together)

    def blocks(self) -> Iterator[Block]:
        """All directions, in blocks; kept where they are one."""
        classes, width = len(self.degrees[0]), len(self.basis)
        size = max(1, BLOCK_NUMBERS // classes)
        if self._kept is not None:
            yield from self._kept
            return
        for start in range(0, width, size):
            block = self._block(slice(start, start + size))
            if size >= width:
                self._kept = [block]
            yield block

    def _block(self, part: slice) -> Block:
        classes, directions = self.degrees
        degrees = classes * directions[:, part] if classes.shape[1] == 1 else classes[:, part] * directions
        weights = product_weights(degrees)
        inverse = 1 / (weights + self.prior_precision)
        shared = weights * inverse
        shared = shared / (self.prior_precision * shared.sum(0)).clamp_min(tiny(shared)).sqrt()
        return Block(self.basis[:, part], weights, inverse, shared)


class EigenbasisStructure(Structure):
    """The diagonal of Σ H ⊗ φ φᵀ in the basis ⊗ classes: h_cj = Σ_n H_cc (u_jᵀφ)², (C, P), u_j the eigenvectors of Σ_n tr(H_n) φ φᵀ.

    George et al. 2018 (EKFAC), with a basis that counts what has curvature, and with what classes share kept free.
    """

    sums = ("moment", "degrees")

    def zeros(self, like: Tensor) -> Statistics:
        width = like.shape[1]
        return {
            "moment": like.new_zeros(width, width),
            "degrees": like.new_zeros(like.shape),
            "basis": torch.eye(width, dtype=like.dtype, device=like.device),
        }

    def curvature(self, draws: Tensor) -> Tensor:
        return (draws - draws.square()).mean(0)

    def add(self, statistics: Statistics, rows: Tensor, curvature: Tensor, weight: float) -> None:
        statistics["moment"].addmm_(rows.mT, rows * curvature.sum(1, keepdim=True), alpha=weight)
        statistics["degrees"].addmm_(curvature.mT, (rows @ statistics["basis"]).square_(), alpha=weight)

    def turned(self, statistics: Statistics) -> Statistics:
        basis = torch.linalg.eigh(statistics["moment"]).eigenvectors.contiguous()
        turn = (statistics["basis"].mT @ basis).square_()
        for part in statistics["degrees"].split(1024):
            part.copy_(part @ turn)
        return {**statistics, "basis": basis}

    def gaussian(self, statistics: Statistics, prior_precision: float) -> EigenGaussian:
        degrees = statistics["degrees"]
        return EigenGaussian(statistics["basis"], (degrees, degrees.new_ones(1, 1)), prior_precision)


class KroneckerStructure(Structure):
    """Σ H ⊗ φ φᵀ ≈ A ⊗ b / t for the diagonal of H, with references Â and b̂ that are A and b as they were known before:

        A = Σ_n ⟨h_n, b̂⟩ φ φᵀ,     b = Σ_n ⟨φ φᵀ, Â⟩ h_n,     t = Σ_n ⟨h_n, b̂⟩ ⟨φ φᵀ, Â⟩.

    At A ∝ Â and b ∝ b̂ it is the nearest Kronecker product in the Frobenius norm (Van Loan and Pitsianis 1993: one step of the power
    method); Martens and Grosse 2015 (K-FAC) is Â = I, b̂ = 1 with averages taken apart.
    """

    sums = ("moment", "degrees", "total")

    def zeros(self, like: Tensor) -> Statistics:
        classes, width = like.shape
        return {
            "moment": like.new_zeros(width, width),
            "degrees": like.new_zeros(classes),
            "total": like.new_zeros(()),
            "basis": torch.eye(width, dtype=like.dtype, device=like.device),
            "reference_degrees": like.new_ones(classes),
            "reference_spectrum": like.new_ones(width),
        }

    def curvature(self, draws: Tensor) -> Tensor:
        return (draws - draws.square()).mean(0)

    def add(self, statistics: Statistics, rows: Tensor, curvature: Tensor, weight: float) -> None:
        of_classes = curvature @ statistics["reference_degrees"]
        of_features = (rows @ statistics["basis"]).square_() @ statistics["reference_spectrum"]
        statistics["moment"].addmm_(rows.mT, rows * of_classes[:, None], alpha=weight)
        statistics["degrees"].addmv_(curvature.mT, of_features, alpha=weight)
        statistics["total"].add_(of_classes @ of_features, alpha=weight)

    def turned(self, statistics: Statistics) -> Statistics:
        values, basis = torch.linalg.eigh(statistics["moment"])
        values, degrees = values.clamp_min(0), statistics["degrees"]
        return {
            **statistics,
            "basis": basis.contiguous(),
            "reference_spectrum": values / values.mean().clamp_min(tiny(values)),
            "reference_degrees": degrees / degrees.mean().clamp_min(tiny(values)),
        }

    def gaussian(self, statistics: Statistics, prior_precision: float) -> EigenGaussian:
        basis, moment = statistics["basis"], statistics["moment"]
        spectrum = ((moment @ basis) * basis).sum(0).clamp_min(0) / statistics["total"].clamp_min(tiny(moment))
        return EigenGaussian(basis, (statistics["degrees"][:, None], spectrum[None]), prior_precision)


def solved(block: Block, along: Tensor) -> Tensor:
    """Λ_j⁻¹ g_j for the directions of a block, (C, b)."""
    return along * block.inverse + block.shared * (block.shared * along).sum(0)


def tiny(like: Tensor) -> float:
    """What a sum is kept above that is divided by."""
    return torch.finfo(like.dtype).tiny * 1e4
