"""Pyro's autoguides, each as the families it denotes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from pyro import poutine
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoDiscreteParallel,
    AutoGaussian,
    AutoGuide,
    AutoGuideList,
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalizingFlow,
    AutoStructured,
)
from torch import Tensor

from pyro_blr.coefficients import read_conditionals
from pyro_blr.curved import survey_curved
from pyro_blr.parameters import Slot, module_slot
from pyro_blr.parts import Part, UnreadableGuide
from pyro_blr.readings import JointGaussian, MeanField, ReadGuide, States
from pyro_blr.running import isolated_random_state
from pyro_blr.statements import Statements, survey_statements
from pyro_blr.summed import marginal_of

__all__ = ["read_guide", "survey"]


def read_guide(model: Callable, guide: Any, args: tuple, kwargs: Mapping[str, Any], loss: Any = None) -> ReadGuide:
    """The families that a guide denotes, tied to its parameters; raises UnreadableGuide where it denotes none. Its model is without
    the states that `loss` sums over.

    An autoguide that has not seen its model is set up here, as its first call does.
    """
    if isinstance(guide, AutoGuide) and type(guide).forward is not AutoGuide.forward and guide.prototype_trace is None:
        with poutine.block():
            guide(*args, **kwargs)
    parts = parts_of(guide, args, kwargs)
    model = marginal_of(model, guide, loss, args, kwargs)
    return ReadGuide(model, parts, getattr(guide, "__name__", type(guide).__name__))


def parts_of(guide: Any, args: tuple, kwargs: Mapping[str, Any]) -> list[Part]:
    """A guide as parts; a list of guides as those of each."""
    if type(guide) is AutoGuideList:
        return [part for member in guide for part in _named(member, args, kwargs)]
    reader = _READERS.get(type(guide))
    if reader is not None:
        return reader(guide)
    for kind, reason in _NO_FAMILY.items():
        if isinstance(guide, kind):
            raise UnreadableGuide(reason)
    parts, reasons = _by_statement(guide, args, kwargs)
    if reasons:
        raise UnreadableGuide(next(iter(reasons.values())))
    return parts


def _by_statement(
    guide: Any, args: tuple, kwargs: Mapping[str, Any], joint: bool = True, curved: bool = True
) -> tuple[list[Part], dict[str, str]]:
    """The parts of a guide that is a program, and for each of its other sites why it is none."""
    with isolated_random_state(0), poutine.block():
        statements, reasons = survey_statements(guide, args, kwargs)
        curves = survey_curved(guide, args, kwargs, reasons) if curved and reasons else []
        for curve in curves:
            del reasons[curve.statement.site]
        groups = []
        if joint and reasons:
            with contextlib.suppress(Exception):  # the guide's own, at values that it does not expect of its latents
                groups = read_conditionals(guide, args, kwargs)
    taken = {name for part in groups for name in part.sites}
    alone = [Statements([statement]) for statement in statements if statement.site not in taken]
    return [*alone, *curves, *groups], {name: reason for name, reason in reasons.items() if name not in taken}


class Survey(NamedTuple):
    """What a guide is site by site."""

    parts: list[Part]  # that denote families
    reasons: dict[str, str]  # of every other site
    auxiliary: frozenset[str]  # statements that are the parts' own, and no site of the model


def survey(guide: Any, args: tuple, kwargs: Mapping[str, Any], joint: bool = True, curved: bool = True) -> Survey:
    """The parts of a guide that denote families, and for each of its other sites why it does not.

    `joint` says whether sites that are linear in each other may be one Gaussian, `curved` whether sites need not fill their family.
    """
    if type(guide) is AutoGuideList:
        found = [survey(member, args, kwargs, joint, curved) for member in guide]
        reasons = {name: reason for each in found for name, reason in each.reasons.items()}
        return Survey(
            [p for each in found for p in each.parts], reasons, frozenset().union(*(f.auxiliary for f in found))
        )
    program: Any = guide
    if not isinstance(guide, (*_READERS, *_NO_FAMILY)):
        return Survey(*_by_statement(guide, args, kwargs, joint, curved), frozenset())
    try:
        parts = parts_of(guide, args, kwargs)
    except UnreadableGuide as error:
        return Survey([], dict.fromkeys(_sites(guide), str(error)), frozenset())
    with isolated_random_state(0), poutine.block():
        nodes: Mapping[str, Any] = poutine.trace(program).get_trace(*args, **kwargs).nodes
    marked = {name for name, node in nodes.items() if node["type"] == "sample" and node["infer"].get("is_auxiliary")}
    return Survey(parts, {}, frozenset(marked))


def _named(member: Any, args: tuple, kwargs: Mapping[str, Any]) -> list[Part]:
    try:
        return parts_of(member, args, kwargs)
    except UnreadableGuide as error:
        raise UnreadableGuide(f"its part {type(member).__name__}: {error}") from None


_NO_FAMILY = {
    AutoDelta: "it is a point, which has no natural parameters",
    AutoLaplaceApproximation: "it is a point, which has no natural parameters",
    AutoGaussian: "its precision is sparse where sites are independent given others, which is no block here",
    AutoLowRankMultivariateNormal: "a covariance of low rank plus diagonal is no exponential family: λ moves off it",
    AutoIAFNormal: "a normalising flow is no exponential family",
    AutoNormalizingFlow: "a normalising flow is no exponential family",
}


def _sites(guide: Any) -> list[str]:
    return [name for name, _ in guide.prototype_trace.iter_stochastic_nodes()]


def _auto_normal(guide: AutoNormal) -> list[Part]:
    return [
        _independent(name, module_slot(guide, f"locs.{name}"), module_slot(guide, f"scales.{name}"))
        for name in _sites(guide)
    ]


def _auto_diagonal(guide: AutoDiagonalNormal) -> list[Part]:
    loc, scale = module_slot(guide, "loc"), module_slot(guide, "scale")
    rows, start = {}, 0
    for name in _sites(guide):
        size = guide._unconstrained_shapes[name].numel()
        rows[name] = slice(start, start + size)
        start += size

    def assign(name: str, mean: Tensor, spread: Tensor) -> None:
        for slot, part in ((loc, mean), (scale, spread)):
            whole = slot.value
            whole[rows[name]] = part.flatten()
            slot.assign(whole)

    return [MeanField(list(rows), [loc, scale], lambda name: (loc.value[rows[name]], scale.value[rows[name]]), assign)]


def _auto_multivariate(guide: AutoMultivariateNormal) -> list[Part]:
    return [_joint(_sites(guide), *(module_slot(guide, name) for name in ("loc", "scale", "scale_tril")))]


def _joint(sites: list[str], loc: Slot, scale: Slot, tril: Slot) -> Part:
    """N(loc, L Lᵀ), L = diag(scale) · scale_tril."""

    def moments() -> tuple[Tensor, Tensor]:
        root = scale.value.unsqueeze(-1) * tril.value
        return loc.value, root @ root.mT

    def assign(mean: Tensor, root: Tensor) -> None:
        diagonal = root.diagonal()
        loc.assign(mean)
        scale.assign(diagonal)
        tril.assign(root / diagonal.unsqueeze(-1))

    return JointGaussian(sites, [loc, scale, tril], moments, assign)


def _auto_structured(guide: AutoStructured) -> list[Part]:
    """Sites independent of each other; a dependency makes one Gaussian of some shape of its own, which is no block here."""
    conditionals: Any = guide.conditionals  # dictionaries, once the guide is set up
    dependencies: Any = guide.dependencies
    parts: list[Part] = []
    for name, kind in conditionals.items():
        if dependencies.get(name):
            raise UnreadableGuide(f"{name} depends on {', '.join(dependencies[name])} in it")
        if kind not in ("normal", "mvn"):
            raise UnreadableGuide(f"its conditional at {name} is {kind!r}, which has no natural parameters")
        loc, scale = module_slot(guide, f"locs.{name}"), module_slot(guide, f"scales.{name}")
        if kind == "mvn":
            parts.append(_joint([name], loc, scale, module_slot(guide, f"scale_trils.{name}")))
        else:
            parts.append(_independent(name, loc, scale))
    return parts


def _independent(name: str, loc: Slot, scale: Slot) -> Part:
    def assign(_: str, mean: Tensor, spread: Tensor) -> None:
        loc.assign(mean)
        scale.assign(spread)

    return MeanField([name], [loc, scale], lambda _: (loc.value, scale.value), assign)


def _auto_discrete(guide: AutoDiscreteParallel) -> list[Part]:
    return [States({site["name"]: module_slot(guide, f"{site['name']}_probs") for site, *_ in guide._discrete_sites})]


_READERS: dict[type, Callable[[Any], list[Part]]] = {
    AutoNormal: _auto_normal,
    AutoDiagonalNormal: _auto_diagonal,
    AutoMultivariateNormal: _auto_multivariate,
    AutoDiscreteParallel: _auto_discrete,
    AutoStructured: _auto_structured,
}
