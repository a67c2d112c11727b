"""Logistic likelihoods that Pólya-Gamma variables make Gaussian: coordinate ascent in closed form, streaming."""

from __future__ import annotations

import abc
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_blr.nn.heads._base import Head

__all__ = ["PolyaGammaHead"]


class Message(NamedTuple):
    """What data add to the natural parameters of q: precision (G, K, K), linear term (G, K), and the bound's constant ()."""

    precision: Tensor
    linear: Tensor
    constant: Tensor


class PolyaGammaHead(Head):
    """q(w) = Π_g N(m_g, Λ_g⁻¹) over G independent vectors of K weights, given comparisons ψ = aᵀw that came out positive.

        log σ(ψ) ≥ log σ(ξ) + (ψ − ξ)/2 − θ(ξ)(ψ² − ξ²)/2,     θ(ξ) = tanh(ξ/2) / 2ξ = E[ω], ω ~ PG(1, ξ),
        Λ = δ I + Σ θ(ξ) a aᵀ,     m = Λ⁻¹ (δ m₀ + Σ a/2),     ξ² = E_q[ψ²] = (aᵀm)² + aᵀ Λ⁻¹ a

    (Jaakkola and Jordan 2000; Bishop 2006, eqs. 10.144, 10.156-10.163; Polson, Scott and Windle 2013, section 2; Durante and Rigon 2019:
    the bound is that of the augmented model).
    Given every ξ the data are Gaussian, so that the bound on the evidence is a closed form, and data are
    added and subtracted with their ξ.
    """

    precision: Tensor
    linear: Tensor
    constant: Tensor
    prior_mean: Tensor

    def _start(self, groups: int, prior_mean: Tensor | None) -> None:
        """No data: G groups of K = weights / G."""
        size = self.out_features * self.width // groups
        start = torch.zeros(self.out_features, self.width) if prior_mean is None else prior_mean.detach()
        if start.shape != (self.out_features, self.width):
            expected = (self.out_features, self.width)
            raise ValueError(f"prior_mean has shape {tuple(start.shape)}; expected {expected}, the bias last")
        self.register_buffer("prior_mean", start.double().reshape(groups, size))
        self.register_buffer("precision", torch.zeros(groups, size, size, dtype=torch.float64))
        self.register_buffer("linear", torch.zeros(groups, size, dtype=torch.float64))
        self.register_buffer("constant", torch.zeros((), dtype=torch.float64))

    @abc.abstractmethod
    def _targets(self, targets: Tensor, shape: torch.Size) -> Tensor:
        """The targets as (n, ...), checked; `shape` is that of the batch."""

    @abc.abstractmethod
    def _squares(self, rows: Tensor, targets: Tensor) -> Tensor:
        """E_q[ψ²] of every comparison, (n, J)."""

    @abc.abstractmethod
    def _curvature(self, rows: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Σ θ a aᵀ, (G, K, K), with θ (n, J)."""

    @abc.abstractmethod
    def _pull(self, rows: Tensor, targets: Tensor) -> Tensor:
        """Σ a/2, (G, K)."""

    @property
    def mean(self) -> Tensor:
        return self._posterior()[0].reshape(self.out_features, self.width)

    @property
    def stddev(self) -> Tensor:
        """Posterior standard deviations of the weights, (out_features, width), the bias last."""
        inverse = torch.cholesky_inverse(self._posterior()[1])
        return inverse.diagonal(dim1=-2, dim2=-1).sqrt().reshape(self.out_features, self.width)

    @torch.no_grad()
    def observe(self, features: Tensor, targets: Tensor, *, tol: float = 1e-6, max_sweeps: int = 500) -> Tensor:
        """Adds data by coordinate ascent over q and their ξ, the ξ of data added before being held; returns ξ, (..., J).

        All data at once is the optimum of the bound. In batches it is assumed-density filtering; `refine` then goes over batches
        again, and comes to the same optimum. The bound `log_evidence()` never falls from sweep to sweep.

        features: (..., in_features). targets: as the head says.
        tol: nats of the bound that may be left; max_sweeps, after which it warns.
        """
        rows, answers = self._rows(features), self._targets(targets, features.shape[:-1])
        base = self._sums()
        before, last, left = -torch.inf, torch.inf, torch.inf
        for _ in range(max_sweeps):
            local = self._squares(rows, answers).sqrt()
            self._hold(base, self._message(rows, answers, local), 1.0)
            bound = self.log_evidence()
            gain, before = bound - before, bound
            ratio = min(max(gain / last, 0.0), 0.999) if last < torch.inf else 0.999
            last, left = gain, gain * ratio / (1 - ratio)
            if left <= tol:
                break
        else:
            warnings.warn(
                f"coordinate ascent stopped after {max_sweeps} sweeps with about {left:.1e} nats to go; expected at most {tol:.0e}: raise "
                "max_sweeps, or call refine",
                stacklevel=2,
            )
        return local.reshape(*features.shape[:-1], -1)

    @torch.no_grad()
    def forget(self, features: Tensor, targets: Tensor, local: Tensor) -> None:
        """Subtracts what `observe` or `refine` added for these data when it returned `local`, to rounding.

        Raises ValueError, and changes nothing, where the precision that remains is none.
        """
        rows, answers = self._rows(features), self._targets(targets, features.shape[:-1])
        base = self._sums()
        self._hold(base, self._message(rows, answers, local.to(rows).reshape(len(rows), -1)), -1.0)
        try:
            self._posterior()
        except ValueError:
            self._hold(base)
            raise

    @torch.no_grad()
    def refine(self, features: Tensor, targets: Tensor, local: Tensor) -> Tensor:
        """One coordinate step on data that were added with `local`: their ξ from q as it is now. Returns the new ξ.

        Over all batches in turn, again and again, this is coordinate ascent on the bound of all data, a batch in memory at a time.
        """
        rows, answers = self._rows(features), self._targets(targets, features.shape[:-1])
        fresh = self._squares(rows, answers).sqrt()
        self.forget(features, targets, local)
        self._hold(self._sums(), self._message(rows, answers, fresh), 1.0)
        return fresh.reshape(local.shape)

    @torch.no_grad()
    def log_evidence(self) -> float:
        """The bound: log ∫ p(w) Π exp(log σ(ξ) + (ψ − ξ)/2 − θ(ψ² − ξ²)/2) dw ≤ log p(targets | features)."""
        mean, factor = self._posterior()
        prior = self.prior_precision
        log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum()
        volume = 0.5 * (mean.numel() * torch.tensor(prior, dtype=torch.float64).log() - log_det)
        reach = (
            0.5 * ((prior * self.prior_mean + self.linear) * mean).sum() - 0.5 * prior * self.prior_mean.square().sum()
        )
        return float(self.constant + volume + reach)

    def _message(self, rows: Tensor, targets: Tensor, local: Tensor) -> Message:
        weights = torch.where(local > 1e-6, torch.tanh(local / 2) / (2 * local.clamp_min(1e-6)), 0.25)
        constant = (torch.nn.functional.logsigmoid(local) - local / 2 + weights * local.square() / 2).sum()
        precision, linear = torch.zeros_like(self.precision), torch.zeros_like(self.linear)
        for part, answers, theta in self._parts(rows, targets, weights):
            precision += self._curvature(part, answers, theta)
            linear += self._pull(part, answers)
        return Message(precision, linear, constant)

    def _sums(self) -> Message:
        return Message(self.precision.clone(), self.linear.clone(), self.constant.clone())

    def _hold(self, base: Message, message: Message | None = None, sign: float = 1.0) -> None:
        """Natural parameters ← base + sign · message."""
        for i, buffer in enumerate((self.precision, self.linear, self.constant)):
            buffer.copy_(base[i] if message is None else base[i] + sign * message[i])

    def _posterior(self) -> tuple[Tensor, Tensor]:
        """m (G, K) and the Cholesky factor of Λ (G, K, K)."""
        return self._once(self.buffers(), self._solve)

    @torch.no_grad()
    def _solve(self) -> tuple[Tensor, Tensor]:
        identity = torch.eye(self.precision.shape[-1]).to(self.precision)
        factor, fault = torch.linalg.cholesky_ex(self.precision + self.prior_precision * identity)
        if fault.any():
            raise ValueError("the precision of the weights is not positive definite; forget only what was observed")
        right = self.prior_precision * self.prior_mean + self.linear
        return torch.cholesky_solve(right[..., None], factor)[..., 0], factor
