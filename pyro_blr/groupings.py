"""A choice of which sites form one Gaussian, and the blocks that it gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pyro_blr.blocks import Block, build_blocks
from pyro_blr.families import Pattern
from pyro_blr.graph import FactorGraph
from pyro_blr.plans import FactorPlan

__all__ = ["Grouping", "blocks_of"]


@dataclass(frozen=True)
class Grouping:
    """Groups of site names, and the sites whose group keeps no plate as batch; why, in words."""

    groups: tuple[tuple[str, ...], ...] = ()
    flat: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()
    patterns: Mapping[str, Pattern] = field(default_factory=dict)  # block -> which entries a sparse precision has
    judged: tuple[FactorGraph, Mapping[str, FactorPlan]] | None = field(default=None, compare=False, repr=False)

    def plans_of(self, graph: FactorGraph) -> Mapping[str, FactorPlan] | None:
        """The verdicts under the groups, where they were found on this very run."""
        return self.judged[1] if self.judged is not None and self.judged[0] is graph else None


def blocks_of(graph: FactorGraph, factorisation: str | Sequence[Sequence[str]] | Grouping) -> dict[str, Block]:
    """The factors of q over the sites of a run."""
    if isinstance(factorisation, Grouping):
        return build_blocks(graph, factorisation.groups, factorisation.flat, factorisation.patterns)
    return build_blocks(graph, factorisation)
