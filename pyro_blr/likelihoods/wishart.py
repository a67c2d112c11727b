"""Wishart likelihood."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pyro.distributions
import torch
import torch.distributions
from torch import Tensor

from ._base import Likelihood, as_tensor
from ._expectations import Constant, Expectation, Matrix
from ._parametrisations import inverse, inverse_point
from ._registry import register_likelihood
from ._terms import Product, Term


@register_likelihood(torch.distributions.Wishart, pyro.distributions.Wishart)
class Wishart(Likelihood):
    """E log W(X | ν, B⁻¹) = ½(ν − d − 1) E log|X| − ½ tr(E B E X) + ½ν E log|B| − ½ν d log 2 − log Γ_d(ν/2).

    B is the inverse scale: torch's `precision_matrix`, and E X = ν B⁻¹.
    """

    roles = {"value": Matrix, "df": Constant, "inverse_scale": Matrix}

    def canonical(self, value: Tensor, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
        return {"value": value, "df": as_tensor(arguments["df"], value), "inverse_scale": inverse(arguments)}

    def points(self, value: Tensor, arguments: Mapping[str, Any]) -> dict[str, Expectation]:
        points = (Matrix.of(value), Constant.of(as_tensor(arguments["df"], value)), inverse_point(arguments))
        return dict(zip(self.roles, points, strict=True))

    def terms(self, value: Matrix, df: Constant, inverse_scale: Matrix) -> Sequence[Term | Tensor]:
        nu, d = df.value, value.mean.size(-1)
        return [
            Product(-0.5 * inverse_scale.mean, value.mean, inner=2),
            Product(0.5 * (nu - d - 1), value.logdet),
            Product(0.5 * nu, inverse_scale.logdet - d * math.log(2)),
            -torch.mvlgamma(0.5 * nu, d),
        ]
