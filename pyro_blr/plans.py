"""How each factor is averaged under q, and what is said about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pyro_blr.graph import Factor
from pyro_blr.kinds import Form
from pyro_blr.likelihoods import Expectation, Likelihood

__all__ = ["PROVED", "Argument", "FactorPlan", "Verdict"]

PROVED = "exact (proved)"


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
