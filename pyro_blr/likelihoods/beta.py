"""Beta likelihood."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyro.distributions
import torch
import torch.distributions
from torch import Tensor

from ._base import Likelihood, as_tensor
from ._expectations import Constant, Probability
from ._registry import register_likelihood
from ._terms import Product, Term


@register_likelihood(torch.distributions.Beta, pyro.distributions.Beta)
class Beta(Likelihood):
    """E log Beta(x | α, β) = (α − 1) E log x + (β − 1) E log(1 − x) + log Γ(α + β) − log Γ(α) − log Γ(β)."""

    roles = {"value": Probability, "concentration1": Constant, "concentration0": Constant}

    def canonical(self, value: Tensor, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
        alpha, beta = (as_tensor(arguments[name], value) for name in ("concentration1", "concentration0"))
        return {"value": value, "concentration1": alpha, "concentration0": beta}

    def terms(self, value: Probability, concentration1: Constant, concentration0: Constant) -> Sequence[Term | Tensor]:
        alpha, beta = concentration1.value, concentration0.value
        return [
            Product(alpha - 1, value.log),
            Product(beta - 1, value.log_complement),
            torch.lgamma(alpha + beta) - torch.lgamma(alpha) - torch.lgamma(beta),
        ]
