"""Scores of predictions that are mixtures over draws of the weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

__all__ = [
    "ClassificationScores",
    "RegressionScores",
    "classification_scores",
    "out_of_distribution_auroc",
    "predictive_log_probs",
    "regression_scores",
]


@dataclass(frozen=True)
class ClassificationScores:
    """What `classification_scores` returns: means over data, natural logarithms; lower is better but for accuracy."""

    nll: float
    brier: float
    accuracy: float
    ece: float
    mce: float


@dataclass(frozen=True)
class RegressionScores:
    """What `regression_scores` returns: mean test log-likelihood, and root mean squared error of the predictive mean."""

    log_likelihood: float
    rmse: float


def predictive_log_probs(logits: Tensor) -> Tensor:
    """log p(k) = log (1/S) Σ_s softmax(logits_s)_k: probabilities, not logits, are averaged over draws.

    logits: (S, ..., K), of S draws. Returns (..., K), in float64.
    """
    each = logits.to(torch.float64).log_softmax(-1)
    return each.logsumexp(0) - math.log(len(each))


def classification_scores(logits: Tensor, labels: Tensor, *, bins: int = 15) -> ClassificationScores:
    """NLL −log p(y), Brier score Σ_k (p_k − 1[y = k])², accuracy, and calibration errors, of p the mixture over draws.

    Calibration errors compare max_k p_k with how often that class is right, in `bins` bins of equal width: ECE averages the gaps by
    the number of data in each bin, MCE is the largest (Guo et al. 2017, eqs. 3 and 5). They are torchmetrics'.

    logits: (S, ..., K), of S draws, as from `predict`; of one network, `logits[None]`.
    labels: (...), integers below K.

    Raises ValueError where the shapes do not fit, ImportError without torchmetrics.
    """
    if labels.shape != logits.shape[1:-1]:
        raise ValueError(
            f"logits have shape {tuple(logits.shape)} and labels {tuple(labels.shape)}; expected (draws, *shape of labels, classes): "
            "of one network pass logits[None]"
        )
    metrics = torchmetrics_functional("classification_scores")
    log_probs, labels = predictive_log_probs(logits).flatten(0, -2), labels.flatten()
    # torchmetrics takes anything above 1 for logits.
    probs = log_probs.exp().clamp(max=1)
    correct = torch.nn.functional.one_hot(labels, probs.shape[-1])
    ece, mce = (
        metrics.multiclass_calibration_error(probs, labels, probs.shape[-1], n_bins=bins, norm=norm).item()
        for norm in ("l1", "max")
    )
    return ClassificationScores(
        nll=torch.nn.functional.nll_loss(log_probs, labels).item(),
        brier=(probs - correct).square().sum(-1).mean().item(),
        accuracy=(probs.argmax(-1) == labels).double().mean().item(),
        ece=ece,
        mce=mce,
    )


def out_of_distribution_auroc(inside: Tensor, outside: Tensor) -> float:
    """P(H(x') > H(x)) + ½ P(H(x') = H(x)), x from the training distribution, x' not, H the entropy of the mixture over draws.

    The area under the curve of a detector that calls high entropy foreign: ½ is chance, 1 perfect. It is torchmetrics'.

    inside, outside: logits (S, ..., K), as for `classification_scores`.

    Raises ImportError without torchmetrics.
    """
    metrics = torchmetrics_functional("out_of_distribution_auroc")
    entropies = [
        torch.special.entr(predictive_log_probs(logits).exp()).sum(-1).flatten() for logits in (inside, outside)
    ]
    # torchmetrics would squash what is above 1, and so make ties.
    scores = (torch.cat(entropies) / math.log(inside.shape[-1])).clamp(max=1)
    foreign = torch.cat([torch.full_like(each, i, dtype=torch.long) for i, each in enumerate(entropies)])
    found: float = metrics.binary_auroc(scores, foreign).item()
    return found


def regression_scores(distribution: Distribution, targets: Tensor) -> RegressionScores:
    """Mean of log (1/S) Σ_s p(y | θ_s) over data, and (mean (y − (1/S) Σ_s E[y | θ_s])²)^½.

    distribution: of the targets, its batch shape (S, *shape of targets), e.g. Normal(predict(...), scale).

    Raises ValueError where the shapes do not fit.
    """
    if distribution.batch_shape[1:] != targets.shape:
        raise ValueError(
            f"the distribution has batch shape {tuple(distribution.batch_shape)} and targets {tuple(targets.shape)}; expected (draws, "
            "*shape of targets)"
        )
    each = distribution.log_prob(targets).to(torch.float64)
    residuals = distribution.mean.to(torch.float64).mean(0) - targets
    return RegressionScores(
        log_likelihood=(each.logsumexp(0) - math.log(len(each))).mean().item(),
        rmse=residuals.square().mean().sqrt().item(),
    )


def torchmetrics_functional(name: str) -> Any:
    """torchmetrics.functional.classification, or ImportError that says what to install."""
    try:
        from torchmetrics.functional import classification
    except ImportError as error:
        raise ImportError(
            f"{name} needs torchmetrics and found none: pip install torchmetrics, or 'pyro_blr[evaluation]'"
        ) from error
    return classification
