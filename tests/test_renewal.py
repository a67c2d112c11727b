"""Local blocks that begin again: which they are, and what it is worth on latent Dirichlet allocation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from models import oracle_case
from torch import Tensor

from pyro_blr import BLRInference, renewal
from pyro_blr.renewal import _local_blocks

TOPICS, DOCUMENTS, WORDS = 5, 60, 80


def allocation(document: Tensor, word: Tensor) -> None:
    with pyro.plate("topics", TOPICS):
        phi = pyro.sample("phi", dist.Dirichlet(torch.full((WORDS,), 0.1)))
    with pyro.plate("documents", DOCUMENTS):
        theta = pyro.sample("theta", dist.Dirichlet(torch.full((TOPICS,), 0.1)))
    with pyro.plate("words", len(word)):
        z = pyro.sample("z", dist.Categorical(theta[document]))
        pyro.sample("word", dist.Categorical(phi[z]), obs=word)


def corpus() -> tuple[Tensor, Tensor]:
    generator = np.random.default_rng(0)
    phi = generator.dirichlet(0.05 * np.ones(WORDS), TOPICS)
    theta = generator.dirichlet(0.2 * np.ones(TOPICS), DOCUMENTS)
    counts = np.stack([generator.multinomial(40, row @ phi) for row in theta])
    document, word = counts.nonzero()
    times = counts[document, word]
    return torch.as_tensor(document.repeat(times)), torch.as_tensor(word.repeat(times))


def start(seed: int) -> dict[str, Any]:
    return {"phi": dist.Dirichlet(torch.as_tensor(np.random.default_rng(seed).gamma(100.0, 0.01, (TOPICS, WORDS))))}


def locals_of(model: Any, args: tuple, given: set[str]) -> tuple[list[str], list[str]]:
    engine = BLRInference(model, blocks="sites")
    return _local_blocks(engine._ascent(engine._program(args, {})), given)


def test_which_blocks_are_local() -> None:
    assert locals_of(allocation, corpus(), {"phi"}) == (["z"], ["theta"])
    assert locals_of(allocation, corpus(), {"phi", "theta"}) == ([], [])
    assert locals_of(allocation, corpus(), {"z"}) == ([], [])
    model, args, _, _ = oracle_case("gaussian_mixture")
    assert locals_of(model, args, {"m"})[1] == []  # one vector of weights for all data


def test_optima_are_better_than_from_plain_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    bounds = {}
    for rounds in (0, renewal.ROUNDS):
        monkeypatch.setattr(renewal, "ROUNDS", rounds)
        bounds[rounds] = [
            BLRInference(allocation, init=start(seed), blocks="sites").run(*corpus(), progress=False).elbo
            for seed in range(4)
        ]
    assert np.mean(bounds[renewal.ROUNDS]) > np.mean(bounds[0])


def test_the_bound_never_falls_after_the_rounds() -> None:
    posterior = BLRInference(allocation, init=start(0), blocks="sites").run(*corpus(), progress=False)
    rises = torch.tensor(posterior.history).diff()
    assert posterior.converged
    assert (rises >= -1e-11 * abs(posterior.elbo)).all()


def test_a_distribution_is_a_start_that_is_moved_last() -> None:
    """Under phi at its prior every topic is alike: had phi moved first, all topics would have stayed so."""
    engine = BLRInference(allocation, init=start(0), blocks="sites")
    engine.step(*corpus())
    phi = engine.posterior["phi"].mean
    assert float((phi[0] - phi[1]).abs().max()) > 1e-3


def test_steps_are_plain_sweeps() -> None:
    """`step` does what it says: three of them and a `run` are the same path as three sweeps and a `run`."""
    engine = BLRInference(allocation, init=start(0), blocks="sites")
    losses = [engine.step(*corpus()) for _ in range(3)]
    posterior = engine.run(*corpus(), max_steps=2, progress=False)
    assert posterior.history[0] == pytest.approx(-losses[1], rel=1e-12)
    assert len(posterior.history) == 5
