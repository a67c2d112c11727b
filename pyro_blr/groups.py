"""`blocks="auto"`: which Gaussian sites form one Gaussian.

Two sites belong together where a factor is affine in both at once, or where both are in a factor without a closed form: given the rest
their posterior is then correlated, and one Gaussian holds the correlation.  Sites that a closed-form factor multiplies stay apart, since
each is exact given the other.  Plates that all sites of a group share remain a batch, unless a factor combines several of its elements.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from pyro_blr.blocks import Block, build_blocks, in_same_plates, is_gaussian
from pyro_blr.conjugacy import analyse
from pyro_blr.couplings import across_scales, different_precisions, in_location
from pyro_blr.families import MultivariateNormal, Normal, TransformedNormal, pushforward_family
from pyro_blr.graph import FactorGraph, Site
from pyro_blr.groupings import Grouping, blocks_of
from pyro_blr.likelihoods import Linear, Vector
from pyro_blr.patterns import described, pattern_of
from pyro_blr.plans import FactorPlan
from pyro_blr.predictors import with_quadrature
from pyro_blr.series import without_numbers

__all__ = ["choose_groups"]

MOST = {"affine": 2000, "quadrature": 500, "draws": 200}  # dimensions of a dense block, by its costliest common factor
SPARSE = 1_000_000  # of one whose precision is sparse
_SLACK = 1.1  # how many times its own event a large site's block may have, however large
_NUMBERS = 2000**2  # numbers in the covariances of a block in plates
_ROUNDS = 10  # of grouping, analysing, and taking back what was no longer exact


def choose_groups(graph: FactorGraph, unfaithful: Mapping[str, frozenset[str]]) -> Grouping:
    """The groups of a model's sites; `unfaithful` as in `analyse`."""
    blocks = build_blocks(graph, "sites")
    plans = with_quadrature(graph, blocks, analyse(graph, blocks, unfaithful), judged=False)
    search = _Search(graph, blocks, plans)
    for _ in range(_ROUNDS):
        grouping = search.grouping()
        if not grouping.groups:
            return replace(grouping, judged=(graph, plans))
        joint = blocks_of(graph, grouping)
        found = with_quadrature(graph, joint, analyse(graph, joint, unfaithful), judged=False)
        if not search.learn(joint, found):
            large = {name: pattern_of(graph, joint, found, name) for name in search.large(joint)}
            patterns = {name: pattern for name, pattern in large.items() if pattern is not None}
            if len(patterns) == len(large):
                sparse = replace(
                    grouping, patterns=patterns, notes=(*grouping.notes, *map(described, patterns.values()))
                )
                return replace(sparse, judged=(graph, found))
            search.keep_apart(joint[name] for name in set(large) - set(patterns))
    return Grouping(
        notes=(f"no grouping of sites was found in {_ROUNDS} rounds: every site is kept by itself",),
        judged=(graph, plans),
    )


@dataclass(frozen=True)
class _Edge:
    """Why two sites belong together: a factor, and what it takes to average it."""

    sites: frozenset[str]
    factor: str
    kind: str  # a key of `MOST`


class _Search:
    def __init__(self, graph: FactorGraph, blocks: Mapping[str, Block], plans: Mapping[str, FactorPlan]):
        self.graph, self.blocks, self.plans = graph, blocks, plans
        self.candidates = {name for name in blocks if self._may_join(name)}
        self.order = {name: place for place, name in enumerate(blocks)}
        self.apart: set[frozenset[str]] = set()
        self.flat: set[str] = set()
        self.dense: set[str] = set()  # sites whose large Gaussian would not be sparse
        self.mixed: dict[frozenset[str], str] = {}  # why a pair's dtypes keep it apart; empty where they do not
        self.edges = [edge for plan in plans.values() for edge in self._edges(plan)]
        for plan in plans.values():
            self._flatten_mixed(blocks, plan)

    # -- what belongs together ----------------------------------------------------------------------------------------

    def _may_join(self, name: str) -> bool:
        """Gaussian in some variable, or nothing lost if it were; with a statement that speaks of every element, and without
        wishes of its own."""
        block, factor = self.blocks[name], self.graph.factors[name]
        site = self.graph.sites[name]
        wishes = site.infer.get("blr", {})
        inner = factor.constructed.mask if factor.constructed is not None else None
        return (
            (is_gaussian(block.family) or self._is_only_drawn(name))
            and not block.elements
            and not set(wishes) & {"block", "family", "copies"}
            and (factor.mask is None or factor.mask is True)
            and inner is None
            and pushforward_family(site.support, site.shape[len(site.batch_shape) :]) is not None
        )

    def _is_only_drawn(self, name: str) -> bool:
        """Whether a site of another family has a closed form in its own prior only: as the Gaussian of an unconstrained variable
        it has what its family has, and the correlations too."""
        if self.blocks[name].is_discrete or self.graph.factors[name].latents != {name}:
            return False
        others = [p for p in self.plans.values() if name in p.factor.latents and p.factor.name != name]
        return bool(others) and all(name in plan.sampled for plan in others)

    def _edges(self, plan: FactorPlan) -> list[_Edge]:
        """Pairs of sites that a factor couples; pairs that it multiplies in closed form are put apart."""
        if plan.replayed:
            return []
        linear = [a for a in plan.arguments if a.role in (Linear, Vector)]
        if plan.exact:
            self.apart |= {frozenset(pair) for a in linear for pair in a.products}
        multiplied = {frozenset(pair) for a in linear for pair in a.products}
        affine = {name for a in linear for name in a.forms if self._is_real(name)} & set(plan.analytic)
        kind = "draws" if plan.sampled else "quadrature"
        drawn = [name for name in (*plan.integrated, *plan.sampled) if name in self.candidates]
        pairs = [(pair, "affine") for pair in combinations(sorted(affine & self.candidates), 2)]
        pairs = [(pair, how) for pair, how in pairs if frozenset(pair) not in multiplied]
        pairs += [(pair, kind) for pair in combinations(drawn, 2)]
        pairs += [
            ((a, b), kind) for a in drawn for b in sorted(affine & self.candidates) if in_location(self.graph, plan, a)
        ]
        if plan.sampled and self._is_funnel(plan):
            self.apart |= across_scales(self.graph, plan)
        if plan.enumerated or plan.sampled and self._is_funnel(plan):
            pairs = [(pair, how) for pair, how in pairs if frozenset(pair) not in across_scales(self.graph, plan)]
        self.mixed |= {frozenset(pair): different_precisions(self.graph, *pair) for pair, _ in pairs}
        return [_Edge(frozenset(pair), plan.factor.name, how) for pair, how in pairs if self._compatible(*pair)]

    def _is_real(self, name: str) -> bool:
        return isinstance(self.blocks[name].family, (Normal, MultivariateNormal))

    def _is_funnel(self, plan: FactorPlan) -> bool:
        """Whether a factor's joint density in a real value and its scale is unbounded where the scale vanishes.

        Averaged over the value by itself it is not; and draws of both are too few to see which.
        """
        return any(self._is_real(site) for site in self.graph.tape.latents_of(plan.factor.value))

    def _compatible(self, a: str, b: str) -> bool:
        one, other = self.graph.sites[a], self.graph.sites[b]
        subsampled = any(p.subsample_size != p.size for site in (one, other) for p in site.plates)
        same = (one.dtype, one.device, one.looped) == (other.dtype, other.device, other.looped)
        return same and (not subsampled or in_same_plates((one, other)))

    # -- grouping ------------------------------------------------------------------------------------------------------

    def grouping(self) -> Grouping:
        """Groups grown along edges, the smallest pair first, as long as they stay affordable and nothing in them is apart."""
        group_of = {name: frozenset([name]) for name in self.blocks}
        kinds: dict[frozenset[str], str] = {}
        for edge in self.edges:
            kinds[edge.sites] = _costlier(edge.kind, kinds.get(edge.sites, edge.kind))
        kind_of = dict.fromkeys(group_of.values(), "affine")
        refused: dict[frozenset[str], str] = {}
        for pair in sorted(kinds, key=lambda pair: (self._dimensions(pair), sorted(map(self.order.__getitem__, pair)))):
            parts = {group_of[name] for name in pair}
            union = frozenset().union(*parts)
            kind = functools.reduce(_costlier, [kinds[pair], *(kind_of[part] for part in parts)])
            if any(both <= union for both in self.apart):
                continue
            refusal = self._refusal(union, kind)
            if refusal:
                refused[pair] = refusal
                continue
            kind_of[union] = kind
            group_of |= dict.fromkeys(union, union)
        found = {group for group in group_of.values() if len(group) > 1 or group & self.flat}
        ordered = [self._like_by_like(group) for group in found]
        groups = sorted(ordered, key=lambda group: min(map(self.order.__getitem__, group)))
        kept = [text for pair, text in refused.items() if len({group_of[name] for name in pair}) > 1]
        notes = [*map(self._reason, groups), *dict.fromkeys(kept), *filter(None, self.mixed.values())]
        return Grouping(tuple(groups), frozenset(self.flat), tuple(notes))

    def _like_by_like(self, group: Iterable[str]) -> tuple[str, ...]:
        """In the model's order, the sites that a loop makes of one kind (`z_0`, `z_1`, …) one after the other."""
        ordered = sorted(group, key=self.order.__getitem__)
        kinds = list(dict.fromkeys(map(without_numbers, ordered)))
        return tuple(sorted(ordered, key=lambda name: kinds.index(without_numbers(name))))

    def _dimensions(self, group: Iterable[str]) -> int:
        """The length of the group's variable: of one batch element where it keeps its plates."""
        sites = [self.graph.sites[name] for name in group]
        batch = sites[0].batch_shape.numel() if self._keeps_plates(sites) else 1
        return sum(site.batch_shape.numel() * self._event(site) for site in sites) // max(batch, 1)

    def _event(self, site: Site) -> int:
        family = self.blocks[site.name].family
        base = family.base if isinstance(family, TransformedNormal) else family
        return max(base.event_shape.numel(), 1)

    def _keeps_plates(self, sites: Sequence[Site]) -> bool:
        return in_same_plates(sites) and not any(site.name in self.flat for site in sites)

    def _refusal(self, group: frozenset[str], kind: str) -> str:
        """Why a joint block would be too large; empty where it is not."""
        sites = [self.graph.sites[name] for name in sorted(group, key=self.order.__getitem__)]
        size, keeps = self._dimensions(group), self._keeps_plates(sites)
        own = max(self._event(site) for site in sites)
        batch = sites[0].batch_shape.numel() if keeps else 1
        names = " and ".join(site.name for site in sites) if len(group) < 6 else f"{len(group)} sites"
        if not keeps and any(p.subsample_size != p.size for site in sites for p in site.plates):
            return f"{names} are in different plates, one of them subsampled: kept apart"
        sparse = kind != "draws" and size <= SPARSE and not self.dense & group and (not keeps or batch == 1)
        if size > MOST[kind] and size > _SLACK * own and not sparse:
            how = "" if kind == "affine" else f" for factors averaged by {kind}"
            return f"a joint block of {names} would have {size:,} dimensions, beyond {MOST[kind]:,}{how}: kept apart"
        apart = sum(site.batch_shape.numel() * self._event(site) ** 2 for site in sites)
        if batch * size**2 > max(_NUMBERS, 4 * apart) and not sparse:
            return f"a joint block of {names} would hold {batch * size**2:,} covariances: kept apart"
        return ""

    def _reason(self, group: Sequence[str]) -> str:
        edges = [edge for edge in self.edges if edge.sites <= frozenset(group)]
        size, names = (
            self._dimensions(group),
            ", ".join(group[:6]) + (f" and {len(group) - 6} others" if group[6:] else ""),
        )
        sites = [self.graph.sites[name] for name in group]
        each = (
            f" for each of {sites[0].batch_shape.numel():,}"
            if self._keeps_plates(sites) and sites[0].batch_shape
            else ""
        )
        parts = []
        for kinds, text in ((("affine",), "jointly affine in"), (("quadrature", "draws"), "share the non-conjugate")):
            factors = list(dict.fromkeys(edge.factor for edge in edges if edge.kind in kinds))
            if factors:
                more = f" and {len(factors) - 4} others" if len(factors) > 4 else ""
                parts.append(f"{text} {', '.join(factors[:4])}{more}")
        if not parts:
            parts = ["its elements meet in a factor"]
        return f"one Gaussian of {size:,} dimensions{each} over {names}: {'; '.join(parts)}"

    # -- what an analysis of the joint blocks teaches --------------------------------------------------------------------

    def learn(self, blocks: Mapping[str, Block], plans: Mapping[str, FactorPlan]) -> bool:
        """Puts apart what is no longer exact together, and flattens plates whose elements meet; whether anything was new."""
        before = len(self.apart), len(self.flat)
        for name, plan in plans.items():
            mine = self.plans[name]
            if (mine.exact and not plan.exact) or (mine.deterministic and not plan.deterministic):
                self._put_apart(name, blocks, plan)
            self._flatten_mixed(blocks, plan)
        return before != (len(self.apart), len(self.flat))

    def large(self, blocks: Mapping[str, Block]) -> list[str]:
        """Joint blocks that are too large to be dense."""
        return [
            name
            for name, block in blocks.items()
            if block.is_joint
            and block.batch_shape.numel() == 1
            and block.num_directions > self._most(block)
            and block.num_directions > _SLACK * max(self._event(site) for site in block.sites)
        ]

    def _most(self, block: Block) -> int:
        """What the edges inside allowed; of elements of a single site, what its factors do."""
        kinds = [edge.kind for edge in self.edges if edge.sites <= set(block.site_names)]
        if not kinds and any(not p.exact for p in self.plans.values() if p.factor.latents & set(block.site_names)):
            kinds = ["quadrature"]
        return MOST[functools.reduce(_costlier, kinds, "affine")]

    def keep_apart(self, blocks: Iterable[Block]) -> None:
        """Takes back large groups without a sparse precision."""
        for block in blocks:
            self.dense |= set(block.site_names)
            self.flat -= set(block.site_names)

    def _put_apart(self, name: str, blocks: Mapping[str, Block], plan: FactorPlan) -> None:
        here = self.graph.factors[name].latents
        for block in (*plan.sampled, *plan.integrated):
            members = [site for site in blocks[block].site_names if site in here]
            self.apart |= {frozenset(pair) for pair in combinations(members, 2)}

    def _flatten_mixed(self, blocks: Mapping[str, Block], plan: FactorPlan) -> None:
        """Sites in a plate several elements of which a factor combines: they are dependent, if that is affordable."""
        for argument in plan.all_arguments:
            for name, dims in argument.mixed.items():
                block = blocks[name]
                joins = set(block.site_names) <= self.candidates
                event = 1 if isinstance(block.family, MultivariateNormal) else 0
                if joins and (event or isinstance(block.family, Normal)) and any(dim < -event for dim in dims):
                    size = block.num_directions * block.batch_shape.numel()
                    whole = all(plate.subsample_size == plate.size for plate in block.plates)
                    most = MOST["affine" if plan.exact else "quadrature"]
                    sparse = plan.deterministic and size <= SPARSE and not self.dense & set(block.site_names)
                    if whole and (size <= most or sparse):
                        self.flat |= set(block.site_names)


def _costlier(a: str, b: str) -> str:
    return max(a, b, key=list(MOST).index)
