"""The head of one class among several, compared with each other one."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_blr.nn.heads._dense import dense_prediction, draw_logits, logit_covariance
from pyro_blr.nn.heads._labels import class_labels
from pyro_blr.nn.heads._polya_gamma import PolyaGammaHead
from pyro_blr.nn.heads._predictions import HeadPrediction

__all__ = ["OneVsEachHead"]


class OneVsEachHead(PolyaGammaHead):
    """One class y of C by comparisons with each other one, with a full covariance of all C · P weights w.

        p(y | f) ≥ Π_{j≠y} σ(f_y − f_j),     f = W φ,
        Λ = δ I + Σ_n Σ_{j≠y_n} θ(ξ_nj) a_nj a_njᵀ,     a_nj = (e_{y_n} − e_j) ⊗ φ_n,     m = Λ⁻¹ (δ m₀ + Σ a_nj / 2)

    (Titsias 2016; every σ by Pólya-Gamma augmentation, Snell and Zemel 2021.) Coordinate ascent is exact on a bound of the softmax
    likelihood's; the first of its two inequalities is an equality for two classes.
    Predictions are of the softmax. Memory is (C · P)²: for small heads.

    in_features, out_features, bias, prior_precision, prior_mean: as of `BernoulliHead`. Targets are class numbers (...).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        prior_precision: float = 1.0,
        prior_mean: Tensor | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, prior_precision)
        if out_features < 2:
            raise ValueError(
                f"out_features is {out_features}; expected two classes or more: BernoulliHead has one output"
            )
        self._start(1, prior_mean)

    @torch.no_grad()
    def predict(self, features: Tensor, num_samples: int = 64) -> HeadPrediction:
        """Class probabilities and their uncertainty for features (..., in_features), in float64.

        num_samples: draws of the logits; 0 is a closed form (MacKay's, of each class against the most probable one).
        """
        found = dense_prediction(*self._logits(self._rows(features)), num_samples)
        shape = features.shape[:-1]
        return HeadPrediction(*(value.reshape(*shape, *value.shape[1:]) for value in vars(found).values()))

    @torch.no_grad()
    def sample_logits(self, features: Tensor, num_samples: int) -> Tensor:
        """f of weights drawn from q, (num_samples, ..., out_features); independent between rows of features (..., in_features)."""
        draws = draw_logits(*self._logits(self._rows(features)), num_samples)
        return draws.reshape(num_samples, *features.shape[:-1], self.out_features)

    def _logits(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (n, C) and covariance (n, C, C)."""
        return rows @ self.mean.mT, logit_covariance(rows, torch.cholesky_inverse(self._posterior()[1][0]))

    def _targets(self, targets: Tensor, shape: torch.Size) -> Tensor:
        return class_labels(targets, shape, self.out_features)

    def _others(self, targets: Tensor) -> Tensor:
        """The C − 1 classes that are not the target's, (n, C − 1), in order."""
        classes = torch.arange(self.out_features - 1, device=targets.device)
        return classes + (classes >= targets[:, None])

    def _squares(self, rows: Tensor, targets: Tensor) -> Tensor:
        others, own = self._others(targets), targets[:, None]
        mean, covariance = self._logits(rows)
        gap = mean.gather(1, own) - mean.gather(1, others)
        variance = covariance.diagonal(dim1=1, dim2=2)
        between = covariance.gather(1, own[..., None].expand(-1, 1, self.out_features))[:, 0].gather(1, others)
        return gap.square() + (variance.gather(1, own) + variance.gather(1, others) - 2 * between).clamp_min(0)

    def _curvature(self, rows: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        classes, width = self.out_features, self.width
        theta = torch.zeros(len(rows), classes).to(weights).scatter_(1, self._others(targets), weights)
        total = torch.zeros(classes, width, classes, width).to(weights)
        for label in range(classes):  # rows of one label touch its blocks with each other class, and the diagonal
            mine = targets == label
            part, weight = rows[mine], theta[mine]
            grams = torch.stack([part.mT @ (part * column[:, None]) for column in weight.unbind(1)])
            total[label, :, label, :] += grams.sum(0)
            for other in range(classes):
                total[other, :, other, :] += grams[other]
                if other != label:
                    total[label, :, other, :] -= grams[other]
                    total[other, :, label, :] -= grams[other]
        return total.reshape(1, classes * width, classes * width)

    def _pull(self, rows: Tensor, targets: Tensor) -> Tensor:
        signs = torch.nn.functional.one_hot(targets, self.out_features).to(rows) * self.out_features - 1
        return 0.5 * (signs.mT @ rows).reshape(1, -1)
