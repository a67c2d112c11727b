"""Guides that are linear in their own latents, `b ~ Normal(W a + c, s)`: one Gaussian over all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_blr.blocks import Block
from pyro_blr.families import MultivariateNormal, Normal
from pyro_blr.links import Argument
from pyro_blr.marginals import gaussian_moments
from pyro_blr.messages import Messages
from pyro_blr.parameters import Slot
from pyro_blr.parts import Part, UnreadableGuide

__all__ = ["Coefficient", "Conditional", "Conditionals"]

_OFF = 1e-4  # correlation, given its parents, of what the guide holds independent: ½ of its square is nats


class Coefficient(NamedTuple):
    """W of one parent: a parameter, its transpose, or a diagonal."""

    parent: str
    argument: Argument
    form: str

    def value(self) -> Tensor:
        found = self.argument.value
        return {"matrix": lambda: found, "transposed": lambda: found.mT, "diagonal": lambda: found.diag()}[self.form]()

    def assign(self, matrix: Tensor) -> None:
        target = matrix.mT if self.form == "transposed" else matrix.diagonal() if self.form == "diagonal" else matrix
        self.argument.assign(target)


@dataclass(frozen=True)
class Conditional:
    """z ~ N(Σ_j W_j z_j + c, S Sᵀ), every argument a parameter of its own."""

    site: str
    distribution_class: type
    intercept: Argument
    spread: tuple[Argument, ...]
    coefficients: tuple[Coefficient, ...]

    @property
    def arguments(self) -> list[Argument]:
        return [self.intercept, *self.spread, *(c.argument for c in self.coefficients)]

    def made(self, loc: Tensor, **spread: Tensor) -> Any:
        return self.distribution_class(loc, **spread, validate_args=False)

    def root(self) -> Tensor:
        """S, for the flat vector."""
        made = self.made(self.intercept.value, **{a.name: a.value for a in self.spread})
        return made.scale_tril if isinstance(made, dist.MultivariateNormal) else made.scale.flatten().diag()

    def assign(self, loc: Tensor, covariance: Tensor) -> None:
        self.intercept.assign(loc)
        if issubclass(self.distribution_class, dist.MultivariateNormal):
            made = self.made(loc, covariance_matrix=covariance)
        else:
            made = self.made(loc, scale=covariance.diagonal().sqrt())
        for argument in self.spread:
            argument.assign(getattr(made, argument.name))


class Conditionals(Part):
    """z = c + W z + S ε with W strictly lower triangular: a Gaussian of mean (1 − W)⁻¹ c and root (1 − W)⁻¹ S.

    Back from its moments, every row of W is a regression on the parents that the guide gives it. That is the same Gaussian only if
    what is left is independent; else the natural gradient leaves the guide's family, and `write` says so.
    """

    def __init__(self, conditionals: Sequence[Conditional]):
        self.conditionals = tuple(conditionals)
        self.sites = tuple(c.site for c in conditionals)

    @property
    def slots(self) -> list[Slot]:
        return [argument.slot for conditional in self.conditionals for argument in conditional.arguments]

    @property
    def groups(self) -> list[tuple[str, ...]]:
        return [self.sites]

    def options(self, name: str) -> dict[str, Any]:
        return {}

    def read(self, blocks: Mapping[str, Block]) -> dict[str, Tensor]:
        block = blocks["+".join(self.sites)]
        for conditional, member in zip(self.conditionals, block.members, strict=True):
            if not isinstance(member.family, (Normal, MultivariateNormal)):
                raise UnreadableGuide(f"{member.site.name} has bounds that its Normal in the guide does not know")
            if conditional.intercept.shape.numel() != member.stop - member.start:
                raise UnreadableGuide(f"{member.site.name} has other elements in the model than in the guide")
        loc, weights, root = self._structural(block)
        inverse = torch.linalg.inv(torch.eye(len(loc), dtype=loc.dtype, device=loc.device) - weights)
        mean, root = inverse @ loc, inverse @ root
        gaussian = dist.MultivariateNormal(mean, root @ root.mT, validate_args=False)
        return {block.name: block.family.from_distribution(gaussian)}

    def write(self, blocks: Mapping[str, Block], naturals: Mapping[str, Tensor]) -> None:
        block = blocks["+".join(self.sites)]
        if block.name not in naturals:
            return
        mean, covariance = gaussian_moments(block, naturals[block.name])
        weights, left = self._regressed(block, mean, covariance)
        rows = _rows(block)
        loc = mean - weights @ mean
        for conditional in self.conditionals:
            mine = rows[conditional.site]
            conditional.assign(loc[mine], left[mine, mine])
            for coefficient in conditional.coefficients:
                coefficient.assign(weights[mine, rows[coefficient.parent]])

    def obstacle(
        self, blocks: Mapping[str, Block], messages: Messages, targets: Callable[[], Mapping[str, Tensor]]
    ) -> str:
        block = blocks["+".join(self.sites)]
        parents = self._parents(block)
        if bool((parents | ~torch.ones_like(parents).tril(-1)).all()):
            return ""  # parameters for every Gaussian
        target = targets().get(block.name)
        if target is None:
            return (
                f"{block.name} is not conjugate, and a statement of it in the guide does not follow all those before it"
            )
        try:
            self._regressed(block, *gaussian_moments(block, target))
        except UnreadableGuide as error:
            return str(error)
        return ""

    def _structural(self, block: Block) -> tuple[Tensor, Tensor, Tensor]:
        """(c, W, S)."""
        rows = _rows(block)
        loc = torch.cat([conditional.intercept.value.flatten() for conditional in self.conditionals])
        weights = loc.new_zeros(len(loc), len(loc))
        root = torch.zeros_like(weights)
        for conditional in self.conditionals:
            mine = rows[conditional.site]
            root[mine, mine] = conditional.root()
            for coefficient in conditional.coefficients:
                weights[mine, rows[coefficient.parent]] = coefficient.value()
        return loc, weights, root

    def _regressed(self, block: Block, mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
        """(W, covariance of what W leaves); raises where the guide has no parameters for this Gaussian."""
        parents = self._parents(block)
        weights = torch.zeros_like(covariance)
        for row, mask in enumerate(parents):
            on = mask.nonzero().flatten()
            if len(on):
                weights[row, on] = torch.linalg.solve(covariance[on][:, on], covariance[on, row])
        apart = torch.eye(len(mean), dtype=mean.dtype, device=mean.device) - weights
        left = apart @ covariance @ apart.mT
        widths = left.diagonal().sqrt()
        correlation = left / (widths.unsqueeze(-1) * widths)
        for conditional in self.conditionals:  # what a statement's own covariance holds
            mine = _rows(block)[conditional.site]
            if issubclass(conditional.distribution_class, dist.MultivariateNormal):
                correlation[mine, mine] = 0.0
        off = float((correlation - correlation.diagonal().diag()).abs().max())
        if not off <= _OFF:
            raise UnreadableGuide(
                f"the posterior of {' and '.join(self.sites)} has correlations of {off:.2g} which the guide holds to be zero"
            )
        return weights, left

    def _parents(self, block: Block) -> Tensor:
        """Which elements each element's location is computed from, (D, D)."""
        rows = _rows(block)
        size = sum(member.stop - member.start for member in block.members)
        found = torch.zeros(size, size, dtype=torch.bool)
        for conditional in self.conditionals:
            for coefficient in conditional.coefficients:
                mine, theirs = rows[conditional.site], rows[coefficient.parent]
                shape = (mine.stop - mine.start, theirs.stop - theirs.start)
                found[mine, theirs] = torch.eye(*shape, dtype=torch.bool) if coefficient.form == "diagonal" else True
        return found


def _rows(block: Block) -> dict[str, slice]:
    return {member.site.name: slice(member.start, member.stop) for member in block.members}
