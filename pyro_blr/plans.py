"""How each factor is averaged under q, and what is said about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pyro_blr.graph import Factor
from pyro_blr.kinds import Form
from pyro_blr.likelihoods import Expectation, Likelihood

__all__ = ["PROVED", "Argument", "Cut", "FactorPlan", "Predictor", "Verdict"]

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
class Predictor:
    """One number for each element of a factor's batch, affine in the variables of Gaussian blocks: what node `node` holds.

    `transform`: the node moves elements of a site about that is the image of its block's variable; the predictor is the variable.
    `entry`: the predictor is one entry of the node's last dim, and the other predictor the other.
    `width`: the node's last dim holds so many numbers for each element, all of them predictors.
    """

    node: int
    argument: Argument
    transform: Any = None
    entry: int | None = None
    width: int | None = None


@dataclass(frozen=True)
class Cut:
    """The predictors through which alone a factor sees the Gaussian blocks, elementwise: log f(predictors).

    `joint`: the sum of two predictors, which tells their covariance.  `log_prob`: the recorded log density, None where the
    distribution's arguments say all; `start` is where on the tape its record begins.  `by_rows`: elements can be evaluated
    apart, by number.
    """

    predictors: tuple[Predictor, ...]
    joint: Argument | None = None
    log_prob: Any = None
    start: int = 0
    by_rows: bool = False

    @property
    def numbers(self) -> int:
        """How many numbers of an element are predictors."""
        return sum(predictor.width or 1 for predictor in self.predictors)

    @property
    def is_wide(self) -> bool:
        """Whether integrals over them need random points."""
        return self.numbers > 2 or any(predictor.width is not None for predictor in self.predictors)


@dataclass(frozen=True)
class FactorPlan:
    """How E_q[log f] is computed: over `enumerated` blocks by summing, over `analytic` ones in closed form, over `integrated`
    ones by quadrature over the predictors of `cut`, over `sampled` ones by drawing."""

    factor: Factor
    likelihood: Likelihood | None
    arguments: tuple[Argument, ...]
    enumerated: tuple[str, ...]
    analytic: tuple[str, ...]
    sampled: tuple[str, ...]
    verdicts: tuple[Verdict, ...]
    replayed: bool = False
    integrated: tuple[str, ...] = ()
    cut: Cut | None = None

    @property
    def exact(self) -> bool:
        """Whether the expectation is in closed form."""
        return not self.sampled and not self.integrated

    @property
    def deterministic(self) -> bool:
        """Whether no draws are needed: in closed form, or by quadrature."""
        return not self.sampled

    @property
    def all_arguments(self) -> tuple[Argument, ...]:
        """The canonical arguments, and the predictors where there is a cut."""
        return (*self.arguments, *(predictor.argument for predictor in (self.cut.predictors if self.cut else ())))

    @property
    def blocks(self) -> tuple[str, ...]:
        return (*self.enumerated, *self.analytic, *self.integrated, *self.sampled)
