"""Default settings on real data, against reference posteriors: errors in units of the reference's sd.

    python tests/benchmarks/reference_posteriors.py            # five seeds of every posterior
    python tests/benchmarks/reference_posteriors.py --only garch --seeds 1

For every scalar |Δ mean| / sd and |Δ sd| / sd, on draws of q itself; the table has the largest over scalars.
`floors.py` gives what the best full-rank Gaussian can do.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from statistics import median

import pyro
import torch
from side_by_side import duration

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from posteriors import CASES, Case, errors, reference_of  # noqa: E402

from pyro_blr import BLRInference  # noqa: E402

NUM_DRAWS = 40_000


def one(case: Case, seed: int) -> tuple[float, float, float, str]:
    """(error of means, of sds, seconds, how it ended) from one seed."""
    data, reference = reference_of(case)
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    start = time.perf_counter()
    posterior = BLRInference(case.model).run(data, progress=False)
    took = time.perf_counter() - start
    mean, sd = errors(case.scalars(posterior.sample((NUM_DRAWS,)), data), reference)
    return mean, sd, took, posterior.stop_reason if posterior.converged else f"NOT CONVERGED: {posterior.stop_reason}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="part of a name")
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    print(f"{'posterior':34} {'bar':>5}  {'met':>5}  errors of mean, of sd per seed; seconds; how it ended")
    for case in CASES:
        if options.only not in case.name:
            continue
        found = [one(case, seed) for seed in range(options.seeds)]
        met = sum(max(mean, sd) <= case.bar for mean, sd, _, _ in found)
        pairs = "  ".join(f"{mean:.2f} {sd:.2f}" for mean, sd, _, _ in found)
        print(
            f"{case.name:34} {case.bar:5.2f}  {met} of {len(found)}  {pairs}; {duration(median(f[2] for f in found))}; {found[0][3]}",
            flush=True,
        )


if __name__ == "__main__":
    main()
