"""What the draws of one step have told, until the step takes it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["Evidence", "accumulate"]


@dataclass
class Evidence:
    """Gradients of the mean loss and curvatures, by parameter, summed over draws.

    A single draw leaves its gradients where autograd put them (`gradients` is empty), and Price's estimate is made from the
    noise when the step takes it; only several draws have sums of their own.
    """

    observations: int = 0
    squares: dict[Tensor, Tensor] = field(default_factory=dict)
    gradients: dict[Tensor, Tensor] = field(default_factory=dict)
    estimates: dict[Tensor, Tensor] = field(default_factory=dict)

    def gradient(self, parameter: Tensor) -> Tensor | None:
        """ĝ, in the dtype of the loss's gradient; None where the loss does not depend on the parameter."""
        found = self.gradients.get(parameter)
        return parameter.grad if found is None else found

    def square(self, parameter: Tensor) -> Tensor:
        """ĥ of Gauss and Newton, averaged over the observations."""
        return self.squares[parameter] / self.observations

    def fault(self, loss: Any, parameters: Iterable[Tensor]) -> str | None:
        """What is not finite: the loss, or a gradient or curvature; None where the step can be taken."""
        if loss is not None and not math.isfinite(loss):
            return f"the loss is {float(loss)}"
        gradients = [self.gradient(parameter) for parameter in parameters]
        found = [gradient for gradient in gradients if gradient is not None]
        for name, tensors in (("gradient", found), ("curvature", [*self.squares.values(), *self.estimates.values()])):
            norms = torch._foreach_norm(tensors, math.inf) if tensors else []
            if not all(math.isfinite(norm.item()) for norm in norms):
                return f"a {name} of the loss has an infinity or NaN"
        return None


@torch.no_grad()
def accumulate(sums: dict[Tensor, Tensor], parameter: Tensor, value: Tensor, weight: float = 1.0) -> None:
    """sums[parameter] += weight · value, in float32 at least; may take `value` itself as the sum."""
    known = sums.get(parameter)
    if known is None:
        sums[parameter] = value.to(torch.promote_types(value.dtype, torch.float32)).mul_(weight)
    else:
        known.add_(value, alpha=weight)
