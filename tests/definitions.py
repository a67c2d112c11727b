"""∇_μ E_q[log f] by its definition, from runs of the model alone: F⁻¹ Cov_q(T, log f), by
quadrature, enumeration or draws.

Nothing of the package's own expressions, likelihoods or averages is used, and the statistics T are
written out once more.
log f is Pyro's: scaled and masked, one value for each element of the factor's batch, batched over
values of the latents by vmap.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from pyro_blr import families
from pyro_blr.blocks import Block

LARGEST_GRID = 20_000
FEW_DRAWS, MANY_DRAWS = 4_000, 400_000
_CHUNK = 20_000


# ------------------------------------------------------------------------------------------------
# q


@dataclass(frozen=True)
class Belief:
    """q_i at a random λ: nodes, weights and draws in the site's own values, flattened to (…,
    elements, *event)."""

    natural: Tensor
    distribution: Any  # batch (elements,)
    kind: str
    states: Tensor | None
    shape: torch.Size  # of the site's value
    dtype: torch.dtype
    to_value: Callable[[Tensor], Tensor]

    @property
    def elements(self) -> int:
        return self.distribution.batch_shape.numel()

    def nodes(self, order: int) -> tuple[Tensor, Tensor]:
        """Points of q's own variable (n, elements, *event) and their weights (n, elements)."""
        return _NODES[self.kind](self.distribution, order)

    def statistics(self, leaf: Tensor) -> Tensor:
        """T, (n, elements, p); states of a Categorical are indicators of all but the last."""
        if self.kind == "Categorical":
            states = self.distribution.probs.shape[-1]
            return torch.nn.functional.one_hot(leaf, states)[..., :-1].double()
        return _STATISTICS[self.kind](leaf)

    def value(self, leaf: Tensor) -> Tensor:
        """(S, elements, *event) -> (S, *the site's shape)."""
        if self.states is not None:
            leaf = self.states[leaf]
        elif self.kind in ("Beta", "Dirichlet") and self.dtype != torch.float64:
            leaf = leaf.clamp(1e-7, 1 - 1e-7)
        return self.to_value(leaf).reshape(leaf.shape[0], *self.shape).to(self.dtype)


def random_belief(block: Block, generator: torch.Generator) -> Belief:
    """A q_i that is neither the prior nor symmetric, at a moderate distance from every boundary."""
    batch = block.batch_shape

    def uniform(low: float, high: float, *event: int) -> Tensor:
        return low + (high - low) * torch.rand((*batch, *event), generator=generator, dtype=torch.float64)

    family, to_value = block.family, (lambda leaf: leaf)
    if isinstance(family, families.TransformedNormal):
        transform, family = family, family.base
        to_value = transform.constrain
    if isinstance(family, families.MultivariateNormal):
        d = family.event_shape[0]
        root = uniform(-0.4, 0.4, d, d)
        q: Any = dist.MultivariateNormal(uniform(-1, 1, d), root @ root.mT + torch.diag_embed(uniform(0.1, 0.6, d)))
    elif isinstance(family, families.LogNormal):
        q = dist.LogNormal(uniform(-0.5, 0.5), uniform(0.2, 0.6))
    elif isinstance(family, families.Normal):
        q = dist.Normal(uniform(-1, 1), uniform(0.3, 1.0))
    elif isinstance(family, families.Gamma):
        q = dist.Gamma(uniform(2, 6), uniform(0.5, 3))
    elif isinstance(family, families.InverseGamma):
        q = dist.InverseGamma(uniform(2, 6), uniform(0.5, 3))
    elif isinstance(family, families.Beta):
        q = dist.Beta(uniform(2, 5), uniform(2, 5))
    elif isinstance(family, families.Dirichlet):
        q = dist.Dirichlet(uniform(1.5, 4, *family.event_shape))
    elif isinstance(family, families.Wishart):
        d = family.event_shape[0]
        root = uniform(-0.5, 0.5, d, d)
        scale = root @ root.mT + torch.diag_embed(uniform(0.2, 0.5, d))
        q = dist.Wishart(uniform(d + 6, d + 10), covariance_matrix=scale)
    elif isinstance(family, families.Bernoulli):
        q = dist.Bernoulli(uniform(0.2, 0.8))
    else:
        q = dist.Categorical(torch.softmax(uniform(-1, 1, block.num_states), -1))
    one_hot = isinstance(family, families.Categorical) and family.one_hot
    natural = family.from_distribution(dist.OneHotCategorical(q.probs) if one_hot else q)
    flat = _flattened(q, batch)
    kind = type(flat).__name__
    site = block.sites[0]
    return Belief(natural, flat, kind, block.states if block.is_discrete else None, site.shape, site.dtype, to_value)


def _flattened(q: Any, batch: torch.Size) -> Any:
    arguments = {
        "Normal": ("loc", "scale"),
        "LogNormal": ("loc", "scale"),
        "MultivariateNormal": ("loc", "covariance_matrix"),
        "Gamma": ("concentration", "rate"),
        "InverseGamma": ("concentration", "rate"),
        "Beta": ("concentration1", "concentration0"),
        "Dirichlet": ("concentration",),
        "Wishart": ("df", "covariance_matrix"),
        "Bernoulli": ("probs",),
        "Categorical": ("probs",),
    }[type(q).__name__]
    return type(q)(
        **{name: getattr(q, name).flatten(0, len(batch) - 1) if batch else getattr(q, name)[None] for name in arguments}
    )


def _hermite(order: int) -> tuple[Tensor, Tensor]:
    x, w = np.polynomial.hermite_e.hermegauss(order)
    return torch.as_tensor(x), torch.as_tensor(w / w.sum())


def _normal_nodes(q: Any, order: int) -> tuple[Tensor, Tensor]:
    x, w = _hermite(order)
    return q.loc + x[:, None] * q.scale, w[:, None].expand(-1, len(q.loc))


def _log_normal_nodes(q: Any, order: int) -> tuple[Tensor, Tensor]:
    leaf, w = _normal_nodes(q, order)
    return leaf.exp(), w


def _multivariate_nodes(q: Any, order: int) -> tuple[Tensor, Tensor]:
    d = q.loc.shape[-1]
    x, w = _hermite(order)
    x, w = (
        torch.cartesian_prod(*[x] * d).reshape(-1, d),
        torch.cartesian_prod(*[w] * d).reshape(-1, d).prod(-1),
    )
    tril = torch.linalg.cholesky(q.covariance_matrix)
    return q.loc + torch.einsum("eij,nj->nei", tril, x), w[:, None].expand(-1, len(q.loc))


def _trapezoid(
    log_density: Callable[[Tensor], Tensor], left: float, right: float, step: float
) -> tuple[Tensor, Tensor]:
    """The trapezoidal rule on the whole line, whose error falls exponentially for these densities."""
    t = torch.arange(left, right, step, dtype=torch.float64)[:, None]
    w = torch.softmax(log_density(t), 0)
    kept = w.max(1).values > 1e-18
    return t[kept], w[kept]


def _gamma_nodes(q: Any, order: int, inverse: bool = False) -> tuple[Tensor, Tensor]:
    a, b = q.concentration, q.rate
    t, w = _trapezoid(lambda t: a * t - t.exp(), -42 / float(a.min()), 4.2, 0.2)
    x = t.exp() / b
    return (1 / x if inverse else x), w


def _inverse_gamma_nodes(q: Any, order: int) -> tuple[Tensor, Tensor]:
    return _gamma_nodes(q, order, inverse=True)


def _beta_nodes(q: Any, order: int) -> tuple[Tensor, Tensor]:
    a, b = q.concentration1, q.concentration0
    softplus = torch.nn.functional.softplus
    t, w = _trapezoid(lambda t: a * t - (a + b) * softplus(t), -42 / float(a.min()), 42 / float(b.min()), 0.4)
    return torch.sigmoid(t).expand(w.shape), w


def _dirichlet_nodes(q: Any, order: int) -> tuple[Tensor, Tensor]:
    """Stick-breaking."""
    alpha = q.concentration
    sticks = [dist.Beta(alpha[:, k], alpha[:, k + 1 :].sum(-1)) for k in range(alpha.shape[-1] - 1)]
    parts = [_beta_nodes(stick, order) for stick in sticks]
    index = torch.cartesian_prod(*[torch.arange(len(w)) for _, w in parts]).reshape(-1, len(parts))
    left, weights, columns = torch.ones(()), torch.ones(()), []
    for k, (x, w) in enumerate(parts):
        columns.append(left * x[index[:, k]])
        left, weights = left * torch.sigmoid(-torch.logit(x))[index[:, k]], weights * w[index[:, k]]
    return torch.stack([*columns, left * torch.ones_like(weights)], -1), weights


def _wishart_nodes(q: Any, order: int) -> tuple[Tensor, Tensor]:
    """Bartlett's decomposition of the 2 x 2 case; polynomial in the off-diagonal."""
    assert q.event_shape == (2, 2)
    half = torch.full_like(q.df, 0.5)
    c1, w1 = _gamma_nodes(dist.Gamma(q.df / 2, half), order)
    c2, w2 = _gamma_nodes(dist.Gamma((q.df - 1) / 2, half), order)
    x, w = _hermite(5)
    i, j, k = torch.cartesian_prod(torch.arange(len(w1)), torch.arange(len(w2)), torch.arange(len(x))).unbind(-1)
    zero = torch.zeros_like(c1[i])
    bartlett = torch.stack([c1[i].sqrt(), zero, x[k][:, None] + zero, c2[j].sqrt()], -1).unflatten(-1, (2, 2))
    root = torch.linalg.cholesky(q.covariance_matrix) @ bartlett
    weights = w1[i] * w2[j] * w[k][:, None]
    kept = weights.max(1).values > 1e-15  # a matrix near the boundary breaks the model's own Cholesky factors
    return (root @ root.mT)[kept], weights[kept]


def _categorical_nodes(q: Any, order: int) -> tuple[Tensor, Tensor]:
    probs = torch.stack([1 - q.probs, q.probs], -1) if isinstance(q, dist.Bernoulli) else q.probs
    n = probs.shape[-1]
    return torch.arange(n)[:, None].expand(n, len(probs)), probs.T


_NODES: dict[str, Callable[[Any, int], tuple[Tensor, Tensor]]] = {
    "Normal": _normal_nodes,
    "LogNormal": _log_normal_nodes,
    "MultivariateNormal": _multivariate_nodes,
    "Gamma": _gamma_nodes,
    "InverseGamma": _inverse_gamma_nodes,
    "Beta": _beta_nodes,
    "Dirichlet": _dirichlet_nodes,
    "Wishart": _wishart_nodes,
    "Bernoulli": _categorical_nodes,
    "Categorical": _categorical_nodes,
}


def _pair(*parts: Tensor) -> Tensor:
    return torch.stack(parts, -1)


def _half(matrix: Tensor) -> Tensor:
    """The lower triangle, row by row."""
    rows = [matrix[..., i, : i + 1] for i in range(matrix.shape[-1])]
    return torch.cat(rows, -1)


_STATISTICS: dict[str, Callable[[Tensor], Tensor]] = {
    "Normal": lambda x: _pair(x, x * x),
    "LogNormal": lambda x: _pair(x.log(), x.log() ** 2),
    "MultivariateNormal": lambda x: torch.cat([x, _half(x.unsqueeze(-1) * x.unsqueeze(-2))], -1),
    "Gamma": lambda x: _pair(x.log(), x),
    "InverseGamma": lambda x: _pair(x.log(), 1 / x),
    "Beta": lambda x: _pair(x.log(), torch.log1p(-x)),
    "Dirichlet": lambda x: x.log(),
    "Wishart": lambda x: torch.cat([torch.logdet(x).unsqueeze(-1), _half(x)], -1),
    "Bernoulli": lambda k: k.unsqueeze(-1).double(),
}


# ------------------------------------------------------------------------------------------------
# The model


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """A program in float32 runs in it, whatever the dtype around it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class LogProb:
    """log f of one factor, elementwise over its batch (flattened), at stacked values of the latents."""

    def __init__(
        self,
        model: Callable,
        factor: str,
        beliefs: Mapping[str, Belief],
        fixed: Mapping[str, Tensor],
        dtype: torch.dtype = torch.float64,
    ):
        self.model, self.factor, self.beliefs, self.dtype = model, factor, beliefs, dtype
        others = {name: belief.value(leaf)[0] for name, belief in beliefs.items() for leaf in [belief.nodes(1)[0][:1]]}
        self.fixed = {**others, **fixed}

    def __call__(self, leaves: Mapping[str, Tensor]) -> Tensor:
        """{site: (S, elements, *event)} -> (S, E), float64."""
        values = {name: self.beliefs[name].value(leaf) for name, leaf in leaves.items()}
        count = len(next(iter(values.values())))
        parts = []
        for start in range(0, count, _CHUNK):
            chunk = {name: value[start : start + _CHUNK] for name, value in values.items()}
            result = self._batched(chunk).double()
            parts.append(result.reshape(len(result), -1))
        return torch.cat(parts)

    def _batched(self, values: Mapping[str, Tensor]) -> Tensor:
        with pyro.validation_enabled(False), torch.no_grad(), default_dtype(self.dtype):
            try:
                return torch.func.vmap(self._one)(dict(values))
            except RuntimeError:  # an operation that cannot be batched
                count = len(next(iter(values.values())))
                return torch.stack([self._one({k: v[i] for k, v in values.items()}) for i in range(count)])

    def _one(self, values: Mapping[str, Tensor]) -> Tensor:
        conditioned = poutine.condition(self.model, data={**self.fixed, **values})
        trace = poutine.trace(conditioned).get_trace()
        trace.compute_log_prob(lambda name, site: name == self.factor)
        node = trace.nodes[self.factor]
        log_prob = node["log_prob"]
        shape = torch.broadcast_shapes(log_prob.shape, node["fn"].batch_shape)
        return log_prob.expand(shape)


# ------------------------------------------------------------------------------------------------
# The definition


class Definition(NamedTuple):
    """E_q[Σ_e log f_e] and the message to every site, with standard errors (zero for quadrature)."""

    bound: Tensor
    bound_error: Tensor
    messages: dict[str, Tensor]
    errors: dict[str, Tensor]
    how: str


def definition(log_prob: LogProb, sites: list[str], seed: int, draws: int = FEW_DRAWS) -> Definition:
    """By quadrature and enumeration over everything that one element of the factor depends on,
    where the grid is small enough."""
    if draws == FEW_DRAWS:
        try:
            return _Quadrature(log_prob, sites, seed).run()
        except _TooLarge:
            pass
    return _monte_carlo(log_prob, sites, seed, draws)


class _TooLarge(Exception):
    pass


def _fisher_inverse(belief: Belief) -> tuple[Tensor, Tensor]:
    """(μ, F⁻¹), (elements, p) and (elements, p, p), from the nodes."""
    leaf, w = belief.nodes(8)
    t = belief.statistics(leaf)
    mean = torch.einsum("ne,nep->ep", w, t)
    t = t - mean
    return mean, torch.linalg.inv(torch.einsum("ne,nep,neq->epq", w, t, t))


def _random_leaves(beliefs: Mapping[str, Belief], sites: list[str], count: int) -> dict[str, Tensor]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Singular sample", UserWarning)  # torch's Wishart draws again
        draws = {name: beliefs[name].distribution.sample((count,)) for name in sites}
    return {name: x if beliefs[name].states is None else x.long() for name, x in draws.items()}


def _dependence(
    log_prob: LogProb, sites: list[str], fixed: Mapping[str, Tensor], moved: list[str], count: int
) -> dict[str, Tensor]:
    """{site: (elements, E)}: which elements of the factor change with which elements of the sites,
    at some of `count` points."""
    beliefs = log_prob.beliefs
    base = {
        **_random_leaves(beliefs, sites, count),
        **{k: v.expand(count, *v.shape[1:]) for k, v in fixed.items()},
    }
    start = log_prob(base)
    result = {}
    for name in moved:
        elements = beliefs[name].elements
        other = _random_leaves(beliefs, [name], 2 * count)[name].unflatten(0, (2, count))
        copies = {
            k: v.repeat(2 * elements, *[1] * (v.dim() - 1)).unflatten(0, (2, elements, count)) for k, v in base.items()
        }
        mine = copies[name].clone()
        for element in range(elements):
            mine[:, element, :, element] = other[:, :, element]
        copies[name] = mine
        values = log_prob({k: v.flatten(0, 2) for k, v in copies.items()}).unflatten(0, (2, elements, count))
        result[name] = (values != start).any(2).any(0)
    return result


class _Quadrature:
    def __init__(self, log_prob: LogProb, sites: list[str], seed: int):
        torch.manual_seed(seed)
        self.log_prob, self.sites, self.beliefs = log_prob, sites, log_prob.beliefs
        self.discrete = [name for name in sites if self.beliefs[name].states is not None]
        self.continuous = [name for name in sites if self.beliefs[name].states is None]
        self.fisher = {name: _fisher_inverse(self.beliefs[name]) for name in sites}

    def run(self) -> Definition:
        self.covariances = {n: torch.zeros_like(self.fisher[n][0]) for n in self.sites}
        self.bound = torch.zeros((), dtype=torch.float64)
        dependence = _dependence(self.log_prob, self.sites, {}, self.discrete, 24) if self.discrete else {}
        colours = self._colours(dependence)
        sizes = [len(self.beliefs[name].nodes(1)[0]) for name, _ in colours]
        if math.prod(sizes) > 64:
            raise _TooLarge
        for states in itertools.product(*map(range, sizes)):
            self._given_states(dependence, colours, states)
        messages = {n: torch.einsum("epq,eq->ep", self.fisher[n][1], c) for n, c in self.covariances.items()}
        zeros = {n: torch.zeros_like(m) for n, m in messages.items()}
        return Definition(self.bound, torch.zeros(()), messages, zeros, "quadrature")

    def _colours(self, dependence: Mapping[str, Tensor]) -> list[tuple[str, list[int]]]:
        """Elements of a site that no element of the factor sees together move in step; each colour
        is one axis of the grid."""
        colours = []
        for name, table in dependence.items():
            classes: list[list[int]] = []
            for element in range(len(table)):
                if not table[element].any():
                    continue
                home = next((c for c in classes if not (table[c] & table[element]).any()), None)
                classes.append([element]) if home is None else home.append(element)
            colours += [(name, c) for c in classes]
        return colours

    def _weights(self, colour: tuple[str, list[int]], table: Tensor, weights: Tensor) -> Tensor:
        """(n, E): for each element of the factor, q of the one element of this colour that it
        sees, or uniform."""
        elements = torch.tensor(colour[1])
        sees = table[elements]
        mine = elements[sees.int().argmax(0)]
        return torch.where(sees.any(0), weights[:, mine], 1.0 / len(weights))

    def _given_states(self, dependence: Mapping[str, Tensor], colours: list, states: tuple[int, ...]) -> None:
        fixed = {n: torch.zeros(1, self.beliefs[n].elements, dtype=torch.long) for n in self.discrete}
        for (name, elements), state in zip(colours, states, strict=True):
            fixed[name][:, elements] = state
        axes = [
            self._weights(c, dependence[c[0]], self.beliefs[c[0]].nodes(1)[1])[s]
            for c, s in zip(colours, states, strict=True)
        ]
        weight = torch.stack(axes).prod(0) if axes else torch.ones(())
        average = self._continuous(fixed, weight)
        self.bound = self.bound + (weight * average).sum()
        for name in self.discrete:
            statistic = self.beliefs[name].statistics(fixed[name])[0] - self.fisher[name][0]
            self.covariances[name] += statistic * (dependence[name] * weight * average).sum(-1, keepdim=True)

    def _continuous(self, fixed: Mapping[str, Tensor], weight: Tensor) -> Tensor:
        """E[log f_e | states], after adding Σ_e weight_e Cov(T, log f_e | states) to every site's
        covariance."""
        if not self.continuous:
            return self.log_prob(fixed)[0]
        dependence = _dependence(self.log_prob, self.sites, fixed, self.continuous, 3)
        colours = self._colours(dependence)
        order = 24
        parts = [self.beliefs[name].nodes(order) for name, _ in colours]
        if math.prod(len(w) for _, w in parts) > LARGEST_GRID:
            parts = [
                self.beliefs[name].nodes(5) for name, _ in colours
            ]  # exact for the polynomials that exact messages are
        sizes = [len(w) for _, w in parts]
        if math.prod(sizes) > LARGEST_GRID:
            raise _TooLarge
        index = torch.unravel_index(torch.arange(math.prod(sizes)), sizes) if sizes else ()
        leaves = {
            n: self.beliefs[n].nodes(1)[0][:1].expand(math.prod(sizes), *self.beliefs[n].nodes(1)[0].shape[1:]).clone()
            for n in self.continuous
        }
        for (name, elements), (nodes, _), position in zip(colours, parts, index, strict=True):
            leaves[name][:, elements] = nodes[position][:, elements]
        leaves.update({n: v.expand(math.prod(sizes), -1) for n, v in fixed.items()})
        values = self.log_prob(leaves).reshape(*sizes, -1)
        weights = [self._weights(c, dependence[c[0]], w) for c, (_, w) in zip(colours, parts, strict=True)]
        average = _contracted(values, weights, None)
        for position, (colour, (nodes, w)) in enumerate(zip(colours, parts, strict=True)):
            marginal = _contracted(values, weights, position) - average
            self._add(colour, dependence[colour[0]], nodes, w, marginal * weight)
        return average

    def _add(
        self, colour: tuple[str, list[int]], table: Tensor, nodes: Tensor, weights: Tensor, marginal: Tensor
    ) -> None:
        name, elements = colour
        statistic = self.beliefs[name].statistics(nodes) - self.fisher[name][0]
        for element in elements:
            f = marginal[:, table[element]].sum(-1)
            self.covariances[name][element] += torch.einsum("n,n,np->p", weights[:, element], f, statistic[:, element])


def _contracted(values: Tensor, weights: list[Tensor], kept: int | None) -> Tensor:
    """Σ over every axis but `kept` of the product of weights and values; (E) or (n, E)."""
    for axis in reversed(range(len(weights))):
        if axis != kept:
            shape = [len(weights[axis]), *[1] * (values.dim() - axis - 2), values.shape[-1]]
            values = (values * weights[axis].reshape(shape)).sum(axis)
    return values


def _monte_carlo(log_prob: LogProb, sites: list[str], seed: int, draws: int) -> Definition:
    torch.manual_seed(seed + draws)
    dependence = _dependence(log_prob, sites, {}, sites, 48)
    beliefs = log_prob.beliefs
    fisher = {name: _fisher_inverse(beliefs[name]) for name in sites}
    centre = log_prob(_random_leaves(beliefs, sites, 1000)).mean(0)
    sums: dict[str, list[Tensor]] = {}
    for _ in range(0, draws, _CHUNK):
        leaves = _random_leaves(beliefs, sites, min(draws, _CHUNK))
        values = log_prob(leaves) - centre
        _accumulate(sums, "", values.sum(-1))
        for name in sites:
            mean, inverse = fisher[name]
            score = torch.einsum("epq,seq->sep", inverse, beliefs[name].statistics(leaves[name]) - mean)
            _accumulate(sums, name, score * (values @ dependence[name].double().T).unsqueeze(-1))
    means, errors = {}, {}
    for name, (count, total, squares) in sums.items():
        means[name] = total / count
        errors[name] = ((squares / count - means[name] ** 2).clamp_min(0) / count).sqrt()
    bound, error = means.pop("") + centre.sum(), errors.pop("")
    return Definition(bound, error, means, errors, "draws")


def _accumulate(sums: dict[str, list[Tensor]], name: str, values: Tensor) -> None:
    parts = [torch.tensor(float(len(values))), values.sum(0), (values**2).sum(0)]
    sums[name] = [a + b for a, b in zip(sums[name], parts, strict=True)] if name in sums else parts
