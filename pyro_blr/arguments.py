"""Expectations of a factor's canonical arguments under q.

An expression that is affine in a statistic t(z) has its expectation at the pseudo-point t⁻¹(E_q[t]): E τ where τ enters linearly,
exp E log τ inside a logarithm.  The variance of an affine argument is Σ_l (J V e_l)(J e_l) along tangents e_l; exact, because it is affine.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp, vmap

from pyro_blr.blocks import Block
from pyro_blr.cuts import addends, refs_of
from pyro_blr.families import Beta, Dirichlet, InverseGamma, MultivariateNormal, Normal, Wishart
from pyro_blr.graph import FactorGraph
from pyro_blr.kinds import Form
from pyro_blr.likelihoods import Expectation, Linear, Matrix, Positive, Probability, Simplex, Vector
from pyro_blr.maps import compiled
from pyro_blr.plans import Argument, FactorPlan
from pyro_blr.probabilities import powers_map
from pyro_blr.tape import Latent, Ref

__all__ = ["Arguments", "Moments", "mean_leaf"]

Moments = Mapping[str, Mapping[str, Tensor]]


def mean_leaf(block: Block, moments: Mapping[str, Tensor]) -> Tensor:
    """The pseudo-point of a block: where its variable stands for the expectation of what the templates are linear in."""
    if isinstance(block.family, InverseGamma):
        return moments["inverse"].reciprocal()
    if isinstance(block.family, (Beta, Dirichlet)):
        return moments["log"].exp()
    return moments["mean"]


class Arguments:
    """The arguments of one factor, each as the expectations that its template needs of it."""

    def __init__(self, graph: FactorGraph, blocks: Mapping[str, Block], plan: FactorPlan):
        self.graph, self.blocks, self.plan = graph, blocks, plan
        self._bases: dict[tuple[str, str], Tensor] = {}
        self._looped: set[str] = set()
        self._moves: dict[str, bool] = {}
        self._known: dict[str, Expectation] = {}
        self._maps: dict[str, Any] = {}
        self._is_constant = {argument.name: self._has_constant_coefficients(argument) for argument in plan.arguments}

    @property
    def are_constant(self) -> bool:
        """Whether no coefficient of any argument changes while the data stay the same."""
        return all(self._is_constant.values())

    def is_constant(self, argument: Argument) -> bool:
        """Whether no coefficient of one of them does."""
        return self._is_constant[argument.name]

    def prepare(self, argument: Argument, moments: Moments) -> None:
        """Before the argument is read off at these moments; what is cut at its predictors needs it."""

    def forget_map(self, name: str) -> None:
        """Frees the compiled map of an argument that is not needed any more."""
        self._maps[name] = None

    def _has_constant_coefficients(self, argument: Argument) -> bool:
        """Whether only data, enumerated states and the argument's own blocks enter, so that its map can be compiled."""
        tape = self.graph.tape
        own = (view for name in (*argument.forms, *self.plan.enumerated) for view in self.blocks[name].views)
        mine = {view.site.name for view in own}
        if not tape.latents_of(argument.ref) <= mine:
            return False
        return not any(x.requires_grad for x in tape.inputs_of([argument.ref]))

    def expectation(self, argument: Argument, env: Mapping[str, Tensor], moments: Moments) -> Expectation:
        """The argument under q; `env` holds the sites' values at the pseudo-points, states and draws."""
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
            found = self.compiled(argument, env, moments)
            if found is not None:
                return found(moments)
        return self._by_program(argument, env, moments)

    def compiled(self, argument: Argument, env: Mapping[str, Tensor], moments: Moments) -> Any:
        """The argument as a function of moments that does not run the program; None where there is none."""
        if argument.name not in self._maps:
            function = self._leaf_function(argument, env)
            sites = self.graph.tape.latents_of(argument.ref)
            design_of = functools.partial(self.graph.tape.design_matrix, argument.ref)
            self._maps[argument.name] = compiled(
                argument, function, self._terms(argument, env), self.blocks, moments, sites, design_of
            )
        return self._maps[argument.name]

    def _leaf_function(self, argument: Argument, env: Mapping[str, Tensor]) -> Callable[[Mapping[str, Tensor]], Tensor]:
        return lambda leaves: self._at(argument, env, leaves)

    def _terms(self, argument: Argument, env: Mapping[str, Tensor]) -> list[Callable]:
        """The argument's addends as functions of the leaves."""

        def term(sign: float, part: Argument) -> Callable:
            return lambda leaves: sign * self._at(part, env, leaves)

        return [
            term(sign, replace(argument, ref=ref))
            for sign, ref in addends(self.graph.tape, argument.ref)
            if any(self.graph.tape.latents_of(one) for one in refs_of(ref))
        ]

    def _by_program(self, argument: Argument, env: Mapping[str, Tensor], moments: Moments) -> Expectation:
        if argument.role is Linear:
            return self._linear(argument, env, moments)
        if argument.role is Vector:
            return self._vector(argument, env, moments)
        if argument.role is Positive:
            return Positive(self._at(argument, env), self._log(argument, env, moments))
        if argument.role is Probability:
            return self._probability(argument, env, moments)
        if argument.role is Simplex and Form.POWERS in argument.forms.values():
            (name,) = argument.forms
            found = powers_map(name, self._leaf_function(argument, env), moments[name]["log"])
            assert found is not None  # the judge saw it so
            return found(moments)
        if argument.role is Simplex:
            return Simplex(self._log(argument, env, moments))
        if argument.role is Matrix:
            return Matrix(self._at(argument, env), self._logdet(argument, env, moments))
        raise AssertionError(f"no rule for {argument.role.__name__}")

    def _at(self, argument: Argument, env: Mapping[str, Tensor], leaves: Mapping[str, Tensor] | None = None) -> Tensor:
        """The argument with the given leaves in place of the blocks' pseudo-points."""
        if leaves:
            env, wanted = dict(env), self.graph.tape.latents_of(argument.ref)
            for name, leaf in leaves.items():
                env.update(self.blocks[name].values(leaf, wanted))
        return self.graph.tape.evaluate([argument.ref], env)[0]

    def _log(self, argument: Argument, env: Mapping[str, Tensor], moments: Moments) -> Tensor:
        """E log a = log a(1) + (d/dε) log a(exp ε ℓ), ℓ = E log z: exact, because log a is affine in log z."""
        names = list(argument.forms)
        logs = [moments[name]["log"] for name in names]
        if len(names) == 1 and self._is_leaf(argument):
            return logs[0].reshape(self.blocks[names[0]].sites[0].shape)
        if len(names) == 1 and self._only_moves(argument):  # no constant is among what it moves
            return self._at(argument, env, {names[0]: logs[0]})

        def log_argument(*exponents: Tensor) -> Tensor:
            return self._at(argument, env, {n: e.exp() for n, e in zip(names, exponents, strict=True)}).log()

        found = jvp(log_argument, tuple(torch.zeros_like(x) for x in logs), tuple(logs))
        return found[0] + found[1]

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
            found = jvp(lambda e, c=complement, f=leaf: log_of(f, c, e), (start,), (logs[leaf],))
            results.append(found[0] + found[1])
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
            return Matrix.of(self._at(argument, env, leaves)).logdet

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
            self._moves[argument.name] = self.graph.tape.only_moves(argument.ref)
        return self._moves[argument.name]

    def _linear(self, argument: Argument, env: Mapping[str, Tensor], moments: Moments) -> Linear:
        names = list(argument.forms)
        if len(names) == 1:
            block, mine = self.blocks[names[0]], moments[names[0]]
            plain = not block.is_joint and isinstance(block.family, (Normal, MultivariateNormal))
            if plain and self._only_moves(argument):
                return Linear(self._at(argument, env), self._at(argument, env, {names[0]: _diagonal(mine)}))
        variance = None
        for tangents, duals in self._spreads(argument, env, moments):
            part = (tangents * duals).sum(0)
            variance = part if variance is None else variance + part
        return Linear(self._at(argument, env), variance)

    def _vector(self, argument: Argument, env: Mapping[str, Tensor], moments: Moments) -> Vector:
        names = list(argument.forms)
        if len(names) == 1 and self._is_leaf(argument):
            block, mine = self.blocks[names[0]], moments[names[0]]
            if isinstance(block.family, MultivariateNormal) and not block.is_joint:
                return Vector(self._at(argument, env), mine["covariance"])
        covariance = None
        for tangents, duals in self._spreads(argument, env, moments):
            part = torch.einsum("l...i,l...j->...ij", tangents, duals)
            covariance = part if covariance is None else covariance + part
        return Vector(self._at(argument, env), covariance)

    def _spreads(self, argument: Argument, env: Mapping[str, Tensor], moments: Moments) -> list[tuple[Tensor, Tensor]]:
        """Pairs (J V e_l, J e_l), stacked over l, whose products sum to the variance: one pair a block, one a product of blocks."""
        sets = [(name,) for name in argument.forms] + list(argument.products)
        return [self._spread(argument, names, env, moments) for names in sets]

    def _spread(
        self, argument: Argument, names: Sequence[str], env: Mapping[str, Tensor], moments: Moments
    ) -> tuple[Tensor, Tensor]:
        bases = [self._basis(argument, name, moments[name]) for name in names]
        scaled = [
            self._times_covariance(name, basis, argument, moments[name])
            for name, basis in zip(names, bases, strict=True)
        ]
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

    def _times_covariance(self, name: str, basis: Tensor, argument: Argument, moments: Mapping[str, Tensor]) -> Tensor:
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
