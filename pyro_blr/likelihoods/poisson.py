"""Poisson likelihood."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyro.distributions
import torch
import torch.distributions
from torch import Tensor

from ._base import Likelihood, as_tensor
from ._expectations import Constant, Positive
from ._registry import register_likelihood
from ._terms import Product, Term


@register_likelihood(torch.distributions.Poisson, pyro.distributions.Poisson)
class Poisson(Likelihood):
    """E log Poisson(x | β) = x E log β − E β − log x!"""

    roles = {"value": Constant, "rate": Positive}

    def canonical(self, value: Tensor, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
        return {"value": value, "rate": as_tensor(arguments["rate"], value)}

    def terms(self, value: Constant, rate: Positive) -> Sequence[Term | Tensor]:
        x = value.value.to(rate.log.dtype)
        return [Product(rate.log, x), -rate.mean, -torch.lgamma(x + 1)]
