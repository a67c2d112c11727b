"""Logistic regressions of `shared/oracles`: the bound against an independent program's, iterations, and seconds.

    PYTHONPATH=tests OMP_NUM_THREADS=1 python tests/benchmarks/logistic.py

The first fit of a process also imports what torch imports late; the others are warm.  An iteration is an integral of
the gradient and the Hessian over all data, those of the start (Newton's method at the mean) included.
"""

from __future__ import annotations

import json
import statistics
from unittest import mock

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from oracles import arrays, shared_path
from side_by_side import argument_parser, duration, heading, seconds
from torch import Tensor

from pyro_blr import BLRInference, Posterior
from pyro_blr.ascent import Ascent

FITS = 5


def design(x: np.ndarray) -> Tensor:
    """The columns after one of ones."""
    columns = torch.as_tensor(x, dtype=torch.float64)
    return torch.cat([torch.ones(len(columns), 1, dtype=torch.float64), columns], 1)


def model(x: Tensor, y: Tensor, scale: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros_like(scale), scale).to_event(1))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)


def bits(posterior: Posterior, x: Tensor, y: Tensor) -> float:
    """Minus the average log2 probability of held-out data, over Gauss-Hermite points of the predictor."""
    w = posterior["w"]
    nodes, weights = np.polynomial.hermite_e.hermegauss(32)
    mean, sd = x @ w.mean, ((x @ w.covariance_matrix) * x).sum(-1).sqrt()
    logits = (2 * y - 1).unsqueeze(-1) * (mean.unsqueeze(-1) + sd.unsqueeze(-1) * torch.as_tensor(nodes))
    probability = logits.sigmoid() @ torch.as_tensor(weights / weights.sum())
    return float(-probability.log2().mean())


def main() -> None:
    argument_parser(__doc__).parse_args()
    heading("logistic regressions")
    expected = json.loads(shared_path("oracles", "expected.json").read_text())
    for name in ("breast_cancer", "a1a"):
        data, oracle = arrays(f"{name}.npz"), expected[f"logistic_{name}"]
        x, y = design(data["x"]), (torch.as_tensor(data["y"], dtype=torch.float64) > 0).double()
        scale = torch.ones(x.shape[1], dtype=torch.float64)
        if name == "a1a":
            scale = torch.full_like(scale, 2.8072**-0.5)
            scale[0] = 1e-5**-0.5
        times, fits, newton = [], [], Ascent.target_at_mean
        for _ in range(FITS):
            with mock.patch.object(Ascent, "target_at_mean", autospec=True, side_effect=newton) as start:
                times.append(seconds(lambda: fits.append(BLRInference(model).run(x, y, scale, progress=False))))  # noqa: B023
        posterior = fits[-1]
        print(
            f"{name}: bound {posterior.elbo:.6f}, {abs(posterior.elbo / oracle['bound'] - 1):.1e} from the oracle's "
            f"{oracle['bound']:.6f}; {start.call_count} + {posterior.num_steps} iterations; "
            f"first fit {duration(times[0])}, warm {duration(statistics.median(times[1:]))}"
        )
        if "x_test" in data:
            held_out = bits(posterior, design(data["x_test"]), (torch.as_tensor(data["y_test"]) > 0).double())
            print(f"{name}: {held_out:.4f} bits a held-out row")
        if "note" in oracle:
            print(f"{name}: {oracle['note']}")


if __name__ == "__main__":
    main()
