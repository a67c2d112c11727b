"""Constructor arguments in their several parametrisations -> canonical ones; their expectations at points."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributions.utils import clamp_probs
from torch.nn.functional import logsigmoid

from ._base import as_tensor
from ._expectations import Matrix, Probability, Simplex


def given(arguments: Mapping[str, Any], name: str) -> bool:
    """Whether the argument was passed."""
    return arguments.get(name) is not None


def probability(value: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """p, from `probs` or as σ(`logits`)."""
    if given(arguments, "probs"):
        return as_tensor(arguments["probs"], value)
    return torch.sigmoid(as_tensor(arguments["logits"], value))


def probability_point(value: Tensor, arguments: Mapping[str, Any]) -> Probability:
    """log p and log(1 − p); of logits, without a round trip through p."""
    if given(arguments, "probs"):
        return Probability.of(clamp_probs(as_tensor(arguments["probs"], value)))
    logits = as_tensor(arguments["logits"], value)
    return Probability(_finite(logsigmoid(logits)), _finite(logsigmoid(-logits)))


def simplex(arguments: Mapping[str, Any]) -> Tensor:
    """p, from `probs` or as exp(`logits`), so that `logits=theta.log()` is theta again; not normalised."""
    return arguments["probs"] if given(arguments, "probs") else torch.exp(arguments["logits"])


def simplex_point(arguments: Mapping[str, Any]) -> Simplex:
    """log p, normalised."""
    if given(arguments, "probs"):
        probs = arguments["probs"]
        return Simplex(clamp_probs(probs / probs.sum(-1, keepdim=True)).log())
    return Simplex(_finite(torch.log_softmax(arguments["logits"], -1)))


def inverse(arguments: Mapping[str, Any]) -> Tensor:
    """Λ = Σ⁻¹, from `precision_matrix`, `covariance_matrix` Σ or `scale_tril` L, Σ = L Lᵀ."""
    if given(arguments, "precision_matrix"):
        return arguments["precision_matrix"]
    if given(arguments, "covariance_matrix"):
        return torch.linalg.inv(arguments["covariance_matrix"])
    tril = arguments["scale_tril"]
    return torch.linalg.inv(tril @ tril.mT)


def inverse_point(arguments: Mapping[str, Any]) -> Matrix:
    """Λ and log|Λ|, through a Cholesky factor."""
    if given(arguments, "precision_matrix"):
        return Matrix.of(arguments["precision_matrix"])
    if given(arguments, "covariance_matrix"):
        tril = torch.linalg.cholesky(arguments["covariance_matrix"])
    else:
        tril = arguments["scale_tril"]
    identity = torch.eye(tril.shape[-1], dtype=tril.dtype, device=tril.device)
    root = torch.linalg.solve_triangular(tril, identity, upper=False)
    # not torch.cholesky_inverse, whose forward derivatives are wrong (pytorch issue 196682)
    return Matrix(root.mT @ root, -2 * tril.diagonal(dim1=-2, dim2=-1).log().sum(-1))


def _finite(log: Tensor) -> Tensor:
    """log 0 as the least number, so that 0 · log 0 = 0."""
    return log.clamp_min(torch.finfo(log.dtype).min)
