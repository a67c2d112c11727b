"""Verdicts: for each factor, which blocks of q it can be averaged over in closed form, and why not the others.

Conjugacy is decided on the canonical arguments of the factor's likelihood template, never on `log_prob`.  Two judges: the structural
one reads the recorded expression (`kinds`), the numerical one evaluates it (`probe`).  Both yes is *proved*.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyro_blr.blocks import Block
from pyro_blr.excuses import excuse
from pyro_blr.families import Beta, Dirichlet, Gamma, InverseGamma, LogNormal, TransformedNormal, Wishart
from pyro_blr.forms import (
    UNUSABLE,
    allowed_form,
    holds_for_other_data,
    is_jointly_affine,
    numerical_at_all_states,
)
from pyro_blr.graph import Factor, FactorGraph
from pyro_blr.interactions import mixed_dims, products_of
from pyro_blr.kinds import Form, Judge, Kind, Sort
from pyro_blr.likelihoods import Likelihood, Linear, Vector, likelihood_of
from pyro_blr.likeness import Alike
from pyro_blr.plans import PROVED, Argument, FactorPlan, Verdict
from pyro_blr.probe import Probe
from pyro_blr.reasons import contradiction, family_name, in_two_arguments, misaligned, misfit, site_family, unrecorded
from pyro_blr.recorded import Recorded
from pyro_blr.remedies import remedy_for
from pyro_blr.running import generic_value

__all__ = ["analyse"]

MOST_RUNS = 256  # runs of the model, at most, for one average over discrete sites that leave torch


@dataclass(frozen=True)
class _Finding:
    """The outcome for one block in one argument."""

    form: Form | None
    proved: bool
    points: int = 0
    operation: str = ""
    source: str = ""
    cause: str = ""  # what only the values show


_SORTS = {
    Gamma: Sort.POSITIVE,
    InverseGamma: Sort.POSITIVE,
    Beta: Sort.PROBABILITY,
    Dirichlet: Sort.SIMPLEX,
    Wishart: Sort.MATRIX,
}


def analyse(
    graph: FactorGraph,
    blocks: Mapping[str, Block],
    unfaithful: Mapping[str, frozenset[str]],
    misaligned: Mapping[str, frozenset[str]] | None = None,
    judged: Mapping[str, FactorPlan] | None = None,
) -> dict[str, FactorPlan]:
    """A plan for every factor of the graph.

    `unfaithful` names the factors whose recorded expressions do not reproduce the model, and the latents they depend on;
    `misaligned` those whose table over the states of discrete sites is not the factor, and their latents.
    `judged` holds the plans of a graph of the same structure, whose verdicts hold for this one's data.
    """
    judge = _Judge(graph, blocks)
    plans = {}
    for name, factor in graph.factors.items():
        if name in unfaithful:
            plans[name] = judge.replayed(factor, unfaithful[name], aligned=True)
        elif misaligned is not None and name in misaligned:
            plans[name] = judge.replayed(factor, misaligned[name], aligned=False)
        elif judged is not None:
            plans[name] = judge.renewed(factor, judged[name])
        else:
            plans[name] = judge.plan(factor)
    return plans


class _Judge:
    def __init__(self, graph: FactorGraph, blocks: Mapping[str, Block]):
        self.graph, self.blocks = graph, blocks
        self.block_of = {site: name for name, block in blocks.items() for site in block.site_names}
        self.probe, self.structure = Probe(graph, blocks), Judge(graph.tape)
        self.alike = Alike(graph, blocks)

    def replayed(self, factor: Factor, latents: frozenset[str], aligned: bool) -> FactorPlan:
        """A factor that only running the model can evaluate."""
        discrete = [
            site for site in self.graph.sites if site in latents and self.blocks[self.block_of[site]].is_discrete
        ]
        enumerated, sampled = self._replayable(latents)
        how = "Monte Carlo"
        if not sampled:
            how = f"exact (verified numerically at {math.prod(self.blocks[name].num_states for name in enumerated)} points)"
        verdicts = []
        for site in self.graph.sites:
            if site not in latents:
                continue
            if not sampled:
                verdicts.append(Verdict(factor.name, site, True, how))
                continue
            text = unrecorded(factor, site, self.graph, latents) if aligned else misaligned(factor, site, discrete)
            verdicts.append(Verdict(factor.name, site, False, how, text))
        return FactorPlan(factor, None, (), enumerated, (), sampled, tuple(verdicts), replayed=True)

    def _replayable(self, latents: frozenset[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Blocks whose joint states are few enough to run the model at each, and the others."""
        enumerated, sampled, runs = [], [], 1
        for name in dict.fromkeys(self.block_of[site] for site in self.graph.sites if site in latents):
            block = self.blocks[name]
            if block.is_discrete and block.batch_shape.numel() == 1 and runs * block.num_states <= MOST_RUNS:
                runs *= block.num_states
                enumerated.append(name)
            else:
                sampled.append(name)
        return tuple(enumerated), tuple(sampled)

    def plan(self, factor: Factor) -> FactorPlan:
        names = tuple(dict.fromkeys(self.block_of[s] for s in self.graph.sites if s in factor.latents))
        enumerated = tuple(name for name in names if self.blocks[name].is_discrete)
        continuous = [name for name in names if not self.blocks[name].is_discrete]
        reasons: dict[str, tuple[str, _Finding]] = {}
        likelihood, arguments = self._canonical(factor)
        if likelihood is None and factor.constructed is not None:
            family = family_name(factor)
            for name in continuous:
                reasons[name] = (f"no closed form for {family}", _Finding(None, False))
        elif factor.constructed is None:
            for name in continuous:
                reasons[name] = ("its distribution hides its arguments", _Finding(None, False))
        for name in continuous:
            if name in self._blocks_of((factor.scale, factor.mask)):
                reasons.setdefault(
                    name,
                    (
                        f"{' and '.join(self._sites(name, factor.latents))} is in its scale or mask",
                        _Finding(None, False),
                    ),
                )
        findings = self._find(factor, arguments, names, reasons)
        sampled = tuple(name for name in continuous if name in reasons)
        analytic = tuple(name for name in continuous if name not in reasons)
        planned = tuple(self._planned(argument, findings, analytic, names) for argument in arguments)
        verdicts = self._verdicts(factor, names, planned, findings, reasons, sampled)
        return FactorPlan(factor, likelihood, planned, enumerated, analytic, sampled, verdicts)

    def renewed(self, factor: Factor, plan: FactorPlan) -> FactorPlan:
        """The same plan over the expressions of another run."""
        _, arguments = self._canonical(factor)
        known = {argument.name: argument for argument in plan.arguments}
        arguments = [replace(known[argument.name], ref=argument.ref) for argument in arguments]
        return replace(plan, factor=factor, arguments=tuple(arguments))

    # -- canonical arguments ----------------------------------------------------------------------------------------

    def _canonical(self, factor: Factor) -> tuple[Likelihood | None, list[Argument]]:
        constructed = factor.constructed
        if constructed is None:
            return None, []
        likelihood = likelihood_of(constructed.distribution_class)
        if likelihood is None:
            return None, []
        recording = self.graph.recording
        with recording.again(factor.source):
            value = self._safe_value(factor, recording.recorded(factor.value))
            arguments = {name: recording.recorded(ref) for name, ref in constructed.arguments.items()}
            canonical = likelihood.canonical(value, arguments)
            canonical = _combine_shared(canonical, likelihood, lambda a: self._blocks_of((recording.reference(a),)))
        return likelihood, [
            Argument(name, likelihood.roles[name], recording.reference(value)) for name, value in canonical.items()
        ]

    def _safe_value(self, factor: Factor, value: Any) -> Any:
        """Observed data with what a mask hides replaced by something inside the support: NaN times zero is NaN."""
        constructed = factor.constructed
        assert constructed is not None
        if isinstance(value, Recorded) or not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        masks = [m for m in (factor.mask, constructed.mask) if isinstance(m, (Tensor, bool))]
        if not masks or bool(torch.isfinite(value).all()):
            return value
        mask = torch.ones((), dtype=torch.bool, device=value.device)
        for item in masks:
            item = torch.as_tensor(item, dtype=torch.bool, device=value.device)
            extra = constructed.reinterpreted if item is factor.mask else 0
            mask = mask & item.reshape(item.shape + (1,) * extra)
        mask = mask.reshape(mask.shape + (1,) * constructed.event_dim)
        safe = generic_value(factor.name, factor.distribution).to(value)
        return torch.where(mask, value, safe.expand(torch.broadcast_shapes(safe.shape, value.shape)))

    def _blocks_of(self, refs: Sequence[Any]) -> set[str]:
        return {self.block_of[site] for ref in refs for site in self.graph.tape.latents_of(ref)}

    def _sites(self, block: str, latents: Collection[str]) -> list[str]:
        """The block's sites among `latents`, those of a factor or of an argument."""
        return [site for site in self.blocks[block].site_names if site in latents]

    # -- the two judges -----------------------------------------------------------------------------------------------

    def _find(
        self, factor: Factor, arguments: Sequence[Argument], names: Sequence[str], reasons: dict
    ) -> dict[tuple[str, str], _Finding]:
        findings: dict[tuple[str, str], _Finding] = {}
        where: dict[str, list[Argument]] = {}
        for argument in arguments:
            for name in self._blocks_of((argument.ref,)):
                if not self.blocks[name].is_discrete:
                    where.setdefault(name, []).append(argument)
                    if name not in reasons:
                        key = ("form", argument.role, names.index(name))
                        judge = functools.partial(self._judge, factor, argument, name)
                        findings[argument.name, name] = self.alike.once(
                            key, [argument.ref], names, judge, lambda f: f.form is None or f.proved
                        )
        for name, places in where.items():
            if name in reasons:
                continue
            if len(places) > 1:
                held = {place.name: self._sites(name, self.graph.tape.latents_of(place.ref)) for place in places}
                reasons[name] = (in_two_arguments(held), findings[places[0].name, name])
                continue
            finding = findings[places[0].name, name]
            if finding.form is None:
                here = self.graph.tape.latents_of(places[0].ref)
                text = misfit(places[0], self.blocks[name], here, finding.operation, finding.source, finding.cause)
                reasons[name] = (text, finding)
        return findings

    def _judge(self, factor: Factor, argument: Argument, name: str) -> _Finding:
        block = self.blocks[name]
        structural = self._structural(argument, block)
        try:
            form, points = numerical_at_all_states(self.probe, argument, block)
        except UNUSABLE as error:
            return _Finding(None, False, cause=f"it cannot be evaluated at other values: {error}")
        claimed = allowed_form(argument.role, block, structural) if structural is not None else None
        if form is Form.PARTIAL and claimed is not Form.PARTIAL:
            form = None  # where nothing moves the numbers are no evidence: the expression must say so
        if claimed is not None and form is not None:
            return _Finding(claimed, True, points)
        if form is not None and holds_for_other_data(self.probe, argument, block, form):
            return _Finding(form, False, points)
        if structural is None:
            return _Finding(None, False, points)
        if claimed is None:
            return _Finding(None, False, points, structural.operation, structural.source)
        cause = excuse(self.probe, argument, block)
        if not cause and not block.is_joint:  # about several sites together the structural judge asks the numbers
            raise RuntimeError(contradiction(factor, argument, block, structural, points))
        return _Finding(None, False, points, structural.operation, structural.source, cause)

    def _structural(self, argument: Argument, block: Block) -> Kind | None:
        named = self.graph.tape.latents_of(argument.ref)
        if any(isinstance(m.family or block.family, TransformedNormal) for m in block.members if m.site.name in named):
            return None  # the block's variable is not the site, but what is pushed onto it
        sort = Sort.REAL
        for family, candidate in _SORTS.items():
            if isinstance(block.family, family):
                sort = candidate
        if isinstance(block.family, LogNormal):
            sort = Sort.POSITIVE
        kinds = [self.structure.kind_of(argument.ref, site, sort) for site in block.site_names if site in named]
        if len(kinds) == 1:
            return kinds[0]
        others = [kind for kind in kinds if allowed_form(argument.role, block, kind) is None]
        if others:
            return others[0]
        return Kind(Form.AFFINE) if is_jointly_affine(self.probe, argument.ref, block) else None

    # -- what follows -------------------------------------------------------------------------------------------------

    def _planned(
        self, argument: Argument, findings: Mapping, analytic: Sequence[str], names: Sequence[str]
    ) -> Argument:
        forms = {name: findings[argument.name, name].form for name in analytic if (argument.name, name) in findings}
        mixed: dict[str, tuple[int, ...]] = {}
        products: tuple[tuple[str, ...], ...] = ()
        if argument.role in (Linear, Vector):

            def places() -> tuple[dict, list]:  # blocks by their places among the factor's
                dims = {names.index(name): mixed_dims(self.probe, argument, self.blocks[name]) for name in forms}
                found = products_of(self.probe, argument, [self.blocks[name] for name in forms])
                return dims, [tuple(map(names.index, each)) for each in found]

            key = ("mixed", argument.role, *map(names.index, forms))
            dims, multiplied = self.alike.once(key, [argument.ref], names, places)
            mixed = {names[place]: found for place, found in dims.items()}
            products = tuple(tuple(names[place] for place in each) for each in multiplied)
        return Argument(argument.name, argument.role, argument.ref, forms, mixed, products)

    def _verdicts(
        self,
        factor: Factor,
        names: Sequence[str],
        arguments: Sequence[Argument],
        findings: Mapping,
        reasons: Mapping,
        sampled: Sequence[str],
    ) -> tuple[Verdict, ...]:
        result = []
        for name in names:
            block = self.blocks[name]
            mine = [finding for (_, other), finding in findings.items() if other == name]
            for site in (site.name for site in block.sites if site.name in factor.latents):
                if name in reasons:
                    reason, finding = reasons[name]
                    if factor.source and not reason.endswith(")"):
                        reason += f" ({factor.source})"
                    places = (a.name for a in arguments if site in self.graph.tape.latents_of(a.ref))
                    argument = next((place for place in places if (place, name) in findings), "")
                    finding = findings.get((argument, name), finding)
                    prior = site_family(self.graph.sites[site])
                    remedy = remedy_for(family_name(factor), argument, prior, finding.operation)
                    result.append(
                        Verdict(factor.name, site, False, "Monte Carlo", f"{factor.name}: {reason}", remedy, argument)
                    )
                elif sampled:
                    others = " and ".join(s for b in sampled for s in self._sites(b, factor.latents))
                    result.append(Verdict(factor.name, site, False, f"closed form given draws of {others}"))
                else:
                    unproved = [finding for finding in mine if not finding.proved]
                    how = PROVED
                    if unproved:
                        how = f"exact (verified numerically at {min(f.points for f in unproved)} points)"
                    result.append(Verdict(factor.name, site, True, how))
        return tuple(result)


def _combine_shared(canonical: dict[str, Any], likelihood: Likelihood, blocks_of: Any) -> dict[str, Any]:
    """A block in both the value and the loc of a Gaussian: what matters is their difference, so let that be the loc."""
    if "value" in canonical and "loc" in canonical and likelihood.roles["value"] in (Linear, Vector):
        if blocks_of(canonical["value"]) & blocks_of(canonical["loc"]):
            difference = canonical["loc"] - canonical["value"]
            zero = torch.zeros(
                tuple(difference.shape), dtype=difference.dtype, device=difference.device
            )  # no recorded operand
            return {**canonical, "loc": difference, "value": zero}
    return canonical
