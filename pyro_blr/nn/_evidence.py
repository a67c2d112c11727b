"""What the draws of one step have told, until the step takes it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_blr.nn._buckets import Bucket
from pyro_blr.nn._ranks import any_rank, local

__all__ = ["Evidence", "accumulate"]


@dataclass
class Evidence:
    """Gradients of the mean loss and curvatures, by parameter, summed over draws; `grams` and `smooth` by a group's first.

    `squares` are curvatures that the loss was differentiated for: of Gauss and Newton, or the Hessian's; `smooth` says where the
    latter could be had at the first step. `drawn` are buckets that still hold the weights drawn.

    A single draw leaves its gradients where autograd put them (`gradients` is empty), and Price's estimate is made from the
    noise when the step takes it; only several draws have sums of their own.
    """

    observations: int = 0
    squares: dict[Tensor, Tensor] = field(default_factory=dict)
    grams: dict[Tensor, Tensor] = field(default_factory=dict)
    drawn: list[Bucket] = field(default_factory=list)
    smooth: set[Tensor] = field(default_factory=set)
    gradients: dict[Tensor, Tensor] = field(default_factory=dict)
    estimates: dict[Tensor, Tensor] = field(default_factory=dict)

    def gradient(self, parameter: Tensor) -> Tensor | None:
        """ĝ, in the dtype of the loss's gradient; None where the loss does not depend on the parameter."""
        found = self.gradients.get(parameter)
        return parameter.grad if found is None else found

    def fault(self, loss: Any, parameters: Iterable[Tensor]) -> str | None:
        """What is not finite, in any process: the loss, or a gradient or curvature; None where the step can be taken."""
        parameters = list(parameters)
        said = self.own_fault(loss, parameters)
        if parameters and any_rank(said is not None, parameters[0].device):
            return said or "another process found what is not finite"
        return said

    def own_fault(self, loss: Any, parameters: Iterable[Tensor]) -> str | None:
        """What is not finite in this process."""
        if loss is not None and not math.isfinite(loss):
            return f"the loss is {float(loss)}"
        gradients = [self.gradient(parameter) for parameter in parameters]
        found = [local(gradient) for gradient in gradients if gradient is not None]
        curvatures = [*self.squares.values(), *self.estimates.values(), *self.grams.values()]
        if finite([*found, *curvatures]):
            return None
        return f"a {'curvature' if finite(found) else 'gradient'} of the loss has an infinity or NaN"


def finite(tensors: list[Tensor]) -> bool:
    """Whether every element of every tensor is finite; waits for the device once."""
    if not tensors:
        return True
    if all(tensor.device.type == "cpu" for tensor in tensors):
        # A sum is an infinity or NaN where an element is, and much faster here than a maximum.
        return all(
            math.isfinite(tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))) for tensor in tensors
        )
    norms = torch._foreach_norm(tensors, math.inf)
    return math.isfinite(torch.stack([norm.to(norms[0].device, torch.float32) for norm in norms]).sum())


@torch.no_grad()
def accumulate(sums: dict[Tensor, Tensor], parameter: Tensor, value: Tensor, weight: float = 1.0) -> None:
    """sums[parameter] += weight · value, in float32 at least; may take `value` itself as the sum."""
    known = sums.get(parameter)
    if known is None:
        sums[parameter] = value.to(torch.promote_types(value.dtype, torch.float32)).mul_(weight)
    else:
        known.add_(value, alpha=weight)
