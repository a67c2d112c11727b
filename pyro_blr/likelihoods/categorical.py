"""Categorical likelihood."""

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
from ._terms import Lookup, Term


@register_likelihood(torch.distributions.Categorical, pyro.distributions.Categorical)
class Categorical(Likelihood):
    """E log Categorical(k | p) = E log p_k, p on the simplex."""

    roles = {"value": Constant, "probs": Simplex}

    def canonical(self, value: Tensor, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
        return {"value": value, "probs": simplex(arguments)}

    def points(self, value: Tensor, arguments: Mapping[str, Any]) -> dict[str, Expectation]:
        return {"value": Constant.of(value), "probs": simplex_point(arguments)}

    def terms(self, value: Constant, probs: Simplex) -> Sequence[Term | Tensor]:
        return [Lookup(probs.log, value.value)]
