"""From a support to the Normal pushed onto it."""

import math
from typing import Any

import torch
from pyro.distributions import constraints, transforms
from pyro.distributions.torch_transform import TransformModule
from torch import Tensor
from torch.distributions import biject_to

from ._base import ExponentialFamily
from .diagonal_normal import DiagonalNormal
from .multivariate_normal import MultivariateNormal
from .normal import Normal
from .transformed_normal import TransformedNormal, support_key


class LowerCholeskyVector(transforms.Transform):
    """ℝ^{d(d+1)/2} -> lower triangular d × d matrices: the lower triangle, row by row, exp on the diagonal.

    torch's LowerCholeskyTransform reads a whole matrix, so it is no bijection.
    """

    domain = constraints.real_vector
    codomain = constraints.lower_cholesky
    bijective = True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LowerCholeskyVector)

    def _call(self, x: Tensor) -> Tensor:
        dimension = self.forward_shape(x.shape)[-1]
        rows, columns = torch.tril_indices(dimension, dimension, device=x.device).unbind(0)
        flat = torch.zeros(dimension * dimension, dtype=x.dtype, device=x.device).expand(*x.shape[:-1], -1)
        matrix = flat.index_copy(-1, rows * dimension + columns, x).unflatten(-1, (dimension, dimension))
        return matrix.tril(-1) + matrix.diagonal(dim1=-2, dim2=-1).exp().diag_embed()

    def _inverse(self, y: Tensor) -> Tensor:
        rows, columns = torch.tril_indices(y.shape[-1], y.shape[-1], device=y.device).unbind(0)
        matrix = y.tril(-1) + y.diagonal(dim1=-2, dim2=-1).log().diag_embed()
        return matrix[..., rows, columns]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return y.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def forward_shape(self, shape: Any) -> torch.Size:
        dimension = (math.isqrt(8 * shape[-1] + 1) - 1) // 2
        return torch.Size([*shape[:-1], dimension, dimension])

    def inverse_shape(self, shape: Any) -> torch.Size:
        return torch.Size([*shape[:-2], shape[-1] * (shape[-1] + 1) // 2])


class CorrelationCholesky(transforms.CorrCholeskyTransform):
    """torch's bijection onto Cholesky factors of correlation matrices, without writes and masks, so that it can be batched."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CorrelationCholesky)

    def _call(self, x: Tensor) -> Tensor:
        dimension = self.forward_shape(x.shape)[-1]
        bound = 1 - torch.finfo(x.dtype).eps
        below, entries = _strictly_below(dimension, x.device)
        flat = torch.zeros(dimension * dimension, dtype=x.dtype, device=x.device).expand(*x.shape[:-1], -1)
        matrix = flat.index_copy(-1, entries, x.tanh().clamp(-bound, bound)).unflatten(-1, below.shape)
        rest = (1 - matrix.square()).sqrt().cumprod(-1)
        ones = torch.eye(dimension, dtype=x.dtype, device=x.device)
        return (matrix + ones) * torch.nn.functional.pad(rest[..., :-1], (1, 0), value=1.0)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor, intermediates: Any = None) -> Tensor:
        below, _ = _strictly_below(y.shape[-1], y.device)
        rest = torch.where(below.tril(-2), 1 - y.square().cumsum(-1), 1.0)
        slope = -2 * (x + torch.nn.functional.softplus(-2 * x) - math.log(2.0))
        return 0.5 * rest.log().sum((-2, -1)) + slope.sum(-1)


def _strictly_below(dimension: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A mask of the entries below the diagonal, and their places row by row in the flattened matrix."""
    below = torch.ones(dimension, dimension, dtype=torch.bool, device=device).tril(-1)
    rows, columns = torch.tril_indices(dimension, dimension, -1, device=device).unbind(0)
    return below, rows * dimension + columns


def pushforward_family(support: Any, event_shape: torch.Size, *, diagonal: bool = False) -> ExponentialFamily | None:
    """The Gaussian family of a support: Normal or MultivariateNormal on ℝ and ℝᵈ, else TransformedNormal.

    The Gaussian has a full covariance over the event, or independent elements where it is `diagonal`.
    None where the support is discrete or has no bijection from ℝᵈ (a sphere, a support that is not known).
    """
    if support.is_discrete:
        return None
    try:
        transform = _bijection(support)
    except NotImplementedError:
        return None
    if isinstance(transform, TransformModule):
        return None
    event_shape = torch.Size(event_shape)
    missing = len(event_shape) - transform.codomain.event_dim
    if missing > 0:
        transform = transforms.IndependentTransform(transform, missing)
    shape = transform.inverse_shape(event_shape)
    shape = torch.Size(shape[len(shape) - transform.domain.event_dim :])  # bounds may bring batch dimensions
    whole = DiagonalNormal if diagonal else MultivariateNormal
    base = whole(shape.numel()) if shape else Normal()
    if _is_real(support) and shape == base.event_shape and not diagonal:
        return base
    return TransformedNormal(event_shape, shape, base, support_key(support), support, transform)


def _bijection(support: Any) -> Any:
    """biject_to(support), completed where torch has only a surjection, written anew where `vmap` cannot follow it."""
    if isinstance(support, constraints.independent):
        inner = _bijection(support.base_constraint)
        return transforms.IndependentTransform(inner, support.reinterpreted_batch_ndims)
    if support is constraints.lower_cholesky:
        return LowerCholeskyVector()
    if support is constraints.corr_cholesky:
        return CorrelationCholesky()
    if support is constraints.positive_definite:
        return transforms.ComposeTransform([LowerCholeskyVector(), transforms.CholeskyTransform().inv])
    return biject_to(support)


def _is_real(support: Any) -> bool:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support is constraints.real
