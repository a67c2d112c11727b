"""A Normal pushed through a bijection: the family of any other continuous support."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyro.distributions as distributions
import torch
from pyro.distributions import constraints, transforms
from torch import Tensor

from ._base import ExponentialFamily
from .diagonal_normal import DiagonalNormal


def support_key(value: Any) -> Hashable:
    """What makes two supports the same: the class and the bounds, tensors by value."""
    if isinstance(value, torch.Tensor):
        return ("tensor", value.dtype, value.shape, tuple(value.detach().flatten().tolist()))
    if isinstance(value, constraints.Constraint):
        return (type(value), *((name, support_key(item)) for name, item in sorted(vars(value).items())))
    if isinstance(value, list | tuple):
        return tuple(map(support_key, value))
    return value


class Pushforward(distributions.TransformedDistribution):
    """The law of x = t(u), u ~ base: a TransformedDistribution that knows its support."""

    def __init__(self, base: Any, bijections: list[Any], support: Any) -> None:
        self._support = support
        super().__init__(base, bijections, validate_args=False)

    @constraints.dependent_property(is_discrete=False)
    def support(self) -> Any:
        return self._support

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> "Pushforward":
        new = self._get_checked_instance(Pushforward, _instance)
        new._support = self._support
        return super().expand(batch_shape, _instance=new)


@dataclass(frozen=True)
class TransformedNormal(ExponentialFamily):
    """x = t(u), u ~ N(m, V) flattened: T(x) = (u, vech u uᵀ); λ, A and μ are the Gaussian's in u.

    The variable is u: `entropy` and `kl` are those of u (`kl` is the same for x), and the base measure is du.
    `log_prob` is the density of x, log N(u) − log|dx/du|. Two members are equal when their supports are,
    bounds compared by value.
    """

    shape: torch.Size
    unconstrained_shape: torch.Size  # of u before it is flattened
    base: ExponentialFamily  # of u: Normal for a scalar, else MultivariateNormal or DiagonalNormal
    key: Hashable = field(repr=False)  # `support_key` of the support
    support: Any = field(compare=False)
    transform: Any = field(compare=False, repr=False)

    @property
    def event_shape(self) -> torch.Size:
        return self.shape

    @property
    def num_parameters(self) -> int:
        return self.base.num_parameters

    def unconstrain(self, value: Tensor) -> Tensor:
        """u = t⁻¹(x), (*batch, *event) -> (*batch, *base.event_shape)."""
        unconstrained = self.transform.inv(value)
        batch = unconstrained.shape[: unconstrained.dim() - len(self.unconstrained_shape)]
        return unconstrained.reshape(batch + self.base.event_shape)

    def constrain(self, unconstrained: Tensor) -> Tensor:
        """x = t(u)."""
        return self.transform(self._unflatten(unconstrained))

    def log_abs_det_jacobian(self, unconstrained: Tensor) -> Tensor:
        """log|dx/du|, (*batch, *base.event_shape) -> (*batch)."""
        u = self._unflatten(unconstrained)
        return self.transform.log_abs_det_jacobian(u, self.transform(u))

    def _unflatten(self, unconstrained: Tensor) -> Tensor:
        batch = unconstrained.shape[: unconstrained.dim() - len(self.base.event_shape)]
        return unconstrained.reshape(batch + self.unconstrained_shape)

    def sufficient_statistics(self, value: Tensor) -> Tensor:
        return self.base.sufficient_statistics(self.unconstrain(value))

    def log_partition(self, natural: Tensor) -> Tensor:
        return self.base.log_partition(natural)

    def to_expectation(self, natural: Tensor) -> Tensor:
        return self.base.to_expectation(natural)

    def to_natural(self, expectation: Tensor) -> Tensor:
        return self.base.to_natural(expectation)

    def contains(self, natural: Tensor) -> Tensor:
        return self.base.contains(natural)

    def _bend(self, natural: Tensor, direction: Tensor) -> Tensor:
        return self.base._bend(natural, direction)

    def moments(self, natural: Tensor) -> dict[str, Tensor]:
        return self.base.moments(natural)

    def message(self, natural: Tensor, gradients: Mapping[str, Tensor]) -> Tensor:
        return self.base.message(natural, gradients)

    def to_distribution(self, natural: Tensor) -> Any:
        inner, outer = self.base.event_shape, self.unconstrained_shape
        reshape = [] if inner == outer else [transforms.ReshapeTransform(inner, outer)]
        return Pushforward(self.base.to_distribution(natural), [*reshape, self.transform], self.support)

    def from_distribution(self, distribution: Any) -> Tensor:
        """λ of what `to_distribution` makes, or of a TransformedDistribution by the same bijection."""
        gaussian: tuple = (torch.distributions.Normal, torch.distributions.MultivariateNormal)
        if isinstance(self.base, DiagonalNormal):
            gaussian = (torch.distributions.Independent,)
        inner, bijections = getattr(distribution, "base_dist", None), getattr(distribution, "transforms", [])
        if not isinstance(inner, gaussian) or inner.event_shape != self.base.event_shape:
            raise self._refuse(distribution)
        bijections = [b for b in bijections if not isinstance(b, transforms.ReshapeTransform)]
        same = isinstance(distribution, Pushforward) and support_key(distribution.support) == self.key
        if distribution.event_shape != self.shape or not (same or bijections == [self.transform]):
            raise self._refuse(distribution)
        return self.base.from_distribution(inner)

    @classmethod
    def of(cls, distribution: Any) -> None:
        return None  # a support, not a distribution, decides: see `pushforward_family`

    def log_prob(self, natural: Tensor, value: Tensor) -> Tensor:
        unconstrained = self.unconstrain(value)
        jacobian = self.transform.log_abs_det_jacobian(self._unflatten(unconstrained), value)
        return self.base.log_prob(natural, unconstrained) - jacobian

    def entropy(self, natural: Tensor) -> Tensor:
        """The entropy of u."""
        return self.base.entropy(natural)

    def kl(self, natural_q: Tensor, natural_p: Tensor) -> Tensor:
        return self.base.kl(natural_q, natural_p)

    def fisher(self, natural: Tensor) -> Tensor:
        return self.base.fisher(natural)

    def natural_gradient(self, natural: Tensor, gradient: Tensor) -> Tensor:
        return self.base.natural_gradient(natural, gradient)
