"""Parameters of a guide as places that values are read from and written to, the parameter store's rules kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import constraints, transform_to

__all__ = ["Slot", "module_slot", "nudged", "remembered", "statement_slot"]


@dataclass(frozen=True)
class Slot:
    """One parameter: its constrained value, and the unconstrained leaf behind it that an optimiser would move."""

    name: str
    find: Callable[[], Tensor]  # the unconstrained tensor, where the guide itself would find it
    constraint: Any

    @property
    def leaf(self) -> Tensor:
        """The unconstrained tensor that the store or the module holds."""
        return self.find()

    @property
    def value(self) -> Tensor:
        """The constrained value in float64."""
        with torch.no_grad():
            return transform_to(self.constraint)(self.leaf.detach().double())

    def assign(self, target: Tensor) -> None:
        """Sets the constrained value; the leaf stays the same tensor, so optimisers and modules keep hold of it."""
        with torch.no_grad():
            leaf = self.leaf
            leaf.copy_(transform_to(self.constraint).inv(target.detach().double()).reshape(leaf.shape))


def module_slot(module: Any, path: str) -> Slot:
    """A parameter of a PyroModule by its attribute path; found in the module's context, which syncs it with the store."""
    *parents, name = path.split(".")
    owner = attrgetter(".".join(parents))(module) if parents else module
    constraint = vars(owner).get("_pyro_params", {}).get(name, (constraints.real, None))[0]

    def find() -> Tensor:
        with _context(module):
            return _leaf_of(attrgetter(path)(module))

    return Slot(path, find, constraint)


def statement_slot(name: str, node: Mapping[str, Any]) -> Slot:
    """A parameter that a `pyro.param` statement of a traced guide named."""
    store = pyro.get_param_store()
    constraint = node["kwargs"].get("constraint", constraints.real)
    if len(node["args"]) > 1 and isinstance(node["args"][1], constraints.Constraint):
        constraint = node["args"][1]
    held = _leaf_of(node["value"])

    def find() -> Tensor:
        return store._params.get(name, held)  # store[name] would constrain it first

    return Slot(name, find, constraint)


def _leaf_of(value: Any) -> Any:
    return value.unconstrained() if hasattr(value, "unconstrained") else value


@contextmanager
def _context(module: Any) -> Iterator[None]:
    with poutine.block(), module._pyro_context:
        yield


@torch.no_grad()
def nudged(slots: Iterable[Slot], seed: int) -> None:
    """Moves every parameter a little, each element by another amount."""
    generator = torch.Generator().manual_seed(seed)
    for slot in slots:
        leaf = slot.leaf
        noise = 0.05 + 0.1 * torch.rand(leaf.shape, generator=generator, device="cpu", dtype=torch.float64)
        leaf.add_(noise.to(leaf))


def remembered(slots: list[Slot]) -> Callable[[], None]:
    """What puts the parameters back as they are now, bit for bit."""
    held = [(slot.leaf, slot.leaf.detach().clone()) for slot in slots]

    def restore() -> None:
        with torch.no_grad():
            for leaf, value in held:
                leaf.copy_(value)

    return restore
