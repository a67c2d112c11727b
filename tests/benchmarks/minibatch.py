"""Five passes of minibatches: which part of the gap between the first full sweep and the full-batch optimum they close.

    PYTHONPATH=tests python tests/benchmarks/minibatch.py
    PYTHONPATH=tests python tests/benchmarks/minibatch.py --seeds 70 71 72 --case documents --batches 25

Data, start and minibatches follow from the seed. Both bounds are those of the globals, with every local
site at its optimum on all data. More than one is possible: minibatches may end in a better local optimum.
"""

from __future__ import annotations

import statistics
import time

import torch
from five_passes import CASES, PASSES
from side_by_side import argument_parser, heading

BATCHES = {"documents": (25, 50, 100), "mixture": (500, 1000)}


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--case", choices=list(CASES), nargs="+", default=list(CASES))
    parser.add_argument("--batches", type=int, nargs="+", help="one size or more, for the cases given")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(70, 90)))
    parser.add_argument(
        "--drawn", action="store_true", help="rows that Pyro's plate draws, instead of passes in random order"
    )
    options = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    how = "drawn by the plate" if options.drawn else "in random order"
    heading(f"{PASSES} passes of minibatches, rows {how}, seeds {options.seeds}")
    for name in options.case:
        case, sizes = CASES[name], options.batches or BATCHES[name]
        closed: dict[int, list[float]] = {size: [] for size in sizes}
        start = time.perf_counter()
        for seed in options.seeds:
            first, optimum = case.full_batch(seed)
            for size in sizes:
                closed[size].append((case.minibatches(seed, size, options.drawn) - first) / (optimum - first))
            print(f"{name}, seed {seed}: {' '.join(f'{parts[-1]:.4f}' for parts in closed.values())}", flush=True)
        for size, parts in closed.items():
            enough = sum(part >= 0.99 for part in parts)
            print(
                f"{name}, {size} of {case.rows}: 99 % in {enough} of {len(parts)}; least {min(parts):.4f}, "
                f"median {statistics.median(parts):.4f}; {' '.join(f'{part:.4f}' for part in parts)}"
            )
        print(f"{name}: {time.perf_counter() - start:.0f} s in all", flush=True)


if __name__ == "__main__":
    main()
