"""What classification heads predict: probabilities, and how much of their entropy is the weights'."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["HeadPrediction", "binary_prediction", "closed_form_prediction", "sampled_prediction"]


@dataclass(frozen=True)
class HeadPrediction:
    """The predictive distribution of labels, and its uncertainty, for every row (token) of a batch (...).

    probabilities: E_q[p(y | f)], (..., C).
    entropy: H of these, in nats: (...), or (..., C) where outputs are binary.
    mutual_information: H − E_q[H(p(y | f))], the part that knowing the weights would take away; shape of `entropy`.
    logit_variance: Var_q[f], (..., C).
    """

    probabilities: Tensor
    entropy: Tensor
    mutual_information: Tensor
    logit_variance: Tensor


def sampled_prediction(logits: Tensor, logit_variance: Tensor) -> HeadPrediction:
    """From draws of the logits, (S, ..., C)."""
    log_each = logits.log_softmax(-1)
    each = log_each.exp()
    probabilities = each.mean(0)
    entropy = torch.special.entr(probabilities).sum(-1)
    inside = -(each * log_each).sum(-1).mean(0)
    return HeadPrediction(probabilities, entropy, (entropy - inside).clamp_min(0), logit_variance)


def closed_form_prediction(
    mean: Tensor, variance: Tensor, contrast: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> HeadPrediction:
    """Without draws: p_c ∝ exp(−(μ_t − μ_c) / √(1 + π/8 Var(f_t − f_c))), t the most probable class; information ½ tr(Cov ∇²).

    MacKay's formula (1992, The evidence framework applied to classification networks) for every class against t, and the formula itself
    with two classes. No term depends on what all logits share. The mutual information is its second-order term,
    ½ (Σ_c p_c Var f_c − Var Σ_c p_c f_c), at most the entropy.

    mean, variance: of the logits, (n, C).
    contrast: weights a (n, C) → Cov(f, aᵀf) (n, C) and Var(aᵀf) (n,).
    """
    top = mean.argmax(-1, keepdim=True)
    covariance, reference = contrast(torch.zeros_like(mean).scatter_(-1, top, 1.0))
    between = (variance - 2 * covariance + reference[:, None]).clamp_min(0)
    gap = (mean - mean.gather(-1, top)) / (1 + math.pi / 8 * between).sqrt()
    probabilities = gap.softmax(-1)
    entropy = torch.special.entr(probabilities).sum(-1)
    spread = (probabilities * variance).sum(-1) - contrast(probabilities)[1]
    information = torch.minimum((0.5 * spread).clamp_min(0), entropy)
    return HeadPrediction(probabilities, entropy, information, variance)


def binary_prediction(mean: Tensor, variance: Tensor) -> HeadPrediction:
    """E σ(f) and the expected entropy under f ~ N(mean, variance), elementwise, to rounding.

    The trapezium rule converges geometrically on analytic integrands: over f = m + s ε for s below 2, where the poles of σ are far
    from the real line, and else over the logistic's own axis, with E σ(f) = E_l Φ((m − l)/s), l ~ Logistic(0, 1).
    """
    sd = variance.sqrt()
    grid = torch.linspace(-9, 9, 145).to(mean)
    normal = torch.exp(-0.5 * grid.square())
    near = mean[..., None] + sd[..., None] * grid
    wide = torch.linspace(-44, 44, 353).to(mean)
    wide_sd = sd.clamp_min(1.0)[..., None]
    logistic = torch.sigmoid(wide) * torch.sigmoid(-wide) * (wide[1] - wide[0])
    density = torch.exp(-0.5 * ((wide - mean[..., None]) / wide_sd).square()) / (wide_sd * math.sqrt(2 * math.pi))
    small, normal = sd < 2, normal / normal.sum()
    found = torch.special.ndtr((mean[..., None] - wide) / wide_sd) @ logistic
    probabilities = torch.where(small, torch.sigmoid(near) @ normal, found)
    inside = torch.where(small, uncertainty(near) @ normal, density @ uncertainty(wide) * (wide[1] - wide[0]))
    entropy = torch.special.entr(probabilities) + torch.special.entr(1 - probabilities)
    return HeadPrediction(probabilities, entropy, (entropy - inside).clamp_min(0), variance)


def uncertainty(logits: Tensor) -> Tensor:
    """H of Bernoulli(σ(f)), without cancellation."""
    positive, negative = torch.sigmoid(logits), torch.sigmoid(-logits)
    softplus = torch.nn.functional.softplus
    return positive * softplus(-logits) + negative * softplus(logits)
