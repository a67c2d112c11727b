"""Local blocks that begin again while the parameters of the states still form.

A topic of a document and the topics of its words confirm each other: under words that all topics share they settle on few, and stay
there when the topics have become good ones.  So for some rounds they begin again at their start, move a few times, and only then
the other blocks do; scikit-learn's latent Dirichlet allocation begins every iteration so.  Every move is an update as in
any sweep.  Bringing the local blocks to their optimum in each round is worse than either (`docs/design.md`).
"""

from __future__ import annotations

from collections.abc import Collection

from pyro_blr.ascent import Ascent

__all__ = ["renewed"]

ROUNDS = 10
PASSES = 4  # over the local blocks in a round


def renewed(ascent: Ascent, given: Collection[str]) -> None:
    """Rounds from the start of every local block that is not `given` one; nothing where no two local blocks meet."""
    states, parents = _local_blocks(ascent, given)
    if not parents or not ascent.program.is_exact or ascent.program.is_subsampled:
        return
    local = [name for name in ascent.order if name in (*states, *parents)]
    others = [name for name in ascent.order if name not in local]
    start = {name: ascent.beliefs.naturals[name] for name in local}
    for _ in range(ROUNDS):
        for name in local:
            ascent.beliefs.update(name, start[name])
        ascent.sweep(states)
        for _ in range(PASSES):
            ascent.sweep(local)
        ascent.sweep(others)


def _local_blocks(ascent: Ascent, given: Collection[str]) -> tuple[list[str], list[str]]:
    """(Discrete blocks of several elements, blocks of several elements that their own statements look up by data)."""
    messages, blocks = ascent.program.messages, ascent.program.blocks
    states: list[str] = []
    parents: list[str] = []
    components: set[str] = set()
    for name, block in blocks.items():
        if not block.is_discrete or block.batch_shape.numel() == 1 or name in given:
            continue
        for factor in messages.factors_of[name]:
            analytic = messages.plans[factor].analytic
            if factor not in block.site_names:
                components.update(analytic)
                continue
            found = [other for other in analytic if blocks[other].batch_shape.numel() > 1 and other not in given]
            if found:
                states.append(name)
                parents += found
    return states, [name for name in dict.fromkeys(parents) if name not in components]
