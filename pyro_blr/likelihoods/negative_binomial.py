"""NegativeBinomial likelihood."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyro.distributions
import torch
import torch.distributions
from torch import Tensor

from ._base import Likelihood, as_tensor
from ._expectations import Constant, Expectation, Probability
from ._parametrisations import probability, probability_point
from ._registry import register_likelihood
from ._terms import Product, Term


@register_likelihood(torch.distributions.NegativeBinomial, pyro.distributions.NegativeBinomial)
class NegativeBinomial(Likelihood):
    """E log NB(x | r, p) = x E log p + r E log(1 − p) + log Γ(x + r) − log Γ(r) − log x!, torch's p."""

    roles = {"value": Constant, "total_count": Constant, "probs": Probability}

    def canonical(self, value: Tensor, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
        total_count = as_tensor(arguments["total_count"], value)
        return {"value": value, "total_count": total_count, "probs": probability(value, arguments)}

    def points(self, value: Tensor, arguments: Mapping[str, Any]) -> dict[str, Expectation]:
        return {**super().points(value, arguments), "probs": probability_point(value, arguments)}

    def terms(self, value: Constant, total_count: Constant, probs: Probability) -> Sequence[Term | Tensor]:
        x, r = (a.value.to(probs.log.dtype) for a in (value, total_count))
        nothing = (x == 0) & (r == 0)  # has probability one, where Γ(0) is infinite
        safe = torch.where(nothing, 1.0, r)
        log_choose = torch.lgamma(x + safe) - torch.lgamma(safe) - torch.lgamma(x + 1)
        return [Product(probs.log, x), Product(probs.log_complement, r), log_choose]
