"""One state for all elements of a large discrete site: the same verdicts and the same q as with a state an element."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_blr import BLRInference, sharing
from pyro_blr.sharing import shared_state

K, N = 3, 40
GENERATOR = torch.Generator().manual_seed(5)
Y = torch.randn(N, generator=GENERATOR) + 3 * torch.randint(K, (N,), generator=GENERATOR)
GROUP = torch.randint(4, (N,), generator=GENERATOR)
CENTRES = torch.tensor([0.0, 3.0, 6.0])


def mixture(mean_of: Callable[[Tensor, Tensor], Any]) -> Callable[[Tensor], None]:
    """A mixture that says how the mean of a datum follows from the means and its state."""

    def model(y: Tensor) -> None:
        with pyro.plate("components", K):
            m = pyro.sample("m", dist.Normal(0.0, 5.0))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Categorical(torch.ones(K)))
            pyro.sample("y", dist.Normal(mean_of(m, z), 1.0), obs=y)

    return model


def lookup_by_rows(m: Tensor, z: Tensor) -> Tensor:
    return torch.stack([m, m + 1, m - 1, 2 * m])[GROUP, z]


# What a program may do with the states, and whether one row can stand for all.
ALIKE = {
    "m[z]": lambda m, z: m[z],
    "m[z] and data": lambda m, z: 0.5 * m[z] + 0.1 * Y,
    "arithmetic": lambda m, z: (z == 0) * m[0] + (z == 1) * m[1] + (z == 2).double() * m[2],
    "where": lambda m, z: torch.where(z == 0, m[0], torch.where(z == 1, m[1], m[2])),
    "by data and state": lookup_by_rows,
    "a sum over the right": lambda m, z: (torch.stack([m, m], -1)[z] * 0.5).sum(-1),
}
APART = {
    "roll": lambda m, z: m[z.roll(1)],
    "flip": lambda m, z: m[z].flip(0),
    "asked for its length": lambda m, z: m[z] * (len(z) > 1),
    "asked for its shape": lambda m, z: m[z] + (1.0 if z.shape == (N,) else 7.0),
    "reshaped": lambda m, z: m[z.reshape(2, -1)].reshape(-1),
    "a permutation": lambda m, z: m[z[torch.arange(N).flip(0)]],
    "cumulative": lambda m, z: m[z.cumsum(0) % K],
    "the first": lambda m, z: m[z] + 0 * m[z[0]],
    "unbound": lambda m, z: torch.stack([m[k] for k in z]),
    "over the plate": lambda m, z: m[z] - m[z].mean(0),
    "written into": lambda m, z: torch.zeros(N).index_put((torch.arange(N),), m[z]),
}


def understood(model: Callable, *args: Any) -> Any:
    engine = BLRInference(model)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return engine._program(args, {})


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "LARGE", 2)


@pytest.mark.parametrize("name", list(ALIKE))
def test_programs_that_treat_elements_alike_run_with_one_row(name: str, always: None) -> None:
    program = understood(mixture(ALIKE[name]), Y)
    assert program.graph.shared == {"z"}
    assert program.trace.nodes["z"]["value"].shape == (1,)
    assert program.graph.sites["z"].shape == (N,)


@pytest.mark.parametrize("name", list(APART))
def test_programs_that_tell_elements_apart_keep_a_state_an_element(name: str, always: None) -> None:
    program = understood(mixture(APART[name]), Y)
    assert program.graph.shared == frozenset()
    assert program.trace.nodes["z"]["value"].shape == (N,)


@pytest.mark.parametrize("name", list(ALIKE))
def test_the_posterior_is_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for large in (2, 10**9):
        monkeypatch.setattr(sharing, "LARGE", large)
        engine = BLRInference(mixture(ALIKE[name]), init={"m": CENTRES})
        posterior = engine.run(Y, progress=False)
        found.append((posterior.elbo, engine.guide.naturals, str(engine.explain(Y))))
    (bound, naturals, text), (other_bound, other_naturals, other_text) = found
    assert bound == pytest.approx(other_bound, abs=1e-9)
    assert text == other_text
    for site, natural in naturals.items():
        torch.testing.assert_close(natural, other_naturals[site])


def test_a_row_an_element_is_never_made() -> None:
    words, elements = 1_000, sharing.LARGE
    data = torch.arange(elements) % words

    def model(word: Tensor) -> None:
        with pyro.plate("topics", 2):
            phi = pyro.sample("phi", dist.Dirichlet(torch.ones(words)))
        with pyro.plate("words", len(word)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2)))
            pyro.sample("word", dist.Categorical(phi[z]), obs=word)

    program = understood(model, data)
    assert program.is_exact
    probs = program.trace.nodes["word"]["fn"].probs
    assert probs.shape == (elements, words)
    assert probs.untyped_storage().nbytes() == words * probs.element_size()


def test_minibatches_are_drawn_once_where_sharing_fails(always: None) -> None:
    """The run that failed has drawn the subsample: the next one takes it, so that the generator stands where it would."""

    def model(y: Tensor) -> None:
        with pyro.plate("components", K):
            m = pyro.sample("m", dist.Normal(0.0, 5.0))
        with pyro.plate("data", len(y), subsample_size=10) as index:
            z = pyro.sample("z", dist.Categorical(torch.ones(K)))
            pyro.sample("y", dist.Normal(m[z[torch.arange(10)]], 1.0), obs=y[index])

    program = understood(model, Y)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = torch.randperm(N)[:10]
    assert torch.equal(program.graph.subsamples["data"].sort().values, plain.sort().values)


def test_a_site_outside_plates_keeps_its_states() -> None:
    value = torch.zeros(20_000, dtype=torch.long)
    assert shared_state(value, dist.Categorical(torch.ones(20_000, 2)), []) is value
