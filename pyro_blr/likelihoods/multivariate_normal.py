"""MultivariateNormal likelihood."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pyro.distributions
import torch
import torch.distributions
from torch import Tensor

from ._base import Likelihood, as_tensor
from ._expectations import Expectation, Matrix, Vector
from ._parametrisations import inverse, inverse_point
from ._registry import register_likelihood
from ._terms import Product, Term

_LOG_2PI = math.log(2 * math.pi)


@register_likelihood(torch.distributions.MultivariateNormal, pyro.distributions.MultivariateNormal)
class MultivariateNormal(Likelihood):
    """E log N(x | m, Λ⁻¹) = ½ E log|Λ| − ½ tr(E Λ (r rᵀ + Cov x + Cov m)) − ½ d log 2π, r = E x − E m."""

    roles = {"value": Vector, "loc": Vector, "precision": Matrix}

    def canonical(self, value: Tensor, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
        return {"value": value, "loc": as_tensor(arguments["loc"], value), "precision": inverse(arguments)}

    def points(self, value: Tensor, arguments: Mapping[str, Any]) -> dict[str, Expectation]:
        points = (Vector.of(value), Vector.of(as_tensor(arguments["loc"], value)), inverse_point(arguments))
        return dict(zip(self.roles, points, strict=True))

    def terms(self, value: Vector, loc: Vector, precision: Matrix) -> Sequence[Term | Tensor]:
        residual = value.mean - loc.mean
        # einsum, because matmul would copy a precision per component to every observation
        scaled = torch.einsum("...i,...ij->...j", residual, precision.mean)
        terms: list[Term | Tensor] = [
            -0.5 * (scaled * residual).sum(-1),
            0.5 * (precision.logdet - residual.size(-1) * _LOG_2PI),
        ]
        for covariance in (value.covariance, loc.covariance):
            if covariance is not None:
                terms.append(Product(-0.5 * precision.mean, covariance, inner=2))
        return terms
