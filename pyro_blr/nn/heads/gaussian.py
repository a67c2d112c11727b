"""The regression head: matrix-normal weights, in closed form from one pass over the data."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution, Gamma

from pyro_blr.nn.heads._base import Head, check_finite
from pyro_blr.nn.heads._noise_models import noise_model

__all__ = ["GaussianHead"]


class WeightPosterior(NamedTuple):
    """W | Σ ~ MN(mean, Λ⁻¹, Σ): mean (P, C), the Cholesky factor of Λ (P, P), and
    E = Σ y yᵀ + δ M₀ᵀM₀ − Mᵀ Λ M, (C, C), or its diagonal (C,)."""

    mean: Tensor
    factor: Tensor
    residual: Tensor


class GaussianHead(Head):
    """Regression y = Wᵀφ + ε, ε ~ N(0, Σ), exact in one pass over (features, targets), W being P × C with the bias in its last row.

        W | Σ ~ MN(M₀, (δ I)⁻¹, Σ),     Λ = δ I + Σ_n φ_n φ_nᵀ,     M = Λ⁻¹ (δ M₀ + Σ_n φ_n y_nᵀ),
        y | φ ~ N(Mᵀφ, (1 + φᵀ Λ⁻¹ φ) Σ), or Student's t where Σ is inferred.

    (Bishop 2006, eqs. 3.50-3.58; Minka 2000, Bayesian linear regression, eqs. 11-36.) The natural parameters are sums over data: `observe`
    adds, `forget` subtracts, in float64 whatever the features are in. δ is in units of the noise precision: W_pc has prior
    variance Σ_cc / δ. Targets of which the noise is inferred should be of order one, or `noise` be chosen for them.

        head = GaussianHead(features.shape[-1], 1)
        head.observe(features, targets)
        head.predict(new_features).mean

    in_features, out_features, bias: as those of `torch.nn.Linear`.
    prior_precision: δ.
    prior_mean: M₀ᵀ, (out_features, width), the bias last; None is zero.
    noise: the variance, a number or (out_features,), or the covariance (out_features, out_features), where it is known; otherwise the
        prior of the noise's precision: Gamma(a, b) for each output (None is Gamma(1, 1)), or Wishart(ν, W) for all together.
    """

    prior_mean: Tensor
    count: Tensor
    gram: Tensor
    cross: Tensor
    square: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        prior_precision: float = 1.0,
        prior_mean: Tensor | None = None,
        noise: float | Tensor | Distribution | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, prior_precision)
        self.noise = noise_model(Gamma(1.0, 1.0) if noise is None else noise, out_features)
        start = torch.zeros(out_features, self.width) if prior_mean is None else prior_mean.detach()
        if start.shape != (out_features, self.width):
            raise ValueError(
                f"prior_mean has shape {tuple(start.shape)}; expected {(out_features, self.width)}, the bias last"
            )
        self.register_buffer("prior_mean", start.double())
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("gram", torch.zeros(self.width, self.width, dtype=torch.float64))
        self.register_buffer("cross", torch.zeros(self.width, out_features, dtype=torch.float64))
        shape = (out_features, out_features) if self.noise.joint else (out_features,)
        self.register_buffer("square", torch.zeros(shape, dtype=torch.float64))

    @torch.no_grad()
    def observe(self, features: Tensor, targets: Tensor) -> None:
        """Adds Σ φ φᵀ, Σ φ yᵀ, Σ y yᵀ and n of features (..., in_features) and targets (..., out_features), or (...) for one output."""
        self._add(features, targets, 1.0)

    @torch.no_grad()
    def forget(self, features: Tensor, targets: Tensor) -> None:
        """Subtracts what `observe` added for the same data: the posterior is that without them, to rounding.

        Raises ValueError, and changes nothing, where no data have such sums.
        """
        kept = [buffer.clone() for buffer in self.buffers()]
        try:
            self._add(features, targets, -1.0)
            if self.count < 0:
                raise ValueError(
                    f"{-int(self.count)} more data were forgotten than observed; forget only what was observed"
                )
            self.noise.check(self._posterior().residual, self.count)
        except ValueError:
            for buffer, value in zip(self.buffers(), kept, strict=True):
                buffer.copy_(value)
            raise

    @property
    def mean(self) -> Tensor:
        return self._posterior().mean.mT

    @property
    def stddev(self) -> Tensor:
        """Posterior standard deviations of the weights, (out_features, width), the bias last."""
        posterior = self._posterior()
        inverse = torch.cholesky_inverse(posterior.factor).diagonal()
        variance = self.noise.variance(posterior.residual, self.count)
        return (variance[:, None] * inverse).sqrt()

    @torch.no_grad()
    def predict(self, features: Tensor, observed: bool = True) -> Distribution:
        """The predictive distribution of targets at features (..., in_features): batch shape (...), event shape (out_features,).

        observed: with the noise of a new observation; False is the posterior of the regression function alone. In float64.
        """
        posterior, rows = self._posterior(), self._rows(features)
        spread = torch.linalg.solve_triangular(posterior.factor, rows.mT, upper=False).square().sum(0)
        shape = features.shape[:-1]
        loc = (rows @ posterior.mean).reshape(*shape, self.out_features)
        return self.noise.predictive(loc, (spread + observed).reshape(shape), posterior.residual, self.count)

    @torch.no_grad()
    def log_evidence(self) -> float:
        """log p(targets | features), weights and noise integrated out: compare prior precisions, features or noise models by it."""
        posterior = self._posterior()
        log_ratio = self.width * math.log(self.prior_precision) - 2 * posterior.factor.diagonal().log().sum()
        volume = 0.5 * self.out_features * log_ratio
        return float(volume + self.noise.log_evidence(posterior.residual, self.count))

    def _add(self, features: Tensor, targets: Tensor, sign: float) -> None:
        expected = (*features.shape[:-1], self.out_features)
        if targets.shape != expected and not (self.out_features == 1 and targets.shape == features.shape[:-1]):
            raise ValueError(f"targets have shape {tuple(targets.shape)}; expected {expected} beside these features")
        flat, answers = (
            features.detach().reshape(-1, features.shape[-1]),
            targets.detach().reshape(-1, self.out_features),
        )
        check_finite("targets", answers)
        sums = [torch.zeros_like(self.gram), torch.zeros_like(self.cross), torch.zeros_like(self.square)]
        for part, answer in self._parts(flat, answers):
            rows, answer = self._rows(part), answer.to(self.gram)
            sums[0].addmm_(rows.mT, rows)
            sums[1].addmm_(rows.mT, answer)
            sums[2].add_(answer.mT @ answer if self.noise.joint else answer.square().sum(0))
        for buffer, value in zip((self.gram, self.cross, self.square), sums, strict=True):
            buffer.add_(value, alpha=sign)
        self.count.add_(sign * len(answers))

    def _posterior(self) -> WeightPosterior:
        return self._once(self.buffers(), self._solve)

    @torch.no_grad()
    def _solve(self) -> WeightPosterior:
        prior = self.prior_mean.mT
        precision = self.gram + self.prior_precision * torch.eye(self.width).to(self.gram)
        factor, fault = torch.linalg.cholesky_ex(precision)
        if fault:
            raise ValueError("the precision of the weights is not positive definite; forget only what was observed")
        # About the prior mean, so that what it explains is not subtracted again.
        cross = self.cross - self.gram @ prior
        shift = torch.cholesky_solve(cross, factor)
        about, explained = prior.mT @ self.cross, cross.mT @ shift
        residual = prior.mT @ self.gram @ prior - about - about.mT - explained
        residual = self.square + (residual if self.noise.joint else residual.diagonal())
        return WeightPosterior(prior + shift, factor, residual)
