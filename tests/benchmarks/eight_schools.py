"""One `step` on small models, eight schools first, against one `SVI.step` with `AutoNormal`.

    python tests/benchmarks/eight_schools.py
    python tests/benchmarks/eight_schools.py --compile                  # the same with compile=True
    python tests/benchmarks/eight_schools.py --compile --device cuda    # and a regression of 10^5 rows and 100 columns

All are warm: a sweep over an exact model that has been taken a hundred times is replayed as a flat list of operations, and where q
has settled, a step is a run of the model, which shows that its data are the same.  `--unsettled` lets exact models forget that they have.
`--moving` gives every step other data: a model is then recorded anew every time, and nothing is compiled.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from side_by_side import argument_parser, heading, in_turn, row
from torch import Tensor

from pyro_blr import BLRInference

EFFECTS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
X = torch.cat([torch.ones(100, 1), torch.randn(100, 3, generator=torch.Generator().manual_seed(0))], -1)
Y = X @ torch.tensor([0.5, -1.0, 2.0, 0.0]) + torch.randn(100, generator=torch.Generator().manual_seed(1))
GROUPS = torch.arange(100) % 8


def model(effects: Tensor, errors: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
    precision = pyro.sample("precision", dist.Gamma(2.0, 20.0))
    with pyro.plate("schools", len(effects)):
        school = pyro.sample("school", dist.Normal(mean, precision.rsqrt()))
        pyro.sample("effect", dist.Normal(school, errors), obs=effects)


def coin(flips: Tensor) -> None:
    fairness = pyro.sample("fairness", dist.Beta(10.0, 10.0))
    with pyro.plate("flips", len(flips)):
        pyro.sample("flip", dist.Bernoulli(fairness), obs=flips)


def mean_and_precision(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
    precision = pyro.sample("precision", dist.Gamma(1.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mean, precision.rsqrt()), obs=y)


def hierarchical(x: Tensor, groups: Tensor, y: Tensor) -> None:
    between, within = (pyro.sample(name, dist.Gamma(2.0, 2.0)) for name in ("between", "within"))
    w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[-1]), 2.0).to_event(1))
    with pyro.plate("groups", 8):
        offset = pyro.sample("offset", dist.Normal(0.0, between.rsqrt()))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x @ w + offset[groups], within.rsqrt()), obs=y)


def ten_sites(x: Tensor, groups: Tensor, y: Tensor) -> None:
    """Intercepts and slopes by group, offsets by another grouping, other columns; a precision each."""
    names = ("between_intercepts", "between_slopes", "between_offsets", "within")
    intercepts, slopes, offsets, within = (pyro.sample(name, dist.Gamma(2.0, 2.0)) for name in names)
    intercept, slope = (pyro.sample(name, dist.Normal(0.0, 2.0)) for name in ("intercept", "slope"))
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    with pyro.plate("groups", 8):
        a = pyro.sample("a", dist.Normal(intercept, intercepts.rsqrt()))
        b = pyro.sample("b", dist.Normal(slope, slopes.rsqrt()))
    with pyro.plate("others", 5):
        c = pyro.sample("c", dist.Normal(0.0, offsets.rsqrt()))
    with pyro.plate("data", len(y)):
        loc = a[groups] + b[groups] * x[:, 1] + x[:, 2:] @ w + c[groups % 5]
        pyro.sample("y", dist.Normal(loc, within.rsqrt()), obs=y)


def wide(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[-1]), 1.0).to_event(1))
    precision = pyro.sample("precision", dist.Gamma(1.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x @ w, precision.rsqrt()), obs=y)


def wide_data() -> tuple[Tensor, Tensor]:
    x = torch.randn(100_000, 100)
    return x, x.sum(-1) + torch.randn(100_000)


def logistic(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[-1]), 2.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)


def non_centred(effects: Tensor, errors: Tensor) -> None:
    mean, scale = pyro.sample("mean", dist.Normal(0.0, 5.0)), pyro.sample("scale", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(effects)):
        school = pyro.sample("school", dist.Normal(0.0, 1.0))
        pyro.sample("effect", dist.Normal(mean + scale * school, errors), obs=effects)


CASES: dict[str, tuple[Callable[..., None], tuple[Tensor, ...]]] = {
    "eight schools, exact": (model, (EFFECTS, ERRORS)),
    "coin, exact": (coin, (torch.tensor([1.0] * 6 + [0.0] * 4),)),
    "mean and precision, exact": (mean_and_precision, (Y,)),
    "hierarchical regression, exact": (hierarchical, (X, GROUPS, Y)),
    "logistic regression, quadrature": (logistic, (X, (Y > 0).float())),
    "eight schools, non-centred, draws": (non_centred, (EFFECTS, ERRORS)),
    "regression of ten sites, exact": (ten_sites, (X, GROUPS, Y)),
}


def unsettled(engine: BLRInference, *data: Tensor) -> None:
    """A step that sweeps, whether that changes anything or not."""
    engine._settled = None
    engine.step(*data)


def timed(
    step: Callable[..., Any], sets: list[tuple[Tensor, ...]], number: int, clock: Callable[[], float]
) -> Callable:
    """A function that takes steps, on the sets of data in turn, and returns the seconds of one."""

    def per_step() -> float:
        start = clock()
        for data in itertools.islice(itertools.cycle(sets), number):
            step(*data)
        return (clock() - start) / number

    return per_step


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--only", default="", help="the cases whose name contains this")
    parser.add_argument("--warm-up", type=int, default=150, help="steps before the clock runs")
    parser.add_argument("--steps", type=int, default=100, help="steps timed together")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--processor", action="store_true", help="processor seconds, which other programs change less")
    parser.add_argument("--compile", action="store_true", help="steps with compile=True")
    parser.add_argument("--moving", action="store_true", help="other data at every step")
    parser.add_argument("--unsettled", action="store_true", help="exact models only: every step is a sweep")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    clock = time.process_time if options.processor else time.perf_counter
    heading(f"one step, float32, {options.device}{', compile=True' * options.compile}{', moving' * options.moving}")
    if options.device != "cpu":  # saying "cpu" would slow every call
        torch.set_default_device(options.device)
    cases = {**CASES, "regression, 10^5 rows of 100, exact": (wide, wide_data())} if options.device != "cpu" else CASES
    for name, (program, data) in cases.items():
        if options.only not in name or (options.unsettled and "exact" not in name):
            continue
        pyro.clear_param_store()
        sets = [tuple(item.to(options.device) for item in data)]
        if options.moving:
            sets += [(*sets[0][:-1], sets[0][-1].roll(1))]
        engine = BLRInference(program, compile=options.compile)
        svi = SVI(program, AutoNormal(program), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
        step = partial(unsettled, engine) if options.unsettled else engine.step
        for each in (step, svi.step):
            timed(each, sets, options.warm_up, clock)()
        ours, theirs = (timed(each, sets, options.steps, clock) for each in (step, svi.step))
        row(
            name,
            *in_turn(ours, theirs, options.pairs),
            "at most 0.1 of ten sites" if options.compile else "at most 0.33",
        )


if __name__ == "__main__":
    main()
