"""E_q[log f] of one factor, as a differentiable function of the moments of q.

Over blocks in which the factor is conjugate the expectation is in closed form: an argument that is affine in a statistic t(z) has its
expectation at the pseudo-point t⁻¹(E_q[t]).  Discrete blocks are summed over, one value a state on a new left dimension.
Other blocks are given as points (draws); with none of these the result is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp, vmap

from pyro_blr.blocks import Block
from pyro_blr.conjugacy import Argument, FactorPlan
from pyro_blr.expressions import Latent, Ref
from pyro_blr.families import Beta, Dirichlet, Gamma, InverseGamma, MultivariateNormal, Normal, Wishart
from pyro_blr.graph import FactorGraph, broadcast_shape
from pyro_blr.kinds import Form
from pyro_blr.likelihoods import WeightedSums, Expectation, Linear, Matrix, Positive, Probability, Simplex, Vector
from pyro_blr.likelihoods import Normal as NormalLikelihood
from pyro_blr.maps import compiled
from pyro_blr.summaries import QuadraticSummary, summarise

__all__ = ["FactorAverage", "Moments", "mean_leaf"]

_MOVES = frozenset(
    "getitem expand expand_as broadcast_tensors broadcast_to reshape view view_as flatten unflatten squeeze unsqueeze permute "
    "transpose movedim moveaxis swapaxes swapdims t T mT contiguous clone identity index_select gather take_along_dim unbind "
    "chunk split flip roll stack cat".split()
)

_UNKNOWN: Any = object()

Moments = Mapping[str, Mapping[str, Tensor]]


def mean_leaf(block: Block, moments: Mapping[str, Tensor]) -> Tensor:
    """The pseudo-point of a block: where its variable stands for the expectation of what the templates are linear in."""
    if isinstance(block.family, InverseGamma):
        return moments["inverse"].reciprocal()
    if isinstance(block.family, (Beta, Dirichlet)):
        return moments["log"].exp()
    return moments["mean"]


class FactorAverage:
    """E_q[log f] for one factor under its plan."""

    def __init__(self, graph: FactorGraph, blocks: Mapping[str, Block], plan: FactorPlan):
        self.graph, self.blocks, self.plan = graph, blocks, plan
        self.points = {name: self._state_values(name, i) for i, name in enumerate(plan.enumerated)}
        self._bases: dict[tuple[str, str], Tensor] = {}
        self._looped: set[str] = set()
        self._moves: dict[str, bool] = {}
        self._known: dict[str, Expectation] = {}
        self._summary: Any = _UNKNOWN
        self._weighted: WeightedSums | None = WeightedSums(torch.ones(()))
        self._weighted_by: list[Tensor] | None = None
        self._maps: dict[str, Any] = {}
        self._is_constant = {argument.name: self._has_constant_coefficients(argument) for argument in plan.arguments}

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
        if self._weighted is None or plan.likelihood is None or constructed is None or any(p.requires_grad for p in probs):
            return None
        if constructed.mask is not None or not all(self._is_constant.values()):
            return None
        if any(isinstance(item, Ref) for item in (plan.factor.mask, plan.factor.scale)):
            return None
        if self._weighted_by is None or any(a is not b for a, b in zip(probs, self._weighted_by, strict=True)):
            with torch.no_grad():
                self._weighted = WeightedSums(self._all_weights(probs), {}, self._weighted.data)
            self._weighted_by = probs
        narrow = self._in_model_precision(moments)
        env = self._environment(narrow, {})
        arguments = {a.name: self._expectation(a, env, narrow) for a in plan.arguments}
        states = [self.blocks[name].num_states for name in reversed(plan.enumerated)]
        ones = self.graph.max_plate_nesting - len(plan.factor.batch_shape)
        event = constructed.batch_shape[len(constructed.batch_shape) - constructed.reinterpreted :]
        shape = (*states, *[1] * ones, *plan.factor.batch_shape, *event)
        total = plan.likelihood.weighted_total(arguments, constructed.reinterpreted, shape, self._weighted)
        if total is None:
            self._weighted = None  # it does not pay for this factor
        return total

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
        return {
            name: {key: value.to(self.blocks[name].dtype) for key, value in moments[name].items()}
            for name in (*self.plan.analytic, *self.plan.enumerated)
        }

    def elementwise(self, moments: Moments, samples: Mapping[str, Tensor]) -> Tensor:
        """s_f E[log f | enumerated states], shape (states..., *batch of the factor)."""
        env = self._environment(moments, samples)
        if not self.plan.analytic:
            return self._point_log_prob(env)
        constructed = self.plan.factor.constructed
        assert constructed is not None and self.plan.likelihood is not None
        arguments = {a.name: self._expectation(a, env, moments) for a in self.plan.arguments}
        tape = self.graph.tape
        mask, scale, inner = tape.evaluate([self.plan.factor.mask, self.plan.factor.scale, constructed.mask], env)
        weights = None
        if inner is not None:
            weights = torch.as_tensor(inner).to(dtype=_float_dtype(arguments))
        elif constructed.reinterpreted and not self._value_covers_event(constructed):
            weights = torch.ones(constructed.batch_shape, dtype=_float_dtype(arguments), device=_device(arguments))
        result = self.plan.likelihood.expected_log_prob(arguments, constructed.reinterpreted, weights)
        return self._scaled(result, mask, scale)

    def _summarised(self, moments: Moments) -> QuadraticSummary | None:
        """The factor as sums over its data, where its coefficients are constant and it is large enough for that to pay."""
        plan, constructed = self.plan, self.plan.factor.constructed
        if not isinstance(plan.likelihood, NormalLikelihood) or plan.sampled or plan.enumerated or constructed is None:
            return None
        if not plan.analytic or not all(self._is_constant.values()):
            return None
        if any(isinstance(item, Ref) for item in (plan.factor.mask, plan.factor.scale, constructed.mask)):
            return None
        if constructed.mask is not None or (plan.factor.mask is not None and constructed.reinterpreted):
            return None
        env = self._environment(moments, {})
        parts = {argument.name: argument for argument in plan.arguments}
        if parts["value"].forms:
            return None
        loc = self._compiled(parts["loc"], env, moments) if parts["loc"].forms else None
        if loc is None:
            return None
        precision = self._expectation(parts["precision"], env, moments)
        if parts["precision"].forms:
            precision = self._maps["precision"]
        weights = torch.as_tensor(plan.factor.scale)
        if plan.factor.mask is not None:
            weights = weights * torch.as_tensor(plan.factor.mask).to(weights)
        shape = constructed.batch_shape
        found = summarise(self._expectation(parts["value"], env, moments), loc, precision, shape, weights)
        if found is not None:
            self._maps["loc"] = None  # its columns are no longer needed
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
        for name in self.plan.analytic:
            env.update(self.blocks[name].values(mean_leaf(self.blocks[name], moments[name])))
        for name in self.plan.enumerated:
            env.update(self.points[name])
        for name in self.plan.sampled:
            env.update(self.blocks[name].values(samples[name]))
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

    # -- expectations of the arguments --------------------------------------------------------------------------------

    def _has_constant_coefficients(self, argument: Argument) -> bool:
        """Whether only data, enumerated states and the argument's own blocks enter, so that its map can be compiled."""
        tape = self.graph.tape
        mine = {site for name in (*argument.forms, *self.plan.enumerated) for site in self.blocks[name].site_names}
        if not tape.latents_of(argument.ref) <= mine:
            return False
        return not any(x.requires_grad for x in tape.inputs_of([argument.ref]))

    def _expectation(self, argument: Argument, env: Mapping[str, Tensor], moments: Moments) -> Expectation:
        known = self._known.get(argument.name)
        if known is not None:
            return known
        if not argument.forms:
            (value,) = self.graph.tape.evaluate([argument.ref], env)
            result = argument.role.of(_as_float(value, env, argument.role))
            if self._is_constant[argument.name]:
                self._known[argument.name] = result
            return result
        if self._is_constant[argument.name]:
            found = self._compiled(argument, env, moments)
            if found is not None:
                return found(moments)
        return self._by_program(argument, env, moments)

    def _compiled(self, argument: Argument, env: Mapping[str, Tensor], moments: Moments) -> Any:
        if argument.name not in self._maps:
            function = self._leaf_function(argument, env)
            self._maps[argument.name] = compiled(argument, function, self.blocks, moments, self._design(argument))
        return self._maps[argument.name]

    def _design(self, argument: Argument) -> Tensor | None:
        """X where the argument is X @ z plus constants: its columns need not be computed."""
        if len(argument.forms) != 1:
            return None
        (name,) = argument.forms
        plain = isinstance(self.blocks[name].family, (Normal, MultivariateNormal)) and len(self.blocks[name].members) == 1
        return self.graph.tape.design_matrix(argument.ref, self.blocks[name].site_names[0]) if plain else None

    def _leaf_function(self, argument: Argument, env: Mapping[str, Tensor]) -> Callable[[Mapping[str, Tensor]], Tensor]:
        return lambda leaves: self._at(argument, env, leaves)

    def _by_program(self, argument: Argument, env: Mapping[str, Tensor], moments: Moments) -> Expectation:
        if argument.role is Linear:
            return self._linear(argument, env, moments)
        if argument.role is Vector:
            return self._vector(argument, env, moments)
        if argument.role is Positive:
            return Positive(self._at(argument, env), self._log(argument, env, moments))
        if argument.role is Probability:
            return self._probability(argument, env, moments)
        if argument.role is Simplex:
            return Simplex(self._log(argument, env, moments))
        if argument.role is Matrix:
            return Matrix(self._at(argument, env), self._logdet(argument, env, moments))
        raise AssertionError(f"no rule for {argument.role.__name__}")

    def _at(
        self, argument: Argument, env: Mapping[str, Tensor], leaves: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """The argument with the given leaves in place of the blocks' pseudo-points."""
        if leaves:
            env = dict(env)
            for name, leaf in leaves.items():
                env.update(self.blocks[name].values(leaf))
        return self.graph.tape.evaluate([argument.ref], env)[0]

    def _log(self, argument: Argument, env: Mapping[str, Tensor], moments: Moments) -> Tensor:
        """E log a = log a(1) + (d/dε) log a(exp ε ℓ), ℓ = E log z: exact, because log a is affine in log z."""
        names = list(argument.forms)
        logs = [moments[name]["log"] for name in names]
        if len(names) == 1 and self._is_leaf(argument):
            return logs[0].reshape(self.blocks[names[0]].sites[0].shape)
        if len(names) == 1 and self._only_moves(argument):
            return self._at(argument, env, {names[0]: logs[0]})

        def log_argument(*exponents: Tensor) -> Tensor:
            return self._at(argument, env, {n: e.exp() for n, e in zip(names, exponents, strict=True)}).log()

        value, change = jvp(log_argument, tuple(torch.zeros_like(x) for x in logs), tuple(logs))
        return value + change

    def _probability(self, argument: Argument, env: Mapping[str, Tensor], moments: Moments) -> Probability:
        """E log a and E log(1 − a), each log-affine in one of p and 1 − p."""
        ((name, form),) = argument.forms.items()
        logs = (moments[name]["log"], moments[name]["log_complement"])
        if self._only_moves(argument):
            return Probability(*(self._at(argument, env, {name: x}) for x in logs))

        def log_of(complement_leaf: bool, complement_value: bool, exponent: Tensor) -> Tensor:
            p = exponent.exp()
            value = self._at(argument, env, {name: 1 - p if complement_leaf else p})
            return (1 - value if complement_value else value).log()

        flipped = form is Form.COMPLEMENT
        results = []
        for complement in (False, True):
            leaf = complement != flipped  # which of p and 1 − p the value (or its complement) is
            start = torch.zeros_like(logs[leaf])
            value, change = jvp(lambda e, c=complement, f=leaf: log_of(f, c, e), (start,), (logs[leaf],))
            results.append(value + change)
        return Probability(*results)

    def _logdet(self, argument: Argument, env: Mapping[str, Tensor], moments: Moments) -> Tensor:
        """E log|A|, affine in E log|W| (in E log τ): followed along W = exp(ε ℓ / d) I (τ = exp ε ℓ) from ε = 0."""
        names = list(argument.forms)
        directions, starts = [], []
        for name in names:
            family = self.blocks[name].family
            if isinstance(family, Wishart):
                d = family.event_shape[-1]
                log = moments[name]["logdet"] / d
                directions.append(log)
            else:
                directions.append(moments[name]["log"])
            starts.append(torch.zeros_like(directions[-1]))

        def logdet(*exponents: Tensor) -> Tensor:
            leaves = {}
            for name, exponent in zip(names, exponents, strict=True):
                family = self.blocks[name].family
                leaf = exponent.exp()
                if isinstance(family, Wishart):
                    eye = torch.eye(family.event_shape[-1], dtype=leaf.dtype, device=leaf.device)
                    leaf = leaf[..., None, None] * eye
                leaves[name] = leaf
            return torch.linalg.slogdet(self._at(argument, env, leaves)).logabsdet

        # By differences, exact for an affine function: torch's forward derivatives of cholesky_inverse and cholesky_solve are
        # wrong (pytorch issues 196682, 196694).
        longest = max((float(d.detach().abs().max()) for d in directions if d.numel()), default=0.0)
        step = min(1.0, 3.0 / max(longest, 1.0))
        value = logdet(*starts)
        return value + (logdet(*(step * direction for direction in directions)) - value) / step

    # -- first and second moments of (multi-)affine arguments ----------------------------------------------------------

    def _is_leaf(self, argument: Argument) -> bool:
        """Whether the argument is the value of a site itself."""
        ref = argument.ref
        return isinstance(ref, Ref) and isinstance(self.graph.tape.nodes[ref.index].function, Latent)

    def _only_moves(self, argument: Argument) -> bool:
        """Whether the expression only moves entries about, so that it commutes with every elementwise function."""
        if argument.name not in self._moves:
            tape = self.graph.tape
            nodes = [tape.nodes[index] for index in tape.needed([argument.ref])]
            self._moves[argument.name] = all(isinstance(n.function, Latent) or n.name in _MOVES for n in nodes)
        return self._moves[argument.name]

    def _linear(self, argument: Argument, env: Mapping[str, Tensor], moments: Moments) -> Linear:
        names = list(argument.forms)
        if len(names) == 1:
            block, mine = self.blocks[names[0]], moments[names[0]]
            plain = len(block.members) == 1 and isinstance(block.family, (Normal, MultivariateNormal))
            if plain and self._only_moves(argument):
                variance = _diagonal(mine)
                return Linear(self._at(argument, env), self._at(argument, env, {names[0]: variance}))
        variance = None
        for tangents, duals in self._spreads(argument, env, moments):
            part = (tangents * duals).sum(0)
            variance = part if variance is None else variance + part
        return Linear(self._at(argument, env), variance)

    def _vector(self, argument: Argument, env: Mapping[str, Tensor], moments: Moments) -> Vector:
        names = list(argument.forms)
        if len(names) == 1 and self._is_leaf(argument):
            block, mine = self.blocks[names[0]], moments[names[0]]
            if isinstance(block.family, MultivariateNormal) and len(block.members) == 1:
                return Vector(self._at(argument, env), mine["covariance"])
        covariance = None
        for tangents, duals in self._spreads(argument, env, moments):
            part = torch.einsum("l...i,l...j->...ij", tangents, duals)
            covariance = part if covariance is None else covariance + part
        return Vector(self._at(argument, env), covariance)

    def _spreads(
        self, argument: Argument, env: Mapping[str, Tensor], moments: Moments
    ) -> list[tuple[Tensor, Tensor]]:
        """Pairs (J V e_l, J e_l), stacked over l, whose products sum to the variance: one pair a block, one a product of blocks."""
        sets = [(name,) for name in argument.forms] + list(argument.products)
        return [self._spread(argument, names, env, moments) for names in sets]

    def _spread(
        self, argument: Argument, names: Sequence[str], env: Mapping[str, Tensor], moments: Moments
    ) -> tuple[Tensor, Tensor]:
        bases = [self._basis(argument, name, moments[name]) for name in names]
        scaled = [self._times_covariance(name, basis, argument, moments[name]) for name, basis in zip(names, bases, strict=True)]
        points = [mean_leaf(self.blocks[name], moments[name]) for name in names]

        def function(*leaves: Tensor) -> Tensor:
            return self._at(argument, env, dict(zip(names, leaves, strict=True)))

        return self._derivative(argument, function, points, scaled), self._derivative(argument, function, points, bases)

    def _derivative(
        self, argument: Argument, function: Callable[..., Tensor], points: Sequence[Tensor], tangents: Sequence[Tensor]
    ) -> Tensor:
        """∂ⁿ function along every combination of the stacked tangents, flattened to one left dim; exact, being multi-affine."""
        if argument.name not in self._looped:
            try:
                return _nested_jvp(function, list(points), list(tangents))
            except (RuntimeError, NotImplementedError, ValueError):
                self._looped.add(argument.name)  # an operation without a forward derivative or batching rule
        return _differences(function, list(points), list(tangents))

    def _basis(self, argument: Argument, name: str, moments: Mapping[str, Tensor]) -> Tensor:
        """Tangents e_l: one for each index along the mixed dims, all ones along the others."""
        key = (argument.name, name)
        if key not in self._bases:
            leaf = moments["mean"]
            mixed = sorted(argument.mixed[name])
            sizes = [leaf.shape[dim] for dim in mixed]
            count = torch.Size(sizes).numel()
            basis = torch.eye(count, dtype=leaf.dtype, device=leaf.device)
            shape = [leaf.shape[dim] if dim in mixed else 1 for dim in range(-leaf.dim(), 0)]
            self._bases[key] = basis.reshape(count, *shape).expand(count, *leaf.shape)
        return self._bases[key]

    def _times_covariance(
        self, name: str, basis: Tensor, argument: Argument, moments: Mapping[str, Tensor]
    ) -> Tensor:
        """V e_l.  Where outputs see one entry of the event each, only V's diagonal matters."""
        if "covariance" not in moments:
            return basis * moments["variance"]
        if -1 in argument.mixed[name]:
            return torch.einsum("...ij,l...j->l...i", moments["covariance"], basis)
        return basis * _diagonal(moments)


def _diagonal(moments: Mapping[str, Tensor]) -> Tensor:
    if "covariance" in moments:
        return moments["covariance"].diagonal(dim1=-2, dim2=-1)
    return moments["variance"]


def _nested_jvp(function: Callable[..., Tensor], points: list[Tensor], tangents: list[Tensor]) -> Tensor:
    """d/dε₁ … d/dεₙ function(x₁ + ε₁ t₁, …), over all combinations of the stacked tangents."""
    if not points:
        raise AssertionError("no points")

    def along_last(*rest: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda tangent: jvp(lambda x: function(*rest, x), (points[-1],), (tangent,))[1]

    if len(points) == 1:
        return vmap(along_last())(tangents[-1])

    def derived(*rest: Tensor) -> Tensor:
        return vmap(along_last(*rest))(tangents[-1])

    result = _nested_jvp(derived, points[:-1], tangents[:-1])
    return result.flatten(0, 1)


def _differences(function: Callable[..., Tensor], points: list[Tensor], tangents: list[Tensor]) -> Tensor:
    """The same by finite differences, one evaluation at a time."""
    if len(points) == 1:
        base = function(points[0])
        return torch.stack([function(points[0] + tangent) - base for tangent in tangents[0]])
    parts = []
    for tangent in tangents[-1]:
        moved = points[-1] + tangent

        def difference(*rest: Tensor, moved: Tensor = moved) -> Tensor:
            return function(*rest, moved) - function(*rest, points[-1])

        parts.append(_differences(difference, points[:-1], tangents[:-1]))
    return torch.stack(parts, 1).flatten(0, 1)


def _as_float(value: Any, env: Mapping[str, Tensor], role: type[Expectation]) -> Tensor:
    if isinstance(value, Tensor):
        return value
    dtype = next((v.dtype for v in env.values() if v.is_floating_point()), torch.get_default_dtype())
    return torch.as_tensor(value, dtype=dtype)


def _fields(arguments: Mapping[str, Expectation]) -> list[Tensor]:
    return [x for a in arguments.values() for x in vars(a).values() if isinstance(x, Tensor)]


def _float_dtype(arguments: Mapping[str, Expectation]) -> torch.dtype:
    return next((x.dtype for x in _fields(arguments) if x.is_floating_point()), torch.get_default_dtype())


def _device(arguments: Mapping[str, Expectation]) -> torch.device:
    return _fields(arguments)[0].device
