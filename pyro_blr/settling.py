"""When a script's steps on the same data go on to their optimum, after which they cost no more than a run of the model."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from pyro_blr.program import Program

__all__ = ["Settling"]

PATIENCE = 10  # steps before the first search
NO_GAIN = 0.01  # nats that a search has to gain on the one before


@dataclass(frozen=True)
class Settling:
    """The step that seeks the optimum next, and where the last search ended that did not reach it.

    Searches come after 10, 20, 40, ... steps, until one converges or gains nothing.
    """

    due: float = field(default_factory=lambda: PATIENCE)
    program: Program | None = None
    elbo: float = -math.inf

    def gains_nothing(self, program: Program, elbo: float, error: float) -> bool:
        """Whether another search on the same data ended no higher than this, whose standard error is `error`."""
        return self.program is program and elbo <= self.elbo + max(NO_GAIN, 3 * error)
