"""E_q[log f] of one factor, as a differentiable function of the moments of q.

Over blocks in which the factor is conjugate the expectation is in closed form: an argument that is affine in a statistic t(z) has its
expectation at the pseudo-point t⁻¹(E_q[t]).  Discrete blocks are summed over, one value a state on a new left dimension.
Other blocks are given as points (draws); with none of these the result is exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_blr.arguments import Arguments, Moments, mean_leaf
from pyro_blr.blocks import Block
from pyro_blr.graph import FactorGraph
from pyro_blr.integrals import FactorIntegral
from pyro_blr.likelihoods import Categorical as CategoricalLikelihood
from pyro_blr.likelihoods import Constant, Expectation, WeightedSums, counts_at
from pyro_blr.likelihoods import Normal as NormalLikelihood
from pyro_blr.maps import SimplexRows
from pyro_blr.plans import FactorPlan
from pyro_blr.shapes import broadcast_shape
from pyro_blr.summaries import QuadraticSummary, summarise
from pyro_blr.tape import Ref

__all__ = ["FactorAverage"]

_UNKNOWN: Any = object()


class FactorAverage:
    """E_q[log f] for one factor under its plan."""

    def __init__(self, graph: FactorGraph, blocks: Mapping[str, Block], plan: FactorPlan):
        self.graph, self.blocks, self.plan = graph, blocks, plan
        self.points = {name: self._state_values(name, i) for i, name in enumerate(plan.enumerated)}
        self.arguments = Arguments(graph, blocks, plan)
        self.integral = FactorIntegral(graph, blocks, plan) if plan.cut is not None else None
        self._summary: Any = _UNKNOWN
        self._weighted: WeightedSums | None = WeightedSums(torch.ones(()))
        self._weighted_by: list[Tensor] | None = None

    # -- the expectation ----------------------------------------------------------------------------------------------

    def total(self, moments: Moments, samples: Mapping[str, Tensor]) -> Tensor:
        """s_f E_q[log f], masked, weighted by the probabilities of enumerated states, summed in float64."""
        if self._summary is _UNKNOWN:
            self._summary = self._summarised(self._in_model_precision(moments))
        if self._summary is not None:
            return self._summary(moments)
        if self.plan.enumerated and self.plan.analytic and not samples:
            total = self._through_weighted_sums(moments)
            if total is not None:
                return total
        moments = self._in_model_precision(moments)
        weighted = self.elementwise(moments, samples)
        for i, name in enumerate(self.plan.enumerated):
            weighted = weighted * self._state_probabilities(moments[name]["probs"], i)
        return weighted.sum(dtype=torch.float64)

    def _through_weighted_sums(self, moments: Moments) -> Tensor | None:
        """The total from sums of data weighted by the states' probabilities, which stay the same until these move."""
        plan, constructed = self.plan, self.plan.factor.constructed
        probs = [moments[name]["probs"] for name in plan.enumerated]
        if (
            self._weighted is None
            or plan.likelihood is None
            or constructed is None
            or any(p.requires_grad for p in probs)
        ):
            return None
        if constructed.mask is not None or not self.arguments.are_constant:
            return None
        if any(isinstance(item, Ref) for item in (plan.factor.mask, plan.factor.scale)):
            return None
        if self._weighted_by is None or any(a is not b for a, b in zip(probs, self._weighted_by, strict=True)):
            self._weighted_by = None  # an interrupt may come before both are new
            with torch.no_grad():
                self._weighted = WeightedSums(self._all_weights(probs), {}, self._weighted.data)
            self._weighted_by = probs
        narrow = self._in_model_precision(moments)
        env = self._environment(narrow, {})
        states = [self.blocks[name].num_states for name in reversed(plan.enumerated)]
        ones = self.graph.max_plate_nesting - len(plan.factor.batch_shape)
        event = constructed.batch_shape[len(constructed.batch_shape) - constructed.reinterpreted :]
        shape = torch.Size([*states, *[1] * ones, *plan.factor.batch_shape, *event])
        if isinstance(plan.likelihood, CategoricalLikelihood) and not event:
            total = self._through_counts(shape, env, narrow)
            if total is not None:
                return total
        arguments = {a.name: self.arguments.expectation(a, env, narrow) for a in plan.arguments}
        total = plan.likelihood.weighted_total(arguments, constructed.reinterpreted, shape, self._weighted)
        if total is None:
            self._weighted = None  # it does not pay for this factor
        return total

    def _through_counts(self, shape: torch.Size, env: Mapping[str, Tensor], moments: Moments) -> Tensor | None:
        """Σ w log a[k] where a is a row of p looked up by data: Σ E log p · (how often each entry of p is meant)."""
        parts, sums = {argument.name: argument for argument in self.plan.arguments}, self._weighted
        if parts["value"].forms or len(parts["probs"].forms) != 1:
            return None
        rows = self.arguments.compiled(parts["probs"], env, moments)
        if not isinstance(rows, SimplexRows) or rows.gather.rows is None or sums is None:
            return None
        log = moments[rows.name]["log"]
        row = rows.gather.rows.reshape(rows.gather.shape[:-1]) * log.shape[-1]

        def position() -> Tensor:
            index = self.arguments.expectation(parts["value"], env, moments)
            assert isinstance(index, Constant)
            return (row + index.value.long()).expand(shape).flatten()

        counts = sums.once(
            "rows", lambda: counts_at(sums.of_data("rows", position), sums.weights.expand(shape), log.shape)
        )
        return (log.double() * counts).sum()

    def _all_weights(self, probs: Sequence[Tensor]) -> Tensor:
        weights = torch.ones((), dtype=probs[0].dtype, device=probs[0].device)
        for i, p in enumerate(probs):
            weights = weights * self._state_probabilities(p, i) if i else self._state_probabilities(p, i)
        factor = self.plan.factor
        if factor.mask is not None and factor.mask is not True:
            weights = weights * torch.as_tensor(factor.mask, device=weights.device).to(weights.dtype)
        if not (isinstance(factor.scale, float) and factor.scale == 1.0):
            weights = weights * factor.scale
        return weights

    def state_scores(self, block: str, moments: Moments) -> Tensor:
        """s_f E_q[log f | state of the block], summed over everything else: shape (*batch of the block, K)."""
        moments = self._in_model_precision(moments)
        scores = self.elementwise(moments, {})
        target = self._state_probabilities(moments[block]["probs"], self.plan.enumerated.index(block)).shape
        for i, name in enumerate(self.plan.enumerated):
            if name != block:
                scores = scores * self._state_probabilities(moments[name]["probs"], i)
        scores = scores.expand(broadcast_shape(scores.shape, target)).sum_to_size(target)
        return scores.reshape(target[0], *moments[block]["probs"].shape[:-1]).movedim(0, -1)

    def _in_model_precision(self, moments: Moments) -> Moments:
        """Data are not copied to float64 for the sake of a few expectations; sums over data accumulate in it."""
        narrow = {
            name: {key: value.to(self.blocks[name].dtype) for key, value in moments[name].items()}
            for name in (*self.plan.analytic, *self.plan.enumerated)
        }
        return {**narrow, **{name: moments[name] for name in self.plan.integrated}}

    def expected(self, argument: str, moments: Moments) -> Expectation:
        """One argument of the factor under q, where it is in closed form."""
        moments = self._in_model_precision(moments)
        found = next(one for one in self.plan.arguments if one.name == argument)
        return self.arguments.expectation(found, self._environment(moments, {}), moments)

    def elementwise(self, moments: Moments, samples: Mapping[str, Tensor]) -> Tensor:
        """s_f E[log f | enumerated states], shape (states..., *batch of the factor)."""
        env = self._environment(moments, samples)
        if self.integral is not None:
            return self._integrated(self.integral, moments, env)
        if not self.plan.analytic:
            return self._point_log_prob(env)
        constructed = self.plan.factor.constructed
        assert constructed is not None and self.plan.likelihood is not None
        arguments = {a.name: self.arguments.expectation(a, env, moments) for a in self.plan.arguments}
        tape = self.graph.tape
        mask, scale, inner = tape.evaluate([self.plan.factor.mask, self.plan.factor.scale, constructed.mask], env)
        weights = None
        if inner is not None:
            weights = torch.as_tensor(inner).to(dtype=_float_dtype(arguments))
        elif constructed.reinterpreted and not self._value_covers_event(constructed):
            weights = torch.ones(constructed.batch_shape, dtype=_float_dtype(arguments), device=_device(arguments))
        result = self.plan.likelihood.expected_log_prob(arguments, constructed.reinterpreted, weights)
        return self._scaled(result, mask, scale)

    def _integrated(self, integral: FactorIntegral, moments: Moments, env: Mapping[str, Tensor]) -> Tensor:
        constructed = self.plan.factor.constructed
        assert constructed is not None
        wide = {name: {key: value.double() for key, value in moments[name].items()} for name in self.plan.integrated}
        result = integral(wide, env)
        if constructed.reinterpreted:
            result = result.flatten(-constructed.reinterpreted).sum(-1)
        mask, scale = self.graph.tape.evaluate([self.plan.factor.mask, self.plan.factor.scale], env)
        return self._scaled(result, mask, scale)

    def _summarised(self, moments: Moments) -> QuadraticSummary | None:
        """The factor as sums over its data, where its coefficients are constant and it is large enough for that to pay."""
        plan, constructed = self.plan, self.plan.factor.constructed
        if not isinstance(plan.likelihood, NormalLikelihood) or plan.sampled or plan.enumerated or constructed is None:
            return None
        if not plan.analytic or not self.arguments.are_constant:
            return None
        if any(isinstance(item, Ref) for item in (plan.factor.mask, plan.factor.scale, constructed.mask)):
            return None
        if constructed.mask is not None or (plan.factor.mask is not None and constructed.reinterpreted):
            return None
        env = self._environment(moments, {})
        parts = {argument.name: argument for argument in plan.arguments}
        if parts["value"].forms:
            return None
        loc = self.arguments.compiled(parts["loc"], env, moments) if parts["loc"].forms else None
        if loc is None:
            return None
        precision = self.arguments.expectation(parts["precision"], env, moments)
        if parts["precision"].forms:
            precision = self.arguments.compiled(parts["precision"], env, moments)
        weights = torch.as_tensor(plan.factor.scale)
        if plan.factor.mask is not None:
            weights = weights * torch.as_tensor(plan.factor.mask).to(weights)
        weights = weights.reshape(weights.shape + (1,) * (constructed.reinterpreted if weights.dim() else 0))
        shape = constructed.batch_shape
        found = summarise(self.arguments.expectation(parts["value"], env, moments), loc, precision, shape, weights)
        if found is not None:
            self.arguments.forget_map("loc")  # its columns are no longer needed
        return found

    def _value_covers_event(self, constructed: Any) -> bool:
        value = self.graph.values.get(self.plan.factor.name, self.plan.factor.value)
        if isinstance(value, Ref):
            return False
        shape = torch.as_tensor(value).shape
        event = constructed.batch_shape[len(constructed.batch_shape) - constructed.reinterpreted :]
        mine = shape[: len(shape) - constructed.event_dim]
        return tuple(mine[len(mine) - constructed.reinterpreted :]) == tuple(event)

    def _scaled(self, result: Tensor, mask: Any, scale: Any) -> Tensor:
        result = result.expand(broadcast_shape(result.shape, self.plan.factor.batch_shape))
        if mask is not None and mask is not True:
            result = torch.where(torch.as_tensor(mask, dtype=torch.bool, device=result.device), result, 0.0)
        return result if isinstance(scale, float) and scale == 1.0 else result * scale

    def _point_log_prob(self, env: Mapping[str, Tensor]) -> Tensor:
        return self.graph.log_prob(self.plan.factor.name, env)

    # -- values of the sites ------------------------------------------------------------------------------------------

    def _environment(self, moments: Moments, samples: Mapping[str, Tensor]) -> dict[str, Tensor]:
        env: dict[str, Tensor] = {}
        wanted = self.plan.factor.latents
        for name in self.plan.analytic:
            env.update(self.blocks[name].values(mean_leaf(self.blocks[name], moments[name]), wanted))
        for name in self.plan.enumerated:
            env.update(self.points[name])
        for name in self.plan.sampled:
            env.update(self.blocks[name].values(samples[name], wanted))
        return env

    def _state_values(self, name: str, position: int) -> dict[str, Tensor]:
        """The states on a dim of their own, left of every plate."""
        block = self.blocks[name]
        states = block.states
        assert states is not None
        rank = self.graph.max_plate_nesting + position
        event = states.shape[1:]
        return {block.site_names[0]: states.reshape(states.shape[0], *[1] * rank, *event)}

    def _state_probabilities(self, probs: Tensor, position: int) -> Tensor:
        """(*batch, K) -> (K, 1..., *batch), in line with `_state_values`."""
        rank = self.graph.max_plate_nesting + position
        moved = probs.movedim(-1, 0)
        return moved.reshape(moved.shape[0], *[1] * (rank - (moved.dim() - 1)), *moved.shape[1:])


def _fields(arguments: Mapping[str, Expectation]) -> list[Tensor]:
    return [x for a in arguments.values() for x in vars(a).values() if isinstance(x, Tensor)]


def _float_dtype(arguments: Mapping[str, Expectation]) -> torch.dtype:
    return next((x.dtype for x in _fields(arguments) if x.is_floating_point()), torch.get_default_dtype())


def _device(arguments: Mapping[str, Expectation]) -> torch.device:
    return _fields(arguments)[0].device
