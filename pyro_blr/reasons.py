"""Why a factor has no closed form over a site, in words: found, expected, and where it stands in the program."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from pyro_blr.blocks import Block
from pyro_blr.families import TransformedNormal
from pyro_blr.graph import Factor, FactorGraph, Site
from pyro_blr.kinds import Kind
from pyro_blr.likelihoods import Constant, Linear, Matrix, Positive, Probability, Simplex, Vector
from pyro_blr.plans import Argument
from pyro_blr.running import unwrap
from pyro_blr.tape import Departure

__all__ = ["contradiction", "family_name", "in_two_arguments", "misfit", "misaligned", "site_family", "unrecorded"]

_FORMS_IN_WORDS: Mapping[type, str] = {
    Linear: "affine in",
    Vector: "affine in",
    Positive: "proportional to",
    Probability: "equal (up to complement) to",
    Simplex: "equal to",
    Matrix: "proportional to",
    Constant: "free of",
}


def in_two_arguments(held: Mapping[str, Sequence[str]]) -> str:
    """Arguments, and the sites of one block that each holds."""
    first, *others = held.values()
    if all(sites == first for sites in others):
        return f"{' and '.join(first)} {'is' if len(first) == 1 else 'are'} in two arguments: {' and '.join(held)}"
    places = [f"{' and '.join(sites)} in {argument}" for argument, sites in held.items()]
    return f"one Gaussian has {', '.join(places[:-1])} and {places[-1]}"


def misfit(
    argument: Argument, block: Block, sites: frozenset[str], operation: str, source: str, cause: str = ""
) -> str:
    """An argument in which `sites` are that is not what its closed form needs; `cause` is what only its values show."""
    members = [member for member in block.members if member.site.name in sites]
    what = _FORMS_IN_WORDS.get(argument.role, argument.role.requirement)
    text = f"{argument.name} is not {what} {' and '.join(member.site.name for member in members)}"
    if operation or cause:
        text += ": " + ", ".join(part for part in (operation, cause) if part)
        return text + (f" ({source})" if source else "")
    pushed = [m.site for m in members if isinstance(m.family or block.family, TransformedNormal)]
    if len(members) == 1:
        return text + "".join(f", a {site_family(site)} site" for site in pushed)
    kinds = " and ".join(f"{site.name} is a {site_family(site)} site" for site in pushed)
    return f"{text}: {kinds}" if kinds else text


def contradiction(factor: Factor, argument: Argument, block: Block, structural: Kind, points: int) -> str:
    """Two judges that cannot both be right."""
    made = f", {structural.operation} ({structural.source})" if structural.operation else ""
    return (
        f"site {' and '.join(map(repr, block.site_names))} in factor {factor.name!r}: the expression of {argument.name} is "
        f"{structural.form.name.lower()} in it{made}, but its values at {points} points are not, nor can rounding or a constraint "
        "explain that; expected the two to agree. This is a bug of pyro_blr: please report the model. "
        f"Until it is mended, write {argument.name} with other operations"
    )


def unrecorded(factor: Factor, site: str, graph: FactorGraph, latents: Iterable[str]) -> str:
    """A factor whose recorded expressions are not the model's."""
    latents = frozenset(latents)
    found: list[Departure] = [d for d in graph.tape.departures if not d.latents or d.latents & latents]
    reason = graph.failure or "its expressions do not reproduce the model"
    if found:
        reason = f"{found[0].operation} ({found[0].source})"
    return f"{factor.name}: {site} leaves the program's tensors: {reason}"


def misaligned(factor: Factor, site: str, discrete: Iterable[str]) -> str:
    """A factor that all states of its discrete sites at once do not give."""
    names = " and ".join(discrete)
    text = (
        f"{factor.name}: the states of {names} cannot be tried all at once: elements of {names} meet in it (a sum, a roll), or an "
        "operation does not broadcast over a dim of states"
    )
    if site not in names.split(" and "):
        text += f"; so {site} is drawn with it"
    return text + (f" ({factor.source})" if factor.source else "")


def family_name(factor: Factor) -> str:
    """The distribution's class name, as the program wrote it."""
    if factor.constructed is None:
        return type(factor.distribution).__name__
    return factor.constructed.distribution_class.__name__


def site_family(site: Site) -> str:
    """The class name of a site's prior, below `to_event`, `expand` and masks."""
    return type(unwrap(site.distribution)[0]).__name__
