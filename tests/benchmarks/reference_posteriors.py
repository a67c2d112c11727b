"""Default settings on real data, against reference posteriors: errors in units of the reference's sd.

    python tests/benchmarks/reference_posteriors.py            # five seeds of every posterior
    python tests/benchmarks/reference_posteriors.py --only garch --seeds 1

For every scalar |Δ mean| / sd and |Δ sd| / sd, on draws of q itself; the table has the largest over scalars, and beside
them those of draws weighed by p / q.  `floors.py` gives what the best full-rank Gaussian can do.

The cost is in gradients of the log joint at one point: a Hessian counts its dimension, a value counts as a gradient.
It is counted where draws are taken; quadrature and closed forms are not, and show "-".
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from posteriors import CASES  # noqa: E402
from verdicts import Verdict, fitted, judged, of_case  # noqa: E402

from pyro_blr import targets  # noqa: E402


@contextmanager
def gradients_counted() -> Iterator[list[int]]:
    """Adds to its only entry what the estimators are asked for."""
    count, plain, bound = [0], targets.bonnet_price, targets.Targets.sampled_bound

    def derivatives(function: Any, moments: Any, leaves: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        found = plain(function, moments, leaves, *args, **kwargs)
        directions = leaves[0].numel() if "hessian" in found else leaves.shape[-1] if "covariance" in moments else 1
        count[0] += len(leaves) * (1 + directions)
        return found

    def values(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        found = bound(self, *args, **kwargs)
        count[0] += len(found)
        return found

    targets.bonnet_price, targets.Targets.sampled_bound = derivatives, values
    try:
        yield count
    finally:
        targets.bonnet_price, targets.Targets.sampled_bound = plain, bound


def one(problem: Any, seed: int) -> tuple[Verdict, int, float]:
    """(verdict, gradients, processor seconds) from one seed."""
    start = time.process_time()
    with gradients_counted() as count:
        posterior, seconds = fitted(problem, seed)
    took = time.process_time() - start
    drawn = posterior.elbo_kind.startswith("estimate")
    return judged(problem, posterior, seconds), count[0] if drawn else 0, took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="part of a name")
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    print(
        f"{'posterior':31} floor  bar  met    q's mean, sd per seed | weighed, first seed | k-hat; processor s; gradients"
    )
    for case in CASES:
        if options.only not in case.name:
            continue
        problem = of_case(case)
        found = [one(problem, seed) for seed in range(options.seeds)]
        met = sum(max(v.mean, v.sd) <= case.bar for v, _, _ in found)
        pairs = "  ".join(f"{v.mean:.2f} {v.sd:.2f}" for v, _, _ in found)
        first = found[0][0]
        cost = f"{median(count for _, count, _ in found):,.0f}" if any(count for _, count, _ in found) else "-"
        print(
            f"{case.name:31} {case.floor:5.2f} {case.bar:5.2f} {met} of {len(found)} {pairs} | {first.weighted[0]:.2f} "
            f"{first.weighted[1]:.2f} | {first.khat:.2f}; {median(t for _, _, t in found):.1f}; {cost}; {first.word}, {first.ending}",
            flush=True,
        )


if __name__ == "__main__":
    main()
