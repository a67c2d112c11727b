"""What a program written for SVI is made of, how either engine runs it, and how its guide is judged."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO

from pyro_blr import BLRInference

__all__ = ["LISTED", "Fit", "Program", "Script", "by_steps", "by_svi", "program", "without_guide"]


@dataclass(frozen=True)
class Script:
    """A program ready to run: what its constructor of SVI gets, and with what its steps are called."""

    model: Callable
    guide: Callable
    args: tuple
    optim: Any
    loss: Any = field(default_factory=Trace_ELBO)
    steps: int = 1000
    batches: Callable[[int], tuple] | None = (
        None  # what the step of this number is called with; `args` where there is none
    )
    after: Callable[[], None] = lambda: None  # what the script does after every step


@dataclass(frozen=True)
class Program:
    """A script of Pyro's: its name, where it stands, which guide it has, and the function that builds it anew."""

    name: str
    source: str
    guide: str
    build: Callable[[], Script]
    draws: int = 200  # of its guide, of which the judge takes the mean
    minutes: bool = False  # whether its published settings take minutes
    alone: bool = True  # whether the model is run without its guide too: latents of many data need not have a network
    worse: str = ""  # why ours ends below SVI's
    points: bool = False  # whether its guide is points: a density, comparable with no bound

    def fresh(self, seed: int = 0) -> Script:
        """The script, in an empty parameter store."""
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        return self.build()


LISTED: list[Program] = []


def program(name: str, source: str, guide: str, **options: Any) -> Callable:
    """Puts the function that builds a script on the list of programs."""

    def listed(build: Callable[[], Script]) -> Callable[[], Script]:
        LISTED.append(Program(name, source, guide, build, **options))
        return build

    return listed


@dataclass(frozen=True)
class Fit:
    """Where an engine ended: the bound of its guide, the standard error of that, and its processor seconds."""

    elbo: float
    error: float
    seconds: float
    engine: Any


def by_svi(program: Program) -> Fit:
    """The script as it was published."""
    return _by_steps(program, SVI)


def by_steps(program: Program) -> Fit:
    """The script with its constructor replaced, step for step."""
    return _by_steps(program, BLRInference)


def _by_steps(program: Program, constructor: Callable) -> Fit:
    script = program.fresh()
    start = time.process_time()
    engine = constructor(script.model, script.guide, script.optim, script.loss)
    for number in range(script.steps):
        engine.step(*(script.batches(number) if script.batches else script.args))
        script.after()
    seconds = time.process_time() - start
    return Fit(*judged(script, script.guide, program.draws), seconds, engine)


def without_guide(program: Program) -> Fit:
    """The model alone, and `run`."""
    script = program.fresh()
    summed = _summed(script)
    pyro.clear_param_store()
    start = time.process_time()
    engine = BLRInference(script.model)
    engine.run(*script.args, progress=False)
    seconds = time.process_time() - start
    return Fit(*judged(script, poutine.block(engine.guide, hide=summed), program.draws), seconds, engine)


def judged(script: Script, guide: Callable, draws: int) -> tuple[float, float]:
    """The mean of a guide's ELBO under the script's own loss, over draws of one particle, and its standard error."""
    loss = copy.copy(script.loss)
    loss.num_particles, loss.vectorize_particles = 1, False
    pyro.set_rng_seed(1)
    with torch.no_grad():
        values = torch.tensor(
            [-loss.loss(script.model, guide, *script.args) for _ in range(draws)], dtype=torch.float64
        )
    return float(values.mean()), float(values.std() / draws**0.5) if draws > 1 else 0.0


def _summed(script: Script) -> list[str]:
    """Sites of the model that its own guide leaves to enumeration: ours is judged at the others."""
    with poutine.block():
        drawn = poutine.trace(script.guide).get_trace(*script.args)
        nodes: Iterable = poutine.trace(poutine.replay(script.model, trace=drawn)).get_trace(*script.args).nodes.items()
    return [
        name
        for name, node in nodes
        if node["type"] == "sample"
        and not node["is_observed"]
        and name not in drawn
        and node["fn"].has_enumerate_support
    ]
