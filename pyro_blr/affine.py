"""Which nodes of a recording are affine in Gaussian blocks, as expressions and values show, and which of them all paths pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from pyro_blr.blocks import Block
from pyro_blr.cuts import Moved, Sum, refs_of
from pyro_blr.families import LogNormal, TransformedNormal
from pyro_blr.forms import UNUSABLE
from pyro_blr.graph import FactorGraph
from pyro_blr.interactions import mixed_dims
from pyro_blr.kinds import Form, Judge, Sort
from pyro_blr.likelihoods import Linear
from pyro_blr.plans import Argument
from pyro_blr.probe import Probe
from pyro_blr.tape import Latent, Ref, refs_in

__all__ = ["CANDIDATES", "AffineNodes", "fits"]

CANDIDATES = 40  # nodes at most that are tried as predictors
_PLACES = 3  # at which a site must move a node


class AffineNodes:
    """Nodes of a graph's tape as predictors over the sites of some blocks."""

    def __init__(self, graph: FactorGraph, blocks: Mapping[str, Block]):
        self.graph, self.blocks = graph, blocks
        self.block_of = {site: block for block in blocks.values() for site in block.site_names}
        self.judge = Judge(graph.tape)
        self.renew()

    def renew(self) -> None:
        """After something was recorded, whose inputs the probe is to know."""
        self.probe = Probe(self.graph, self.blocks)

    def possible(self, nodes: Sequence[int], sites: frozenset[str]) -> list[int]:
        """The nodes without those that values alone show to be no predictors: neither affine nor one transformed site's.

        All are evaluated in one pass.  A recursion of 200 steps has a thousand nodes, and judging each by its structure
        goes through all before it.
        """
        refs = [Ref(index) for index in nodes]
        try:
            affine = Probe(self.graph, self.blocks).are_on_lines(refs, self._blocks_of(sites))
        except UNUSABLE:
            return list(nodes)
        latents = [self.graph.tape.latents_of(ref) & sites for ref in refs]
        moved = [len(mine) == 1 and any(map(self._is_transformed, mine)) for mine in latents]
        return [index for index, *possible in zip(nodes, affine, moved, strict=True) if any(possible)]

    def _blocks_of(self, sites: Iterable[str]) -> list[Block]:
        return list({self.block_of[site].name: self.block_of[site] for site in sites}.values())

    def separates(self, outputs: tuple, nodes: Sequence[int], sites: frozenset[str]) -> bool:
        tape = self.graph.tape
        seen, stack = set(nodes), [ref.index for ref in refs_in(outputs)]
        while stack:
            index = stack.pop()
            if index in seen or not tape.latents_of(Ref(index)) & sites:
                continue
            if isinstance(tape.nodes[index].function, Latent):
                return False
            seen.add(index)
            stack.extend(ref.index for ref in refs_in((tape.nodes[index].args, tape.nodes[index].kwargs)))
        return True

    def last(
        self, outputs: tuple, shape: torch.Size, sites: frozenset[str], vectors_first: bool
    ) -> dict[int, int | None] | None:
        """Node -> width (None: one number for each element) of nodes that every path passes; None where some path has none."""
        tape, found = self.graph.tape, dict[int, int | None]()
        seen, stack = set[int](), [ref.index for ref in refs_in(outputs)]
        while stack:
            index = stack.pop()
            node = tape.nodes[index]
            if index in seen or not tape.latents_of(Ref(index)) & sites:
                continue
            seen.add(index)
            scalar = fits(node, shape)
            vector = (
                node.shape is not None and len(node.shape) > 0 and fits(replace(node, shape=node.shape[:-1]), shape)
            )
            if (
                node.shape is not None
                and (scalar or vector)
                and len(seen) <= CANDIDATES
                and self.ref(index, sites) is not None
            ):
                found[index] = node.shape[-1] if vector and (vectors_first or not scalar) else None
                continue
            if isinstance(node.function, Latent):
                return None
            stack.extend(ref.index for ref in refs_in((node.args, node.kwargs)))
        return found

    def argument(self, name: str, ref: Any, sites: frozenset[str]) -> Argument:
        mixed: dict[str, tuple[int, ...]] = {}
        for term in ref.terms if isinstance(ref, Sum) else (ref,):
            found = self.graph.tape.latents_of(refs_of(term)[0]) & sites
            for block in {self.block_of[site].name: self.block_of[site] for site in sorted(found)}.values():
                here = () if isinstance(term, Moved) else mixed_dims(self.probe, Argument(name, Linear, term), block)
                mixed[block.name] = tuple(sorted({*mixed.get(block.name, ()), *here}))
        return Argument(name, Linear, ref, dict.fromkeys(mixed, Form.AFFINE), mixed)

    def ref(self, node: int, sites: frozenset[str]) -> Any:
        """The node as a predictor: `Ref` where it is affine, `Moved` where it only moves a transformed site; else None."""
        ref = Ref(node)
        mine = sorted(self.graph.tape.latents_of(ref) & sites)
        transformed = [site for site in mine if self._is_transformed(site)]
        if len(mine) == 1 and transformed:
            kind = self.judge.kind_of(ref, mine[0], Sort.REAL)
            if kind.form is Form.SELECTION:
                return Moved(ref, mine[0])
        for site in mine:
            if site in transformed:
                continue  # affine in the logarithm of a site, say: only values tell
            kind = self.judge.kind_of(ref, site, Sort.REAL)
            linear = kind.form in (Form.SELECTION, Form.AFFINE, Form.COMPLEMENT)
            if not (linear or (kind.form is Form.MONOMIAL and kind.power == 1)):
                return None
        return ref if self._is_affine(ref, mine) and all(self._moves_all(ref, site) for site in transformed) else None

    def _moves_all(self, ref: Ref, site: str) -> bool:
        """Whether every element follows a site wherever the others are.

        Where structure says nothing, values that stay the same may lie in a clamp's flat part, and not on a line.
        """
        block = self.block_of[site]
        for _ in range(_PLACES):
            place = {
                b.name: self.probe.point(b)
                for b in self._blocks_of(self.graph.tape.latents_of(ref) & set(self.block_of))
            }
            leaf, other = place[block.name], self.probe.point(block)
            if block.is_joint:
                member = next(member for member in block.members if member.site.name == site)
                entries = slice(member.start, member.stop)
                moved = leaf.clone()
                moved[..., entries] = other[..., entries]
                other = moved
            start, end = (self.probe.evaluate(ref, {**place, block.name: x}) for x in (leaf, other))
            if not bool((start != end).all()):
                return False
        return True

    def _is_transformed(self, site: str) -> bool:
        block = self.block_of[site]
        family = block.family
        if block.is_joint:
            family = next(m.family for m in block.members if m.site.name == site)  # type: ignore[assignment]
        return isinstance(family, (TransformedNormal, LogNormal))

    def _is_affine(self, ref: Ref, sites: Sequence[str]) -> bool:
        """Whether values lie on a line along lines in all blocks' variables together, whatever the states of discrete sites."""
        blocks = self._blocks_of(sites)
        return all(self.probe.are_on_lines([ref], blocks)[0] for _ in self.probe.assignments(ref))


def fits(node: Any, shape: Sequence[int]) -> bool:
    """Whether a node is a float whose elements broadcast to the elements of a factor."""
    if node.shape is None or node.dtype is None or not node.dtype.is_floating_point or len(node.shape) > len(shape):
        return False
    return all(own in (1, size) for own, size in zip(reversed(node.shape), reversed(shape), strict=False))
