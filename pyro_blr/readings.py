"""Guides of a user's own read as exponential families: λ from their parameters, and their parameters from λ."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from pyro_blr.blocks import Block
from pyro_blr.families import Bernoulli, Categorical, LogNormal, TransformedNormal
from pyro_blr.graph import FactorGraph
from pyro_blr.groupings import Grouping
from pyro_blr.guides import AutoExponentialFamily
from pyro_blr.initial import diagonal_natural
from pyro_blr.marginals import gaussian_moments
from pyro_blr.messages import Messages
from pyro_blr.parameters import Slot, remembered
from pyro_blr.parts import Part, UnreadableGuide, independent_gaussian
from pyro_blr.summed import SummedOut

__all__ = ["JointGaussian", "MeanField", "ReadGuide", "States"]


class MeanField(Part):
    """Independent Normals in unconstrained space, one `(loc, scale)` a site (`AutoNormal`, `AutoDiagonalNormal`).

    `moments` gives a site's unconstrained means and standard deviations, `assign` sets them.
    """

    def __init__(
        self,
        sites: Sequence[str],
        slots: list[Slot],
        moments: Callable[[str], tuple[Tensor, Tensor]],
        assign: Callable[[str, Tensor, Tensor], None],
    ):
        self.sites, self._slots, self._moments, self._assign = tuple(sites), slots, moments, assign

    @property
    def slots(self) -> list[Slot]:
        return self._slots

    def options(self, name: str) -> dict[str, Any]:
        return {"family": independent_gaussian, "block": "elements"}

    def read(self, blocks: Mapping[str, Block]) -> dict[str, Tensor]:
        result = {}
        for name in self.sites:
            block = blocks[name]
            base = block.family.base if isinstance(block.family, TransformedNormal) else block.family
            shape = (*block.full_shape, *base.event_shape)
            mean, scale = (_as_shape(name, moment, shape) for moment in self._moments(name))
            if isinstance(base, LogNormal):
                result[name] = base.from_distribution(dist.LogNormal(mean, scale, validate_args=False))
            else:
                result[name] = diagonal_natural(base, mean, scale.square())
        return result

    def write(self, blocks: Mapping[str, Block], naturals: Mapping[str, Tensor]) -> None:
        for name in self.sites:
            if name in naturals:
                moments = blocks[name].family.moments(naturals[name])
                self._assign(name, moments["mean"], moments["variance"].sqrt())


def _as_shape(name: str, tensor: Tensor, shape: Sequence[int]) -> Tensor:
    if tensor.numel() != torch.Size(shape).numel():
        raise UnreadableGuide(
            f"{name} has {torch.Size(shape).numel()} elements in all, and the guide parameters for {tensor.numel()} of them"
        )
    return tensor.reshape(tuple(shape))


class JointGaussian(Part):
    """One Gaussian over the unconstrained values of several sites, flattened one after the other (`AutoMultivariateNormal`).

    `moments` gives its mean (D) and covariance (D, D); `assign` sets mean and Cholesky factor.
    """

    def __init__(
        self,
        sites: Sequence[str],
        slots: list[Slot],
        moments: Callable[[], tuple[Tensor, Tensor]],
        assign: Callable[[Tensor, Tensor], None],
    ):
        self.sites, self._slots, self._moments, self._assign = tuple(sites), slots, moments, assign

    @property
    def slots(self) -> list[Slot]:
        return self._slots

    @property
    def groups(self) -> list[tuple[str, ...]]:
        return [self.sites]

    def options(self, name: str) -> dict[str, Any]:
        return {}

    def read(self, blocks: Mapping[str, Block]) -> dict[str, Tensor]:
        block = self._block(blocks)
        gaussian = dist.MultivariateNormal(*self._moments(), validate_args=False)
        return {block.name: block.family.from_distribution(gaussian)}

    def write(self, blocks: Mapping[str, Block], naturals: Mapping[str, Tensor]) -> None:
        block = self._block(blocks)
        if block.name in naturals:
            mean, covariance = gaussian_moments(block, naturals[block.name])
            self._assign(mean, torch.linalg.cholesky(covariance))

    def _block(self, blocks: Mapping[str, Block]) -> Block:
        block = blocks["+".join(self.sites)]
        if any(plate.subsample_size != plate.size for site in block.sites for plate in site.plates):
            raise UnreadableGuide(f"{block.name} is in a subsampled plate, for all of which it has no parameters")
        return block


class States(Part):
    """Probabilities of each state, one parameter a site (`AutoDiscreteParallel`)."""

    def __init__(self, sites: Mapping[str, Slot]):
        self.sites, self._slots = tuple(sites), dict(sites)

    @property
    def slots(self) -> list[Slot]:
        return list(self._slots.values())

    def options(self, name: str) -> dict[str, Any]:
        return {}

    def read(self, blocks: Mapping[str, Block]) -> dict[str, Tensor]:
        result = {}
        for name, slot in self._slots.items():
            block, probs = blocks[name], slot.value
            one_hot = isinstance(block.family, Categorical) and block.family.one_hot
            made = dist.OneHotCategorical(probs) if one_hot else dist.Categorical(probs)
            if isinstance(block.family, Bernoulli):
                made = dist.Bernoulli(probs)
            if made.batch_shape != block.full_shape:
                raise UnreadableGuide(f"{name} is in a subsampled plate: the guide has no parameters for all of it")
            result[name] = block.family.from_distribution(made)
        return result

    def write(self, blocks: Mapping[str, Block], naturals: Mapping[str, Tensor]) -> None:
        for name, slot in self._slots.items():
            if name in naturals:
                slot.assign(blocks[name].family.to_distribution(naturals[name]).probs)


class ReadGuide(AutoExponentialFamily):
    """q of a guide that was read: λ lives in its parameters, and in float64 here while nobody else moves them."""

    def __init__(self, model: Any, parts: Sequence[Part], title: str) -> None:
        part_of = {name: part for part in parts for name in part.sites}

        def options(msg: Any) -> dict[str, Any]:
            infer = dict(msg["infer"])
            if msg["name"] in part_of and not msg["is_observed"]:
                infer["blr"] = {**infer.get("blr", {}), **part_of[msg["name"]].options(msg["name"])}
            return infer

        groups = tuple(group for part in parts for group in part.groups)
        flat = frozenset(name for group in groups for name in group)
        super().__init__(poutine.infer_config(model, options), "sites")  # type: ignore[arg-type]
        if groups:
            self.factorisation = Grouping(groups, flat)
        self.read_model, self._parts, self.title, self._writes = model, tuple(parts), title, True
        self._seen: list[Tensor] = []

    @property
    def naturals(self) -> dict[str, Tensor]:
        """Block -> λ; setting it sets the parameters of the guide."""
        held: dict[str, Tensor] = self.__dict__["_held"]
        return held

    @naturals.setter
    def naturals(self, naturals: dict[str, Tensor]) -> None:
        before = self.__dict__.get("_held", {})
        self._held = naturals
        if not self.__dict__.get("_writes", False):
            return
        changed = {name: x for name, x in naturals.items() if name not in before or not _same(before[name], x)}
        if not changed:
            return
        for part in self._parts:
            part.write(self.blocks, changed)
        self._seen = [slot.leaf.detach().clone() for slot in self._slots]

    @property
    def _slots(self) -> list[Slot]:
        return [slot for part in self._parts for slot in part.slots]

    def setup(self, graph: FactorGraph) -> None:
        """Blocks from a captured run, λ from the guide's parameters unless it is known and they did not move."""
        unread = sorted(set(graph.sites) - {name for part in self._parts for name in part.sites})
        if unread:
            raise UnreadableGuide(
                f"the guide has no q for {', '.join(unread)}, over which loss sums or samples in the model itself"
            )
        held, self._held, self._writes = self._held, {}, False
        try:
            super().setup(graph)
        finally:
            self._writes = True
        self._held = held if held and not self._moved() else self._read()

    def check(self, messages: Messages, targets: Callable[[], Mapping[str, Tensor]]) -> None:
        """Raises UnreadableGuide where the guide cannot follow the rule."""
        if isinstance(self.read_model, SummedOut) and messages.graph.failure is not None:
            raise UnreadableGuide(
                f"{', '.join(sorted(self.read_model.states))} are left to loss, whose sum cannot be recorded ({messages.graph.failure})"
            )
        for obstacle in filter(None, (part.obstacle(self.blocks, messages, targets) for part in self._parts)):
            raise UnreadableGuide(obstacle)

    def _read(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for part in self._parts:
            found.update(part.read(self.blocks))
        self._seen = [slot.leaf.detach().clone() for slot in self._slots]
        return {name: found[name].double() for name in self.blocks}

    def _moved(self) -> bool:
        return any(not torch.equal(slot.leaf, seen) for slot, seen in zip(self._slots, self._seen, strict=True))

    def notes(self) -> list[str]:
        text = f"the guide, {self.title}, is read as these families: natural gradients; its parameters hold the result"
        summed = self.read_model.note if isinstance(self.read_model, SummedOut) else ""
        more = [summed, *(part.note for part in self._parts)]
        return [text, *filter(None, more)]

    def refresh(self) -> bool:
        """Reads λ again if somebody else moved the parameters (a loaded store, a training loop between steps)."""
        if not self._held or not self.blocks or not self._moved():
            return False
        self._held = self._read()
        return True

    def saved(self) -> Callable[[], None]:
        """What puts λ and the parameters back as they are now."""
        held, blocks, seen, back = self._held, self.blocks, self._seen, remembered(self._slots)

        def restore() -> None:
            self._held, self.blocks, self._seen = held, blocks, seen
            back()

        return restore


def _same(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.shape == other.shape and torch.equal(one, other.to(one)))
