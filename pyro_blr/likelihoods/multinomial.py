"""Multinomial likelihood."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyro.distributions
import torch
import torch.distributions
from torch import Tensor

from ._base import Likelihood
from ._expectations import Constant, Expectation, Simplex
from ._parametrisations import simplex, simplex_point
from ._registry import register_likelihood
from ._terms import Product, Term


@register_likelihood(torch.distributions.Multinomial, pyro.distributions.Multinomial)
class Multinomial(Likelihood):
    """E log Multinomial(x | n, p) = Σ_k x_k E log p_k + log n! − Σ_k log x_k!, p on the simplex.

    n is Σ_k x_k, as in torch's `log_prob`; `total_count` is no argument of the density.
    """

    roles = {"value": Constant, "probs": Simplex}

    def canonical(self, value: Tensor, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
        return {"value": value, "probs": simplex(arguments)}

    def points(self, value: Tensor, arguments: Mapping[str, Any]) -> dict[str, Expectation]:
        return {"value": Constant.of(value), "probs": simplex_point(arguments)}

    def terms(self, value: Constant, probs: Simplex) -> Sequence[Term | Tensor]:
        x = value.value.to(probs.log.dtype)
        log_choose = torch.lgamma(x.sum(-1) + 1) - torch.lgamma(x + 1).sum(-1)
        return [Product(probs.log, x, inner=1), log_choose]
