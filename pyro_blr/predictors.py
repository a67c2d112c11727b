"""Finding the predictors of a factor: one or two numbers for each element, affine in Gaussian blocks, through which alone it sees them.

The search is on the recorded expressions, first down to the distribution's arguments, then through its log density.  A set of nodes
is a cut when every path from the blocks' sites to the factor passes it.  Two things are seen from values: that the nodes are affine in
all blocks together, and that an element of the log density depends on its own predictors alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pyro_blr.blocks import Block, is_gaussian
from pyro_blr.cuts import Moved, Sum, moved_on, refs_of, transform_of
from pyro_blr.elementwise import is_by_rows, is_elementwise
from pyro_blr.expressions import Latent, Recorded, Recording, Ref, refs_in
from pyro_blr.families import LogNormal, TransformedNormal
from pyro_blr.forms import UNUSABLE, mixed_dims
from pyro_blr.graph import Factor, FactorGraph
from pyro_blr.kinds import Form, Sort, kind_of
from pyro_blr.likelihoods import Linear
from pyro_blr.plans import Argument, Cut, FactorPlan, Predictor, Verdict
from pyro_blr.probe import Probe

__all__ = ["with_quadrature"]

_CANDIDATES = 40  # nodes at most that are tried as predictors
_PAIRS = 12  # pairs of them whose values are looked at


def with_quadrature(
    graph: FactorGraph, blocks: Mapping[str, Block], plans: Mapping[str, FactorPlan], judged: bool
) -> dict[str, FactorPlan]:
    """The plans with factors that need draws integrated by quadrature where they have a cut.

    `judged`: the plans are of an earlier run of the same structure, and their cuts only need its expressions renewed.
    """
    search = _Search(graph, blocks)
    return {name: search.renewed(plan) if judged else search.plan(plan) for name, plan in plans.items()}


@dataclass(frozen=True)
class _Level:
    """Where the search ends: at the distribution's arguments, or at its recorded log density, which begins at `start`."""

    outputs: tuple[Any, ...]
    log_prob: Any
    start: int


class _Search:
    def __init__(self, graph: FactorGraph, blocks: Mapping[str, Block]):
        self.graph, self.blocks = graph, blocks
        self.block_of = {site: block for block in blocks.values() for site in block.site_names}
        self.probe = Probe(graph, blocks)

    def renewed(self, plan: FactorPlan) -> FactorPlan:
        if plan.cut is None:
            return plan
        if plan.cut.log_prob is None:
            return replace(plan, cut=self._entries_again(plan.cut))
        level = self._recorded(plan.factor)
        assert level is not None
        return replace(plan, cut=self._entries_again(moved_on(plan.cut, level.start, level.log_prob)))

    def plan(self, plan: FactorPlan) -> FactorPlan:
        names = [name for name in plan.blocks if name not in plan.enumerated]
        if not plan.sampled or plan.replayed or plan.factor.constructed is None or not all(map(self._suits, names)):
            return plan
        tape, made = self.graph.tape, plan.factor.constructed
        if any(x.requires_grad for x in tape.inputs_of([plan.factor.value, *made.arguments.values()])):
            return plan  # a parameter that is learned: integrals have no gradient in it, averages over draws do
        sites = frozenset(site for name in names for site in self.blocks[name].site_names)
        if any(
            tape.latents_of(ref) & sites for ref in (plan.factor.scale, plan.factor.mask, plan.factor.constructed.mask)
        ):
            return plan
        try:
            cut = self._cut(plan, names, sites)
        except UNUSABLE:
            return plan
        if cut is None:
            return plan
        verdicts = tuple(self._verdict(plan, verdict, cut) for verdict in plan.verdicts)
        return replace(plan, analytic=(), sampled=(), integrated=tuple(names), cut=cut, verdicts=verdicts)

    def _suits(self, name: str) -> bool:
        """Whether the block is Gaussian in a variable of which each site is an image element by element, or affine."""
        block = self.blocks[name]
        if not is_gaussian(block.family):
            return False
        families = [block.family] if not block.is_joint else [member.family for member in block.members]
        return all(
            transform_of(block, site) is not None or not isinstance(family, TransformedNormal)
            for site, family in zip(block.site_names, families, strict=True)
        )

    def _verdict(self, plan: FactorPlan, verdict: Verdict, cut: Cut) -> Verdict:
        if self.block_of[verdict.site].name in plan.enumerated:
            return replace(verdict, exact=False, how="quadrature") if not verdict.exact else verdict
        count = "one affine predictor" if len(cut.predictors) == 1 else "two affine predictors"
        reason, where = verdict.reason or f"{plan.factor.name}: no closed form in the others", ""
        if reason.endswith(")"):
            reason, _, where = reason.rpartition(" (")
            where = f" ({where}"
        elif plan.factor.source:
            where = f" ({plan.factor.source})"
        return replace(verdict, exact=False, how="quadrature", reason=f"{reason}; {count} for each element{where}")

    # -- the search ---------------------------------------------------------------------------------------------------

    def _cut(self, plan: FactorPlan, names: Sequence[str], sites: frozenset[str]) -> Cut | None:
        """One predictor where that is enough, else two; at the arguments rather than inside the log density."""
        factor = plan.factor
        assert factor.constructed is not None
        first = _Level((factor.value, *factor.constructed.arguments.values()), None, len(self.graph.tape.nodes))
        levels = [first] if plan.enumerated else [first, self._recorded(factor)]
        self.probe = Probe(self.graph, self.blocks)  # one that knows the inputs of what was just recorded
        for count in (1, 2):
            for level in levels:
                if level is None:
                    continue
                for nodes in itertools.islice(self._separating(level, factor, sites, count), _PAIRS):
                    cut = self._made(level, nodes, sites)
                    if cut is not None and is_elementwise(self.probe, plan, cut, names):
                        return replace(cut, by_rows=is_by_rows(self.probe, plan, cut, names))
        return None

    def _recorded(self, factor: Factor) -> _Level | None:
        """The distribution's log density, recorded on the tape; None where it does what the tape cannot follow."""
        tape, made = self.graph.tape, factor.constructed
        assert made is not None
        start, departures = len(tape.nodes), len(tape.departures)
        refs = [factor.value, *made.arguments.values()]
        tape.closed, tape.place = False, factor.source
        try:
            value, *arguments = (
                Recorded.wrap(tape.values[ref.index], tape, ref.index) if isinstance(ref, Ref) else ref for ref in refs
            )
            with Recording(tape):
                distribution = made.distribution_class(
                    **dict(zip(made.arguments, arguments, strict=True)), validate_args=False
                )
                found = tape.reference(distribution.log_prob(value))
        except Exception:  # a distribution may object to recorded tensors in any way
            return None
        finally:
            tape.closed, tape.place = True, ""
            lost = len(tape.departures) > departures
            del tape.departures[departures:]
        return _Level((found,), found, start) if isinstance(found, Ref) and not lost else None

    def _separating(
        self, level: _Level, factor: Factor, sites: frozenset[str], count: int
    ) -> Iterator[tuple[int, ...]]:
        """Sets of nodes between the sites and the outputs that every path passes, the last ones first."""
        made = factor.constructed
        assert made is not None
        tape = self.graph.tape
        between = [
            index
            for index in reversed(tape.needed(level.outputs))
            if tape.latents_of(Ref(index)) & sites and _fits(tape.nodes[index], made.batch_shape)
        ]
        between = self._possible(between, sites)
        if count == 1:
            yield from ((index,) for index in between if self._separates(level, (index,), sites))
            return
        usable = [index for index in between[:_CANDIDATES] if self._ref(index, sites) is not None]
        pairs = itertools.combinations(usable, 2)
        yield from (pair for pair in pairs if self._separates(level, pair, sites))
        for index in reversed(tape.needed(level.outputs)):
            shape = tape.nodes[index].shape or ()
            if shape[-1:] == (2,) and tape.latents_of(Ref(index)) & sites and len(shape) == len(made.batch_shape) + 1:
                if self._separates(level, (index,), sites):
                    yield index, index  # two entries of one node

    def _possible(self, nodes: Sequence[int], sites: frozenset[str]) -> list[int]:
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

    def _separates(self, level: _Level, nodes: Sequence[int], sites: frozenset[str]) -> bool:
        tape = self.graph.tape
        seen, stack = set(nodes), [ref.index for ref in refs_in(level.outputs)]
        while stack:
            index = stack.pop()
            if index in seen or not tape.latents_of(Ref(index)) & sites:
                continue
            if isinstance(tape.nodes[index].function, Latent):
                return False
            seen.add(index)
            stack.extend(ref.index for ref in refs_in((tape.nodes[index].args, tape.nodes[index].kwargs)))
        return True

    # -- predictors ---------------------------------------------------------------------------------------------------

    def _made(self, level: _Level, nodes: Sequence[int], sites: frozenset[str]) -> Cut | None:
        predictors: list[Predictor] = []
        entries = len(nodes) == 2 and nodes[0] == nodes[1]
        for entry, node in enumerate(nodes):
            ref = self._ref(node, sites)
            if ref is None or (entries and isinstance(ref, Moved)):
                return None
            if entries:
                argument = self._argument(f"predictor {entry}", self._entry(node, entry), sites)
                predictors.append(Predictor(node, argument, None, entry))
                continue
            transform = transform_of(self.block_of[ref.site], ref.site) if isinstance(ref, Moved) else None
            predictors.append(Predictor(node, self._argument(f"predictor {len(predictors)}", ref, sites), transform))
        joint = None
        if len(predictors) == 2:
            refs = Sum((predictors[0].argument.ref, predictors[1].argument.ref))
            joint = self._argument("sum of predictors", refs, sites)
        return Cut(tuple(predictors), joint, level.log_prob, level.start)

    def _entry(self, node: int, entry: int) -> Ref:
        """One entry of the last dim of what a node holds, recorded on the tape."""
        tape = self.graph.tape
        tape.closed = False
        try:
            value = Recorded.wrap(tape.evaluate([Ref(node)], self.graph.values)[0], tape, node)
            with Recording(tape):
                return tape.reference(value.select(-1, entry))
        finally:
            tape.closed = True
            self.probe = Probe(self.graph, self.blocks)

    def _entries_again(self, cut: Cut) -> Cut:
        """The cut with the entries of its node recorded on this tape."""
        if not cut.predictors or cut.predictors[0].entry is None or cut.joint is None:
            return cut
        refs = [self._entry(predictor.node, entry) for entry, predictor in enumerate(cut.predictors)]
        predictors = tuple(
            replace(predictor, argument=replace(predictor.argument, ref=ref))
            for predictor, ref in zip(cut.predictors, refs, strict=True)
        )
        return replace(cut, predictors=predictors, joint=replace(cut.joint, ref=Sum((refs[0], refs[1]))))

    def _argument(self, name: str, ref: Any, sites: frozenset[str]) -> Argument:
        mixed: dict[str, tuple[int, ...]] = {}
        for term in ref.terms if isinstance(ref, Sum) else (ref,):
            found = self.graph.tape.latents_of(refs_of(term)[0]) & sites
            for block in {self.block_of[site].name: self.block_of[site] for site in sorted(found)}.values():
                here = () if isinstance(term, Moved) else mixed_dims(self.probe, Argument(name, Linear, term), block)
                mixed[block.name] = tuple(sorted({*mixed.get(block.name, ()), *here}))
        return Argument(name, Linear, ref, dict.fromkeys(mixed, Form.AFFINE), mixed)

    def _ref(self, node: int, sites: frozenset[str]) -> Any:
        """The node as a predictor: `Ref` where it is affine, `Moved` where it only moves a transformed site; else None."""
        ref = Ref(node)
        mine = sorted(self.graph.tape.latents_of(ref) & sites)
        transformed = [site for site in mine if self._is_transformed(site)]
        if len(mine) == 1 and transformed:
            kind = kind_of(self.graph.tape, ref, mine[0], Sort.REAL)
            if kind.form is Form.SELECTION:
                return Moved(ref, mine[0])
        for site in mine:
            if site in transformed:
                continue  # affine in the logarithm of a site, say: only values tell
            kind = kind_of(self.graph.tape, ref, site, Sort.REAL)
            linear = kind.form in (Form.SELECTION, Form.AFFINE, Form.COMPLEMENT)
            if not (linear or (kind.form is Form.MONOMIAL and kind.power == 1)):
                return None
        return ref if self._is_affine(ref, mine) else None

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


def _fits(node: Any, shape: Sequence[int]) -> bool:
    """Whether a node is a float whose elements broadcast to the elements of a factor."""
    if node.shape is None or node.dtype is None or not node.dtype.is_floating_point or len(node.shape) > len(shape):
        return False
    return all(own in (1, size) for own, size in zip(reversed(node.shape), reversed(shape), strict=False))
