"""ImproperUniform likelihood."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyro.distributions
import torch
from torch import Tensor

from ._base import Likelihood
from ._registry import register_likelihood
from ._terms import Term


@register_likelihood(pyro.distributions.ImproperUniform)
class ImproperUniform(Likelihood):
    """log f = 0 on the support, whatever q is: no argument is asked for, and the value gets no message."""

    roles = {}

    def canonical(self, value: Tensor, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
        return {}

    def terms(self) -> Sequence[Term | Tensor]:
        return [torch.zeros(())]
