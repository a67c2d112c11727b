"""The interface of a likelihood: its arguments, what must be known of them under q, and E_q[log f]."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from ._expectations import Expectation
from ._terms import Term, sum_terms
from ._weighted import WeightedSums, weighted_total


class Likelihood(ABC):
    """E_q[log f] of a factor f, given the expectations of its arguments, of which the factor's value is one.

    The arguments are independent under q. Where a template is given exact expectations it is exact; the
    message to each argument, and to the value, is its gradient in them. Members have no state: there is one
    object of each class.
    """

    roles: ClassVar[Mapping[str, type[Expectation]]]
    """Canonical argument -> the expectations that the template needs of it."""

    @abstractmethod
    def canonical(self, value: Tensor, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
        """The value and the distribution's constructor arguments -> the canonical arguments.

        Plain torch code: what is decided about a factor (is an argument affine in w, a multiple of τ, ...) is
        decided about these expressions.
        """

    @abstractmethod
    def terms(self, *args: Any, **kwargs: Any) -> Sequence[Term | Tensor]:
        """Tensors and products whose sum is E_q[log f], elementwise over the batch; a keyword a role."""

    def points(self, value: Tensor, arguments: Mapping[str, Any]) -> dict[str, Expectation]:
        """`roles[name].of(canonical[name])` for every name, the arguments being points, without its rounding.

        Overridden where the route over the canonical argument loses digits: log p of logits (whose
        exponential may overflow), the determinant of a covariance given as a Cholesky factor. Where torch
        clamps probabilities away from 0 and 1, so does this.
        """
        return {name: self.roles[name].of(a) for name, a in self.canonical(value, arguments).items()}

    @final
    def expected_log_prob(
        self, arguments: Mapping[str, Expectation], num_event_dims: int = 0, weights: Tensor | None = None
    ) -> Tensor:
        """Σ_event w E_q[log f], the event being the rightmost `num_event_dims` dims of the batch.

        Those dims are what `Independent` reinterprets; a vector's or matrix's own dims are not among them.
        Arguments broadcast: they may have further dims on the left (enumerated states) and dims of size one.
        `weights` broadcasts with the elementwise log f before the event sum (a mask); what it masks must be
        finite.
        """
        return sum_terms(self.terms(**arguments), num_event_dims, weights)

    @final
    def weighted_total(
        self,
        arguments: Mapping[str, Expectation],
        num_event_dims: int,
        batch_shape: Sequence[int],
        sums: WeightedSums,
    ) -> Tensor | None:
        """Σ w E_q[log f] over the whole batch through weighted sums of data; None where that does not pay."""
        return weighted_total(self.terms(**arguments), num_event_dims, batch_shape, sums)


def as_tensor(argument: Any, value: Tensor) -> Tensor:
    """A constructor argument as a tensor; a number takes the dtype and device of the value."""
    if isinstance(argument, Tensor):
        return argument
    dtype = value.dtype if value.dtype.is_floating_point else torch.get_default_dtype()
    return torch.as_tensor(argument, dtype=dtype, device=value.device)
