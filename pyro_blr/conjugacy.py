"""Verdicts: for each factor, which blocks of q it can be averaged over in closed form, and why not the others.

Conjugacy is decided on the canonical arguments of the factor's likelihood template, never on `log_prob`.  Two judges: the structural
one reads the recorded expression (`kinds`), the numerical one evaluates it (`probe`).  Both yes is *proved*.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from pyro_blr.blocks import Block, is_gaussian
from pyro_blr.expressions import Recorded, Recording, Ref
from pyro_blr.families import Beta, Dirichlet, Gamma, InverseGamma, LogNormal, TransformedNormal, Wishart
from pyro_blr.graph import Factor, FactorGraph, generic_value, unwrap
from pyro_blr.kinds import Form, Kind, Sort, kind_of
from pyro_blr.likelihoods import (
    Constant,
    Expectation,
    Likelihood,
    Linear,
    Matrix,
    Positive,
    Probability,
    Simplex,
    Vector,
    likelihood_of,
)
from pyro_blr.probe import Probe, close
from pyro_blr.remedies import remedy_for

__all__ = ["Argument", "FactorPlan", "Verdict", "analyse"]

PROVED = "exact (proved)"
_T = TypeVar("_T")
MOST_RUNS = 256  # runs of the model, at most, for one average over discrete sites that leave torch


@dataclass(frozen=True)
class Verdict:
    """What is said about one (factor, site) pair."""

    factor: str
    site: str
    exact: bool
    how: str
    reason: str = ""
    remedy: str = ""
    argument: str = ""


@dataclass(frozen=True)
class Argument:
    """One canonical argument of a factor: its expression, and the blocks it is averaged over in closed form."""

    name: str
    role: type[Expectation]
    ref: Any
    forms: Mapping[str, Form] = field(default_factory=dict)
    mixed: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    products: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class FactorPlan:
    """How E_q[log f] is computed: over `enumerated` blocks by summing, over `analytic` ones in closed form, over `sampled`
    ones by drawing."""

    factor: Factor
    likelihood: Likelihood | None
    arguments: tuple[Argument, ...]
    enumerated: tuple[str, ...]
    analytic: tuple[str, ...]
    sampled: tuple[str, ...]
    verdicts: tuple[Verdict, ...]
    replayed: bool = False

    @property
    def exact(self) -> bool:
        return not self.sampled

    @property
    def blocks(self) -> tuple[str, ...]:
        return (*self.enumerated, *self.analytic, *self.sampled)


@dataclass(frozen=True)
class _Finding:
    """The outcome for one block in one argument."""

    form: Form | None
    proved: bool
    points: int = 0
    operation: str = ""
    source: str = ""


_SORTS = {Gamma: Sort.POSITIVE, InverseGamma: Sort.POSITIVE, Beta: Sort.PROBABILITY, Dirichlet: Sort.SIMPLEX, Wishart: Sort.MATRIX}


def analyse(
    graph: FactorGraph,
    blocks: Mapping[str, Block],
    unfaithful: Mapping[str, frozenset[str]],
    judged: Mapping[str, FactorPlan] | None = None,
) -> dict[str, FactorPlan]:
    """A plan for every factor of the graph.

    `unfaithful` names the factors whose recorded expressions do not reproduce the model, and the latents they depend on.
    `judged` holds the plans of a graph of the same structure, whose verdicts hold for this one's data.
    """
    judge = _Judge(graph, blocks)
    plans = {}
    for name, factor in graph.factors.items():
        if name in unfaithful:
            plans[name] = judge.replayed(factor, unfaithful[name])
        elif judged is not None:
            plans[name] = judge.renewed(factor, judged[name])
        else:
            plans[name] = judge.plan(factor)
    return plans


class _Judge:
    def __init__(self, graph: FactorGraph, blocks: Mapping[str, Block]):
        self.graph, self.blocks = graph, blocks
        self.block_of = {site: name for name, block in blocks.items() for site in block.site_names}
        self.probe = Probe(graph, blocks)

    def replayed(self, factor: Factor, latents: frozenset[str]) -> FactorPlan:
        """A factor that only running the model can evaluate."""
        departures = [d for d in self.graph.tape.departures if not d.latents or d.latents & latents]
        reason = self.graph.failure or "its expressions do not reproduce the model"
        if departures:
            reason = f"{departures[0].operation} ({departures[0].source})"
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
            text = f"{factor.name}: {site} leaves the program's tensors: {reason}"
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
            family = _family_name(factor)
            for name in continuous:
                reasons[name] = (f"no closed form for {family}", _Finding(None, False))
        elif factor.constructed is None:
            for name in continuous:
                reasons[name] = ("its distribution hides its arguments", _Finding(None, False))
        for name in continuous:
            if name in self._blocks_of((factor.scale, factor.mask)):
                reasons.setdefault(name, (f"{' and '.join(self.blocks[name].site_names)} is in its scale or mask", _Finding(None, False)))
        findings = self._find(factor, arguments, continuous, reasons)
        sampled = tuple(name for name in continuous if name in reasons)
        analytic = tuple(name for name in continuous if name not in reasons)
        planned = tuple(self._planned(argument, findings, analytic) for argument in arguments)
        verdicts = self._verdicts(factor, names, findings, reasons, sampled)
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
        tape = self.graph.tape
        names = list(constructed.arguments)
        refs = [factor.value, *(constructed.arguments[name] for name in names)]
        tape.closed, tape.place = False, factor.source
        try:
            wrapped = [Recorded.wrap(tape.values[ref.index], tape, ref.index) if isinstance(ref, Ref) else ref for ref in refs]
            with Recording(tape):
                value = self._safe_value(factor, wrapped[0])
                canonical = likelihood.canonical(value, dict(zip(names, wrapped[1:], strict=True)))
                canonical = _combine_shared(canonical, likelihood, lambda a: self._blocks_of((tape.reference(a),)))
        finally:
            tape.closed, tape.place = True, ""
        return likelihood, [
            Argument(name, likelihood.roles[name], tape.reference(value)) for name, value in canonical.items()
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

    # -- the two judges -----------------------------------------------------------------------------------------------

    def _find(
        self, factor: Factor, arguments: Sequence[Argument], continuous: Sequence[str], reasons: dict
    ) -> dict[tuple[str, str], _Finding]:
        findings: dict[tuple[str, str], _Finding] = {}
        where: dict[str, list[str]] = {}
        for argument in arguments:
            for name in self._blocks_of((argument.ref,)):
                if name in continuous:
                    where.setdefault(name, []).append(argument.name)
                    if name not in reasons:
                        findings[argument.name, name] = self._judge(argument, name)
        for name, places in where.items():
            if name in reasons:
                continue
            if len(places) > 1:
                reasons[name] = (f"{' and '.join(self.blocks[name].site_names)} is in two arguments: {' and '.join(places)}", findings[places[0], name])
                continue
            finding = findings[places[0], name]
            if finding.form is None:
                reasons[name] = (self._why(arguments, places[0], name, finding), finding)
        return findings

    def _why(self, arguments: Sequence[Argument], place: str, name: str, finding: _Finding) -> str:
        role = next(argument.role for argument in arguments if argument.name == place)
        sites = " and ".join(self.blocks[name].site_names)
        what = _FORMS_IN_WORDS.get(role, role.requirement)
        text = f"{place} is not {what} {sites}"
        if finding.operation:
            text += f": {finding.operation}" + (f" ({finding.source})" if finding.source else "")
        elif isinstance(self.blocks[name].family, TransformedNormal):
            text += f", a {_site_family(self.blocks[name])} site"
        return text

    def _judge(self, argument: Argument, name: str) -> _Finding:
        block = self.blocks[name]
        structural = self._structural(argument, block)
        try:
            form, points = _numerical_at_all_states(self.probe, argument, block)
        except _UNUSABLE as error:
            return _Finding(None, False, 0, f"it cannot be evaluated at other values: {error}")
        claimed = _allowed(argument.role, block, structural) if structural is not None else None
        if claimed is not None and form is not None:
            return _Finding(claimed, True, points)
        if form is not None and _holds_for_other_data(self.probe, argument, block, form):
            return _Finding(form, False, points)
        operation = structural.operation if structural is not None else ""
        source = structural.source if structural is not None else ""
        if claimed is not None:
            operation = operation or "the expression is of the form but its values are not (a constraint of the family fails)"
        return _Finding(None, False, points, operation, source)

    def _structural(self, argument: Argument, block: Block) -> Kind | None:
        if isinstance(block.family, TransformedNormal):
            return None
        sort = Sort.REAL
        for family, candidate in _SORTS.items():
            if isinstance(block.family, family):
                sort = candidate
        if isinstance(block.family, LogNormal):
            sort = Sort.POSITIVE
        kinds = [
            kind_of(self.graph.tape, argument.ref, site, sort)
            for site in block.site_names
            if site in self.graph.tape.latents_of(argument.ref)
        ]
        if len(kinds) == 1:
            return kinds[0]
        others = [kind for kind in kinds if _allowed(argument.role, block, kind) is None]
        if others:
            return others[0]
        return Kind(Form.AFFINE) if is_jointly_affine(self.probe, argument.ref, block) else None

    # -- what follows -------------------------------------------------------------------------------------------------

    def _planned(self, argument: Argument, findings: Mapping, analytic: Sequence[str]) -> Argument:
        forms = {
            name: findings[argument.name, name].form
            for name in analytic
            if (argument.name, name) in findings
        }
        mixed: dict[str, tuple[int, ...]] = {}
        products: tuple[tuple[str, ...], ...] = ()
        if argument.role in (Linear, Vector):
            for name in forms:
                mixed[name] = _mixed_dims(self.probe, argument, self.blocks[name])
            products = _products(self.probe, argument, [self.blocks[name] for name in forms])
        return Argument(argument.name, argument.role, argument.ref, forms, mixed, products)

    def _verdicts(
        self, factor: Factor, names: Sequence[str], findings: Mapping, reasons: Mapping, sampled: Sequence[str]
    ) -> tuple[Verdict, ...]:
        result = []
        for name in names:
            block = self.blocks[name]
            mine = [finding for (_, other), finding in findings.items() if other == name]
            for site in block.site_names:
                if site not in factor.latents:
                    continue
                if name in reasons:
                    reason, finding = reasons[name]
                    if factor.source and not reason.endswith(")"):
                        reason += f" ({factor.source})"
                    argument = next((a for (a, other) in findings if other == name), "")
                    remedy = remedy_for(_family_name(factor), argument, _site_family(block), finding.operation)
                    result.append(
                        Verdict(factor.name, site, False, "Monte Carlo", f"{factor.name}: {reason}", remedy, argument)
                    )
                elif sampled:
                    others = " and ".join(s for b in sampled for s in self.blocks[b].site_names)
                    result.append(Verdict(factor.name, site, False, f"closed form given draws of {others}"))
                else:
                    unproved = [finding for finding in mine if not finding.proved]
                    how = PROVED
                    if unproved:
                        how = f"exact (verified numerically at {min(f.points for f in unproved)} points)"
                    result.append(Verdict(factor.name, site, True, how))
        return tuple(result)


_FORMS_IN_WORDS = {
    Linear: "affine in",
    Vector: "affine in",
    Positive: "proportional to",
    Probability: "equal (up to complement) to",
    Simplex: "equal to",
    Matrix: "proportional to",
    Constant: "free of",
}


def _family_name(factor: Factor) -> str:
    if factor.constructed is None:
        return type(factor.distribution).__name__
    return factor.constructed.distribution_class.__name__


def _site_family(block: Block) -> str:
    return type(unwrap(block.sites[0].distribution)[0]).__name__ if len(block.members) == 1 else type(block.family).__name__


def _combine_shared(canonical: dict[str, Any], likelihood: Likelihood, blocks_of: Any) -> dict[str, Any]:
    """A block in both the value and the loc of a Gaussian: what matters is their difference, so let that be the loc."""
    if "value" in canonical and "loc" in canonical and likelihood.roles["value"] in (Linear, Vector):
        if blocks_of(canonical["value"]) & blocks_of(canonical["loc"]):
            difference = canonical["loc"] - canonical["value"]
            zero = torch.zeros(tuple(difference.shape), dtype=difference.dtype, device=difference.device)  # no recorded operand
            return {**canonical, "loc": difference, "value": zero}
    return canonical


def _allowed(role: type[Expectation], block: Block, kind: Kind) -> Form | None:
    """The form under which the template is exact for the block's family, if the kind has it."""
    family, form = block.family, kind.form
    if role in (Linear, Vector) and is_gaussian(family):
        if isinstance(family, LogNormal):
            return Form.AFFINE if form is Form.LOG else None
        if form is Form.MONOMIAL and kind.power == 1:
            return Form.AFFINE
        return form if form in (Form.SELECTION, Form.AFFINE) else (Form.AFFINE if form is Form.COMPLEMENT else None)
    if role is Positive and isinstance(family, (Gamma, InverseGamma)):
        power = 1.0 if form is Form.SELECTION else kind.power if form is Form.MONOMIAL else None
        wanted = 1.0 if isinstance(family, Gamma) else -1.0
        return form if power == wanted else None
    if role is Probability and isinstance(family, Beta):
        return form if form in (Form.SELECTION, Form.COMPLEMENT) else None
    if role is Simplex and isinstance(family, Dirichlet):
        return form if form in (Form.SELECTION, Form.MONOMIAL) else None
    if role is Matrix:
        if isinstance(family, Wishart) and form in (Form.MATRIX, Form.SELECTION):
            return Form.MATRIX if form is Form.SELECTION or kind.power == 1 else None
        if isinstance(family, Gamma) and (form in (Form.MATRIX, Form.SELECTION) or (form is Form.MONOMIAL and kind.power == 1)):
            return Form.MATRIX
    return None


# --------------------------------------------------------------------------------------------------------------------
# The numerical judge

_STEPS = (0.37, -0.8, 1.9)


def _numerical(probe: Probe, argument: Argument, block: Block) -> tuple[Form | None, int]:
    """The form that the argument's values have along random lines in the block's variable, and at how many points it was seen."""
    role, family = argument.role, block.family
    if role in (Linear, Vector) and is_gaussian(family):
        ok = all(_affine(probe, argument.ref, block, probe.point(block), probe.point(block)) for _ in range(3))
        return (Form.AFFINE if ok else None), 3 * (len(_STEPS) + 2)
    if role is Positive and isinstance(family, (Gamma, InverseGamma)):
        return _positive_form(probe, argument.ref, block), 3 * 8
    if role is Probability and isinstance(family, Beta):
        return _probability_form(probe, argument.ref, block), 3 * 2
    if role is Simplex and isinstance(family, Dirichlet):
        return _simplex_form(probe, argument.ref, block), 3 * 3
    if role is Matrix and isinstance(family, Wishart):
        return _matrix_form(probe, argument.ref, block), 3 * 4
    if role is Matrix and isinstance(family, Gamma):
        return _scaled_matrix_form(probe, argument.ref, block), 3 * 6
    return None, 0


def _numerical_at_all_states(probe: Probe, argument: Argument, block: Block) -> tuple[Form | None, int]:
    """The form that holds whatever the states of the expression's discrete sites; the same one throughout."""
    found: Form | None = None
    total = 0
    for turn in probe.assignments(argument.ref):
        form, points = _numerical(probe, argument, block)
        total += points
        if form is None or (turn > 0 and form is not found):
            return None, total
        found = form
    return found, total


# What a program may say of values or data it was not written for.
_UNUSABLE = (RuntimeError, IndexError, ValueError, TypeError)


def _holds_for_other_data(probe: Probe, argument: Argument, block: Block, form: Form) -> bool:
    """Whether a form without proof is more than a coincidence of the data, as far as the program takes other data."""
    with probe.other_data():
        try:
            return _numerical_at_all_states(probe, argument, block)[0] is form
        except _UNUSABLE:
            return True


def _for_any_data(probe: Probe, ref: Any, find: Callable[[], _T]) -> Iterator[_T]:
    """`find()` at the program's data and at others, in all states of the expression's discrete sites."""
    for _ in probe.assignments(ref):
        yield find()
    with probe.other_data():
        for _ in probe.assignments(ref):
            with contextlib.suppress(*_UNUSABLE):
                yield find()


def _affine(probe: Probe, ref: Any, block: Block, a: Tensor, b: Tensor) -> bool:
    start, end = (probe.evaluate(ref, {block.name: point}) for point in (a, b))
    return all(
        close(probe.evaluate(ref, {block.name: (1 - t) * a + t * b}), (1 - t) * start + t * end) for t in _STEPS
    )


def _positive_form(probe: Probe, ref: Any, block: Block) -> Form | None:
    """c x (c / x for an InverseGamma): linear in x^p, and log-affine with degree p."""
    power = 1.0 if isinstance(block.family, Gamma) else -1.0
    for _ in range(3):
        a, b = probe.point(block), probe.point(block)
        f_a, f_b = (probe.evaluate(ref, {block.name: x}) for x in (a, b))
        if not bool((f_a > 0).all() and (f_b > 0).all()):
            return None
        for t in (0.37, 0.81):
            middle = ((1 - t) * a**power + t * b**power) ** power
            if not close(probe.evaluate(ref, {block.name: middle}), (1 - t) * f_a + t * f_b):
                return None
        for t in _STEPS[:2]:
            value = probe.evaluate(ref, {block.name: a ** (1 - t) * b**t})
            if not bool((value > 0).all()) or not close(value.log(), (1 - t) * f_a.log() + t * f_b.log()):
                return None
        for c in (1e-3, 1e3):
            if not close(probe.evaluate(ref, {block.name: c * a}), c**power * f_a):
                return None
    return Form.MONOMIAL


def _probability_form(probe: Probe, ref: Any, block: Block) -> Form | None:
    """p or 1 − p, elementwise: what commutes with squaring p, or does so up to complement."""
    forms = {Form.SELECTION, Form.COMPLEMENT}
    for _ in range(3):
        a = probe.point(block)
        value, squared = (probe.evaluate(ref, {block.name: x}) for x in (a, a**2))
        constant = probe.evaluate(ref, {block.name: torch.full_like(a, 0.3)})
        if not (close(squared, value**2) and close(constant, torch.full_like(constant, 0.3))):
            forms.discard(Form.SELECTION)
        if not (close(1 - squared, (1 - value) ** 2) and close(constant, torch.full_like(constant, 0.7))):
            forms.discard(Form.COMPLEMENT)
    return forms.pop() if len(forms) == 1 else None


def _simplex_form(probe: Probe, ref: Any, block: Block) -> Form | None:
    """Entries of the site, in rows that sum to one; the rows commute with squaring."""
    for _ in range(3):
        a = probe.point(block)
        value, squared = (probe.evaluate(ref, {block.name: x}) for x in (a, a**2))
        total = value.sum(-1)
        if not (close(total, torch.ones_like(total)) and close(squared, value**2)):
            return None
    return Form.MONOMIAL


def _matrix_form(probe: Probe, ref: Any, block: Block) -> Form | None:
    """A W Aᵀ: linear in W without a constant, and log|·| moves with log|W| alone."""
    for _ in range(3):
        a, b = probe.point(block), probe.point(block)
        f_a, f_b = (probe.evaluate(ref, {block.name: x}) for x in (a, b))
        if not close(probe.evaluate(ref, {block.name: 0.4 * a + 1.7 * b}), 0.4 * f_a + 1.7 * f_b):
            return None
        if not close(f_a, f_a.mT):
            return None
        d = a.shape[-1]
        same = b * ((torch.linalg.slogdet(a)[1] - torch.linalg.slogdet(b)[1]) / d).exp()[..., None, None]
        f_same = probe.evaluate(ref, {block.name: same})
        if not close(torch.linalg.slogdet(f_same)[1], torch.linalg.slogdet(f_a)[1]):
            return None
    return Form.MATRIX


def _scaled_matrix_form(probe: Probe, ref: Any, block: Block) -> Form | None:
    """Linear in τ without a constant, positive definite, log|·| affine in log τ."""
    for _ in range(3):
        a, b = probe.point(block), probe.point(block)
        f_a, f_b = (probe.evaluate(ref, {block.name: x}) for x in (a, b))
        if not close(probe.evaluate(ref, {block.name: 0.4 * a + 1.7 * b}), 0.4 * f_a + 1.7 * f_b):
            return None
        for t in _STEPS:
            value = probe.evaluate(ref, {block.name: a ** (1 - t) * b**t})
            expected = (1 - t) * torch.linalg.slogdet(f_a)[1] + t * torch.linalg.slogdet(f_b)[1]
            if not close(torch.linalg.slogdet(value)[1], expected):
                return None
    return Form.MATRIX


def is_jointly_affine(probe: Probe, ref: Any, block: Block) -> bool:
    """Whether an expression affine in each site of a block is so in all together (no products of two of them)."""
    return _affine(probe, ref, block, probe.point(block), probe.point(block))


def _mixed_dims(probe: Probe, argument: Argument, block: Block) -> tuple[int, ...]:
    """The dims of the block's variable that single outputs combine several indices of, in any state and for any data."""
    found = _for_any_data(probe, argument.ref, lambda: _mixed_dims_here(probe, argument, block))
    return tuple(sorted({dim for dims in found for dim in dims}))


def _mixed_dims_here(probe: Probe, argument: Argument, block: Block) -> tuple[int, ...]:
    """`_mixed_dims` at the present states (negative, counted from the right).

    Along the other dims every output sees one index, so that one tangent serves all of them.  Seen with a generic tangent r
    and weights s along one dim: (J r s²)(J r) = (J r s)² elementwise when each output has one index there.
    """
    shape = probe.leaf_shape(block)
    point = probe.point(block)
    base = probe.evaluate(argument.ref, {block.name: point})
    mixed = []
    for dim in range(-len(shape), 0):
        size = shape[dim]
        if size == 1:
            continue
        tangent = torch.randn(tuple(shape), generator=probe.generator, device="cpu", dtype=torch.float64)
        weights = torch.rand(size, generator=probe.generator, device="cpu", dtype=torch.float64) + 0.5
        weights = weights.reshape(size, *[1] * (-dim - 1))
        moved = [probe.evaluate(argument.ref, {block.name: point + tangent * weights**k}) - base for k in (0, 1, 2)]
        if argument.role is Vector:  # its entries are correlated with each other: they count as one output
            contraction = torch.rand(base.shape[-1], generator=probe.generator, device="cpu", dtype=torch.float64) + 0.5
            moved = [(change * contraction).sum(-1) for change in moved]
        if not close(moved[2] * moved[0], moved[1] ** 2):
            mixed.append(dim)
    return tuple(mixed)


def _products(probe: Probe, argument: Argument, blocks: Sequence[Block]) -> tuple[tuple[str, ...], ...]:
    """The sets of two or more Gaussian blocks that the argument multiplies with each other."""
    found: list[tuple[str, ...]] = []
    pairs = [(a, b) for i, a in enumerate(blocks) for b in blocks[i + 1 :]]
    for a, b in pairs:
        if _interacts(probe, argument.ref, (a, b)):
            found.append((a.name, b.name))
    if len(found) >= 3:
        names = sorted({name for pair in found for name in pair})
        triples = [(x, y, z) for i, x in enumerate(names) for j, y in enumerate(names[i + 1 :], i + 1) for z in names[j + 1 :]]
        by_name = {block.name: block for block in blocks}
        found += [t for t in triples if _interacts(probe, argument.ref, [by_name[name] for name in t])]
    return tuple(found)


def _interacts(probe: Probe, ref: Any, blocks: Sequence[Block]) -> bool:
    """Whether the mixed difference over the blocks is non-zero in some state, for some data."""
    return any(_for_any_data(probe, ref, lambda: _interacts_here(probe, ref, blocks)))


def _interacts_here(probe: Probe, ref: Any, blocks: Sequence[Block]) -> bool:
    low = {block.name: probe.point(block) for block in blocks}
    high = {block.name: probe.point(block) for block in blocks}
    total, size = torch.zeros((), device="cpu"), torch.zeros((), device="cpu")
    for corner in range(2 ** len(blocks)):
        bits = [(corner >> i) & 1 for i in range(len(blocks))]
        leaves = {block.name: (high if bit else low)[block.name] for block, bit in zip(blocks, bits, strict=True)}
        value = probe.evaluate(ref, leaves)
        sign = (-1) ** (len(blocks) - sum(bits))
        total, size = total + sign * value, size + value.abs()
    return bool((total.abs() > 1e-9 * size.max().clamp_min(1e-30)).any())
