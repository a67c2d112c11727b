"""The softmax head: natural gradients with expected curvature, from small heads to vocabularies."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from pyro_blr.generators import isolated_torch_state
from pyro_blr.nn.heads._base import Head
from pyro_blr.nn.heads._eigenbasis import EigenbasisStructure, EigenGaussian, KroneckerStructure
from pyro_blr.nn.heads._expectations import Batch, Expectations, expectations, spread_change
from pyro_blr.nn.heads._full import FullStructure
from pyro_blr.nn.heads._labels import class_labels
from pyro_blr.nn.heads._predictions import HeadPrediction, closed_form_prediction, sampled_prediction
from pyro_blr.nn.heads._structures import Statistics, Structure, WeightGaussian

__all__ = ["CategoricalHead"]

STRUCTURES: dict[str, type[Structure]] = {
    "full": FullStructure,
    "kronecker": KroneckerStructure,
    "eigenbasis": EigenbasisStructure,
}

# Sweeps over the first data after each of which their basis is taken anew.
TURNS = 8


class CategoricalHead(Head):
    """Softmax classification with q(W) = N(M, Λ⁻¹), by the Bayesian learning rule with the expected curvature.

        Λ ← (1 − ρ) Λ + ρ (δ I + Σ_n E_q[diag(p_n) − p_n p_nᵀ] ⊗ φ_n φ_nᵀ),
        M ← M + ρ Λ⁻¹ (Σ_n (y_n − E_q[p_n]) φ_nᵀ − δ (M − M₀)),     p = softmax(W φ)

    (Khan and Rue 2023, eq. 3 for a Gaussian; the Hessian of a linear softmax is its Gauss-Newton matrix.) `observe` adds data and
    goes to the fixed point; `refresh` is one step with a minibatch, for a backbone that is trained at the same time, and forgets
    old statistics; `forget` subtracts. Variances of all logits are closed forms in every structure of Λ.

    covariance: "full", (C P)² numbers; "kronecker", P² + C, and "eigenbasis", C P + P², diagonal in the eigenbasis of the features
        weighted by curvature: for each of its directions Λ is a C × C matrix with the right diagonal that is δ on what all classes share.
        On digits their sds of logits are 7 to 11 % below those of "full", and those of logits minus their average 10 to 32 %.
    in_features, out_features, bias: as those of `torch.nn.Linear`.
    prior_precision, prior_mean: δ, and M₀ (out_features, width), the bias last; None is zero.
    num_draws: draws of the logits that expectations are taken over, in pairs; 0 takes them at the mean (Laplace's approximation).
    dtype: of means and statistics; None is torch's default.
    """

    loc: Tensor
    start: Tensor | None
    steps: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        covariance: str = "full",
        prior_precision: float = 1.0,
        prior_mean: Tensor | None = None,
        num_draws: int = 16,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, prior_precision)
        if covariance not in STRUCTURES:
            raise ValueError(f"covariance is {covariance!r}; expected one of {', '.join(map(repr, STRUCTURES))}")
        if num_draws < 0 or num_draws % 2:
            raise ValueError(f"num_draws is {num_draws}; expected an even number, or 0 for the mean")
        if out_features < 2:
            raise ValueError(
                f"out_features is {out_features}; expected two classes or more: BernoulliHead has one output"
            )
        self.covariance, self.num_draws, self._structure = covariance, num_draws, STRUCTURES[covariance]()
        shape = (out_features, self.width)
        if prior_mean is not None and prior_mean.shape != shape:
            raise ValueError(f"prior_mean has shape {tuple(prior_mean.shape)}; expected {shape}, the bias last")
        dtype = torch.get_default_dtype() if dtype is None else dtype
        loc = torch.zeros(shape, dtype=dtype) if prior_mean is None else prior_mean.detach().to(dtype, copy=True)
        self.register_buffer("loc", loc)
        self.register_buffer("start", None if prior_mean is None else loc.clone())
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        for name, value in self._structure.zeros(loc).items():
            self.register_buffer(f"sum_{name}", value)

    @property
    def mean(self) -> Tensor:
        return self.loc

    @property
    def stddev(self) -> Tensor:
        """Posterior standard deviations of the weights, (out_features, width), the bias last."""
        return self._gaussian().stddev().reshape(self.loc.shape)

    # -- data --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def observe(self, features: Tensor, targets: Tensor, *, tol: float = 1e-3, max_sweeps: int = 200) -> None:
        """q ← argmin KL(q' ‖ q) − E_q'[log p(targets | features)], by natural gradients at ρ = 1; halved where they go too far.

        All data at once is the variational posterior. In batches, one after the other, it is streaming variational Bayes.

        features: (..., in_features). targets: class numbers (...).
        tol: nats that the mean may be from its optimum, while sds move by less than 1e-3; max_sweeps, after which it warns.
        """
        batch = self._batch(features, targets)
        base, fresh = self._statistics(), not bool(self.steps)
        if not len(batch.targets):
            return
        prior, start = self._structure.gaussian(base, self.prior_precision), self.loc.clone()
        gaussian, held, rho, moved = None if fresh else prior, base, 1.0, float("inf")
        for sweep in range(max_sweeps):
            with isolated_torch_state(0):
                found = expectations(self._structure, gaussian, self.loc, batch, self.num_draws)
            statistics = self._with(base, batch, found, 1.0)
            if fresh and sweep < TURNS:  # of no data before: the basis and references are these data's
                statistics = self._structure.turned(statistics)
                base = {**statistics, **{name: torch.zeros_like(statistics[name]) for name in self._structure.sums}}
                prior = self._structure.gaussian(base, self.prior_precision)
            else:
                for name in self._structure.sums:
                    statistics[name] = torch.lerp(held[name], statistics[name], rho)
            held = statistics
            fitted = self._structure.gaussian(statistics, self.prior_precision)
            gradient = found.residual.mT @ batch.rows - prior.times(self.loc - start)
            step = fitted.solve(gradient)
            left = 0.5 * float((gradient * step).sum())
            self._climb(gaussian, prior, start, batch, step, found.value)
            before, moved = (
                moved,
                float("inf") if gaussian is None else spread_change(gaussian, fitted, batch.rows[:256]),
            )
            if (
                sweep > TURNS and moved > 0.7 * before
            ):  # wide logits have little curvature, and little curvature makes wide logits
                rho = max(0.5 * rho, 0.1)
            gaussian = fitted
            self._hold(statistics)
            if left < tol and moved < 1e-3 * rho and (sweep > TURNS or not fresh):
                break
        else:
            warnings.warn(
                f"the head stopped after {max_sweeps} sweeps with {left:.1e} nats to go and sds moving by {moved:.1%}; expected {tol:.0e} "
                "and 0.1%: raise max_sweeps or prior_precision",
                stacklevel=2,
            )
        self.steps += 1

    @torch.no_grad()
    def forget(self, features: Tensor, targets: Tensor) -> None:
        """Subtracts the natural parameters of these data, as q sees them now: λ ← λ − ∇_μ E_q[log p(targets | features)].

        At the optimum of all data that is the first natural-gradient step to the optimum of the others. `observe` and `refresh`
        measured curvature at the q of their time, so that removal is not exact to rounding; diagonals that would fall below zero
        are zero.

        Raises ValueError, and changes nothing, where the precision that remains is none.
        """
        batch = self._batch(features, targets)
        if not len(batch.targets):
            return
        with isolated_torch_state(0):
            gaussian = self._gaussian() if self.steps else None
            found = expectations(self._structure, gaussian, self.loc, batch, self.num_draws)
        statistics = self._with(self._statistics(), batch, found, -1.0)
        if "degrees" in statistics:
            statistics["degrees"].clamp_min_(0)
        step = self._structure.gaussian(statistics, self.prior_precision).solve(found.residual.mT @ batch.rows)
        self.loc.sub_(step)
        self._hold(statistics)

    @torch.no_grad()
    def refresh(self, features: Tensor, targets: Tensor, num_data: float, rate: float = 0.01) -> float:
        """One step with a minibatch that stands for `num_data`, at ρ_t = max(rate, 2 / (t + 20)), the first curvature taken whole.

        Statistics of older batches decay by 1 − ρ: features may change meanwhile. With a structure other than "full" nothing of the
        weights' size is made beside mean and statistics. Leave out rows that are to be ignored. Returns the batch's mean loss.
        """
        batch, step = self._batch(features, targets), int(self.steps)
        if not len(batch.targets):
            raise ValueError("the batch has no rows; expected one or more")
        rho = max(rate, 2 / (step + 20))
        keep, weight = 1 - rho if step else 0.0, num_data / len(batch.targets)
        statistics = self._statistics()
        found = expectations(self._structure, self._gaussian() if step else None, self.loc, batch, self.num_draws)
        for name in self._structure.sums:
            statistics[name].mul_(keep)
        self._structure.add(statistics, batch.rows, found.curvature, weight * (1 - keep))
        if step < 64 and step & (step - 1) == 0 or step % 64 == 0:
            statistics = self._structure.turned(statistics)
        self._hold(statistics)
        gaussian, residual = self._gaussian(), found.residual.mul_(weight)
        if isinstance(gaussian, EigenGaussian):
            gaussian.shift(self.loc, residual, batch.rows, self.start, rho)
        else:
            away = self.loc if self.start is None else self.loc - self.start
            self.loc.add_(gaussian.solve(residual.mT @ batch.rows - self.prior_precision * away), alpha=rho)
        self.steps += 1
        return -found.value / len(batch.targets)

    # -- predictions -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def predict(self, features: Tensor, num_samples: int = 64) -> HeadPrediction:
        """Class probabilities and their uncertainty for every row (token) of features (..., in_features).

        num_samples: draws of the logits; 0 is a closed form (MacKay's, of each class against the most probable one).
        """
        rows, gaussian = self._rows(features, self.loc.dtype), self._gaussian()
        found = [
            self._predicted(part, gaussian, num_samples)
            for part in rows.split(max(1, (1 << 24) // (self.out_features * max(1, num_samples))))
        ]
        values = (torch.cat(value) for value in zip(*(vars(each).values() for each in found), strict=True))
        return HeadPrediction(*(value.reshape(*features.shape[:-1], *value.shape[1:]) for value in values))

    @torch.no_grad()
    def logit_variance(self, features: Tensor) -> Tensor:
        """Var_q of every logit, (..., out_features), for features (..., in_features)."""
        variance = self._gaussian().variance(self._rows(features, self.loc.dtype))
        return variance.reshape(*features.shape[:-1], self.out_features)

    @torch.no_grad()
    def sample_logits(self, features: Tensor, num_samples: int) -> Tensor:
        """f of weights drawn from q, (num_samples, ..., out_features); independent between rows of features (..., in_features)."""
        rows = self._rows(features, self.loc.dtype)
        draws = rows @ self.loc.mT + self._gaussian().draw(rows, num_samples)
        return draws.reshape(num_samples, *features.shape[:-1], self.out_features)

    # -- inside ------------------------------------------------------------------------------------------------

    def _predicted(self, rows: Tensor, gaussian: WeightGaussian, num_samples: int) -> HeadPrediction:
        mean, variance = rows @ self.loc.mT, gaussian.variance(rows)
        if num_samples:
            return sampled_prediction(mean + gaussian.draw(rows, num_samples), variance)
        return closed_form_prediction(mean, variance, lambda weights: gaussian.contrast(rows, weights))

    def _batch(self, features: Tensor, targets: Tensor) -> Batch:
        rows = self._rows(features, self.loc.dtype)
        return Batch(rows, class_labels(targets, features.shape[:-1], self.out_features))

    def _statistics(self) -> Statistics:
        return {name.removeprefix("sum_"): value for name, value in self.named_buffers() if name.startswith("sum_")}

    def _hold(self, statistics: Statistics) -> None:
        for name, value in statistics.items():
            setattr(self, f"sum_{name}", value)

    def _with(self, base: Statistics, batch: Batch, found: Expectations, sign: float) -> Statistics:
        """base + sign · what this batch adds; base is left alone."""
        total = {name: value.clone() if name in self._structure.sums else value for name, value in base.items()}
        self._structure.add(total, batch.rows, found.curvature, sign)
        return total

    def _gaussian(self) -> WeightGaussian:
        statistics = self._statistics()
        return self._once(statistics.values(), lambda: self._structure.gaussian(statistics, self.prior_precision))

    def _climb(
        self,
        gaussian: WeightGaussian | None,
        prior: WeightGaussian,
        start: Tensor,
        batch: Batch,
        step: Tensor,
        value: float,
    ) -> None:
        """M += ρ step with the largest ρ = 1, ½, ¼, … at which the bound given the covariance (the same draws) does not fall."""
        origin = self.loc.clone()

        def distance() -> float:
            away = self.loc - start
            return 0.5 * float((away * prior.times(away)).sum())

        before = value - distance()
        for halving in range(30):
            torch.add(origin, step, alpha=0.5**halving, out=self.loc)
            with isolated_torch_state(0):
                found = expectations(self._structure, gaussian, self.loc, batch, self.num_draws)
            if found.value - distance() >= before - 1e-12 * abs(before):
                return
        self.loc.copy_(origin)
