"""Linear regression with unknown precision on a million rows: `run` against a hand-written program; a sweep
as N grows; memory.

    python tests/benchmarks/regression.py

Float32 data whose columns have mean 5. The hand-written program forms the Gram matrix in float64 from the
same chunks of rows, and iterates the two updates until E[tau] stands still; since its sums are in
float64, so is its E[tau], whatever the data are in.
"""

from __future__ import annotations

import resource
import subprocess
import sys

import pyro
import pyro.distributions as dist
import torch
from side_by_side import argument_parser, heading, in_turn, intervals, row, seconds, stamped

from pyro_blr import BLRInference
from pyro_blr.ascent import Ascent

CHUNK = 1 << 15


def data(rows: int, columns: int = 100) -> tuple[torch.Tensor, torch.Tensor]:
    """(X, y) in float32, made in place so that the peak of memory is the data."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(rows, columns, generator=generator).add_(5)
    weights = torch.randn(columns, generator=generator)
    return X, (X @ weights).add_(torch.randn(rows, generator=generator).mul_(0.5))


def model(X: torch.Tensor, y: torch.Tensor) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([X.shape[1]]).to_event(1))
    tau = pyro.sample("tau", dist.Gamma(1.0, 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(X @ w, tau.rsqrt()), obs=y)


def by_hand(X: torch.Tensor, y: torch.Tensor) -> float:
    """E[tau] of coordinate ascent on q(w) q(tau), w ~ N(0, I), tau ~ Gamma(1, 1)."""
    rows, columns = X.shape
    gram = torch.zeros(columns, columns, dtype=torch.float64)
    cross, square = torch.zeros(columns, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for start in range(0, rows, CHUNK):
        x, r = X[start : start + CHUNK].double(), y[start : start + CHUNK].double()
        gram.addmm_(x.T, x)
        cross += x.T @ r
        square += r @ r
    tau, before = torch.ones((), dtype=torch.float64), 0.0
    while abs(float(tau) - before) > 1e-12 * before:
        before = float(tau)
        covariance = torch.linalg.inv(torch.eye(columns, dtype=torch.float64) + tau * gram)
        mean = tau * (covariance @ cross)
        residual = square - 2 * cross @ mean + mean @ gram @ mean + (gram * covariance).sum()
        tau = (1 + 0.5 * rows) / (1 + 0.5 * residual)
    return float(tau)


def peak() -> float:
    """The largest resident memory of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def memory(rows: int) -> None:
    """Peak above what the process held before there were data, as a multiple of the data."""
    warm_up()
    before = peak()
    X, y = data(rows)
    size = X.nbytes + y.nbytes
    made = peak()
    BLRInference(model).run(X, y, progress=False)
    ratio = (peak() - before) / size
    print(
        f"memory: data {size / 1e6:.0f} MB; peak {(peak() - before) / 1e6:.0f} MB above the start, data included "
        f"({(made - before) / 1e6:.0f} MB once they were made): {ratio:.3g} times the data; wanted: below 3"
    )


def warm_up() -> None:
    BLRInference(model).run(*data(1000), progress=False)


def sweeps(rows: tuple[int, int], pairs: int) -> None:
    """Time between the bounds of neighbouring sweeps, the first left out, of fits to two sizes of data."""
    engines = [BLRInference(model) for _ in rows]
    sets = [data(n) for n in rows]

    def times(position: int) -> float:
        with stamped(Ascent, "bound_before") as stamps:
            engines[position].run(*sets[position], max_steps=9, tol=1e-12, progress=False)
        found = sorted(intervals(stamps[:9]))
        return found[len(found) // 2]

    for position in range(2):
        times(position)
    large, small = in_turn(lambda: times(0), lambda: times(1), pairs)
    row(f"a sweep after the first, N = {rows[0]} against {rows[1]}", large, small, "at most 1.5")


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--memory", action="store_true", help="only the memory, in this process")
    options = parser.parse_args()
    if options.memory:
        memory(options.rows)
        return
    heading(f"linear regression, N = {options.rows}, D = 100, float32")
    subprocess.run(
        [sys.executable, __file__, "--memory", "--rows", str(options.rows)], check=True
    )  # before data are made here
    warm_up()
    X, y = data(options.rows)
    found: list[float] = []

    def ours() -> None:
        found.append(float(BLRInference(model).run(X, y, progress=False)["tau"].mean))

    exact = by_hand(X, y)
    row(
        "run against the program by hand",
        *in_turn(lambda: seconds(ours), lambda: seconds(lambda: by_hand(X, y)), options.pairs),
        "at most 2",
    )
    print(f"E[tau]: {found[0]!r} against {exact!r}: {abs(found[0] / exact - 1):.2g} apart, relatively; wanted: 1e-4")
    sweeps((options.rows, 10_000), 3 * options.pairs)


if __name__ == "__main__":
    main()
