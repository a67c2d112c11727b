"""Dirichlet likelihood."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyro.distributions
import torch
import torch.distributions
from torch import Tensor

from ._base import Likelihood, as_tensor
from ._expectations import Constant, Simplex
from ._registry import register_likelihood
from ._terms import Product, Term


@register_likelihood(torch.distributions.Dirichlet, pyro.distributions.Dirichlet)
class Dirichlet(Likelihood):
    """E log Dir(x | α) = Σ_k (α_k − 1) E log x_k + log Γ(Σ_k α_k) − Σ_k log Γ(α_k)."""

    roles = {"value": Simplex, "concentration": Constant}

    def canonical(self, value: Tensor, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
        return {"value": value, "concentration": as_tensor(arguments["concentration"], value)}

    def terms(self, value: Simplex, concentration: Constant) -> Sequence[Term | Tensor]:
        alpha = concentration.value
        return [
            Product(alpha - 1, value.log, inner=1),
            torch.lgamma(alpha.sum(-1)) - torch.lgamma(alpha).sum(-1),
        ]
