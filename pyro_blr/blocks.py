"""Blocks: the factors q_i of the variational distribution q(z) = Π_i q_i(z_i), and what each says about the model's sites."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_blr.families import (
    Bernoulli,
    Categorical,
    ExponentialFamily,
    LogNormal,
    MultivariateNormal,
    Normal,
    Pattern,
    SparseNormal,
    TransformedNormal,
    family_of,
    pushforward_family,
)
from pyro_blr.graph import FactorGraph, Plate, Site
from pyro_blr.members import Member
from pyro_blr.options import copies_of, options_of
from pyro_blr.running import unwrap

__all__ = ["Block", "build_blocks", "in_same_plates", "is_gaussian"]


@dataclass(frozen=True)
class Block:
    """q_i: an exponential family over one site, or one Gaussian over several.

    λ has shape (*full_shape, p): the plates in full size, then `elements` dims of the site's event that the family treats one by
    one.  A Gaussian over a whole event, or over several sites, is a `MultivariateNormal` over the flattened event.
    """

    name: str
    family: ExponentialFamily
    members: tuple[Member, ...]
    plates: tuple[Plate, ...]
    batch_shape: torch.Size
    elements: int = 0
    states: Tensor | None = field(default=None, compare=False)
    stacks: tuple[Member, ...] = field(default=(), compare=False)  # views of several like members at once

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(member.site for member in self.members)

    @property
    def site_names(self) -> tuple[str, ...]:
        return tuple(member.site.name for member in self.members)

    @property
    def views(self) -> tuple[Member, ...]:
        """The members, and stacks of them."""
        return (*self.members, *self.stacks)

    @property
    def is_joint(self) -> bool:
        """Whether the block's variable holds the unconstrained values of its members one after the other."""
        return self.members[0].family is not None

    @property
    def is_discrete(self) -> bool:
        return self.family.is_discrete

    @property
    def full_shape(self) -> torch.Size:
        """Batch shape with every subsampled plate at its full size."""
        shape = list(self.batch_shape)
        for plate in self.plates:
            shape[plate.dim - self.elements] = plate.size
        return torch.Size(shape)

    @property
    def dtype(self) -> torch.dtype:
        dtype = self.members[0].site.dtype
        if dtype.is_floating_point:
            return dtype
        return torch.get_default_dtype()

    @property
    def device(self) -> torch.device:
        return self.members[0].site.device

    @property
    def scale(self) -> float:
        return self.members[0].site.scale

    @property
    def copies(self) -> Tensor | None:
        """How many exchangeable copies each element stands for, `infer={"blr": {"copies": counts}}`: a part of s_i beside the plates'.

        A token type that occurs n times in a document is one statement under `poutine.scale(scale=n)`, of n copies.
        """
        copies = None if self.is_joint else copies_of(self.members[0].site)
        return None if copies is None else copies.reshape(copies.shape + (1,) * self.elements).expand(self.batch_shape)

    @property
    def within(self) -> Any:
        """(λ̂, λ) ↦ the nearest λ that a guide's own parameters give, where they need not fill the family; else None."""
        return None if self.is_joint else options_of(self.members[0].site).get("within")

    @property
    def num_directions(self) -> int:
        """Length of one element's own variable."""
        family = self.family.base if isinstance(self.family, TransformedNormal) else self.family
        return max(family.event_shape.numel(), 1)

    @property
    def num_states(self) -> int:
        assert self.states is not None
        return self.states.shape[0]

    def values(self, leaf: Tensor, wanted: Collection[str] | None = None) -> dict[str, Tensor]:
        """The sites' values at a value of the block's own variable; shape (*batch, *event) -> the model's shapes.

        `wanted`: the sites that are asked for, where it is not all of them; a loop of T statements has T members.
        """
        if not self.is_joint:
            site = self.members[0].site
            if isinstance(self.family, LogNormal):
                leaf = leaf.exp()
            elif isinstance(self.family, TransformedNormal):
                leaf = self.family.constrain(leaf)
            return {site.name: leaf if leaf.shape == site.shape else leaf.reshape(site.shape)}
        members = self.members if wanted is None else [m for m in self.views if m.site.name in wanted]
        return {m.site.name: m.constrain(leaf[..., m.start : m.stop], self.batch_shape) for m in members}

    def statistics(self, leaf: Tensor) -> Tensor:
        """T at values (*sample, *batch, *event) of the block's own variable."""
        if isinstance(self.family, LogNormal):
            return self.family.sufficient_statistics(leaf.exp())
        family = self.family.base if isinstance(self.family, TransformedNormal) else self.family
        return family.sufficient_statistics(leaf)

    def log_jacobian(self, leaf: Tensor) -> Tensor | None:
        """log |dx/du|, shape (*batch), where the block's variable is the unconstrained u; None where x itself is."""
        if isinstance(self.family, TransformedNormal):
            return self.family.log_abs_det_jacobian(leaf)
        if not self.is_joint:
            return None
        parts = [m.log_jacobian(leaf[..., m.start : m.stop], self.batch_shape) for m in self.members]
        found = [part for part in parts if part is not None]
        return sum(found[1:], found[0]) if found else None

    def select(self, natural: Tensor, subsamples: Mapping[str, Tensor]) -> Tensor:
        """λ of the elements that are in this run."""
        for plate in self.plates:
            if plate.name in subsamples and plate.subsample_size != plate.size:
                natural = natural.index_select(plate.dim - self.elements - 1, subsamples[plate.name].to(natural.device))
        return natural

    def scatter(self, natural: Tensor, selected: Tensor, subsamples: Mapping[str, Tensor]) -> Tensor:
        """The full λ with the elements of this run replaced; the inverse of `select`."""
        subsampled = [p for p in self.plates if p.name in subsamples and p.subsample_size != p.size]
        if not subsampled:
            return selected
        grids = torch.meshgrid(
            *(
                subsamples[plate.name].to(natural.device)
                if plate in subsampled
                else torch.arange(size, device=natural.device)
                for size, plate in zip(natural.shape[:-1], self._plate_of_dims(), strict=True)
            ),
            indexing="ij",
        )
        natural = natural.clone()
        natural[tuple(grids)] = selected
        return natural

    def _plate_of_dims(self) -> list[Plate | None]:
        rank = len(self.batch_shape)
        found: list[Plate | None] = [None] * rank
        for plate in self.plates:
            found[rank + plate.dim - self.elements] = plate
        return found


def is_gaussian(family: ExponentialFamily) -> bool:
    """Whether the family is a Gaussian over some variable: its own, its logarithm, or an unconstrained one."""
    return isinstance(family, (Normal, MultivariateNormal, SparseNormal, LogNormal, TransformedNormal))


def _is_real(support: Any) -> bool:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support in (constraints.real, constraints.real_vector) or isinstance(support, type(constraints.real))


def build_blocks(
    graph: FactorGraph,
    blocks: str | Sequence[Sequence[str]] = "sites",
    flat: Collection[str] = (),
    patterns: Mapping[str, Pattern] | None = None,
) -> dict[str, Block]:
    """How q factorises: `"sites"`, `"elements"`, or a list of groups of site names (sites in no group stand alone).

    The group of a site in `flat` keeps no plate as batch: elements of it are dependent in q.  `patterns`: block -> which of its
    entries are, where its precision is sparse.
    """
    if not isinstance(blocks, str) and any(isinstance(group, str) for group in blocks):
        raise ValueError(
            f"blocks={blocks!r}: found site names, expected groups of them; one group of all is [{list(blocks)!r}]"
        )
    groups = [tuple(group) for group in blocks] if not isinstance(blocks, str) else []
    if isinstance(blocks, str) and blocks not in ("sites", "elements"):
        raise ValueError(f'blocks={blocks!r}: expected "sites", "elements" or a list of groups of site names')
    _check_groups(groups, graph)
    grouped = {name: group for group in groups for name in group if len(group) > 1 or name in flat}
    result: dict[str, Block] = {}
    for name, site in graph.sites.items():
        if name in grouped:
            group = grouped[name]
            if group[0] == name or "+".join(group) not in result:
                keeps_plates = not any(member in flat for member in group)
                block = _joint_block([graph.sites[member] for member in group], keeps_plates)
                pattern = (patterns or {}).get(block.name)
                result[block.name] = block if pattern is None else replace(block, family=SparseNormal(pattern))
        else:
            elementwise = options_of(site).get("block", blocks) == "elements"
            result[name] = _site_block(site, elementwise)
    return result


def _check_groups(groups: Iterable[tuple[str, ...]], graph: FactorGraph) -> None:
    seen: set[str] = set()
    for group in groups:
        for name in group:
            if name not in graph.sites:
                raise ValueError(
                    f"blocks names {name!r}, which is no latent site of the model; it has {sorted(graph.sites)}"
                )
            if name in seen:
                raise ValueError(f"blocks names site {name!r} twice; each site belongs to one group")
            if len(group) > 1 and graph.sites[name].support.is_discrete:
                raise ValueError(
                    f"blocks groups {name!r}, which is discrete; only continuous sites form a joint Gaussian"
                )
            seen.add(name)


def _site_block(site: Site, elementwise: bool) -> Block:
    base, _, _ = unwrap(site.distribution)
    event_dim = site.distribution.event_dim
    event = site.shape[len(site.shape) - event_dim :]
    family = options_of(site).get("family")
    if callable(family):
        family = family(site.support, event)
    states = None
    if family is None:
        if site.support.is_discrete:
            family, states = _discrete_family(site, base)
        else:
            family = family_of(base)
        if family is None and _is_real(site.support):
            family = Normal()
        if family is None:
            family = pushforward_family(site.support, event, diagonal=elementwise)
        if family is None:
            raise ValueError(
                f"site {site.name!r}: found support {site.support}, expected one with a bijection from real vectors; "
                "no exponential family is known for it. Reparameterise the site, or give a guide of your own"
            )
    elements = event_dim - len(family.event_shape)
    if isinstance(family, Normal) and event_dim > 0 and not elementwise:
        family, elements = MultivariateNormal(event.numel()), 0
    elif isinstance(family, MultivariateNormal) and elementwise:
        family, elements = Normal(), event_dim
    if isinstance(family, TransformedNormal):
        elements = 0
    batch = site.batch_shape + event[:elements] if elements > 0 else site.batch_shape
    return Block(site.name, family, (Member(site, 0, event.numel()),), site.plates, torch.Size(batch), elements, states)


def _discrete_family(site: Site, base: Any) -> tuple[ExponentialFamily, Tensor]:
    if not base.has_enumerate_support:
        raise ValueError(
            f"site {site.name!r}: {type(base).__name__} is discrete with infinite support; found no exact sum over its states. "
            "Marginalise it in the model, give it a finite support, or pass its data if it is observed"
        )
    states = base.enumerate_support(expand=False)
    states = states.reshape(states.shape[0], *base.event_shape)
    if isinstance(base, torch.distributions.Bernoulli):
        return Bernoulli(), states
    one_hot = isinstance(base, torch.distributions.OneHotCategorical)
    return Categorical(states.shape[0], one_hot=one_hot), states


def in_same_plates(sites: Sequence[Site]) -> bool:
    """Whether all sites are in the same plates, and in no other batch dimensions."""
    batch, plates = sites[0].batch_shape, sites[0].plates
    dims = {plate.dim for plate in plates}
    return all(size == 1 or dim - len(batch) in dims for dim, size in enumerate(batch)) and all(
        site.batch_shape == batch and set(site.plates) == set(plates) for site in sites
    )


def _joint_block(sites: Sequence[Site], keeps_plates: bool = True) -> Block:
    """One Gaussian over the unconstrained values of several sites; plates stay a batch where all sites are in the same ones."""
    complete = keeps_plates and in_same_plates(sites)
    plates = sites[0].plates if complete else ()
    batch = sites[0].batch_shape if complete else torch.Size()
    members, start = [], 0
    for site in sites:
        if copies_of(site) is not None:
            raise ValueError(
                f"site {site.name!r}: found copies for a site of the group {[s.name for s in sites]}; leave it out of groups"
            )
        family = pushforward_family(site.support, site.shape[len(site.batch_shape) :])
        if family is None:
            raise ValueError(
                f"site {site.name!r}: {site.support} has no bijection from real vectors; leave it out of the group"
            )
        event = family.base.event_shape if isinstance(family, TransformedNormal) else family.event_shape
        size = torch.Size((*site.batch_shape[len(batch) :], *event)).numel()
        members.append(Member(site, start, start + size, family))
        start += size
    partial = any(plate.subsample_size != plate.size for site in sites for plate in site.plates)
    if not complete and partial or len({site.looped for site in sites}) > 1:
        raise ValueError(
            f"sites {[site.name for site in sites]} cannot form one block: they are in a subsampled plate that not all of them share"
        )
    return Block("+".join(site.name for site in sites), MultivariateNormal(start), tuple(members), plates, batch)
