"""The noise of a regression head: known, or with a conjugate prior on its precision.

E is the head's residual matrix Σ y yᵀ + δ M₀ᵀM₀ − MᵀΛM, (C, C), or its diagonal (C,) where outputs have noise of their own; n counts data;
`spread` is φᵀΛ⁻¹φ (+ 1 for a new observation), (...).
"""

from __future__ import annotations

import abc
import math
from typing import Any

import pyro.distributions
import torch
from torch import Tensor
from torch.distributions import Distribution, Gamma, Independent, MultivariateNormal, Normal, StudentT, Wishart

__all__ = ["GammaNoise", "KnownNoise", "NoiseModel", "WishartNoise", "noise_model"]


class NoiseModel(abc.ABC):
    """What Σ is, given E and n."""

    joint: bool  # whether E is a matrix

    @abc.abstractmethod
    def variance(self, residual: Tensor, count: Tensor) -> Tensor:
        """E[Σ_cc], (C,); infinite where there is no mean."""

    @abc.abstractmethod
    def predictive(self, loc: Tensor, spread: Tensor, residual: Tensor, count: Tensor) -> Distribution:
        """∫ N(loc, spread · Σ) p(Σ | data) dΣ; event shape (C,)."""

    @abc.abstractmethod
    def log_evidence(self, residual: Tensor, count: Tensor) -> Tensor:
        """log ∫ (2π)^(−nC/2) |Σ|^(−n/2) exp(−½ tr Σ⁻¹E) p(Σ) dΣ."""

    @abc.abstractmethod
    def check(self, residual: Tensor, count: Tensor) -> None:
        """ValueError where no data have this E."""


class KnownNoise(NoiseModel):
    """Σ given: (C,) its diagonal, or (C, C)."""

    def __init__(self, covariance: Tensor) -> None:
        self.covariance, self.joint = covariance, covariance.dim() == 2

    def variance(self, residual: Tensor, count: Tensor) -> Tensor:
        covariance = self.covariance.to(residual)
        return covariance.diagonal() if self.joint else covariance

    def predictive(self, loc: Tensor, spread: Tensor, residual: Tensor, count: Tensor) -> Distribution:
        if self.joint:
            factor = torch.linalg.cholesky(self.covariance.to(loc))
            return MultivariateNormal(loc, scale_tril=spread.sqrt()[..., None, None] * factor)
        return Independent(Normal(loc, (spread[..., None] * self.covariance.to(loc)).sqrt()), 1)

    def log_evidence(self, residual: Tensor, count: Tensor) -> Tensor:
        covariance = self.covariance.to(residual)
        if self.joint:
            log_det, fit = covariance.logdet(), torch.linalg.solve(covariance, residual).trace()
        else:
            log_det, fit = covariance.log().sum(), (residual / covariance).sum()
        return -0.5 * (count * (len(covariance) * math.log(2 * math.pi) + log_det) + fit)

    def check(self, residual: Tensor, count: Tensor) -> None:
        pass


class GammaNoise(NoiseModel):
    """Σ = diag(1/τ), τ_c ~ Gamma(a, b): τ_c | data ~ Gamma(a + n/2, b + E_c/2)  (Bishop 2006, exercise 3.12)."""

    joint = False

    def __init__(self, concentration: Tensor, rate: Tensor) -> None:
        self.concentration, self.rate = concentration, rate

    def variance(self, residual: Tensor, count: Tensor) -> Tensor:
        a, b = self._arguments(residual, count)
        return torch.where(a > 1, b / (a - 1).clamp_min(1e-300), math.inf)

    def predictive(self, loc: Tensor, spread: Tensor, residual: Tensor, count: Tensor) -> Distribution:
        a, b = self._arguments(residual, count)
        return Independent(StudentT(2 * a, loc, (spread[..., None] * b / a).sqrt()), 1)

    def log_evidence(self, residual: Tensor, count: Tensor) -> Tensor:
        a, b = self._arguments(residual, count)
        prior_a, prior_b = self._arguments(torch.zeros_like(residual), torch.zeros_like(count))
        normalisers = prior_a * prior_b.log() - prior_a.lgamma() - a * b.log() + a.lgamma()
        return (normalisers - 0.5 * count * math.log(2 * math.pi)).sum()

    def check(self, residual: Tensor, count: Tensor) -> None:
        if (self._arguments(residual, count)[1] <= 0).any():
            raise ValueError("the squared residuals are negative; forget only what was observed")

    def _arguments(self, residual: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        return self.concentration.to(residual) + 0.5 * count, self.rate.to(residual) + 0.5 * residual


class WishartNoise(NoiseModel):
    """Σ⁻¹ ~ Wishart(ν, W): Σ⁻¹ | data ~ Wishart(ν + n, (W⁻¹ + E)⁻¹)  (Minka 2000, section 5)."""

    joint = True

    def __init__(self, df: Tensor, scale_matrix: Tensor) -> None:
        self.df, self.inverse_scale = df, torch.linalg.inv(scale_matrix)

    def variance(self, residual: Tensor, count: Tensor) -> Tensor:
        df, inverse = self._arguments(residual, count)
        excess = df - len(inverse) - 1
        return torch.where(excess > 0, inverse.diagonal() / excess.clamp_min(1e-300), math.inf)

    def predictive(self, loc: Tensor, spread: Tensor, residual: Tensor, count: Tensor) -> Distribution:
        df, inverse = self._arguments(residual, count)
        freedom = df - len(inverse) + 1
        factor = torch.linalg.cholesky(inverse / freedom)
        return pyro.distributions.MultivariateStudentT(freedom, loc, spread.sqrt()[..., None, None] * factor)

    def log_evidence(self, residual: Tensor, count: Tensor) -> Tensor:
        df, inverse = self._arguments(residual, count)
        prior_df, prior = self._arguments(torch.zeros_like(residual), torch.zeros_like(count))
        width = len(inverse)
        gammas = torch.mvlgamma(df / 2, width) - torch.mvlgamma(prior_df / 2, width)
        return 0.5 * (prior_df * prior.logdet() - df * inverse.logdet() - count * width * math.log(math.pi)) + gammas

    def check(self, residual: Tensor, count: Tensor) -> None:
        if torch.linalg.cholesky_ex(self._arguments(residual, count)[1]).info:
            raise ValueError("the matrix of squared residuals is not positive definite; forget only what was observed")

    def _arguments(self, residual: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        return self.df.to(residual) + count, self.inverse_scale.to(residual) + residual


def noise_model(noise: Any, outputs: int) -> NoiseModel:
    """The model that a user's `noise` names; ValueError where it is none."""
    if isinstance(noise, Independent):
        noise = noise.base_dist
    try:
        if isinstance(noise, Gamma):
            shape = torch.Size([outputs])
            return GammaNoise(noise.concentration.double().expand(shape), noise.rate.double().expand(shape))
        if isinstance(noise, Wishart) and noise.batch_shape == () and noise.event_shape == (outputs, outputs):
            return WishartNoise(noise.df.double(), noise.covariance_matrix.double())
        if isinstance(noise, int | float | Tensor) and not isinstance(noise, bool):
            return KnownNoise(known_covariance(torch.as_tensor(noise, dtype=torch.float64), outputs))
    except RuntimeError:
        pass  # shapes that do not expand
    raise ValueError(
        f"noise is {noise!r}; expected a variance above zero, a number or of shape ({outputs},), a covariance ({outputs}, {outputs}), or "
        "the prior of the noise's precision: Gamma for each output, or Wishart for all"
    )


def known_covariance(value: Tensor, outputs: int) -> Tensor:
    """(C,) of variances, or a positive definite (C, C); RuntimeError otherwise."""
    if value.dim() == 2 and value.shape == (outputs, outputs):
        torch.linalg.cholesky(value)
        return value.detach()
    variance = value.detach().expand(outputs)
    if not (torch.isfinite(variance) & (variance > 0)).all():
        raise RuntimeError("no variance")
    return variance
