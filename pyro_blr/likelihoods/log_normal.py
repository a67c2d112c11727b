"""LogNormal likelihood."""

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


@register_likelihood(torch.distributions.LogNormal, pyro.distributions.LogNormal)
class LogNormal(Likelihood):
    """E log LN(x | m, τ⁻¹) = ½ E log τ − ½ E τ · E(log x − m)² − E log x − ½ log 2π."""

    roles = {"log_value": Linear, "loc": Linear, "precision": Positive}

    def canonical(self, value: Tensor, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
        loc, scale = as_tensor(arguments["loc"], value), as_tensor(arguments["scale"], value)
        return {"log_value": value.log(), "loc": loc, "precision": scale**-2}

    def terms(self, log_value: Linear, loc: Linear, precision: Positive) -> Sequence[Term | Tensor]:
        square = Square(-0.5 * precision.mean, log_value, loc)
        return [square, -log_value.mean, 0.5 * (precision.log - _LOG_2PI)]
