"""One step, as SVI takes it: on a minibatch or fresh draws the rate shrinks, so that noise averages out."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from pyro_blr.ascent import Ascent
from pyro_blr.beliefs import Beliefs
from pyro_blr.blocks import Block
from pyro_blr.checks import check_natural
from pyro_blr.climbs import guarded_sweep
from pyro_blr.draws import Draws, fresh_seed
from pyro_blr.newton import newton_start
from pyro_blr.program import Program
from pyro_blr.rules import Passes, RobbinsMonro

__all__ = ["first_targets", "is_at_rest", "take_step"]

NUM_DRAWS = 32
LOCAL_SWEEPS = 50  # sweeps over local blocks at most, before a global step on a minibatch
LOCAL_TOLERANCE = 1e-4  # relative change of λ below which exact local blocks are at their optimum
INNER_STEPS = 100  # times at most that a step on a minibatch looks for its own end
INNER_LOCAL_SWEEPS = 3  # sweeps over several local blocks each time
INNER_TOLERANCE = 1e-3  # relative change of λ below which it has found it
FIRST_SWEEPS = 300  # sweeps over the first minibatch at most
FIRST_TOLERANCE = 1e-4  # relative change of λ below which they end: near a saddle λ moves slowly
LOOK = 10  # sweeps over exact blocks from one look at how far they go to the next
REST = 1e-14  # nats that the last of them moves a block: 1e-8 remain if each is a thousandth shorter; rounding in float32 moves 1e-15
FULL_STEPS = 5  # steps at ρ = 1 before the rate shrinks, on full data

schedule = RobbinsMonro(delay=1.0, decay=0.6)


def first_targets(program: Program, naturals: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Where the rule would move each block whose messages are exact, for every element of this run."""
    selected = {name: block.select(naturals[name], program.graph.subsamples) for name, block in program.blocks.items()}
    ascent = Ascent(program, Beliefs(program.blocks, selected))
    return {name: ascent.target(name, None) for name in ascent.order if program.messages.is_exact(name)}


def take_step(ascent: Ascent, number: int) -> bool:
    """A full sweep; on a minibatch locals go to their optimum, and globals move by ρ_t.  Whether all further steps do nothing."""
    program = ascent.program
    if not program.is_exact or program.is_subsampled:
        _take_estimated_step(ascent, number)
        return False
    before = dict(ascent.beliefs.naturals)
    ascent.sweep()
    return ascent.bound_kind == "exact evidence" or is_at_rest(program, before, ascent.beliefs.naturals, number)


def is_at_rest(program: Program, before: Mapping[str, Tensor], after: Mapping[str, Tensor], number: int) -> bool:
    """Whether a sweep over exact blocks moved none by more than `REST`, nor by more than the last look saw: sweeps that leave a
    saddle are ever longer."""
    if number % LOOK != LOOK - 1:
        return False
    nats = program.sweeps.moved
    program.sweeps.moved = max(
        _nats_between(block, before[name], after[name]) for name, block in program.blocks.items()
    )
    return program.sweeps.moved <= min(nats, REST)


@torch.no_grad()
def _nats_between(block: Block, before: Tensor, after: Tensor) -> float:
    """s ½ ⟨Δλ, Δμ⟩, the average of the two KL divergences between them; a third of the time of `gap`, which is its limit."""
    if torch.equal(before, after):
        return 0.0
    family = block.family
    changes = (after - before) * (family.to_expectation(after) - family.to_expectation(before))
    return block.scale * abs(0.5 * float(changes.sum()))


def _take_estimated_step(ascent: Ascent, number: int) -> None:
    program = ascent.program
    draws = None if program.is_deterministic else Draws(fresh_seed(), NUM_DRAWS)
    if number == 0 and not program.is_exact:
        newton_start(ascent)
    local = [name for name in ascent.order if name in program.local_blocks()] if program.is_subsampled else []
    if program.is_subsampled and program.is_exact and number == 0:
        _first_sweeps(ascent)
        return
    if program.is_subsampled:
        _optimise_locals(ascent, local, draws)
        rate = Passes(program.graph.steps_of_a_pass).rate(number)
        if program.is_exact:
            _implicit_step(ascent, local, rate)
            return
    else:
        rate = 1.0 if draws is None or number < FULL_STEPS else schedule.rate(number - FULL_STEPS + 1)
    names = [name for name in ascent.order if name not in local]
    guarded_sweep(ascent, draws, rate, None if ascent.beliefs.points else ascent.finite_estimates(draws), names)


def _optimise_locals(ascent: Ascent, local: list[str], draws: Draws | None) -> None:
    """Local blocks to their optimum given the globals: exact ones until λ is still, others until the bound is."""
    if ascent.program.is_exact:
        for _ in range(LOCAL_SWEEPS if len(local) > 1 else 1):
            before = dict(ascent.beliefs.naturals)
            ascent.sweep(local)
            if all(_is_still(before[name], ascent.beliefs.naturals[name], LOCAL_TOLERANCE) for name in local):
                return
        return
    previous = -math.inf
    for _ in range(LOCAL_SWEEPS):
        guarded_sweep(ascent, draws, 1.0, None if ascent.beliefs.points else ascent.finite_estimates(draws), local)
        if ascent.beliefs.points:
            continue
        bound = ascent.estimate(draws)[0]
        if abs(bound - previous) <= 1e-6 * max(1.0, abs(bound)):
            break
        previous = bound


def _is_still(before: Tensor, after: Tensor, tolerance: float) -> bool:
    """Whether λ has moved by no more than a small part of itself."""
    return bool((after - before).norm() <= tolerance * before.norm())


def _first_sweeps(ascent: Ascent) -> None:
    """The first step, ρ = 1: full sweeps on the first minibatch, in the order that full sweeps on all data have.

    They leave the start on the path that full sweeps take, and pass the saddles on it before the rate shrinks.
    """
    for _ in range(FIRST_SWEEPS):
        before = dict(ascent.beliefs.naturals)
        ascent.sweep()
        if all(_is_still(before[name], natural, FIRST_TOLERANCE) for name, natural in ascent.beliefs.naturals.items()):
            return


def _implicit_step(ascent: Ascent, local: list[str], rate: float) -> None:
    """λ ← (1 − ρ) λ_t + ρ λ̂(λ), the target taken where the step ends, locals at their optimum there too.

    Block by block it is the maximum of the minibatch's bound − (1/ρ − 1) KL(q_λ ‖ q_λt) (Theis and Hoffman
    2015, eq. 8).

    It sees each datum as often as the plain step, and gains several times as much from it.
    """
    names = [name for name in ascent.order if name not in local]
    before = dict(ascent.beliefs.naturals)
    for inner in range(INNER_STEPS):
        if inner:
            for _ in range(INNER_LOCAL_SWEEPS if len(local) > 1 else 1):
                ascent.sweep(local)
        settled = True
        for name in names:
            last = ascent.beliefs.naturals[name]
            target = ascent.target(name, None)
            check_natural(ascent.program.blocks[name], target)
            moved = ascent.rule.step(ascent.program.blocks[name].family, before[name], target, rate)
            ascent.beliefs.update(name, moved)
            settled = settled and _is_still(last, moved, INNER_TOLERANCE)
        if settled:
            return
