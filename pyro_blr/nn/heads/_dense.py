"""Logits under a full covariance of all weights, and what follows from their covariance row by row."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_blr.nn.heads._predictions import HeadPrediction, closed_form_prediction, sampled_prediction

__all__ = ["dense_prediction", "draw_logits", "logit_covariance"]

# Numbers that a part of the rows takes on the way.
PART_NUMBERS = 1 << 22


def logit_covariance(rows: Tensor, covariance: Tensor) -> Tensor:
    """Cov(f_a, f_b) = φᵀ Cov(w_a, w_b) φ, (n, C, C), of rows (n, P), with the weights' covariance (C P, C P)."""
    width = rows.shape[1]
    classes = len(covariance) // width
    by_feature = covariance.reshape(classes, width, classes, width).permute(1, 0, 2, 3).reshape(width, -1)
    parts = rows.split(max(1, PART_NUMBERS // by_feature.shape[1]))
    found = [
        ((part @ by_feature).reshape(len(part), classes * classes, width) @ part[..., None]).reshape(
            -1, classes, classes
        )
        for part in parts
    ]
    return torch.cat(found)


def draw_logits(mean: Tensor, covariance: Tensor, num_samples: int) -> Tensor:
    """Draws of N(mean, covariance), (S, n, C), from torch's generator, in pairs m ± L ε."""
    noise = torch.randn((num_samples + 1) // 2, *mean.shape, dtype=mean.dtype, device=mean.device)
    shift = (torch.linalg.cholesky(covariance) @ noise[..., None])[..., 0]
    return mean + torch.cat([shift, -shift])[:num_samples]


def dense_prediction(mean: Tensor, covariance: Tensor, num_samples: int) -> HeadPrediction:
    """Of logits with these moments, (n, C) and (n, C, C): from draws, or with `num_samples` 0 in closed form."""
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    if num_samples:
        return sampled_prediction(draw_logits(mean, covariance, num_samples), variance)

    def contrast(weights: Tensor) -> tuple[Tensor, Tensor]:
        shared = (covariance @ weights[..., None])[..., 0]
        return shared, (shared * weights).sum(-1)

    return closed_form_prediction(mean, variance, contrast)
