"""A diagonal Gaussian mixture: seconds a sweep, against those of an iteration of scikit-learn's
`BayesianGaussianMixture`.

    python tests/benchmarks/gmm.py

Both start from the same labels, in float64, on the same cores. The models differ in one prior: scikit-
learn ties a mean's precision to its component's, here the two are independent. What is timed lies between
two bounds of one fit; the model's own run is outside.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from side_by_side import argument_parser, heading, in_turn, intervals, row, stamped
from sklearn.mixture import BayesianGaussianMixture

from pyro_blr import BLRInference
from pyro_blr.ascent import Ascent


def data(rows: int, dims: int, components: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points from a seeded mixture, and random labels to start from."""
    generator = np.random.default_rng(0)
    centres = 3 * generator.normal(size=(components, dims))
    scales = generator.uniform(0.5, 1.5, size=(components, dims))
    labels = generator.integers(0, components, rows)
    points = centres[labels] + scales[labels] * generator.normal(size=(rows, dims))
    return torch.as_tensor(points), torch.as_tensor(generator.integers(0, components, rows))


def model(x: torch.Tensor, components: int) -> None:
    """Means and precisions in a plate of their own, so that q is elementwise."""
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(components)))
    with pyro.plate("dims", x.shape[-1], dim=-1), pyro.plate("components", components, dim=-2):
        mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
        precision = pyro.sample("precision", dist.Gamma(1.0, 1.0))
    with pyro.plate("rows", len(x), dim=-1):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(mean[z], precision[z].rsqrt()).to_event(1), obs=x)


class SameStart(BayesianGaussianMixture):
    """scikit-learn's mixture from given labels."""

    labels: Any = None

    def _initialize_parameters(self, X: Any, random_state: Any, **_: Any) -> None:
        self._initialize(X, np.eye(self.n_components)[self.labels])


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--dims", type=int, default=10)
    parser.add_argument("--components", type=int, default=10)
    parser.add_argument("--sweeps", type=int, default=10, help="sweeps of a fit")
    parser.add_argument("--pairs", type=int, default=7, help="fits of each")
    options = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    warnings.simplefilter("ignore")  # scikit-learn is stopped before it has converged
    x, labels = data(options.rows, options.dims, options.components)
    array = x.numpy()
    engine = BLRInference(model, init={"z": labels}, blocks="sites")
    heading(f"Gaussian mixture, N = {options.rows}, D = {options.dims}, K = {options.components}, float64")

    def ours() -> float:
        with stamped(Ascent, "bound_before") as stamps:
            engine.run(x, options.components, max_steps=options.sweeps + 1, tol=1e-12, progress=False)
        return float(np.median(intervals(stamps[: options.sweeps + 1])))

    def theirs() -> float:
        fit = SameStart(
            n_components=options.components,
            covariance_type="diag",
            weight_concentration_prior_type="dirichlet_distribution",
            max_iter=options.sweeps + 1,
            tol=0.0,
        )
        fit.labels = labels.numpy()
        with stamped(SameStart, "_compute_lower_bound") as stamps:
            fit.fit(array)
        return float(np.median(intervals(stamps)))

    ours()  # warm-up: judging the model, and what is kept of it
    theirs()
    row("sweep against iteration", *in_turn(ours, theirs, options.pairs), "at most 1")


if __name__ == "__main__":
    main()
