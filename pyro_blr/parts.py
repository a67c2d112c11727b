"""What some sites' q is in a guide: families, and the way between λ and the guide's parameters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_blr.blocks import Block
from pyro_blr.families import LogNormal, Normal, pushforward_family
from pyro_blr.messages import Messages
from pyro_blr.parameters import Slot

__all__ = ["Part", "UnreadableGuide", "independent_gaussian"]


class UnreadableGuide(ValueError):
    """Why a guide denotes no product of exponential families with parameters of its own."""


class Part(ABC):
    """What some sites' q is in a guide: its families, and the way between λ and the guide's parameters."""

    sites: tuple[str, ...]

    @property
    @abstractmethod
    def slots(self) -> list[Slot]:
        """The parameters that hold λ."""

    @abstractmethod
    def options(self, name: str) -> dict[str, Any]:
        """`infer={"blr": ...}` of a site."""

    @abstractmethod
    def read(self, blocks: Mapping[str, Block]) -> dict[str, Tensor]:
        """Block -> λ (*full_shape, p) in float64."""

    @abstractmethod
    def write(self, blocks: Mapping[str, Block], naturals: Mapping[str, Tensor]) -> None:
        """Sets the parameters to what λ says."""

    @property
    def groups(self) -> list[tuple[str, ...]]:
        """Sites that q holds to be jointly Gaussian, with all elements of their plates."""
        return []

    def obstacle(
        self, blocks: Mapping[str, Block], messages: Messages, targets: Callable[[], Mapping[str, Tensor]]
    ) -> str:
        """Why the guide has no parameters for where the rule moves λ; empty where it has. `targets` are of exact blocks alone."""
        return ""

    @property
    def note(self) -> str:
        """What a user should know of it; empty where it is all that its families are."""
        return ""


def independent_gaussian(support: Any, event_shape: torch.Size) -> Any:
    """The family of independent Normals in the unconstrained space of a support."""
    inner = support
    while isinstance(inner, constraints.independent):
        inner = inner.base_constraint
    if inner in (constraints.real, constraints.real_vector):
        return Normal()
    if inner in (constraints.positive, constraints.nonnegative):
        return LogNormal()
    family = pushforward_family(support, event_shape, diagonal=True)
    if family is None:
        raise UnreadableGuide(f"no Gaussian family is known on the support {support}")
    return family
