"""Which parameter of a guide an argument is: itself, or a one-to-one link of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_blr.parameters import Slot

__all__ = ["Argument", "Rows", "find_argument", "shared_parameters"]


class Link(NamedTuple):
    """A one-to-one map from a parameter to an argument, and its inverse; a vector's takes the last dim whole."""

    name: str
    to: Callable[[Tensor], Tensor]
    back: Callable[[Tensor], Tensor]
    vector: bool = False


LINKS = (
    Link("itself", lambda x: x, lambda y: y),
    Link("exp", torch.exp, torch.log),
    Link("softplus", torch.nn.functional.softplus, lambda y: y + torch.log(-torch.expm1(-y))),
    Link("square", torch.square, torch.sqrt),
    Link("exp(·/2)", lambda x: (0.5 * x).exp(), lambda y: 2 * y.log()),
    Link("sqrt", torch.sqrt, torch.square),
    Link("reciprocal", torch.reciprocal, torch.reciprocal),
    Link("sigmoid", torch.sigmoid, torch.logit),
    Link("normalised", lambda x: x / x.sum(-1, keepdim=True), lambda y: y, True),
    Link("softmax", lambda x: x.softmax(-1), torch.log, True),
    Link("log_softmax", lambda x: x.log_softmax(-1), lambda y: y, True),
)


_MOST = 10**6  # comparisons in search of elements


class Rows(NamedTuple):
    """The elements of a plate that one run of the guide drew."""

    size: int
    indices: Tensor


@dataclass(frozen=True)
class Argument:
    """One argument of a guide's distribution: which parameter it is, or which elements of one, and through which link."""

    name: str
    slot: Slot
    link: Link
    shape: torch.Size
    picks: Tensor | None = None  # places of its elements in the flat parameter; None where it is all of it

    @property
    def value(self) -> Tensor:
        whole = self.link.to(self.slot.value)
        return (whole if self.picks is None else whole.flatten()[self.picks]).reshape(self.shape)

    def assign(self, target: Tensor) -> None:
        value = self.link.back(target.detach().double())
        if self.picks is not None:
            whole = self.slot.value
            whole.view(-1)[self.picks] = value.expand(self.shape).flatten().to(whole)
            value = whole
        self.slot.assign(value)

    @property
    def places(self) -> frozenset[tuple[str, int]]:
        """The elements of parameters that it is made of."""
        count = self.slot.leaf.numel() if self.slot.constraint.event_dim == 0 else 1
        found = range(count) if self.picks is None else self.picks.tolist()
        return frozenset((self.slot.name, place) for place in found)


def find_argument(
    site: str,
    name: str,
    tensors: list[Tensor],
    slots: Mapping[str, Slot],
    values: Sequence[Mapping[str, Tensor]],
    rows: Sequence[Sequence[Rows]] | None = None,
) -> Argument | str:
    """The argument, seen as `tensors` where the parameters were `values`; or why it is no parameter.

    In plates of which a run drew some `rows` it may be those rows of a parameter, which then has all of them; and it may be
    elements of one. Both are for statements read by themselves: without `rows` an argument is all of a parameter.
    """
    for slot_name, slot in slots.items():
        for link in LINKS:
            matches = [_equal(link, seen[slot_name], tensor) for seen, tensor in zip(values, tensors, strict=True)]
            if all(matches):
                return Argument(name, slot, link, tensors[0].shape)
            if rows is not None and all(
                _equal(link, seen[slot_name], tensor, drawn)
                for seen, tensor, drawn in zip(values, tensors, rows, strict=True)
            ):
                return Argument(name, slot, link, values[0][slot_name].shape)
    for slot_name, slot in slots.items() if rows is not None else ():
        for link in LINKS:
            picks = _picks(link, slot, [seen[slot_name] for seen in values], tensors)
            if picks is not None:
                return Argument(name, slot, link, tensors[0].shape, picks)
    tied = [s for s in slots if any(_is_repeated(values[0][s], tensors[0], link) for link in LINKS[:3])]
    if tied:
        return f"elements of {site} share the parameter {tied[0]!r}"
    return f"{name} of its distribution at {site} is no parameter of its own"


def shared_parameters(arguments: Sequence[tuple[str, Argument]]) -> dict[str, str]:
    """Site -> why its parameters are not its own: other arguments are made of them too, or nothing is of some of their elements."""
    owners: dict[tuple[str, int], tuple[str, str]] = {}
    reasons: dict[str, str] = {}
    for site, argument in arguments:
        for place in argument.places:
            first, other = owners.setdefault(place, (site, argument.name))
            if first != site:
                reasons[first] = reasons[site] = f"{site} and {first} share the parameter {argument.slot.name!r}"
            elif other != argument.name:
                reasons[site] = f"{other} and {argument.name} of {site} share the parameter {argument.slot.name!r}"
    for site, argument in arguments:
        places = range(argument.slot.leaf.numel())
        if argument.picks is not None and any((argument.slot.name, place) not in owners for place in places):
            reasons.setdefault(site, f"elements of its parameter {argument.slot.name!r} at {site} belong to no family")
    return reasons


def _equal(link: Link, parameter: Tensor, argument: Tensor, drawn: Sequence[Rows] = ()) -> bool:
    parameter = _picked(parameter, argument.shape, drawn)
    if parameter.numel() != argument.numel() or not argument.is_floating_point():
        return False
    if link.vector and (argument.dim() == 0 or argument.shape[-1] < 2 or parameter.shape[-1:] != argument.shape[-1:]):
        return False
    tolerance = 1e-9 if argument.dtype == torch.float64 else 1e-4
    found = link.to(parameter).reshape(argument.shape)
    return bool(torch.allclose(found, argument.detach().double(), rtol=tolerance, atol=tolerance * 1e-2))


def _picks(link: Link, slot: Slot, parameters: Sequence[Tensor], arguments: Sequence[Tensor]) -> Tensor | None:
    """The places in a flat parameter, each taken once, of an argument that is some of its elements (`loc[0]`, `b[:, 1]`)."""
    size, count = parameters[0].numel(), arguments[0].numel()
    if link.vector or slot.constraint.event_dim > 0 or not 0 < count <= size or size * count > _MOST:
        return None
    match = torch.ones(count, size, dtype=torch.bool)
    for parameter, argument in zip(parameters, arguments, strict=True):
        if argument.numel() != count or not argument.is_floating_point():
            return None
        tolerance = 1e-9 if argument.dtype == torch.float64 else 1e-5
        found, wanted = link.to(parameter).flatten(), argument.detach().double().flatten()
        match &= torch.isclose(found.cpu(), wanted.cpu().unsqueeze(-1), rtol=tolerance, atol=tolerance * 1e-2)
    picks = match.long().argmax(-1)
    alone = bool((match.sum(-1) == 1).all()) and len(picks.unique()) == count
    return picks if alone else None


def _picked(parameter: Tensor, shape: torch.Size, drawn: Sequence[Rows]) -> Tensor:
    """The rows of a parameter that an argument of this shape can have; the parameter where it has no more."""
    if parameter.dim() != len(shape):
        return parameter
    for dim, (full, part) in enumerate(zip(parameter.shape, shape, strict=True)):
        for rows in drawn:
            if full == rows.size and part == len(rows.indices) and full != part:
                parameter = parameter.index_select(dim, rows.indices.to(parameter.device))
                break
    return parameter


def _is_repeated(parameter: Tensor, argument: Tensor, link: Link) -> bool:
    if parameter.numel() >= argument.numel():
        return False
    try:
        wide = link.to(parameter).expand(argument.shape)
    except RuntimeError:
        return False
    return bool(torch.allclose(wide, argument.detach().double(), rtol=1e-4))
