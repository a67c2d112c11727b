"""Linear regression with unknown precision, N = 100,000: `run` against Pyro's SVI, each to within 0.1 nats
of its own family's optimum.

    python tests/benchmarks/svi.py --budget 600

SVI has `AutoMultivariateNormal` and Adam at 0.01. The bound of its guide has a closed form here, so it is
judged outside the clock and without noise, at its parameters and at their running average (whichever is
there first); the optimum of its family is that closed form's own maximum, found by L-BFGS. Where the
budget ends first, the ratio is a lower bound.
"""

from __future__ import annotations

import math
import time

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal
from regression import data, model, warm_up
from side_by_side import argument_parser, duration, heading, seconds

from pyro_blr import BLRInference

NEAR = 0.1  # nats


class Exact:
    """E_q[log p(y, w, tau)] + H(q) for (w, log tau) ~ N(m, L Lᵀ), from sums over the data in float64."""

    def __init__(self, X: torch.Tensor, y: torch.Tensor):
        X64, y64 = X.double(), y.double()
        self.rows, self.columns = X.shape
        self.gram, self.cross, self.square = X64.T @ X64, X64.T @ y64, y64 @ y64

    def bound(self, mean: torch.Tensor, tril: torch.Tensor) -> torch.Tensor:
        """With weight tau the Gaussian is tilted: E[tau f(w)] = E[tau] E[f(w + Cov(w, log tau))]."""
        d, n = self.columns, self.rows
        covariance = tril @ tril.mT
        w, u, V = mean[:d], mean[d], covariance[:d, :d]
        tilted, tau = w + covariance[:d, d], (u + 0.5 * covariance[d, d]).exp()
        residual = self.square - 2 * self.cross @ tilted + tilted @ (self.gram @ tilted) + (self.gram * V).sum()
        likelihood = 0.5 * n * (u - math.log(2 * math.pi)) - 0.5 * tau * residual
        prior = (
            -0.5 * (w @ w + V.diagonal().sum()) - 0.5 * d * math.log(2 * math.pi) - tau + u
        )  # Gamma(1, 1), and d tau / d log tau
        entropy = tril.diagonal().log().sum() + 0.5 * (d + 1) * (1 + math.log(2 * math.pi))
        return likelihood + prior + entropy

    def optimum(self) -> float:
        """The largest bound, by L-BFGS in coordinates in which the posterior is nearly a unit Gaussian."""
        d = self.columns
        solution = torch.linalg.solve(self.gram, self.cross)
        tau = self.rows / (self.square - self.cross @ solution)
        scale = torch.zeros(d + 1, d + 1, dtype=torch.float64)
        scale[:d, :d] = torch.linalg.cholesky(torch.linalg.inv(tau * self.gram))
        scale[d, d] = (2 / self.rows) ** 0.5
        centre = torch.cat([solution, tau.log().unsqueeze(0)])
        shift = torch.zeros(d + 1, dtype=torch.float64, requires_grad=True)
        factor = torch.zeros(d + 1, d + 1, dtype=torch.float64, requires_grad=True)
        solver = torch.optim.LBFGS(
            [shift, factor],
            max_iter=500,
            tolerance_grad=1e-7,
            tolerance_change=1e-14,
            line_search_fn="strong_wolfe",
        )

        def loss() -> torch.Tensor:
            solver.zero_grad()
            tril = scale @ (factor.tril(-1) + factor.diagonal().exp().diag())
            value = -self.bound(centre + scale @ shift, tril)
            value.backward()
            return value

        solver.step(loss)
        return -float(loss().detach())


def fit_svi(X: torch.Tensor, y: torch.Tensor, exact: Exact, target: float, budget: float) -> tuple[float, int, float]:
    """(seconds in SVI.step, steps, best bound) until within `NEAR` of the target, or the budget is spent."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = AutoMultivariateNormal(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    spent, steps, best, since = 0.0, 0, -math.inf, 1
    average: list[torch.Tensor] = []
    while spent < budget and best < target - NEAR:
        start = time.perf_counter()
        for _ in range(50):
            svi.step(X, y)
        spent += time.perf_counter() - start
        steps += 50
        with torch.no_grad():
            now = [guide.loc.double(), (guide.scale.unsqueeze(-1) * guide.scale_tril).double()]
            if steps >= 2 * since or not average:  # the average starts anew whenever the steps have doubled
                average, since, count = now, steps, 1
            else:
                count += 1
                average = [a + (x - a) / count for a, x in zip(average, now, strict=True)]
            best = max(best, float(exact.bound(*now)), float(exact.bound(*average)))
    return spent, steps, best


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--budget", type=float, default=120.0, help="seconds for SVI")
    parser.add_argument("--runs", type=int, default=5, help="runs of ours")
    options = parser.parse_args()
    heading(f"linear regression against SVI, N = {options.rows}, D = 100, float32")
    X, y = data(options.rows)
    warm_up()
    posteriors = []
    times = [
        seconds(lambda: posteriors.append(BLRInference(model).run(X, y, progress=False))) for _ in range(options.runs)
    ]
    limit = BLRInference(model).run(X, y, tol=1e-9, progress=False).elbo
    print(
        f"run: median {duration(sorted(times)[len(times) // 2])} ({duration(min(times))} to {duration(max(times))}), "
        f"{posteriors[0].num_steps} sweeps; {limit - posteriors[0].elbo:.2g} nats below the optimum of its family, {limit:.3f}"
    )
    exact = Exact(X, y)
    target = exact.optimum()
    spent, steps, best = fit_svi(X, y, exact, target, options.budget)
    arrived = best >= target - NEAR
    print(
        f"SVI: {duration(spent)}, {steps} steps; {target - best:.3g} nats below the optimum of its family, {target:.3f}"
        + ("" if arrived else ": the budget ended first, the ratios are lower bounds")
    )
    ratios = sorted(spent / t for t in times)
    print(
        f"SVI against run: ratio {ratios[len(ratios) // 2]:.4g} ({ratios[0]:.4g} to {ratios[-1]:.4g}); wanted: at least 100"
    )


if __name__ == "__main__":
    main()
