"""Plates in every nesting and enumerated sites, against oracles that know neither: dense Gaussians, and all states one by one.

Pyro's own tests of these assert that a step runs, or what the gradient of the loss is; here the engine has to end at the optimum.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.optim import Adam
from torch import Tensor
from torch.distributions import constraints

from pyro_blr import BLRInference

HOW = ["plate", "loop"]
ALL = slice(None)


# ------------------------------------------------------------------------------------------------------------
# Plates: Gaussians, whose posterior is one linear system


def elements(how: str, name: str, size: int, dim: int, given: int | None = None) -> Iterator[tuple[Any, str]]:
    """(index, ending of the site names) inside a plate: once, for all of its elements, or for one after the other."""
    if how == "plate":
        with pyro.plate(name, size, subsample_size=given, dim=dim) as index:
            yield (index if given else ALL), ""
    else:
        for i in pyro.plate(name, size, subsample_size=given):
            yield int(i), f"_{int(i)}"


def placed(y: Tensor, *indices: Any) -> Tensor:
    """y[indices] as plates of dims -1, -2, … hold it: the first index is the last dim, and what is left of all plates is none."""
    for axis, i in enumerate(indices):
        y = y[(ALL,) * axis + (slice(i, i + 1) if isinstance(i, int) else i,)]
    y = y.permute(*reversed(range(y.dim())))
    for _ in itertools.takewhile(lambda i: isinstance(i, int), reversed(indices)):
        y = y[0]
    return y


@pytest.mark.parametrize(
    ("how", "blocks"),
    [(how, "auto") for how in itertools.product(HOW, HOW, HOW)]
    + [(("plate", "plate", "plate"), "sites"), (("loop", "plate", "loop"), "sites")],
)
def test_three_plates_in_each_other(how: tuple[str, str, str], blocks: str) -> None:
    """m ~ N(0, 1), a_i ~ N(m, 1), b_ij ~ N(a_i, 1), y_ijk ~ N(b_ij, 1)."""
    sizes = (2, 3, 2)
    y = torch.linspace(-1.0, 2.0, 12).sin().reshape(sizes)

    def model() -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        for i, at_i in elements(how[0], "I", 2, -1):
            a = pyro.sample(f"a{at_i}", dist.Normal(m, 1.0))
            for j, at_j in elements(how[1], f"J{at_i}", 3, -2):
                b = pyro.sample(f"b{at_i}{at_j}", dist.Normal(a, 1.0))
                for k, at_k in elements(how[2], f"K{at_i}{at_j}", 2, -3):
                    pyro.sample(f"y{at_i}{at_j}{at_k}", dist.Normal(b, 1.0), obs=placed(y, i, j, k))

    same_i, same_j = torch.kron(torch.eye(2), torch.ones(6, 6)), torch.kron(torch.eye(6), torch.ones(2, 2))
    covariance = 1.0 + same_i + same_j + torch.eye(12)
    solved = torch.linalg.solve(covariance, y.flatten())
    engine = BLRInference(model, blocks=blocks)
    for _ in range(2 if blocks == "auto" else 200):
        engine.step()
    # sweeps by site end where one moves no block by 1e-14 nats: 3/2 δ² there, times 1 / (1 − r) of a contraction r < 0.9
    tolerance = 1e-8 if blocks == "auto" else 10 * (2e-14 / 3) ** 0.5
    of_a = (1.0 + same_i) @ solved
    found = [engine.posterior[name].mean.flatten() for name in (["a"] if how[0] == "plate" else ["a_0", "a_1"])]
    np.testing.assert_allclose(float(engine.posterior["m"].mean), float(solved.sum()), atol=tolerance)
    np.testing.assert_allclose(torch.cat(found), of_a[[0, 6]], atol=tolerance)
    if blocks == "auto":
        evidence = dist.MultivariateNormal(torch.zeros(12), covariance).log_prob(y.flatten())
        assert engine.posterior.elbo_kind == "exact evidence"
        assert -engine.evaluate_loss() == pytest.approx(float(evidence), abs=1e-9)


@pytest.mark.parametrize("dims", [(-1, -2), (-2, -1)], ids=["columns inside", "rows inside"])
@pytest.mark.parametrize("how", [*itertools.product(HOW, HOW)], ids="-".join)
def test_plates_that_cross(how: tuple[str, str], dims: tuple[int, int]) -> None:
    """a_i ~ N(0, 1), b_j ~ N(0, 1), y_ij ~ N(a_i + b_j, 1)."""
    y = torch.linspace(-1.0, 2.0, 6).cos().reshape(2, 3)

    def model() -> None:
        sites: list[dict[str, Tensor]] = [{}, {}]
        for axis, name in enumerate("ab"):
            for _, at in elements(how[axis], f"{name}s", y.shape[axis], dims[axis]):
                sites[axis][at] = pyro.sample(f"{name}{at}", dist.Normal(0.0, 1.0))
        outer = dims.index(-1)  # the plate of the rightmost dim goes first
        for p, at_p in elements(how[outer], "first", y.shape[outer], -1):
            for q, at_q in elements(how[1 - outer], f"second{at_p}", y.shape[1 - outer], -2):
                loc = sites[outer][at_p] + sites[1 - outer][at_q]
                pyro.sample(f"y{at_p}{at_q}", dist.Normal(loc, 1.0), obs=placed(y if outer == 0 else y.mT, p, q))

    covariance = torch.kron(torch.eye(2), torch.ones(3, 3)) + torch.kron(torch.ones(2, 2), torch.eye(3)) + torch.eye(6)
    engine = BLRInference(model)
    engine.step()
    evidence = dist.MultivariateNormal(torch.zeros(6), covariance).log_prob(y.flatten())
    assert -engine.evaluate_loss() == pytest.approx(float(evidence), abs=1e-9)
    means = torch.linalg.solve(covariance, y.flatten()).reshape(2, 3)
    found = (
        engine.posterior["a"].mean.flatten()
        if how[0] == "plate"
        else [engine.posterior["a_0"].mean, engine.posterior["a_1"].mean]
    )
    np.testing.assert_allclose(torch.as_tensor(found), means.sum(1), atol=1e-9)


@pytest.mark.parametrize(
    ("how", "given"),
    [
        (("plate", "plate"), (3, 2)),
        (("plate", "plate"), (6, 2)),
        (("plate", "plate"), (3, 4)),
        (("plate", "loop"), (3, 2)),
        (("loop", "plate"), (3, 2)),
        (("loop", "loop"), (3, 2)),
    ],
)
def test_subsampled_plates_in_each_other(how: tuple[str, str], given: tuple[int, int]) -> None:
    """y_ij ~ N(m, 1), rows and columns drawn anew at every step: the precision does not depend on which, the mean averages out."""
    y = torch.linspace(0.0, 3.0, 24).sin().reshape(6, 4)

    def model() -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        for i, at_i in elements(how[0], "I", 6, -1, given[0]):
            for j, at_j in elements(how[1], f"J{at_i}", 4, -2, given[1]):
                pyro.sample(f"y{at_i}{at_j}", dist.Normal(m, 1.0), obs=placed(y, i, j))

    engine = BLRInference(model)
    steps = 60
    for _ in range(steps):
        engine.step()
    assert float(engine.posterior["m"].variance) == pytest.approx(1 / 25, rel=1e-6)
    every_draw = [
        y[list(rows)][:, list(columns)].mean() * 24 / 25
        for rows in itertools.combinations(range(6), given[0])
        for columns in itertools.combinations(range(4), given[1])
    ]
    standard_error = float(torch.stack(every_draw).std()) / steps**0.5
    assert float(engine.posterior["m"].mean) == pytest.approx(float(y.sum()) / 25, abs=5 * standard_error)


# ------------------------------------------------------------------------------------------------------------
# Enumeration: small models of discrete sites, against all of their states


def flip(name: str, probs: Any, **options: Any) -> Tensor:
    return pyro.sample(name, dist.Bernoulli(torch.as_tensor(probs)), **options).long()


SHAKY = torch.tensor([0.2, 0.7], dtype=torch.float64)
TABLE = torch.tensor([[0.1, 0.6], [0.4, 0.9]], dtype=torch.float64)


def one_above_a_plate() -> None:
    x = flip("x", 0.3)
    with pyro.plate("J", 3):
        y = flip("y", SHAKY[x])
        flip("w", SHAKY[y], obs=torch.tensor([1.0, 1.0, 0.0]))


def plates_in_each_other() -> None:
    with pyro.plate("I", 2, dim=-1):
        x = flip("x", torch.tensor([0.3, 0.6]))
        with pyro.plate("J", 2, dim=-2):
            y = flip("y", SHAKY[x])
            flip("w", TABLE[x, y], obs=torch.tensor([[1.0, 0.0], [1.0, 1.0]]))


def two_plates_below_one() -> None:
    x = flip("x", 0.4)
    with pyro.plate("I", 2):
        flip("u", TABLE[x, flip("y", SHAKY[x])], obs=torch.tensor([1.0, 0.0]))
    with pyro.plate("J", 3):
        flip("v", TABLE[flip("z", 0.5), x], obs=torch.tensor([1.0, 0.0, 0.0]))


def plates_that_cross() -> None:
    rows, columns = pyro.plate("I", 2, dim=-2), pyro.plate("J", 3, dim=-1)
    with rows:
        x = flip("x", torch.tensor([[0.3], [0.6]]))
    with columns:
        y = flip("y", torch.tensor([0.5, 0.2, 0.8]))
    with rows, columns:
        flip("w", TABLE[x, y], obs=torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]]))


def a_loop() -> None:
    x = flip("x", 0.6)
    for i in pyro.plate("I", 2):
        y = flip(f"y_{i}", SHAKY[x])
        for j in pyro.plate(f"J_{i}", 2):
            flip(f"w_{i}_{j}", TABLE[y, x], obs=torch.tensor(float(i != j)))


def a_diamond() -> None:
    a = flip("a", 0.3)
    b, c = flip("b", SHAKY[a]), flip("c", SHAKY[1 - a])
    d = flip("d", TABLE[b, c])
    flip("w", SHAKY[d], obs=torch.tensor(1.0))


def three_states() -> None:
    x = pyro.sample("x", dist.Categorical(torch.tensor([0.2, 0.5, 0.3])))
    y = pyro.sample("y", dist.Categorical(torch.tensor([[0.1, 0.2, 0.7], [0.3, 0.4, 0.3], [0.8, 0.1, 0.1]])[x]))
    pyro.sample("w", dist.Normal(torch.tensor([-1.0, 0.0, 2.0])[y] + x, 1.0), obs=torch.tensor(0.7))


def scaled_and_masked() -> None:
    x = flip("x", 0.3)
    with pyro.plate("J", 3), poutine.mask(mask=torch.tensor([True, False, True])):
        flip("w", SHAKY[x], obs=torch.tensor([1.0, 1.0, 0.0]))
    with pyro.plate("K", 2), poutine.scale(scale=2.5):
        flip("v", TABLE[x, flip("y", 0.4)], obs=torch.ones(2))


def with_memory() -> None:
    z = flip("z_0", 0.3)
    for t in pyro.markov(range(1, 5)):
        z = flip(f"z_{t}", SHAKY[z])
        flip(f"w_{t}", TABLE[z, z], obs=torch.tensor(float(t % 2)))


MODELS = [
    one_above_a_plate,
    plates_in_each_other,
    two_plates_below_one,
    plates_that_cross,
    a_loop,
    a_diamond,
    three_states,
    scaled_and_masked,
    with_memory,
]
every_model = pytest.mark.parametrize("model", MODELS, ids=[model.__name__ for model in MODELS])


class States:
    """log p at every joint state of a model's discrete sites, one run of the model for each."""

    def __init__(self, model: Callable):
        nodes: Any = poutine.trace(model).get_trace().nodes
        self.sites = {
            name: node
            for name, node in nodes.items()
            if node["type"] == "sample" and not node["is_observed"] and type(node["fn"]).__name__ != "_Subsample"
        }
        self.shapes = {name: node["fn"].batch_shape for name, node in self.sites.items()}
        self.counts = {name: len(node["fn"].enumerate_support(expand=False)) for name, node in self.sites.items()}
        axes = [self.counts[name] for name, shape in self.shapes.items() for _ in range(shape.numel())]
        self.log_joint = torch.zeros(axes)
        for state in itertools.product(*map(range, axes)):
            trace = poutine.trace(poutine.condition(model, data=self._values(torch.tensor(state)))).get_trace()
            self.log_joint[state] = trace.log_prob_sum()

    def _values(self, state: Tensor) -> dict[str, Tensor]:
        parts = state.split([shape.numel() for shape in self.shapes.values()])
        return {
            name: part.reshape(self.shapes[name]).to(node["value"].dtype)
            for (name, node), part in zip(self.sites.items(), parts, strict=True)
        }

    def factors(self, laws: dict[str, Any]) -> list[Tensor]:
        """The probabilities of each element's states, in the order of the axes."""
        result: list[Tensor] = []
        for name, law in laws.items():
            count, shape = self.counts[name], self.shapes[name]
            values = torch.arange(count).to(self.sites[name]["value"].dtype)
            table = law.log_prob(values.reshape(-1, *(1,) * len(shape)).expand(count, *shape)).exp().detach()
            result += list(table.reshape(count, -1).T)
        return result

    def expected(self, factors: list[Tensor], apart: int | None = None) -> Tensor:
        """E_q[log p], over all elements or over all but one."""
        total = self.log_joint
        for axis in reversed(range(len(factors))):
            if axis != apart:
                total = (total.movedim(axis, -1) * factors[axis]).sum(-1)
        return total

    def bound(self, factors: list[Tensor]) -> float:
        return float(self.expected(factors) - sum(torch.xlogy(q, q).sum() for q in factors))


def same_plates(model: Callable) -> Callable:
    """A guide with a Bernoulli or Categorical of its own parameters for every discrete site, in the model's plates."""
    sites = States(model).sites

    def guide() -> None:
        plates: dict[str, Any] = {}
        for place, (name, node) in enumerate(sites.items()):
            shape = node["fn"].batch_shape
            with contextlib.ExitStack() as stack:
                for frame in node["cond_indep_stack"]:
                    if frame.vectorized:
                        if frame.name not in plates:
                            plates[frame.name] = pyro.plate(frame.name, frame.size, dim=frame.dim)
                        stack.enter_context(plates[frame.name])
                start = 0.2 + 0.1 * place + 0.05 * torch.arange(float(shape.numel())).reshape(shape)
                if isinstance(node["fn"], dist.Categorical):
                    probs = torch.stack([start, 0.5 * (1 - start), 0.5 * (1 - start)], -1)
                    law: Any = dist.Categorical(pyro.param(f"q_{name}", probs, constraint=constraints.simplex))
                else:
                    law = dist.Bernoulli(pyro.param(f"q_{name}", start, constraint=constraints.unit_interval))
                pyro.sample(name, law)

    return guide


def laws_of(guide: Callable, states: States) -> dict[str, Any]:
    nodes: Any = poutine.trace(guide).get_trace().nodes
    return {name: nodes[name]["fn"] for name in states.sites}


@every_model
def test_the_bound_of_an_enumerated_guide_is_that_of_all_states(model: Callable) -> None:
    """From a wrong start to the best product: each element's probabilities are softmax E_q[log p | its state]."""
    states, guide = States(model), same_plates(model)
    engine = BLRInference(
        model,
        config_enumerate(guide, "parallel"),
        Adam({"lr": 0.01}),
        TraceEnum_ELBO(max_plate_nesting=2),
    )
    start = engine.evaluate_loss()
    assert -start == pytest.approx(states.bound(states.factors(laws_of(guide, states))), abs=1e-6)
    for _ in range(100):
        engine.step()
    factors = states.factors(laws_of(guide, states))
    for axis, q in enumerate(factors):
        np.testing.assert_allclose(q, states.expected(factors, apart=axis).softmax(-1), atol=1e-6)
    assert -engine.evaluate_loss() == pytest.approx(states.bound(factors), abs=1e-6)
    assert -engine.evaluate_loss() <= float(states.log_joint.logsumexp(tuple(range(states.log_joint.dim())))) + 1e-9


@every_model
def test_discrete_sites_without_a_guide(model: Callable) -> None:
    """The same fixed point, where the engine chooses q."""
    states, engine = States(model), BLRInference(model)
    posterior = engine.run(tol=1e-10, progress=False)
    factors = states.factors({name: posterior[name] for name in states.sites})
    for axis, q in enumerate(factors):
        np.testing.assert_allclose(q, states.expected(factors, apart=axis).softmax(-1), atol=1e-6)
    assert posterior.elbo == pytest.approx(states.bound(factors), abs=1e-9)
