"""InverseGamma likelihood."""

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


@register_likelihood(torch.distributions.InverseGamma, pyro.distributions.InverseGamma)
class InverseGamma(Likelihood):
    """E log IG(x | α, β) = (α + 1) E log x⁻¹ − E β E x⁻¹ + α E log β − log Γ(α), in terms of x⁻¹."""

    roles = {"inverse": Positive, "concentration": Constant, "rate": Positive}

    def canonical(self, value: Tensor, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
        concentration, rate = (as_tensor(arguments[name], value) for name in ("concentration", "rate"))
        return {"inverse": value**-1, "concentration": concentration, "rate": rate}

    def terms(self, inverse: Positive, concentration: Constant, rate: Positive) -> Sequence[Term | Tensor]:
        alpha = concentration.value
        return [
            Product(alpha + 1, inverse.log),
            Product(-rate.mean, inverse.mean),
            Product(alpha, rate.log),
            -torch.lgamma(alpha),
        ]
