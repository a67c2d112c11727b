"""Bernoulli likelihood."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyro.distributions
import torch
import torch.distributions
from torch import Tensor

from ._base import Likelihood
from ._expectations import Constant, Expectation, Probability
from ._parametrisations import probability, probability_point
from ._registry import register_likelihood
from ._terms import Product, Term


@register_likelihood(torch.distributions.Bernoulli, pyro.distributions.Bernoulli)
class Bernoulli(Likelihood):
    """E log Bernoulli(x | p) = x E log p + (1 − x) E log(1 − p)."""

    roles = {"value": Constant, "probs": Probability}

    def canonical(self, value: Tensor, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
        return {"value": value, "probs": probability(value, arguments)}

    def points(self, value: Tensor, arguments: Mapping[str, Any]) -> dict[str, Expectation]:
        return {**super().points(value, arguments), "probs": probability_point(value, arguments)}

    def terms(self, value: Constant, probs: Probability) -> Sequence[Term | Tensor]:
        x = value.value.to(probs.log.dtype)
        return [Product(probs.log, x), Product(probs.log_complement, 1 - x)]
