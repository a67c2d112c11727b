"""Gamma and Chi2 likelihoods."""

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


@register_likelihood(
    torch.distributions.Gamma, pyro.distributions.Gamma, torch.distributions.Chi2, pyro.distributions.Chi2
)
class Gamma(Likelihood):
    """E log Gamma(x | α, β) = (α − 1) E log x − E β E x + α E log β − log Γ(α); Chi2(ν) = Gamma(ν/2, 1/2)."""

    roles = {"value": Positive, "concentration": Constant, "rate": Positive}

    def canonical(self, value: Tensor, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
        if "df" in arguments:
            concentration, rate = 0.5 * as_tensor(arguments["df"], value), as_tensor(0.5, value)
        else:
            concentration, rate = (as_tensor(arguments[name], value) for name in ("concentration", "rate"))
        return {"value": value, "concentration": concentration, "rate": rate}

    def terms(self, value: Positive, concentration: Constant, rate: Positive) -> Sequence[Term | Tensor]:
        alpha = concentration.value
        return [
            Product(alpha - 1, value.log),
            Product(-rate.mean, value.mean),
            Product(alpha, rate.log),
            -torch.lgamma(alpha),
        ]
