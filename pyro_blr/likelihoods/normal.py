"""Normal likelihood."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pyro.distributions
import torch
import torch.distributions
from torch import Tensor

from ._base import Likelihood, as_tensor
from ._expectations import Linear, Positive
from ._registry import register_likelihood
from ._terms import Square, Term

_LOG_2PI = math.log(2 * math.pi)


@register_likelihood(torch.distributions.Normal, pyro.distributions.Normal)
class Normal(Likelihood):
    """E log N(x | m, τ⁻¹) = ½ E log τ − ½ E τ · E(x − m)² − ½ log 2π."""

    roles = {"value": Linear, "loc": Linear, "precision": Positive}

    def canonical(self, value: Tensor, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
        loc, scale = as_tensor(arguments["loc"], value), as_tensor(arguments["scale"], value)
        return {"value": value, "loc": loc, "precision": scale**-2}

    def terms(self, value: Linear, loc: Linear, precision: Positive) -> Sequence[Term | Tensor]:
        return [Square(-0.5 * precision.mean, value, loc), 0.5 * (precision.log - _LOG_2PI)]
