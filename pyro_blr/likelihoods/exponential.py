"""Exponential likelihood."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyro.distributions
import torch
import torch.distributions
from torch import Tensor

from ._base import Likelihood, as_tensor
from ._expectations import Positive
from ._registry import register_likelihood
from ._terms import Product, Term


@register_likelihood(torch.distributions.Exponential, pyro.distributions.Exponential)
class Exponential(Likelihood):
    """E log Exp(x | β) = E log β − E β E x."""

    roles = {"value": Positive, "rate": Positive}

    def canonical(self, value: Tensor, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
        return {"value": value, "rate": as_tensor(arguments["rate"], value)}

    def terms(self, value: Positive, rate: Positive) -> Sequence[Term | Tensor]:
        return [Product(-rate.mean, value.mean), rate.log]
