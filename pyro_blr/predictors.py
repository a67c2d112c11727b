"""Finding the predictors of a factor: one or two numbers for each element, affine in Gaussian blocks, through which alone it sees them.

The search is on the recorded expressions, first down to the distribution's arguments, then through its log density.  A set of nodes
is a cut when every path from the blocks' sites to the factor passes it.  Two things are seen from values: that the nodes are affine in
all blocks together, and that an element of the log density depends on its own predictors alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pyro_blr.affine import CANDIDATES, AffineNodes, fits
from pyro_blr.blocks import Block, is_gaussian
from pyro_blr.cuts import Moved, Sum, elsewhere, moved_on, transform_of
from pyro_blr.elementwise import is_by_rows, is_elementwise, is_smooth_in_rows
from pyro_blr.families import TransformedNormal
from pyro_blr.forms import UNUSABLE
from pyro_blr.graph import Factor, FactorGraph
from pyro_blr.likeness import Alike, Outline
from pyro_blr.plans import Cut, FactorPlan, Predictor, Verdict
from pyro_blr.recorded import Recorded
from pyro_blr.tape import Latent, Ref

__all__ = ["with_quadrature"]

_PAIRS = 12  # pairs of them whose values are looked at
_WIDEST = 64  # predictors at most of one element
_COEFFICIENTS = 20_000_000  # of many predictors at most: they are held as a dense array


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
        self.nodes = AffineNodes(graph, blocks)
        self.alike = Alike(graph, blocks)
        self._found: dict[Any, tuple[FactorPlan, Outline, Cut | None]] = {}  # of the first of those that are alike

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
            cut = self._cut_like_others(plan, names, sites)
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
        if self.nodes.block_of[verdict.site].name in plan.enumerated:
            return replace(verdict, exact=False, how="quadrature") if not verdict.exact else verdict
        count = {1: "one affine predictor", 2: "two affine predictors"}.get(
            cut.numbers, f"random points over {cut.numbers} affine predictors"
        )
        reason, where = verdict.reason or f"{plan.factor.name}: no closed form in the others", ""
        if reason.endswith(")"):
            reason, _, where = reason.rpartition(" (")
            where = f" ({where}"
        elif plan.factor.source:
            where = f" ({plan.factor.source})"
        return replace(verdict, exact=False, how="quadrature", reason=f"{reason}; {count} for each element{where}")

    # -- the search ---------------------------------------------------------------------------------------------------

    def _cut_like_others(self, plan: FactorPlan, names: Sequence[str], sites: frozenset[str]) -> Cut | None:
        """The cut that a statement of the same kind has, else one that is searched for."""
        made, tape = plan.factor.constructed, self.graph.tape
        assert made is not None
        outline = self.alike.outline([plan.factor.value, *made.arguments.values()], plan.blocks)
        if outline is None:
            return self._cut(plan, names, sites)
        form = made.distribution_class, tuple(made.arguments), made.batch_shape, made.reinterpreted
        key = form, plan.factor.batch_shape, bool(plan.enumerated), len(names), outline.key
        if key not in self._found:
            self._found[key] = plan, outline, self._cut(plan, names, sites)
            return self._found[key][2]
        first, theirs, cut = self._found[key]
        level: _Level | None = _Level((), None, len(tape.nodes))
        if cut is not None and cut.log_prob is not None:
            level = self._recorded(plan.factor)
            inside = self.alike.outline([cut.log_prob], first.blocks)
            mine = None if level is None else self.alike.outline(level.outputs, plan.blocks)
            if inside is None or mine is None or inside.key != mine.key:
                return self._cut(plan, names, sites)
            theirs, outline = inside, mine
        if cut is None or level is None:
            return None
        nodes = dict(zip(theirs.nodes, outline.nodes, strict=True))
        leaves = [
            (tape.nodes[a], tape.nodes[b]) for a, b in nodes.items() if isinstance(tape.nodes[a].function, Latent)
        ]
        ours = {a.name: b.name for a, b in leaves}
        blocks = dict(zip(first.blocks, plan.blocks, strict=True))
        moved = elsewhere(
            cut, level.log_prob, level.start, lambda i: nodes.get(i, i), ours.__getitem__, blocks.__getitem__
        )
        return self._entries_again(moved)

    def _cut(self, plan: FactorPlan, names: Sequence[str], sites: frozenset[str]) -> Cut | None:
        """One predictor where that is enough, else two, else many; at the arguments rather than inside the log density."""
        factor = plan.factor
        assert factor.constructed is not None
        first = _Level((factor.value, *factor.constructed.arguments.values()), None, len(self.graph.tape.nodes))
        levels = [first] if plan.enumerated else [first, self._recorded(factor)]
        self.nodes.renew()
        for count in (1, 2):
            for level in levels:
                if level is None:
                    continue
                for nodes in itertools.islice(self._separating(level, factor, sites, count), _PAIRS):
                    cut = self._made(level, nodes, sites)
                    if cut is not None and is_elementwise(self.nodes.probe, plan, cut, names):
                        return replace(cut, by_rows=is_by_rows(self.nodes.probe, plan, cut, names))
        if plan.enumerated or self.graph.tape.latents_of(factor.value) & sites:
            return None  # a latent and its scale are a funnel, whose tails random points miss
        return next(filter(None, (self._wide_cut(plan, level, names, sites) for level in levels if level)), None)

    def _wide_cut(self, plan: FactorPlan, level: _Level, names: Sequence[str], sites: frozenset[str]) -> Cut | None:
        """The last affine nodes on all paths, many numbers for each element: fewer than the blocks', or draws do as well."""
        made, blocks = plan.factor.constructed, [self.blocks[name] for name in names]
        assert made is not None
        dimensions = sum(block.num_directions * block.batch_shape.numel() for block in blocks)
        for vectors_first in (False, True):
            widths = self.nodes.last(level.outputs, made.batch_shape, sites, vectors_first)
            if widths is None:
                continue
            predictors: list[Predictor] = []
            for node, width in widths.items():
                argument = self.nodes.argument(f"predictor {len(predictors)}", self.nodes.ref(node, sites), sites)
                ref = argument.ref
                transform = transform_of(self.nodes.block_of[ref.site], ref.site) if isinstance(ref, Moved) else None
                predictors.append(Predictor(node, argument, transform, width=width))
            cut = Cut(tuple(predictors), None, level.log_prob, level.start)
            affordable = made.batch_shape.numel() * cut.numbers * dimensions <= _COEFFICIENTS
            if not (2 < cut.numbers <= min(_WIDEST, dimensions - 1)) or not affordable:
                continue
            if is_elementwise(self.nodes.probe, plan, cut, names) and is_smooth_in_rows(
                self.nodes.probe, plan, cut, names
            ):
                return cut
        return None

    def _recorded(self, factor: Factor) -> _Level | None:
        """The distribution's log density, recorded on the tape; None where it does what the tape cannot follow."""
        tape, made = self.graph.tape, factor.constructed
        assert made is not None
        start, departures = len(tape.nodes), len(tape.departures)
        recording = self.graph.recording
        value, *arguments = map(recording.recorded, (factor.value, *made.arguments.values()))
        try:
            with recording.again(factor.source):
                found = recording.reference(made.built(arguments).log_prob(value))
        except Exception:  # a distribution may object to recorded tensors in any way
            return None
        finally:
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
            if tape.latents_of(Ref(index)) & sites and fits(tape.nodes[index], made.batch_shape)
        ]
        between = self.nodes.possible(between, sites)
        if count == 1:
            yield from ((index,) for index in between if self.nodes.separates(level.outputs, (index,), sites))
            return
        usable = [index for index in between[:CANDIDATES] if self.nodes.ref(index, sites) is not None]
        pairs = itertools.combinations(usable, 2)
        yield from (pair for pair in pairs if self.nodes.separates(level.outputs, pair, sites))
        for index in reversed(tape.needed(level.outputs)):
            shape = tape.nodes[index].shape or ()
            if shape[-1:] == (2,) and tape.latents_of(Ref(index)) & sites and len(shape) == len(made.batch_shape) + 1:
                if self.nodes.separates(level.outputs, (index,), sites):
                    yield index, index  # two entries of one node

    # -- predictors ---------------------------------------------------------------------------------------------------

    def _made(self, level: _Level, nodes: Sequence[int], sites: frozenset[str]) -> Cut | None:
        predictors: list[Predictor] = []
        entries = len(nodes) == 2 and nodes[0] == nodes[1]
        for entry, node in enumerate(nodes):
            ref = self.nodes.ref(node, sites)
            if ref is None or (entries and isinstance(ref, Moved)):
                return None
            if entries:
                argument = self.nodes.argument(f"predictor {entry}", self._entry(node, entry), sites)
                predictors.append(Predictor(node, argument, None, entry))
                continue
            transform = transform_of(self.nodes.block_of[ref.site], ref.site) if isinstance(ref, Moved) else None
            predictors.append(
                Predictor(node, self.nodes.argument(f"predictor {len(predictors)}", ref, sites), transform)
            )
        joint = None
        if len(predictors) == 2:
            refs = Sum((predictors[0].argument.ref, predictors[1].argument.ref))
            joint = self.nodes.argument("sum of predictors", refs, sites)
        return Cut(tuple(predictors), joint, level.log_prob, level.start)

    def _entry(self, node: int, entry: int) -> Ref:
        """One entry of the last dim of what a node holds, recorded on the tape."""
        recording = self.graph.recording
        value = Recorded.wrap(recording.tape.evaluate([Ref(node)], self.graph.values)[0], recording, node)
        with recording:
            ref = recording.reference(value.select(-1, entry))
        self.nodes.renew()
        return ref

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
