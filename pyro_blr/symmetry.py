"""Starts that break exchangeable symmetry: a mixture or factor model never starts at its symmetric saddle.

Draws come from torch's generator.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_blr.ascent import Ascent
from pyro_blr.blocks import is_gaussian

__all__ = ["broken_start"]


@torch.no_grad()
def broken_start(ascent: Ascent, restart: int = 0) -> Ascent:
    """The same ascent from a start without exchangeable symmetry: seeded components, random factors."""
    program = ascent.program
    for name, block in program.blocks.items():
        if block.is_discrete and block.batch_shape.numel() > 1 and _components(ascent, name):
            _seed_components(ascent, name)
    for name in _saddle_blocks(ascent):
        _randomise_mean(ascent, name, 1.0)
    return ascent


def _components(ascent: Ascent, name: str) -> list[str]:
    """The continuous blocks that the states of a discrete block choose between, all exact."""
    messages = ascent.program.messages
    found = []
    for factor in messages.factors_of[name]:
        if factor not in ascent.program.blocks[name].site_names and messages.plans[factor].exact:
            found += [b for b in messages.plans[factor].analytic if messages.is_exact(b)]
    return list(dict.fromkeys(found))


def _seed_components(ascent: Ascent, name: str) -> None:
    """k-means++ in the model's own terms: each component starts at one datum, drawn in proportion to how badly the components
    so far explain it (compare Arthur and Vassilvitskii 2007)."""
    messages, beliefs = ascent.program.messages, ascent.beliefs
    block = ascent.program.blocks[name]
    components = _components(ascent, name)
    factors = [f for f in messages.factors_of[name] if f not in block.site_names and messages.plans[f].exact]
    start = beliefs.moments[name]["probs"]
    flat = torch.zeros(start.shape[:-1].numel(), start.shape[-1], dtype=start.dtype, device=start.device)
    before = {other: beliefs.naturals[other] for other in components}
    distance = torch.ones(flat.shape[0], dtype=torch.float64, device=flat.device)
    table = flat
    for state in range(flat.shape[-1]):
        if not bool(distance.sum() > 0):
            distance = torch.ones_like(distance)
        chosen = int(torch.multinomial(distance / distance.sum(), 1)) if flat.shape[0] < 2**24 else int(distance.argmax())
        flat[chosen, state] = 1.0
        beliefs.set_moments(name, {"probs": flat.reshape(start.shape)})
        for other in components:
            target = ascent.targets.exact(other, beliefs)
            if not bool(ascent.program.blocks[other].family.contains(target).all()):
                target = before[other]
            beliefs.update(other, target)
        table = messages.state_table(name, beliefs.moments, factors).reshape(flat.shape)
        best = table[:, : state + 1].max(-1).values.double()
        distance = (best.max() - best).clamp_min(0.0)
        distance[flat.sum(-1) > 0] = 0.0
    probs = torch.softmax(table.double(), -1).reshape(start.shape)
    _set_probabilities(ascent, name, probs)


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
        if len(gaussian) > 1 and plan.factor.is_observed:
            multiplied.update(gaussian)
    return [name for name in ascent.program.blocks if name in multiplied]


def _randomise_mean(ascent: Ascent, name: str, width: float) -> None:
    beliefs, block = ascent.beliefs, ascent.program.blocks[name]
    moments = block.family.moments(beliefs.naturals[name])
    variance = moments["variance"] if "variance" in moments else moments["covariance"].diagonal(dim1=-2, dim2=-1)
    mean = moments["mean"]
    noise = torch.randn(mean.shape, dtype=mean.dtype).to(mean.device)
    shifted = mean + width * variance.clamp(max=1.0).sqrt() * noise
    beliefs.update(name, ascent.targets.with_mean(name, beliefs, shifted))
