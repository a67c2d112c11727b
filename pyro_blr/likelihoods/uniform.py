"""Uniform likelihood."""

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
from ._terms import Term


@register_likelihood(torch.distributions.Uniform, pyro.distributions.Uniform)
class Uniform(Likelihood):
    """E log U(x | l, h) = −log(h − l), x in its support: so for a Beta site, whose prior is U(0, 1)."""

    roles = {"value": Probability, "low": Constant, "high": Constant}

    def canonical(self, value: Tensor, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
        return {"value": value, **{name: as_tensor(arguments[name], value) for name in ("low", "high")}}

    def terms(self, value: Probability, low: Constant, high: Constant) -> Sequence[Term | Tensor]:
        return [-(high.value - low.value).log() + torch.zeros_like(value.log)]
