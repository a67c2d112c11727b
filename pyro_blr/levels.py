"""How many draws the optima of a run are found on, one after the other."""

from __future__ import annotations

from pyro_blr.program import Program

__all__ = ["levels_of"]

_LEVELS = (16, 64, 256, 1024, 4096, 16384)  # each starts from the optimum of the one before
_REPLAYED = 256  # at most where every draw runs the model again
_FEW_DIMS = 5  # up to which 16 draws have all second moments of N(0, 1); more begin with 64
_WORK = 2 * 10**9


def levels_of(program: Program) -> tuple[int, ...]:
    """The levels whose sweep costs at most `_WORK` numbers, the first one twice where it is the only one: large data
    determine their posterior from few draws.
    """
    plans, blocks = program.messages.plans, program.blocks
    factors = [name for name, plan in plans.items() if not plan.exact]
    drawn = [blocks[name] for name in {name for factor in factors for name in plans[factor].sampled}]
    dims = sum(block.batch_shape.numel() * block.num_directions for block in drawn)
    first, *more = _LEVELS if dims <= _FEW_DIMS else _LEVELS[1:]
    if any(plan.replayed for plan in plans.values()):
        more = [size for size in more if size <= _REPLAYED]
    else:
        cost = program.messages.elements(factors) * max((block.num_directions for block in drawn), default=1)
        more = [size for size in more if size * cost <= _WORK]
    return (first, *(more or [first]))
