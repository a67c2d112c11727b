"""Binomial likelihood."""

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


@register_likelihood(torch.distributions.Binomial, pyro.distributions.Binomial)
class Binomial(Likelihood):
    """E log Binomial(x | n, p) = x E log p + (n − x) E log(1 − p) + log n! − log x! − log (n − x)!"""

    roles = {"value": Constant, "total_count": Constant, "probs": Probability}

    def canonical(self, value: Tensor, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
        total_count = as_tensor(arguments.get("total_count", 1), value)
        return {"value": value, "total_count": total_count, "probs": probability(value, arguments)}

    def points(self, value: Tensor, arguments: Mapping[str, Any]) -> dict[str, Expectation]:
        return {**super().points(value, arguments), "probs": probability_point(value, arguments)}

    def terms(self, value: Constant, total_count: Constant, probs: Probability) -> Sequence[Term | Tensor]:
        x, n = (a.value.to(probs.log.dtype) for a in (value, total_count))
        log_choose = torch.lgamma(n + 1) - torch.lgamma(x + 1) - torch.lgamma(n - x + 1)
        return [Product(probs.log, x), Product(probs.log_complement, n - x), log_choose]
