"""White coordinates of a factor of q around its λ: where the Fisher matrix is the identity, whatever the scales."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pyro_blr.blocks import Block, is_gaussian

__all__ = ["Coordinates", "coordinates_of"]

_CERTAIN = 1e-8
_LOST = 1e-10  # of the correlation of T: directions that the family has in name only


@dataclass(frozen=True)
class Coordinates:
    """ξ (*batch, k) ↦ moments of the block, with ξ = 0 at the present λ."""

    block: Block
    natural: Tensor

    @property
    def size(self) -> int:
        """Length of ξ for one element of the batch."""
        raise NotImplementedError

    def moments(self, xi: Tensor) -> dict[str, Tensor]:
        """The named expectations at ξ, differentiable."""
        raise NotImplementedError

    def at(self, xi: Tensor) -> Tensor:
        """λ at ξ, differentiable."""
        raise NotImplementedError

    def own(self, hessian: Tensor, gradient: Tensor) -> Tensor:
        """∇²_ξ (f − ⟨∇_μ f, μ⟩) at 0, (*batch, k, k), from ∇²_ξ f and ∇_ξ f: what f has of ∇²_μ f in one element."""
        raise NotImplementedError


class _Gaussian(Coordinates):
    """Mean m + L a and covariance L (1 + Σ_k b_k E_k) Lᵀ: ξ = (a, b), with E_k symmetric and ½ tr E_j E_k = δ_jk."""

    @cached_property
    def _root(self) -> tuple[Tensor, Tensor, bool]:
        """(m, L, whether L is a matrix): elements that are independent have their own standard deviations."""
        found = self.block.family.moments(self.natural)
        if "covariance" in found:
            return found["mean"], torch.linalg.cholesky(found["covariance"]), True
        return found["mean"], found["variance"].sqrt(), False

    @property
    def _event(self) -> torch.Size:
        return self._root[0].shape[self.natural.dim() - 1 :]

    @cached_property
    def _basis(self) -> Tensor:
        """(k, d, d)."""
        d = self._event.numel()
        rows, columns = torch.tril_indices(d, d, device=self.natural.device).unbind(0)
        index = torch.arange(len(rows), device=self.natural.device)
        basis = self.natural.new_zeros(len(rows), d, d)
        basis[index, rows, columns] = torch.where(rows == columns, math.sqrt(2.0), 1.0).to(basis)
        return torch.maximum(basis, basis.mT)

    @property
    def size(self) -> int:
        d = self._event.numel()
        return d + (d * (d + 1) // 2 if self._root[2] else d)

    def moments(self, xi: Tensor) -> dict[str, Tensor]:
        mean, root, joint = self._root
        d = self._event.numel()
        first, second = xi[..., :d], xi[..., d:]
        if not joint:
            shape = mean.shape
            spread = 1 + math.sqrt(2) * second.reshape(shape)
            return {"mean": mean + root * first.reshape(shape), "variance": root.square() * spread}
        inner = torch.eye(d, dtype=xi.dtype, device=xi.device) + torch.einsum("...k,kij->...ij", second, self._basis)
        return {"mean": mean + (root @ first.unsqueeze(-1)).squeeze(-1), "covariance": root @ inner @ root.mT}

    def at(self, xi: Tensor) -> Tensor:
        """Through E T over 2 d points, exact because T is quadratic in u."""
        moments = self.moments(xi)
        if "covariance" in moments:
            root = torch.linalg.cholesky(moments["covariance"])
            steps = math.sqrt(root.shape[-1]) * root.movedim(-1, 0)
        else:
            steps = moments["variance"].sqrt().unsqueeze(0)
        points = torch.cat([moments["mean"] + steps, moments["mean"] - steps])
        return self.block.family.to_natural(self.block.statistics(points).mean(0))

    def own(self, hessian: Tensor, gradient: Tensor) -> Tensor:
        """Nothing in the means: ⟨∇_μ f, μ⟩ has 2 ∇_V f there, which is ∇²_m f (Price), also where f is averaged
        over draws and the two estimates differ.
        """
        d = self._event.numel()
        result = hessian.clone()
        if self._root[2]:
            result[..., :d, :d] = 0.0
        else:
            result[..., :d, :d].diagonal(dim1=-2, dim2=-1).zero_()
        return result


class _General(Coordinates):
    """λ + W ξ with Wᵀ F W = 1, on the directions that F has."""

    @property
    def size(self) -> int:
        return self.natural.shape[-1]

    @cached_property
    def _white(self) -> Tensor:
        fisher = self.block.family.fisher(self.natural)
        variances = fisher.diagonal(dim1=-2, dim2=-1)
        scale = variances.clamp_min(torch.finfo(fisher.dtype).tiny).rsqrt()
        if self.block.is_discrete:  # of a probability so near 0 or 1 rounding has left no variance
            scale = torch.where(variances > _CERTAIN, scale, 0.0)
        values, vectors = torch.linalg.eigh(scale.unsqueeze(-1) * fisher * scale.unsqueeze(-2))
        inverse = torch.where(values > _LOST, values.clamp_min(_LOST).rsqrt(), 0.0)
        return scale.unsqueeze(-1) * vectors * inverse.unsqueeze(-2)

    def moments(self, xi: Tensor) -> dict[str, Tensor]:
        return self.block.family.moments(self.at(xi))

    def at(self, xi: Tensor) -> Tensor:
        return self.natural + (self._white @ xi.unsqueeze(-1)).squeeze(-1)

    def own(self, hessian: Tensor, gradient: Tensor) -> Tensor:
        """⟨m, μ(λ)⟩ has the Hessian Wᵀ ∇² ⟨m, μ(λ)⟩ W, with m = W g since F⁻¹ = W Wᵀ."""
        white = self._white
        message = (white @ gradient.unsqueeze(-1)).squeeze(-1)

        def paired(natural: Tensor, weights: Tensor) -> Tensor:
            return (self.block.family.to_expectation(natural) * weights).sum()

        size = self.natural.shape[-1]
        curved = torch.func.vmap(torch.func.hessian(paired))(self.natural.reshape(-1, size), message.reshape(-1, size))
        return hessian - white.mT @ curved.reshape(*self.natural.shape, size) @ white


def coordinates_of(block: Block, natural: Tensor) -> Coordinates:
    """The coordinates that suit the block's family."""
    natural = natural.detach().double()
    return _Gaussian(block, natural) if is_gaussian(block.family) else _General(block, natural)
