"""No dependency is lost, however it is written: the posterior that comes out is the model's own.

What it should be is computed from plain runs of the model: its log joint is quadratic in the latents, or they
have few states.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import pyro
import pyro.distributions as dist
import pytest
import torch
from idioms import IDIOMS, Idiom, Y, k_site, observe, z_site
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample

from pyro_blr import BLRInference


class Given(Messenger):
    """Latent sites at given values, outside whatever handlers the model has of its own."""

    def __init__(self, values: Mapping[str, torch.Tensor]):
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg) -> None:
        if msg["name"] in self.values and msg["value"] is None and not msg["is_observed"]:
            msg["value"] = self.values[msg["name"]].clone()


def run(model: Callable, values: Mapping[str, torch.Tensor]) -> poutine.Trace:
    with Given(values), torch.no_grad(), pyro.validation_enabled(False):
        return poutine.trace(model).get_trace()


def log_joint(model: Callable, values: Mapping[str, torch.Tensor]) -> float:
    """Σ_f s_f log f in a plain run; NaN under a mask is nothing."""
    total = 0.0
    for node in run(model, values).nodes.values():
        if node["type"] == "sample" and not isinstance(node["fn"], _Subsample):
            log_prob = node["fn"].log_prob(node["value"])
            if node["mask"] is not None:
                log_prob = torch.where(torch.as_tensor(node["mask"]), log_prob, 0.0)
            total += float((log_prob * node["scale"]).sum().detach())
    return total


def latents(model: Callable) -> dict[str, dict]:
    return {
        name: node
        for name, node in run(model, {}).nodes.items()
        if node["type"] == "sample" and not node["is_observed"] and not isinstance(node["fn"], (_Subsample, dist.Delta))
    }


def gaussian_optimum(model: Callable) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Mean and sd of the best product over sites of Gaussians, from the quadratic that the log joint is."""
    shapes = {name: node["value"].shape for name, node in latents(model).items()}
    sizes = [shape.numel() for shape in shapes.values()]
    dim = sum(sizes)

    def at(u: torch.Tensor) -> float:
        parts = zip(shapes.items(), u.split(sizes), strict=True)
        return log_joint(model, {name: part.reshape(shape) for (name, shape), part in parts})

    eye = torch.eye(dim)
    base, up, down = at(torch.zeros(dim)), [at(e) for e in eye], [at(-e) for e in eye]
    slope = torch.tensor([(a - b) / 2 for a, b in zip(up, down, strict=True)])
    precision = torch.diag(torch.tensor([2 * base - a - b for a, b in zip(up, down, strict=True)]))
    for i, j in itertools.combinations(range(dim), 2):
        precision[i, j] = precision[j, i] = up[i] + up[j] - base - at(eye[i] + eye[j])
    far = torch.linspace(-1.3, 2.1, dim)
    quadratic = base + slope @ far - 0.5 * far @ precision @ far
    assert abs(at(far) - float(quadratic)) < 1e-5 * max(1.0, abs(base)), "the log joint is not quadratic"
    mean = torch.linalg.solve(precision, slope)
    found = {}
    for (name, shape), part, own in zip(shapes.items(), mean.split(sizes), torch.arange(dim).split(sizes), strict=True):
        sd = torch.linalg.inv(precision[own][:, own]).diagonal().sqrt()
        found[name] = (part.reshape(shape), sd.reshape(shape))
    return found


def enumerated_optimum(model: Callable) -> dict[str, torch.Tensor]:
    """Probabilities of states in the best product over sites; the posterior where there is one site."""
    states = {name: node["fn"].enumerate_support() for name, node in latents(model).items()}
    table = torch.tensor(
        [log_joint(model, dict(zip(states, choice, strict=True))) for choice in itertools.product(*states.values())]
    ).reshape([len(s) for s in states.values()])
    q = [torch.softmax(torch.zeros(n), -1) for n in table.shape]
    for _ in range(500):
        for i in range(len(q)):
            expected = table
            for j in reversed(range(len(q))):
                if j != i:
                    expected = torch.tensordot(expected, q[j], dims=([j], [0]))
            q[i] = torch.softmax(expected, -1)
    return dict(zip(states, q, strict=True))


def explained(engine: BLRInference, row: Idiom) -> bool:
    """Whether the engine treats the model as the row says, and names what leaves torch."""
    explanation = engine.explain()
    if row.how in ("exact", "enumerated"):
        return explanation.exact
    reasons = [verdict.reason for verdict in explanation if not verdict.exact]
    return bool(reasons) and (
        row.how == "sampled" or all("leaves the program's tensors" in reason for reason in reasons)
    )


COMPILED = {"conditional_operator"}  # torch.cond compiles at every run of the model
CONTINUOUS = [
    pytest.param(row, marks=pytest.mark.nightly if row.name in COMPILED else ())
    for row in IDIOMS
    if row.how != "enumerated"
]
DISCRETE = [row for row in IDIOMS if row.how == "enumerated"]
# Relative to the standard deviation.  Coordinate ascent over several sites ends at tol, not at the optimum.
TOLERANCE = {"exact": 1e-8, "sampled": 1e-7, "score": 1e-7}
# No second derivatives, or no batches of draws: sampled by gradients alone, which have noise.
LOOSER = {"sparse_values": 0.05, "conditional_operator": 0.05}


def test_there_are_enough_idioms():
    assert len(IDIOMS) >= 45
    assert len({row.name for row in IDIOMS}) == len(IDIOMS)


# What torch, NumPy and Pyro say of the idioms themselves.
@pytest.mark.filterwarnings(
    "ignore:__array_wrap__ must accept context:DeprecationWarning",
    "ignore:To copy construct from a tensor:UserWarning",
    "ignore:pyro.module data did not find params:UserWarning",
    "ignore:The `random_module` primitive is deprecated:FutureWarning",
    "ignore:Sparse invariant checks:UserWarning",
    "ignore:There is a performance drop:UserWarning",
)
@pytest.mark.parametrize("row", CONTINUOUS, ids=lambda row: row.name)
def test_posterior_is_the_models_own(row):
    expected = gaussian_optimum(row.model)
    pyro.clear_param_store()
    engine = BLRInference(row.model, blocks="sites")  # the factorised optimum is what is expected
    posterior = engine.run(progress=False, tol=1e-10, max_steps=3000)
    tolerance = LOOSER.get(row.name, TOLERANCE[row.how] if len(expected) == 1 else 1e-4)
    for site, (mean, sd) in expected.items():
        assert float(((posterior[site].mean - mean) / sd).abs().max()) < tolerance
        assert float((posterior[site].stddev / sd - 1).abs().max()) < tolerance
    assert explained(engine, row), engine.explain()


@pytest.mark.parametrize("row", DISCRETE, ids=lambda row: row.name)
def test_states_have_the_models_own_probabilities(row):
    expected = enumerated_optimum(row.model)
    engine = BLRInference(row.model)
    posterior = engine.run(progress=False, tol=1e-10)
    for site, probs in expected.items():
        q = posterior[site]
        assert torch.allclose(q.log_prob(q.enumerate_support()).exp(), probs, atol=1e-6)
    assert explained(engine, row), engine.explain()


def statements_in_a_branch():
    if k_site() == 1:
        z_site()
    observe(torch.tensor(0.5))


def observations_in_a_branch():
    on = pyro.sample("on", dist.Bernoulli(torch.tensor(0.4)))
    pyro.sample("x1" if on else "x0", dist.Normal(torch.tensor(0.0), 1.0), obs=Y[0])


def number_of_sites_from_a_latent():
    n = int(k_site()) + 1
    for i in range(n):
        pyro.sample(f"w{i}", dist.Normal(torch.tensor(0.0), 1.0))
    observe(torch.tensor(0.5))


@pytest.mark.parametrize(
    "model",
    [statements_in_a_branch, observations_in_a_branch, number_of_sites_from_a_latent],
    ids=lambda m: m.__name__,
)
def test_statements_that_depend_on_a_latent_are_refused_by_name(model):
    """Which sites there are is no function of q: refused at the first step, with the line that branches."""
    engine = BLRInference(model)
    with pytest.raises(
        ValueError,
        match=r"statements the model makes depends on its latents \(.* on .*, test_dependencies.py:\d+\)",
    ):
        engine.step()
    with pytest.raises(RuntimeError, match="no posterior yet"):
        _ = engine.posterior


def test_a_write_that_comes_and_goes_is_seen_at_every_step():
    """The model runs at every step: what a global says today counts today."""
    shelf = {"slope": 1.0}

    def model():
        x = torch.zeros(3)
        x[1:].add_(shelf["slope"] * z_site())
        observe(x)

    engine = BLRInference(model)
    for slope in (1.0, 3.0, 3.0, -2.0):
        shelf["slope"] = slope
        engine.step()
        ((mean, sd),) = gaussian_optimum(model).values()
        found = engine.posterior["z"]
        assert torch.allclose(found.mean, mean) and torch.allclose(found.stddev, sd)


def test_judging_draws_nothing_from_the_global_generators():
    import random

    import numpy as np

    def model():
        observe([-0.5, 0.3, 0.8][int(k_site())] + 2 * z_site().item())

    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    BLRInference(model).explain()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert random.getstate() == before[2]


def test_devices_that_are_not_in_use_yet_keep_the_users_seed(monkeypatch):
    """What torch.manual_seed would leave behind for a device that starts later is the user's own."""
    seeds = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)

    def model():
        observe([-0.5, 0.3, 0.8][int(k_site())] + 2 * z_site().item())

    engine = BLRInference(model)
    torch.manual_seed(7)
    for _ in range(3):
        engine.step()
    assert seeds == [7]
