"""Other optima of the bound: short climbs from scattered starts, compared with the q that is kept.

k̂ is blind to what q never draws.  A mode that q lacks shows only where another start ends.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

from pyro_blr.ascent import Ascent
from pyro_blr.beliefs import Beliefs
from pyro_blr.blocks import is_gaussian
from pyro_blr.checks import ImproperPosteriorError
from pyro_blr.climbs import climb
from pyro_blr.diagnostics import Restart, rivals_among
from pyro_blr.draws import Draws
from pyro_blr.initial import initial_natural
from pyro_blr.leaps import moved_nats
from pyro_blr.newton import newton_start
from pyro_blr.program import Program
from pyro_blr.running import isolated_random_state
from pyro_blr.stopping import remaining_gain
from pyro_blr.symmetry import broken_start

__all__ = ["other_optima"]

REACH = (1.0, 5.0, 20.0)  # sds: of the start for the first, of the q that was found for the others
NUM_STARTS = 6  # each and its mirror image at every reach
WORK = 4e8  # numbers × directions that Newton's searches may cost; fewer starts beyond
NUM_DRAWS = 128  # for climbs, and for comparing bounds
STEPS, SWEEPS = 20, 200  # of a climb on draws or by quadrature; of exact sweeps
TOLERANCE = 0.02  # nats
SCOUTING = 1e-3  # of quadrature on the way to a mode, as in `Messages.rough`
SAME = 0.1  # nats between Gaussians at modes, and their curvatures, that are one
HOPELESS = 10.0  # nats that a Gaussian at a mode, with its curvature, may lack and still be climbed from
WIDEST = 10.0  # a start's own sd at most, as a step away from it


@torch.no_grad()
def other_optima(program: Program, naturals: Mapping[str, Tensor]) -> list[Restart]:
    """Where climbs from scattered starts end, the q that was kept first; empty where there is nothing to look for.

    Bounds are estimated on the same draws.  Draws come from a generator of their own.
    """
    kept = Ascent(program, Beliefs(program.blocks, naturals))
    if kept.bound_kind == "exact evidence" or program.is_subsampled or program.graph.params:
        return []
    with isolated_random_state(0), program.messages.rough():
        search = _Search(kept)
        for number in range(_affordable(program)):
            if search.is_done:
                break
            # where the model's density, or a matrix of it, has no value there is nothing to climb
            with contextlib.suppress(ImproperPosteriorError, torch.linalg.LinAlgError):
                search.from_start(_scattered(kept, number))
    return search.found


class _Search:
    """Climbs, each only where Newton's method has come to a mode of its own."""

    def __init__(self, kept: Ascent):
        self.kept, self.program = kept, kept.program
        self.found: list[Restart] = []
        self.draws = Draws(1, NUM_DRAWS)
        self._modes: list[tuple[Ascent, Restart]] = []
        mode = Ascent(self.program, kept.beliefs.copy())
        if not self.program.is_exact:
            newton_start(mode)
        self._note(mode, kept, converged=True)

    def from_start(self, ascent: Ascent) -> None:
        """Climbs from a start, and notes where it ends."""
        if self.program.is_exact:
            self._note(ascent, ascent, _swept(ascent))
            return
        with self.program.messages.rough(SCOUTING):
            newton_start(ascent)
        for mode, end in self._modes:
            if moved_nats(mode, ascent.beliefs) < SAME:
                self.found.append(end)
                return
        mode, draws = Ascent(self.program, ascent.beliefs.copy()), None if self.program.is_deterministic else self.draws
        values = ascent.finite_estimates(draws)
        if values is None or float(values.mean()) < self.found[0].elbo - HOPELESS:
            return
        self._note(mode, ascent, climb(ascent, draws, TOLERANCE, STEPS, lambda *_: None).converged)

    @property
    def is_done(self) -> bool:
        """Whether another optimum is known that is as good."""
        return len(rivals_among(self.found)) > 0

    def _note(self, mode: Ascent, end: Ascent, converged: bool) -> None:
        if not self.program.is_deterministic:
            end.measure(self.draws)
        distance = moved_nats(self.kept, end.beliefs)
        self.found.append(Restart(end.bound_before(), end.bound_se, converged, distance))
        self._modes.append((mode, self.found[-1]))


def _swept(ascent: Ascent) -> bool:
    """Exact sweeps; whether the bound has come to its end."""
    history: list[float] = []
    for _ in range(SWEEPS):
        ascent.sweep()
        history.append(ascent.bound_before())
        if remaining_gain(history) < TOLERANCE:
            return True
    return False


def _affordable(program: Program) -> int:
    """How many starts: a Newton step costs a pass over the data for every direction, and for every node of a program."""
    size = max(factor.batch_shape.numel() for factor in program.graph.factors.values())
    directions = max(block.num_directions for block in program.blocks.values())
    states = sum(b.batch_shape.numel() * b.num_states for b in program.blocks.values() if b.is_discrete)
    cost = (size + states + 1000 * len(program.graph.tape.nodes)) * directions * STEPS
    return max(0, min(NUM_STARTS, round(WORK / cost)))


def _scattered(kept: Ascent, number: int) -> Ascent:
    """A start of its own: Gaussians moved from the prior, or from where q is; symmetries broken anew; random states,
    which move last.  Every second start is the mirror image of the one before.
    """
    program, reach = kept.program, REACH[number // 2 % len(REACH)]
    naturals = {}
    for name, block in program.blocks.items():
        natural = initial_natural(block).double()
        if block.is_discrete:
            natural = natural + 2 * torch.randn(natural.shape, dtype=natural.dtype).to(natural.device)
        naturals[name] = natural
    start = Ascent(program, Beliefs(program.blocks, naturals), [n for n, b in program.blocks.items() if b.is_discrete])
    if reach == REACH[0]:
        start = broken_start(start)
    for name, block in program.blocks.items():
        if not is_gaussian(block.family) or kept.program.messages.is_exact(name):
            continue
        around = (start if reach == REACH[0] else kept).beliefs
        moments = around.wide[name]
        wide = moments["covariance"].diagonal(dim1=-2, dim2=-1) if "covariance" in moments else moments["variance"]
        step = reach * wide.sqrt().clamp(max=WIDEST)
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + number // 2)
        noise = torch.randn(step.shape, generator=generator, dtype=step.dtype, device="cpu").to(step.device)
        noise = -noise if number % 2 else noise
        start.beliefs.update(
            name, start.targets.with_mean(name, start.beliefs, (moments["mean"] + step * noise).to(moments["mean"]))
        )
    return start
