"""Starts that break exchangeable symmetry: a mixture or factor model never starts at its symmetric saddle.

Draws come from torch's generator.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_blr.ascent import Ascent
from pyro_blr.blocks import is_gaussian
from pyro_blr.checks import ImproperPosteriorError
from pyro_blr.draws import Draws

__all__ = ["broken_start"]

SHORT_SWEEPS = 20  # of each candidate start, before the best is kept
WORK = 2e7  # elements × states × sweeps that the choice among candidate starts may cost
SHRINK = 0.75  # each candidate seeds this fraction of the components of the one before
_DOUBT = 1e-2  # odds of the other components where data are assigned to their best
_AT_MEANS = Draws(0, 0)


@dataclass(frozen=True)
class _Mixture:
    """Discrete blocks that choose between the same components: a plate of them, or many sites of a loop."""

    discrete: tuple[str, ...]
    components: tuple[str, ...]
    num_states: int


@torch.no_grad()
def broken_start(ascent: Ascent) -> Ascent:
    """The same ascent from a start without exchangeable symmetry: seeded components, random factors.

    How many components the data want is not known, and mean field removes superfluous ones slowly: starts
    with all, and with fewer and fewer, of them seeded are swept a few times; the best bound is kept.
    """
    mixtures = _mixtures(ascent)
    start, last = ascent.beliefs, list(ascent.last)
    best: tuple[float, Ascent] | None = None
    counts = _counts(ascent, mixtures)
    for count in counts:
        trial = Ascent(ascent.program, start.copy(), last)
        for mixture in mixtures:
            _seed(trial, mixture, count)
        _scatter(trial)
        for name in _saddle_blocks(trial):
            _randomise_mean(trial, name)
        if len(counts) == 1:
            return trial
        bound = _bound_after(trial, SHORT_SWEEPS)
        if best is None or bound > best[0]:
            best = bound, trial
    assert best is not None
    return best[1]


def _counts(ascent: Ascent, mixtures: list[_Mixture]) -> list[int]:
    """How many components each start seeds: K, down to two; K alone where sweeps are dear or need draws."""
    most = max((mixture.num_states for mixture in mixtures), default=1)
    counts, size = [most], float(most)
    while counts[-1] > 2:
        size *= SHRINK
        counts.append(max(2, min(round(size), counts[-1] - 1)))
    blocks = ascent.program.blocks
    entries = sum(blocks[n].batch_shape.numel() * m.num_states for m in mixtures for n in m.discrete)
    if not ascent.program.is_exact or ascent.beliefs.points or WORK < len(counts) * SHORT_SWEEPS * entries:
        return counts[:1]
    return counts


def _bound_after(ascent: Ascent, sweeps: int) -> float:
    """The bound after a few sweeps; −∞ where a component with too little data has no proper posterior."""
    try:
        for _ in range(sweeps):
            ascent.sweep()
        return ascent.bound_before()
    except ImproperPosteriorError:
        return -torch.inf


def _mixtures(ascent: Ascent) -> list[_Mixture]:
    """Discrete blocks that share components, together; a single element alone has nothing to tell apart."""
    found: list[_Mixture] = []
    for name, block in ascent.program.blocks.items():
        components = _components(ascent, name) if block.is_discrete else []
        if not components:
            continue
        mine = _Mixture((name,), tuple(components), block.num_states)
        for other in [m for m in found if m.num_states == mine.num_states and set(m.components) & set(mine.components)]:
            found.remove(other)
            shared = tuple(dict.fromkeys(other.components + mine.components))
            mine = _Mixture(other.discrete + mine.discrete, shared, mine.num_states)
        found.append(mine)
    blocks = ascent.program.blocks
    return [m for m in found if sum(blocks[name].batch_shape.numel() for name in m.discrete) > 1]


def _components(ascent: Ascent, name: str) -> list[str]:
    """The blocks that a discrete block's states choose between, in closed form (given draws of others)."""
    messages = ascent.program.messages
    plans = [messages.plans[factor] for factor in _factors(ascent, name)]
    return list(dict.fromkeys(b for plan in plans for b in (*plan.analytic, *plan.integrated)))


def _factors(ascent: Ascent, name: str) -> list[str]:
    """The factors of a discrete block besides its own statement, as far as its states are summed over."""
    messages = ascent.program.messages
    own = ascent.program.blocks[name].site_names
    return [f for f in messages.factors_of[name] if f not in own and name in messages.plans[f].enumerated]


def _seed(ascent: Ascent, mixture: _Mixture, count: int) -> None:
    """k-means++ in the model's own terms (compare Arthur and Vassilvitskii 2007).

    Each of `count` components starts at one datum, drawn in proportion to how badly the components so far
    explain it; each datum then takes the components as they explain it.
    """
    beliefs = ascent.beliefs
    shapes = [beliefs.moments[name]["probs"].shape for name in mixture.discrete]
    like = beliefs.moments[mixture.discrete[0]]["probs"]
    sizes = [shape[:-1].numel() for shape in shapes]
    chosen = torch.zeros(sum(sizes), mixture.num_states, dtype=like.dtype, device=like.device)
    badness = torch.ones(len(chosen), dtype=torch.float64, device=like.device)
    before = {other: beliefs.naturals[other] for other in mixture.components}
    table = chosen
    for state in range(min(count, mixture.num_states)):
        chosen[_draw(badness), state] = 1.0
        for name, shape, rows in zip(mixture.discrete, shapes, chosen.split(sizes), strict=True):
            beliefs.set_moments(name, {"probs": rows.reshape(shape)})
        for other in mixture.components:
            target = ascent.target(other, _AT_MEANS)
            inside = bool(ascent.program.blocks[other].family.contains(target).all())
            beliefs.update(other, target if inside else before[other])
        table = torch.cat([_table(ascent, name) for name in mixture.discrete])
        best = table[:, : state + 1].max(-1).values.double()
        badness = (best.max() - best).clamp_min(0.0)
        badness[chosen.sum(-1) > 0] = 0.0
    scores = table.double()
    scores[:, count:] = -torch.inf
    if (
        not ascent.program.is_exact
    ):  # what is not seeded (a common scale, say) is still too wide to tell the components apart
        scores = torch.nn.functional.one_hot(scores.argmax(-1), mixture.num_states) * -math.log(_DOUBT)
    for name, shape, rows in zip(mixture.discrete, shapes, scores.softmax(-1).split(sizes), strict=True):
        _set_probabilities(ascent, name, rows.reshape(shape))


def _draw(weights: Tensor) -> int:
    """An index in proportion to its weight; any, where all are zero."""
    weights = weights if bool(weights.sum() > 0) else torch.ones_like(weights)
    if len(weights) >= 2**24:  # more than torch.multinomial takes
        return int(
            torch.searchsorted(weights.cumsum(0), weights.sum() * torch.rand((), dtype=weights.dtype)).clamp_max(
                len(weights) - 1
            )
        )
    return int(torch.multinomial(weights, 1))


def _table(ascent: Ascent, name: str) -> Tensor:
    """(elements, K): how well each state explains each element; blocks that need draws are at their means."""
    messages, beliefs, factors = ascent.program.messages, ascent.beliefs, _factors(ascent, name)
    drawn = {b for f in factors for b in messages.plans[f].sampled}
    if drawn:
        leaves = _AT_MEANS.leaves(ascent.program.blocks, sorted(drawn), beliefs, sorted(drawn))
        probs = beliefs.moments[name]["probs"].detach().requires_grad_()
        with torch.enable_grad():
            total = messages.average_over(factors, {**beliefs.moments, name: {"probs": probs}}, leaves).mean()
            table = torch.autograd.grad(total, probs)[0]
    else:
        table = messages.state_table(name, beliefs.moments, factors)
    return table.reshape(-1, table.shape[-1])


def _scatter(ascent: Ascent) -> None:
    """Discrete blocks whose components can only be drawn start at random assignments."""
    plans = ascent.program.messages.plans
    for name, block in ascent.program.blocks.items():
        if block.is_discrete and block.batch_shape.numel() > 1 and not _components(ascent, name):
            if any(plans[f].sampled for f in _factors(ascent, name)):
                scores = torch.randn((*block.batch_shape, block.num_states), dtype=torch.float64).to(block.device)
                _set_probabilities(ascent, name, scores.softmax(-1))


def _set_probabilities(ascent: Ascent, name: str, probs: Tensor) -> None:
    logits = probs.clamp_min(1e-30).log()
    block = ascent.program.blocks[name]
    natural = logits[..., :-1] - logits[..., -1:]
    if block.num_states == 2 and block.family.num_parameters == 1:
        states_first = block.family.moments(torch.ones(1, dtype=natural.dtype))["probs"]
        if bool(states_first[1] > states_first[0]):  # a Bernoulli's λ is log p(1) − log p(0)
            natural = -natural
    ascent.beliefs.update(name, natural.to(ascent.beliefs.naturals[name]))
    ascent.last.append(name)


def _saddle_blocks(ascent: Ascent) -> list[str]:
    """Gaussian blocks that multiply each other: with all means at zero no message moves them."""
    plans = ascent.program.plans.values()
    multiplied = {name for plan in plans for argument in plan.arguments for pair in argument.products for name in pair}
    for plan in plans:
        gaussian = [name for name in plan.sampled if is_gaussian(ascent.program.blocks[name].family)]
        sites = [site for name in gaussian for site in ascent.program.blocks[name].site_names]
        if len(plan.factor.latents & set(sites)) > 1 and plan.factor.is_observed:
            multiplied.update(gaussian)
    return [name for name in ascent.program.blocks if name in multiplied]


def _randomise_mean(ascent: Ascent, name: str) -> None:
    """Moves a Gaussian's mean by a standard deviation of its own (one at most) times noise."""
    beliefs, block = ascent.beliefs, ascent.program.blocks[name]
    moments = block.family.moments(beliefs.naturals[name])
    variance = moments["variance"] if "variance" in moments else moments["covariance"].diagonal(dim1=-2, dim2=-1)
    mean = moments["mean"]
    noise = torch.randn(mean.shape, dtype=mean.dtype).to(mean.device)
    shifted = mean + variance.clamp(max=1.0).sqrt() * noise
    beliefs.update(name, ascent.targets.with_mean(name, beliefs, shifted))
