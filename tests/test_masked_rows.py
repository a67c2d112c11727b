"""A mask with a row for each element of a subsampled plate: the guide is silent where the model is."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO

from pyro_blr import AutoExponentialFamily, BLRInference

MASK = torch.tensor([True, False, True, True, False, True])
DATA = torch.tensor([0.5, -1.0, 2.0, 0.1, 0.7, -0.4], dtype=torch.float64)


def model(size: int = 6, outer: bool = True) -> None:
    """Local sites of which two are hidden, on `size` rows of six."""
    m = pyro.sample("m", dist.Normal(torch.tensor(0.0), 1.0))
    with pyro.plate("n", 6, subsample_size=size) as rows:
        hidden = MASK[rows]
        with poutine.mask(mask=hidden if outer else True):
            z = pyro.sample("z", dist.Normal(m, 2.0).mask(True if outer else hidden))
            pyro.sample("x", dist.Normal(z, 1.0).mask(True if outer else hidden), obs=DATA[rows])


def mean_elbo(guide: AutoExponentialFamily, size: int, outer: bool, count: int) -> tuple[float, float]:
    elbo = Trace_ELBO()
    values = torch.tensor([-elbo.loss(model, guide, size, outer) for _ in range(count)])
    return float(values.mean()), float(values.std()) / count**0.5


@pytest.mark.parametrize("outer", [True, False], ids=["poutine.mask", "distribution.mask"])
def test_the_bound_of_a_subsample_is_that_of_the_plate(outer: bool):
    """On average over rows, by Pyro's own estimate, and as the engine states it exactly."""
    engine = BLRInference(lambda size=6: model(size, outer))
    posterior = engine.run(progress=False)
    guide = AutoExponentialFamily(model, "sites")
    guide(2, outer)
    guide.naturals = dict(posterior.natural)
    part, error = mean_elbo(guide, 2, outer, 1000)
    assert abs(part - posterior.elbo) < 5 * error


def test_a_guide_that_saw_other_rows_masks_these():
    guide = AutoExponentialFamily(model)
    for _ in range(10):
        trace = poutine.trace(guide).get_trace(3)
        rows = trace.nodes["n"]["value"]
        assert torch.equal(trace.nodes["z"]["mask"], MASK[rows])
