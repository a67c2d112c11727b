"""Python loops: their statements are judged once and averaged together, and the average is that of the statements one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_blr import BLRInference, conjugacy
from pyro_blr.beliefs import Beliefs
from pyro_blr.messages import Messages
from pyro_blr.program import Program, Programs

T = 7
COUNTS = torch.tensor([3.0, 4.0, 0.0, 1.0, 1.0, 5.0, 2.0])
LINE = torch.tensor([0.3, -0.2, 1.1, 0.7, 2.0, 1.4, 0.9])


def level(length: int = T) -> None:
    tau, noise, z = pyro.sample("tau", dist.Gamma(2.0, 1.0)), pyro.sample("noise", dist.Gamma(2.0, 1.0)), 0.0
    for t in range(length):
        z = pyro.sample(f"z_{t}", dist.Normal(z, tau.rsqrt()))
        pyro.sample(f"y_{t}", dist.Normal(z, noise.rsqrt()), obs=LINE.double()[t % T])


def counts() -> None:
    s, z = pyro.sample("s", dist.LogNormal(-1.0, 0.5)), 0.0
    for t in pyro.markov(range(T)):
        z = pyro.sample(f"z_{t}", dist.Normal(z, s))
        pyro.sample(f"y_{t}", dist.Poisson(z.exp()), obs=COUNTS.double()[t])


def vectors() -> None:
    """A step that is no elementwise function: a matrix times the state."""
    turn = torch.tensor([[0.9, 0.2], [-0.2, 0.9]])
    z: Any = torch.zeros(2)
    tau = pyro.sample("tau", dist.Gamma(2.0, 1.0))
    for t in range(T):
        z = pyro.sample(f"z_{t}", dist.Normal(turn @ z, 0.5).to_event(1))
        pyro.sample(f"y_{t}", dist.Normal(z[0], tau.rsqrt()), obs=LINE.double()[t])


def in_plates() -> None:
    """Series in a plate, each with its own loop; and their mean, outside."""
    m, tau = pyro.sample("m", dist.Normal(0.0, 1.0)), pyro.sample("tau", dist.Gamma(2.0, 1.0))
    with pyro.plate("series", 3):
        z: Any = m
        for t in range(T):
            z = pyro.sample(f"z_{t}", dist.Normal(0.8 * z, tau.rsqrt()))
            pyro.sample(f"y_{t}", dist.Normal(z, 0.7), obs=LINE.double()[t] + torch.arange(3.0))


def by_series() -> None:
    """Nothing outside: each series is a Gaussian of its own."""
    tau = pyro.sample("tau", dist.Gamma(2.0, 1.0))
    with pyro.plate("series", 3):
        z: Any = 0.0
        for t in range(T):
            z = pyro.sample(f"z_{t}", dist.Normal(z, tau.rsqrt()))
            pyro.sample(f"y_{t}", dist.Poisson((z + 0.5).exp()), obs=COUNTS.double()[t].expand(3))


def positive() -> None:
    """Sites that are images of the block's variable."""
    r: Any = torch.ones(())
    for t in range(T):
        r = pyro.sample(f"r_{t}", dist.LogNormal(r.log(), 0.3))
        pyro.sample(f"y_{t}", dist.Poisson(r), obs=COUNTS.double()[t])


def one_site() -> None:
    """No site of its own for any statement."""
    p, m = pyro.sample("p", dist.Beta(2.0, 2.0)), pyro.sample("m", dist.Normal(0.0, 1.0))
    for t in range(T):
        pyro.sample(f"coin_{t}", dist.Bernoulli(p), obs=(COUNTS.double()[t] > 1).double())
        pyro.sample(f"logit_{t}", dist.Bernoulli(logits=m * LINE.double()[t]), obs=torch.tensor(1.0))


def two_states() -> None:
    """Two sites a step, and an observation that sees the first step too."""
    tau, v, z = pyro.sample("tau", dist.Gamma(2.0, 1.0)), torch.zeros(()), torch.zeros(())
    first: Any = None
    for t in range(T):
        v = pyro.sample(f"v_{t}", dist.Normal(v, 0.3))
        z = pyro.sample(f"z_{t}", dist.Normal(z + v, tau.rsqrt()))
        first = z if first is None else first
        pyro.sample(f"y_{t}", dist.Normal(z - 0.5 * first, 0.7), obs=LINE.double()[t])


def masked_and_scaled() -> None:
    z: Any = torch.zeros(())
    for t in range(T):
        z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
        with pyro.poutine.scale(scale=2.0), pyro.poutine.mask(mask=torch.tensor(t % 3 > 0)):
            pyro.sample(f"y_{t}", dist.StudentT(3.0, z, 0.5), obs=LINE.double()[t])


def program_of(model: Callable) -> Program:
    blocks: Any = [[f"r_{t}" for t in range(T)]] if model is positive else "auto"
    return Programs(model, blocks).run((), {})


def belief(program: Program) -> Beliefs:
    """q at a random place."""
    generator = torch.Generator().manual_seed(3)
    naturals = {}
    for name, block in program.blocks.items():
        family, shape = block.family, block.full_shape
        if hasattr(family, "dimension"):
            d = family.dimension
            root = 0.4 * torch.eye(d) + 0.1 * torch.randn(*shape, d, d, generator=generator)
            mean = torch.randn(*shape, d, generator=generator)
            law: Any = dist.MultivariateNormal(mean, root @ root.mT)
        else:
            laws = {"Gamma": dist.Gamma, "Beta": dist.Beta, "Normal": dist.Normal, "LogNormal": dist.LogNormal}
            law = laws[type(family).__name__](torch.full(shape, 2.0), torch.full(shape, 1.3))
        naturals[name] = family.from_distribution(law)
    return Beliefs(program.blocks, naturals)


@pytest.mark.parametrize(
    ("model", "left"),
    [
        (level, ["tau", "noise", "z_0"]),
        (counts, ["s", "z_0"]),
        (vectors, ["tau", "z_0"]),
        (in_plates, ["m", "tau", "z_0"]),
        (by_series, ["tau", "z_0"]),
        (positive, ["r_0"]),
        (one_site, ["p", "m"]),
        (two_states, ["tau", "v_0", "z_0", "y_0"]),
        (masked_and_scaled, ["z_0"]),
    ],
)
def test_what_is_woven_is_what_its_statements_are(model: Callable, left: list[str]) -> None:
    """The expectation, and the message to every block, to rounding; and what is left by itself is what it must be."""
    program = program_of(model)
    woven = program.messages
    assert [name for name in woven.plans if " … " not in name] == left
    single = Messages(program.graph, program.blocks, program.plans, woven.replay)
    q = belief(program)
    together = woven.expected_log_prob(list(woven.plans), q.wide)
    apart = single.expected_log_prob(list(single.plans), q.wide)
    torch.testing.assert_close(together, apart, rtol=1e-10, atol=1e-9)
    for name in program.blocks:
        found, expected = (m.exact_message(name, q.naturals[name], q.wide) for m in (woven, single))
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_a_loop_is_judged_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The judges see as many expressions in forty steps as in eight."""
    seen: list[Any] = []
    judge = conjugacy.numerical_at_all_states

    def counted(probe: Any, argument: Any, block: Any) -> Any:
        seen.append(argument)
        return judge(probe, argument, block)

    monkeypatch.setattr(conjugacy, "numerical_at_all_states", counted)
    found = []
    for length in (8, 40):
        seen.clear()
        program_of(lambda length=length: level(length))
        found.append(len(seen))
    assert found[0] == found[1]


def test_statements_that_differ_are_not_woven() -> None:
    """Each sees another entry of one site, by a number in the program: their expressions are not the same."""

    def model() -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(T), 1.0).to_event(1))
        for t in range(T):
            pyro.sample(f"y_{t}", dist.Normal(w[t], 0.5), obs=LINE.double()[t])

    assert not any(" … " in name for name in program_of(model).messages.plans)
    posterior = BLRInference(model).run(progress=False)
    torch.testing.assert_close(posterior["w"].mean, 0.8 * LINE.double())


def test_a_zero_among_coefficients_is_judged_by_itself() -> None:
    """`0 * z²` is constant, `2 * z²` is no affine function of z: the first statement says nothing of the second."""

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        for t in range(T):
            pyro.sample(f"y_{t}", dist.Normal(torch.tensor(2.0 * t) * z**2, 1.0), obs=LINE.double()[t])

    plans = program_of(model).plans
    assert plans["y_0"].exact and not any(plans[f"y_{t}"].exact for t in range(1, T))


def test_a_loop_over_a_plate_of_its_own_size() -> None:
    """a_i + b_j, i in a plate and j in a loop, three each: what they hold must not be taken for one another's dim."""
    y = torch.linspace(-1.0, 2.0, 9, dtype=torch.float64).cos().reshape(3, 3)

    def model() -> None:
        b = [pyro.sample(f"b_{j}", dist.Normal(torch.zeros((), dtype=torch.float64), 2.0)) for j in range(3)]
        with pyro.plate("rows", 3):
            a = pyro.sample("a", dist.Normal(torch.zeros(3, dtype=torch.float64), 1.0))
            for j in range(3):
                pyro.sample(f"y_{j}", dist.Normal(a + b[j], 1.0), obs=y[:, j])

    one, eye = torch.ones(3, 3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    covariance = torch.kron(eye, one) + 4.0 * torch.kron(one, eye) + torch.eye(9)
    evidence = dist.MultivariateNormal(torch.zeros(9, dtype=torch.float64), covariance).log_prob(y.flatten())
    assert BLRInference(model).run(progress=False).elbo == pytest.approx(float(evidence), abs=1e-9)


def test_an_exponent_is_judged_by_its_value() -> None:
    """A scale of τ^(−1/2) is conjugate, one of τ^(−1) is not, though both are the same steps on data."""
    powers = torch.tensor([-0.5, -1.0] * T)[:T]

    def model() -> None:
        tau = pyro.sample("tau", dist.Gamma(2.0, 2.0))
        for t in range(T):
            pyro.sample(f"y_{t}", dist.Normal(0.0, tau ** powers[t]), obs=LINE.double()[t])

    plans = program_of(model).plans
    assert [plans[f"y_{t}"].exact for t in range(T)] == [t % 2 == 0 for t in range(T)]


def test_a_reason_names_its_own_line() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("first", dist.Normal(z.exp(), 1.0), obs=torch.tensor(1.0))
        pyro.sample("second", dist.Normal(z.exp(), 1.0), obs=torch.tensor(2.0))

    _, first, second = BLRInference(model).explain()["z"]
    lines = [int(verdict.reason.rstrip(")").rpartition(":")[2]) for verdict in (first, second)]
    assert lines[1] == lines[0] + 1


def test_a_loop_takes_minibatches() -> None:
    """Other data in the same structure: the verdicts hold, and what is woven holds the new data."""

    def model(y: Tensor) -> None:
        z: Any = torch.zeros(())
        for t in range(T):
            z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
            pyro.sample(f"y_{t}", dist.Normal(z, 0.5), obs=y[t])

    engine = BLRInference(model)
    prior = torch.ones(T, T).tril() @ torch.ones(T, T).triu()
    gain = prior @ torch.linalg.inv(prior + 0.25 * torch.eye(T))
    for y in (LINE.double(), LINE.double().flip(0)):
        engine.step(y)
        found = torch.stack([engine.posterior[f"z_{t}"].mean for t in range(T)])
        torch.testing.assert_close(found, gain @ y)
