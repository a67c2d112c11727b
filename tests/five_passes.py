"""Five passes of minibatches against full sweeps from the same start: the cases, and an honest judge of where they got to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_blr import BLRInference
from pyro_blr.ascent import Ascent
from pyro_blr.beliefs import Beliefs
from pyro_blr.initial import initial_natural
from pyro_blr.program import Programs

__all__ = ["CASES", "PASSES", "Case", "bound_of_globals", "mixture", "mixture_case"]

PASSES = 5


def subsampled(rows: Tensor | int | None) -> dict[str, Any]:
    """A plate's arguments: these rows; so many that it draws itself; all."""
    return {"subsample_size": rows} if isinstance(rows, int) else {"subsample": rows}


def lda(words: Tensor, rows: Tensor | int | None = None) -> None:
    """500 documents of 50 words out of 100, 6 topics."""
    with pyro.plate("topics", 6):
        phi = pyro.sample("phi", dist.Dirichlet(0.5 * torch.ones(100)))
    with pyro.plate("documents", words.shape[1], dim=-1, **subsampled(rows)) as index:
        theta = pyro.sample("theta", dist.Dirichlet(0.5 * torch.ones(6)))
        with pyro.plate("words", words.shape[0], dim=-2):
            z = pyro.sample("z", dist.Categorical(theta))
            pyro.sample("word", dist.Categorical(phi[z]), obs=words[:, index])


def lda_case(seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Words, and topics that start at six documents."""
    random = np.random.default_rng(seed)
    topics = random.dirichlet(0.1 * np.ones(100), 6)
    mixing = random.dirichlet(0.2 * np.ones(6), 500)
    words = np.stack([[random.choice(100, p=topics[k]) for k in random.choice(6, size=50, p=row)] for row in mixing], 1)
    words = torch.as_tensor(words)
    chosen = torch.as_tensor(random.permutation(500)[:6])
    counts = torch.stack([torch.bincount(words[:, d], minlength=100) for d in chosen]) + 0.5
    return words, {"phi": counts / counts.sum(-1, keepdim=True)}


def mixture(y: Tensor, rows: Tensor | int | None = None) -> None:
    """20,000 points in the plane, 6 components of unknown means and diagonal precisions."""
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(6)))
    with pyro.plate("components", 6):
        mean = pyro.sample("mean", dist.Normal(0.0, 3.0).expand([2]).to_event(1))
        tau = pyro.sample("tau", dist.Gamma(2.0, 2.0).expand([2]).to_event(1))
    with pyro.plate("data", len(y), **subsampled(rows)) as index:
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("y", dist.Normal(mean[z], tau[z].rsqrt()).to_event(1), obs=y[index])


def mixture_case(seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Overlapping clusters, and means that start at points far from each other."""
    random = np.random.default_rng(seed)
    centres = 4 * random.normal(size=(6, 2))
    y = centres[random.integers(0, 6, 20000)] + random.normal(size=(20000, 2)) * random.uniform(
        0.4, 1.2, size=(20000, 1)
    )
    y = torch.as_tensor(y)
    chosen = [int(random.integers(20000))]
    for _ in range(5):
        chosen.append(int(torch.cdist(y, y[chosen]).min(-1).values.argmax()))
    return y, {"mean": y[chosen]}


@dataclass(frozen=True)
class Case:
    """A model, the data and start of each seed, and how large its subsampled plate is."""

    model: Callable
    make: Callable[[int], tuple[Tensor, dict[str, Tensor]]]
    rows: int
    local: tuple[str, ...]

    def engine(self, init: Mapping[str, Tensor]) -> BLRInference:
        return BLRInference(self.model, init=init, blocks="sites")

    def full_batch(self, seed: int) -> tuple[float, float]:
        """The bound after the first full sweep, and where full sweeps end."""
        data, init = self.make(seed)
        engine = self.engine(init)
        engine.step(data)
        first = -engine.evaluate_loss(data)
        return first, engine.run(data, tol=0.01, progress=False).elbo

    def minibatches(self, seed: int, batch: int, drawn: bool = False) -> float:
        """The bound on all data after five passes, each a new order; or after as many steps on rows that the plate draws."""
        data, init = self.make(seed)
        engine = self.engine(init)
        pyro.set_rng_seed(seed)
        for _ in range(PASSES):
            for rows in torch.randperm(self.rows).split(batch):
                engine.step(data, batch if drawn else rows)
        return bound_of_globals(self.model, data, engine.guide.naturals, self.local)


def bound_of_globals(model: Callable, data: Tensor, naturals: Mapping[str, Tensor], local: Sequence[str]) -> float:
    """The bound on all data at these globals: only local sites are swept, to their optimum.

    It goes below the engine, whose `step` would move the globals too.
    """
    program = Programs(model, "sites").run((data,), {})
    start = {name: initial_natural(block) for name, block in program.blocks.items()}
    fixed = {name: natural for name, natural in naturals.items() if name not in local}
    ascent = Ascent(program, Beliefs(program.blocks, {**start, **fixed}))
    bound = -float("inf")
    for _ in range(200):
        ascent.sweep(list(local))
        before, bound = bound, ascent.bound_before()
        if bound - before < 1e-3:
            break
    assert all(torch.equal(ascent.beliefs.naturals[name], natural) for name, natural in fixed.items())
    return bound


CASES = {
    "documents": Case(lda, lda_case, 500, ("theta", "z")),
    "mixture": Case(mixture, mixture_case, 20000, ("z",)),
}
