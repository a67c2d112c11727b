"""One `step` on a model of the size of eight schools, against one `SVI.step` with `AutoNormal`.

    python tests/benchmarks/eight_schools.py

Both are warm: a sweep that has been taken a hundred times is replayed as a flat list of operations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from side_by_side import argument_parser, heading, in_turn, row, seconds

from pyro_blr import BLRInference

EFFECTS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def model(effects: torch.Tensor, errors: torch.Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
    precision = pyro.sample("precision", dist.Gamma(2.0, 20.0))
    with pyro.plate("schools", len(effects)):
        school = pyro.sample("school", dist.Normal(mean, precision.rsqrt()))
        pyro.sample("effect", dist.Normal(school, errors), obs=effects)


def per_step(step: Callable[..., Any], number: int) -> float:
    def steps() -> None:
        for _ in range(number):
            step(EFFECTS, ERRORS)

    return seconds(steps) / number


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--warm-up", type=int, default=150, help="steps before the clock runs")
    parser.add_argument("--steps", type=int, default=100, help="steps timed together")
    parser.add_argument("--pairs", type=int, default=15)
    options = parser.parse_args()
    heading("eight schools, float32")
    engine = BLRInference(model)
    svi = SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    for step in (engine.step, svi.step):
        per_step(step, options.warm_up)
    pairs = in_turn(
        lambda: per_step(engine.step, options.steps), lambda: per_step(svi.step, options.steps), options.pairs
    )
    row("step against SVI.step", *pairs, "at most 0.5")


if __name__ == "__main__":
    main()
