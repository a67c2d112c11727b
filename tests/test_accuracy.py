"""The Monte-Carlo error that optima on independent draws are said to have."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from pyro_blr.accuracy import Optima
from pyro_blr.families import ExponentialFamily, Gamma, MultivariateNormal, Normal

Q: dict[str, tuple[ExponentialFamily, Tensor]] = {
    "normals": (Normal(), torch.tensor([[0.0, -0.5]] * 40, dtype=torch.float64)),
    "joint": (
        MultivariateNormal(3),
        MultivariateNormal(3).from_distribution(
            torch.distributions.MultivariateNormal(torch.zeros(3).double(), torch.eye(3).double() * 4)
        ),
    ),
    "gammas": (Gamma(), torch.tensor([[5.0, -2.0]] * 40, dtype=torch.float64)),
}


def beliefs(family: ExponentialFamily, natural: Tensor) -> Any:
    """One block "z" at λ."""
    made = SimpleNamespace(blocks={"z": SimpleNamespace(family=family)}, naturals={"z": natural})
    made.wide = {"z": family.moments(natural)}
    made.copy = lambda: made
    return made


@pytest.mark.parametrize("name", Q)
@pytest.mark.parametrize("rate", [0.5, 1.0])
def test_the_error_is_that_of_the_optimum(name: str, rate: float) -> None:
    """Optima with errors of e n^−rate sds in every direction of λ: found within a factor of two where rate is ½, no less than
    the error where it falls faster.
    """
    family, natural = Q[name]
    factor = torch.linalg.cholesky(torch.linalg.inv(family.fisher(natural)))
    torch.manual_seed(0)
    found = []
    for _ in range(30):
        optima = Optima()
        for size in (64, 256, 1024):
            noise = torch.randn_like(natural) * 0.64 * 8 ** (2 * rate - 1) / size**rate
            optima.add(beliefs(family, natural + (factor @ noise.unsqueeze(-1)).squeeze(-1)), size)
        found.append(optima.error().size)
    assert optima.error().block == "z"
    typical = float(torch.tensor(found).square().mean().sqrt())
    error = 0.64 * 8 ** (2 * rate - 1) / 1024**rate  # a log sd's is less by √2
    assert error / math.sqrt(2) < typical
    assert rate > 0.5 or typical < 2 * error


def test_one_optimum_has_no_error_to_tell() -> None:
    optima = Optima()
    optima.add(beliefs(*Q["normals"]), 64)
    assert optima.error().size == math.inf
    optima.add(beliefs(*Q["normals"]), 64)
    assert optima.error().size == 0.0
