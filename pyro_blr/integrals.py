"""E_q[log f] of a factor by quadrature over its predictors, as a differentiable function of the moments of q."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_blr.arguments import Arguments, Moments
from pyro_blr.batches import BUDGET, batched
from pyro_blr.blocks import Block
from pyro_blr.cubature import random_integrals, random_values
from pyro_blr.cuts import RowsBelow, above, below, by_predictor, refs_of, transform_of, wide
from pyro_blr.families import LogNormal
from pyro_blr.graph import FactorGraph
from pyro_blr.maps import compiled
from pyro_blr.plans import Argument, FactorPlan
from pyro_blr.quadrature import TOLERANCE, Integrals, LogFactor, gaussian_expectation, gaussian_integrals
from pyro_blr.rows import RowMoments
from pyro_blr.shapes import broadcast_shape
from pyro_blr.tape import Ref

__all__ = ["FactorIntegral", "PredictorMoments", "log_jacobian"]

FEWEST_POINTS, MOST_POINTS = 64, 4096  # of a row, where its predictors are many
FRESH = 4  # times as many points judge how far these are off
ENOUGH = 0.03  # nats of error in a factor's sum over rows that are not worth more points
WORK = 200_000_000  # numbers at most in the second derivatives at all points of all rows


class PredictorMoments(Arguments):
    """Mean and variance of predictors under q, in float64 whatever the model's own precision."""

    def __init__(self, graph: FactorGraph, blocks: Mapping[str, Block], plan: FactorPlan):
        super().__init__(graph, blocks, plan)
        assert plan.cut is not None
        arguments = [predictor.argument for predictor in plan.cut.predictors]
        arguments += [plan.cut.joint] if plan.cut.joint is not None else []
        self._is_constant = {argument.name: self._has_constant_coefficients(argument) for argument in arguments}
        self._means: list[tuple[Block, Tensor]] = []

    def moments(self, argument: Argument, env: Mapping[str, Tensor], moments: Moments) -> tuple[Tensor, Tensor]:
        self.prepare(argument, moments)
        found: Any = self.expectation(argument, env, moments)
        return found.mean, found.variance

    def prepare(self, argument: Argument, moments: Moments) -> None:
        self._means = [(self.blocks[name], moments[name]["mean"].detach()) for name in argument.forms]

    def _has_constant_coefficients(self, argument: Argument) -> bool:
        parts = [Argument(argument.name, argument.role, ref, argument.forms) for ref in refs_of(argument.ref)]
        return all(super(PredictorMoments, self)._has_constant_coefficients(part) for part in parts)

    def _only_moves(self, argument: Argument) -> bool:
        return isinstance(argument.ref, Ref) and super()._only_moves(argument)

    def compiled(self, argument: Argument, env: Mapping[str, Tensor], moments: Moments) -> Any:
        if argument.name not in self._maps:
            function = self._leaf_function(argument, env)
            sites = frozenset().union(*map(self.graph.tape.latents_of, refs_of(argument.ref)))
            design_of = self._wide_design(argument)
            self._maps[argument.name] = compiled(
                argument, function, self._terms(argument, env), self.blocks, moments, sites, design_of
            )
        return self._maps[argument.name]

    def _wide_design(self, argument: Argument) -> Callable[[str], Tensor | None]:
        def design_of(site: str) -> Tensor | None:
            design = self.graph.tape.design_matrix(argument.ref, site)
            return None if design is None else design.double()

        return design_of

    def _at(self, argument: Argument, env: Mapping[str, Tensor], leaves: Mapping[str, Tensor] | None = None) -> Tensor:
        given = leaves or {}
        blocks = [(block, given.get(block.name, mean)) for block, mean in self._means]
        return above(self.graph.tape, argument.ref, env, blocks, self._wide_inputs(argument))

    def _wide_inputs(self, argument: Argument) -> list[Tensor]:
        """The tape's inputs with those of the argument in float64."""
        used = {id(x) for x in self.graph.tape.inputs_of(refs_of(argument.ref))}
        return [x.double() if id(x) in used and x.is_floating_point() else x for x in self.graph.tape.inputs]


class FactorIntegral:
    """E_q[log f] elementwise, f seen through the predictors of its plan's cut."""

    def __init__(self, graph: FactorGraph, blocks: Mapping[str, Block], plan: FactorPlan):
        assert plan.cut is not None and plan.factor.constructed is not None
        self.graph, self.plan, self.cut, self.made = graph, plan, plan.cut, plan.factor.constructed
        self.predictors = PredictorMoments(graph, blocks, plan)
        self.rows = RowMoments(graph, blocks, plan) if plan.cut.is_wide else None
        self.points = max(FEWEST_POINTS, 8 * plan.cut.numbers)
        self.inputs: list[Tensor] | None = None
        self.device = blocks[plan.integrated[0]].device
        self._rows: RowsBelow | None = None
        self.error: float | None = None  # of E log f in nats, when it was last integrated
        self.tolerance = TOLERANCE
        self._last: tuple[Tensor, Tensor, float, Integrals] | None = None
        self._afresh: Callable[[], Tensor] | None = None  # the last E log f over other random points

    def __call__(self, moments: Moments, env: Mapping[str, Tensor]) -> Tensor:
        """E log f of the distribution itself (before `to_event` sums it, without scale), zero where it is masked."""
        if self.rows is not None:
            shape = self.made.batch_shape
            mean, covariance = self.rows(moments)
            if not (mean.requires_grad or covariance.requires_grad or bool(covariance.any())):
                return self._of_rows(env, self.mask(shape, env))(mean.reshape(*shape, -1))  # q is a point
            found = self._integrals(mean.detach(), covariance.detach(), shape, env)
            return gaussian_expectation(found, mean, covariance).reshape(shape)
        parts = [self.predictors.moments(p.argument, env, moments) for p in self.cut.predictors]
        shape = broadcast_shape(self.made.batch_shape, *(mean.shape for mean, _ in parts), *self._states(env))
        mean = torch.stack([m.expand(shape).flatten() for m, _ in parts], -1)
        variances = [v.expand(shape).flatten() for _, v in parts]
        if self.cut.joint is None:
            covariance = variances[0][:, None, None]
        else:
            _, joint = self.predictors.moments(self.cut.joint, env, moments)
            cross = 0.5 * (joint.expand(shape).flatten() - variances[0] - variances[1])
            covariance = torch.stack([variances[0], cross, cross, variances[1]], -1).unflatten(-1, (2, 2))
        if not (mean.requires_grad or covariance.requires_grad or bool(covariance.any())):
            return self._function(torch.Size(shape), env)(mean.unsqueeze(0), None)[0].reshape(shape)  # q is a point
        found = self._integrals(mean.detach(), covariance.detach(), torch.Size(shape), env)
        return gaussian_expectation(found, mean, covariance).reshape(shape)

    def _states(self, env: Mapping[str, Tensor]) -> list[torch.Size]:
        """The dims of discrete sites, which may enter below the predictors only."""
        sites = [site for name in self.plan.enumerated for site in self.predictors.blocks[name].sites]
        return [env[site.name].shape[: env[site.name].dim() - site.distribution.event_dim] for site in sites]

    def _integrals(self, mean: Tensor, covariance: Tensor, shape: torch.Size, env: Mapping[str, Tensor]) -> Integrals:
        last = self._last
        if last is not None and torch.equal(last[0], mean) and torch.equal(last[1], covariance):
            if last[2] <= self.tolerance:
                return last[3]
        if self.rows is not None:
            function = self._of_rows(env, self.mask(shape, env))
            found = random_integrals(function, mean, covariance, shape, self.points)
            self._afresh = lambda: random_values(function, mean, covariance, shape, FRESH * self.points)
        else:
            found = gaussian_integrals(self._function(shape, env), mean, covariance, self.tolerance)
        self._last = mean, covariance, self.tolerance, found
        self.error = found.total_error
        return found

    def _function(self, shape: torch.Size, env: Mapping[str, Tensor]) -> LogFactor:
        """log f of the rows' predictors."""
        return self._by_rows(shape) if self.cut.by_rows else _Rows(self, shape, env)

    @property
    def noise(self) -> float:
        """Nats by which derivatives may disagree with differences of values: rough ones, or averages of their own at random points."""
        return self.error or 0.0 if self.rows is not None or self.tolerance > TOLERANCE else 0.0

    def saved(self) -> Callable[[], None]:
        """What puts points and errors back as they are now."""
        state = self.points, self.error, self._last, self._afresh

        def restore() -> None:
            self.points, self.error, self._last, self._afresh = state

        return restore

    def refine(self) -> bool:
        """Takes four times as many points from now on, if that is worth while; whether it is."""
        if self._afresh is None or self._last is None:
            return False
        # q has been fitted to its points, both sets of them: only others, and more of them, tell the error
        apart = self._afresh() - self._last[3].value
        self.error = float(apart.sum().abs() + apart.norm())  # what the sum shows, and what it may hide by chance
        more = 4 * self.points * self.made.batch_shape.numel() * self.cut.numbers**2
        if self.error <= ENOUGH or self.points >= MOST_POINTS or more > WORK:
            return False
        self.points, self._last = 4 * self.points, None
        return True

    def _of_rows(self, env: Mapping[str, Tensor], mask: Tensor) -> Callable[[Tensor], Tensor]:
        """log f (*shape) at predictors (*shape, k), zero where masked."""
        if self.inputs is None:
            self.inputs = wide(self.graph.tape.inputs)
        inputs = self.inputs

        def function(rows: Tensor) -> Tensor:
            points = by_predictor(self.cut, rows)
            return torch.where(mask, below(self.graph, self.plan.factor, self.cut, env, points, inputs).double(), 0.0)

        return function

    def _by_rows(self, shape: torch.Size) -> LogFactor:
        """log f of chosen rows, zero where masked."""
        if self._rows is None:
            self._rows = RowsBelow(self.graph, self.plan.factor, self.cut, shape)
        below_rows, mask = self._rows, self.mask(shape, {}).flatten()

        def function(points: Tensor, rows: Tensor | None) -> Tensor:
            shown = mask if rows is None else mask[rows]
            some = max(1, BUDGET // max(shown.numel(), 1))
            found = [below_rows(part, rows).double() for part in points.split(some)]
            return torch.where(shown, torch.cat(found), 0.0)

        return function

    def table(self, points: Tensor, env: Mapping[str, Tensor], mask: Tensor) -> Tensor:
        """log f at stacked points (Q, *shape, k): (Q, *shape), zero where masked."""
        if self.inputs is None:
            self.inputs = wide(self.graph.tape.inputs)
        inputs, factor = self.inputs, self.plan.factor

        def one(point: Tensor, _: Any) -> Tensor:
            found = below(self.graph, factor, self.cut, env, point.unbind(-1), inputs)
            return torch.where(mask, found.double(), 0.0)

        return batched(one, points, {}, mask.numel())

    def mask(self, shape: torch.Size, env: Mapping[str, Tensor]) -> Tensor:
        """Elements that neither the factor's mask nor the distribution's own hides."""
        outer, inner = self.graph.tape.evaluate([self.plan.factor.mask, self.made.mask], env)
        mask = torch.ones(shape, dtype=torch.bool, device=self.device)
        for item, extra in ((outer, self.made.reinterpreted), (inner, 0)):
            if item is not None:
                item = torch.as_tensor(item, dtype=torch.bool, device=self.device)
                mask = mask & item.reshape(item.shape + (1,) * extra)
        return mask


def log_jacobian(block: Block, moments: Mapping[str, Tensor]) -> Tensor:
    """E log|dx/du| summed over a block whose sites are images of its Gaussian variable element by element."""
    total = torch.zeros((), dtype=torch.float64, device=block.device)
    for member in block.members:
        transform = transform_of(block, member.site.name)
        if transform is None or isinstance(block.family, LogNormal):
            continue
        spread = moments["variance"] if "variance" in moments else moments["covariance"].diagonal(dim1=-2, dim2=-1)
        joint = block.is_joint
        mean, variance = (
            (x[..., member.start : member.stop] if joint else x).double().reshape(-1) for x in (moments["mean"], spread)
        )

        def jacobian(points: Tensor, rows: Tensor | None, transform: Any = transform) -> Tensor:
            u = points.squeeze(-1)
            return transform.log_abs_det_jacobian(u, transform(u))

        found = gaussian_integrals(jacobian, mean.detach().unsqueeze(-1), variance.detach()[:, None, None])
        total = total + gaussian_expectation(found, mean.unsqueeze(-1), variance[:, None, None]).sum()
    return total


class _Rows:
    """log f as a function of chosen rows' predictors.

    The program knows only all rows at once: every row is given as many points as the row that wants most.
    """

    def __init__(self, integral: FactorIntegral, shape: torch.Size, env: Mapping[str, Tensor]):
        self.integral, self.shape, self.env = integral, shape, env
        self.mask = integral.mask(shape, env)

    def __call__(self, points: Tensor, rows: Tensor | None) -> Tensor:
        if rows is None:
            return self._all(points)
        order = rows.argsort(stable=True)
        ordered = rows[order]
        first = torch.searchsorted(ordered, ordered)
        turn = torch.empty_like(order)
        turn[order] = torch.arange(rows.numel(), device=rows.device) - first
        count, (q, _, k) = int(turn.max()) + 1, points.shape
        filled = points[:, :1].mean(0).expand(count, q, self.shape.numel(), k).clone()
        filled[turn, :, rows] = points.transpose(0, 1)
        values = self._all(filled.flatten(0, 1)).unflatten(0, (count, q))
        return values[turn, :, rows].T

    def _all(self, points: Tensor) -> Tensor:
        count, k = points.shape[0], points.shape[-1]
        found = self.integral.table(points.reshape(count, *self.shape, k), self.env, self.mask)
        return found.reshape(count, -1)
