"""How a factor couples two sites: through a location, or as a value and its scale."""

from __future__ import annotations

from torch.distributions import constraints

from pyro_blr.graph import FactorGraph
from pyro_blr.likelihoods import Linear, Vector
from pyro_blr.plans import FactorPlan

__all__ = ["across_scales", "different_precisions", "in_location"]

_SCALES = (  # constraints of arguments that say how wide a distribution is
    constraints.positive,
    constraints.nonnegative,
    constraints.positive_definite,
    constraints.lower_cholesky,
)


def in_location(graph: FactorGraph, plan: FactorPlan, drawn: str) -> bool:
    """Whether a site without a closed form is part of a location, and so correlated with the others there.

    A scale is not, if data are observed: E ∂² log N(y | m, s) / ∂m ∂s = 0; and the others keep their closed form given it.
    """
    return any(drawn in graph.tape.latents_of(a.ref) for a in plan.arguments if a.role in (Linear, Vector))


def across_scales(graph: FactorGraph, plan: FactorPlan) -> set[frozenset[str]]:
    """Pairs of a site in a scale and one in the value or another argument.

    Where a discrete site chooses a location for each datum, a scale that follows at once settles on the first choice.
    """
    made, latents_of = plan.factor.constructed, graph.tape.latents_of
    scales: set[str] = set()
    others = set(latents_of(plan.factor.value))
    constraint_of = getattr(made.distribution_class, "arg_constraints", {}) if made is not None else {}
    for name, ref in made.arguments.items() if made is not None else ():
        (scales if constraint_of.get(name) in _SCALES else others).update(latents_of(ref))
    return {frozenset((a, b)) for a in scales - others for b in others}


def different_precisions(graph: FactorGraph, a: str, b: str) -> str:
    """Why the dtypes of two sites keep them apart; empty where they do not."""
    one, other = graph.sites[a], graph.sites[b]
    if one.dtype == other.dtype:
        return ""
    said = " and ".join(f"{site.name} {str(site.dtype).removeprefix('torch.')}" for site in (one, other))
    return f"{said} belong together, and are kept apart by their dtype: give both priors arguments of one dtype"
