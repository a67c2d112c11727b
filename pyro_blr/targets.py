"""Targets: (1/s_i) Σ_f s_f ∇_{μ_i} E_q[log f], where the rule moves λ_i to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_blr.beliefs import Beliefs
from pyro_blr.blocks import Block, is_gaussian
from pyro_blr.estimators import (
    bonnet_price,
    gaussian_leaves,
    reparameterised,
    score_function,
    standard_normal_draws,
)
from pyro_blr.graph import isolated_random_state
from pyro_blr.messages import Messages

__all__ = ["Draws", "Targets", "fresh_seed"]


def fresh_seed() -> int:
    """A seed from torch's global generator."""
    return int(torch.randint(2**31 - 1, ()).item())


@dataclass
class Draws:
    """Draws that stay fixed while steps are judged: one seed, `size` draws a block; none (`size` 0) is the delta method."""

    seed: int
    size: int
    _noise: dict[str, Tensor] = field(default_factory=dict)

    def leaves(self, block: Block, beliefs: Beliefs) -> Tensor:
        """(size, *leaf) draws of a block's own variable."""
        moments = beliefs.moments[block.name]
        if is_gaussian(block.family):
            if self.size == 0:
                return moments["mean"].unsqueeze(0)
            shape = moments["mean"].shape
            noise = self._noise.get(block.name)
            if noise is None or noise.shape[1:] != shape:
                seed = (self.seed + sum(map(ord, block.name))) % (2**31)
                noise = standard_normal_draws(self.size, max(shape.numel(), 1), seed, moments["mean"].dtype, moments["mean"].device)
                noise = self._noise[block.name] = noise.reshape(self.size, *shape)
            return gaussian_leaves(moments, noise)
        with isolated_random_state(self.seed):
            distribution = block.family.to_distribution(beliefs.naturals[block.name])
            sample = distribution.sample((max(self.size, 1),))
        if block.is_discrete:
            return sample
        return sample.to(block.dtype)


class Targets:
    """Messages to each block, exact where they are, from draws where not, added."""

    def __init__(self, messages: Messages):
        self.messages, self.blocks = messages, messages.blocks
        self._flows: dict[str, bool] = {}

    def exact(self, name: str, beliefs: Beliefs) -> Tensor:
        """The target from the block's exact factors alone."""
        natural = beliefs.naturals[name]
        message = self.messages.exact_message(name, natural, beliefs.wide)
        return self._share(name, natural, message.to(natural.dtype))

    def _share(self, name: str, natural: Tensor, message: Tensor) -> Tensor:
        """Divides by s_i; an element that its own mask silences, and nothing else speaks of, keeps its λ."""
        target = message / self.blocks[name].scale
        masked = self.messages.masked(name)
        if masked is None:
            return target
        return torch.where((masked & (message == 0).all(-1)).unsqueeze(-1), natural, target)

    def coupled(self, name: str, beliefs: Beliefs) -> Tensor:
        """The joint optimum of a factorised Gaussian block whose elements meet in a factor.

        E_q log f is a quadratic −½ mᵀ Λ m + hᵀ m in all means together, so the best product of Gaussians has m = Λ⁻¹ h, and as
        precision of each element its own diagonal block of Λ; moving elements by themselves at once could diverge.
        """
        target = self.exact(name, beliefs)
        family = self.blocks[name].family
        moments = beliefs.moments[name]
        mean = moments["mean"].detach()
        factors = self.messages.factors_of[name]

        def gradient(m: Tensor) -> Tensor:
            leaf = m.detach().requires_grad_()
            with torch.enable_grad():
                total = self.messages.expected_log_prob(factors, {**beliefs.moments, name: {**moments, "mean": leaf}})
                return torch.autograd.grad(total, leaf)[0].double()

        base = gradient(torch.zeros_like(mean))
        columns = [gradient(e.reshape(mean.shape)) - base for e in torch.eye(mean.numel(), dtype=mean.dtype, device=mean.device)]
        precision = -torch.stack([column.flatten() for column in columns])
        optimum = torch.linalg.solve(0.5 * (precision + precision.mT), base.flatten()).reshape(mean.shape)
        wanted = family.moments(target)
        return _gaussian_natural(family, optimum.to(target.dtype), wanted, target)

    def with_mean(self, name: str, beliefs: Beliefs, mean: Tensor) -> Tensor:
        """λ of a Gaussian block moved to another mean, its covariance kept."""
        family, natural = self.blocks[name].family, beliefs.naturals[name]
        return _gaussian_natural(family, mean.to(natural), family.moments(natural), natural)

    # -- sampled --------------------------------------------------------------------------------------------------------

    def sampled(self, name: str, beliefs: Beliefs, draws: Draws) -> Tensor:
        """The target with the messages of the block's other factors estimated from draws."""
        natural = beliefs.naturals[name]
        message = self.messages.exact_message(name, natural, beliefs.wide).to(natural.dtype)
        message = message + self.sampled_message(name, beliefs, draws).to(natural.dtype)
        return self._share(name, natural, message)

    def sampled_message(self, name: str, beliefs: Beliefs, draws: Draws) -> Tensor:
        messages = self.messages
        factors = messages.sampled_factors(name)
        drawn = {b for f in factors for b in messages.plans[f].sampled}
        leaves = {b: draws.leaves(self.blocks[b], beliefs) for b in drawn}
        if name not in drawn:
            return self._given_draws(name, beliefs, factors, leaves)
        pieces = [f for f in factors if name in messages.plans[f].sampled]
        given = [f for f in factors if name not in messages.plans[f].sampled]
        message = self._through_draws(name, beliefs, pieces, leaves, draws)
        if given:
            message = message + self._given_draws(name, beliefs, given, leaves)
        return message

    def _given_draws(self, name: str, beliefs: Beliefs, factors: list[str], leaves: Mapping[str, Tensor]) -> Tensor:
        """Closed form in this block for each draw of the others; the average over the draws."""
        moments = {key: value.detach().requires_grad_() for key, value in beliefs.moments[name].items()}
        with torch.enable_grad():
            total = self.messages.average_over(factors, {**beliefs.moments, name: moments}, leaves).mean()
            gradients = torch.autograd.grad(total, list(moments.values()), allow_unused=True)
        found = {key: g for key, g in zip(moments, gradients, strict=True) if g is not None}
        return self.blocks[name].family.message(beliefs.naturals[name], {k: g.double() for k, g in found.items()})

    def _through_draws(
        self, name: str, beliefs: Beliefs, factors: list[str], leaves: Mapping[str, Tensor], draws: Draws
    ) -> Tensor:
        messages, block = self.messages, self.blocks[name]
        natural = beliefs.naturals[name]
        mine = leaves[name]
        others = {b: _repeated(leaf, mine.shape[0]) for b, leaf in leaves.items() if b != name}

        def function(leaf: Tensor, other: Any) -> Tensor:
            total = messages.expected_log_prob(factors, beliefs.moments, {**other, name: leaf})
            jacobian = block.log_jacobian(leaf)
            if jacobian is not None:
                total = total + block.scale * jacobian.sum(dtype=torch.float64)
            return total.to(leaf.dtype) if leaf.is_floating_point() else total

        if block.is_discrete or not self._gradient_flows(name, function, mine, others):
            values = torch.stack([function(mine[s], _at(others, s)) for s in range(mine.shape[0])])
            return score_function(block.family, natural, values.detach().to(natural.dtype), mine)
        if is_gaussian(block.family):
            _, gradients = bonnet_price(function, beliefs.moments[name], mine, others, draws.seed)
            return block.family.message(natural, {key: g.double() for key, g in gradients.items()})
        with isolated_random_state(draws.seed):
            return reparameterised(function, block.family, natural, mine.shape[0], others)[1]

    def _gradient_flows(self, name: str, function: Callable, mine: Tensor, others: Mapping[str, Tensor]) -> bool:
        """Whether autograd's derivative along a random direction is the function's own (a latent may have left torch)."""
        if not any(self.messages.plans[f].replayed for f in self.messages.sampled_factors(name)):
            return True
        if name not in self._flows:
            leaf = mine[0].detach().double() if mine[0].is_floating_point() else mine[0]
            generator = torch.Generator().manual_seed(7)
            direction = torch.randn(tuple(leaf.shape), generator=generator, dtype=torch.float64).to(leaf)
            leaf = mine[0].detach().requires_grad_()
            with torch.enable_grad():
                value = function(leaf, _at(others, 0))
                gradient = torch.autograd.grad(value, leaf, allow_unused=True)[0] if value.requires_grad else None
            if gradient is None:
                self._flows[name] = False
            else:
                step = 1e-4 if leaf.dtype == torch.float64 else 1e-2
                ends = [function(leaf.detach() + t * step * direction.to(leaf), _at(others, 0)) for t in (1, -1)]
                slope = float((ends[0] - ends[1]) / (2 * step))
                mine_slope = float((gradient * direction.to(gradient)).sum())
                self._flows[name] = abs(slope - mine_slope) <= 1e-2 * max(abs(slope), abs(mine_slope), 1e-6)
        return self._flows[name]

    def sampled_bound(self, beliefs: Beliefs, draws: Draws) -> Tensor:
        """One estimate of Σ_f s_f log f over the sampled factors for each draw, log-Jacobians included; shape (S,)."""
        messages = self.messages
        factors = [name for name, plan in messages.plans.items() if not plan.exact]
        drawn = {b for f in factors for b in messages.plans[f].sampled}
        leaves = {b: draws.leaves(self.blocks[b], beliefs) for b in drawn}
        values = messages.average_over(factors, beliefs.moments, leaves)
        for name in drawn:
            jacobian = self.blocks[name].log_jacobian(leaves[name][0])
            if jacobian is not None:
                each = torch.stack([self.blocks[name].log_jacobian(leaf).sum(dtype=torch.float64) for leaf in leaves[name]])
                values = values + self.blocks[name].scale * each
        return values


def _gaussian_natural(family: Any, mean: Tensor, moments: Mapping[str, Tensor], like: Tensor) -> Tensor:
    """λ with a given mean and the covariance of `moments`; `like` has that covariance's second part."""
    if "covariance" in moments:
        precision = torch.linalg.inv(moments["covariance"])
        first = (precision @ mean.unsqueeze(-1)).squeeze(-1)
    else:
        first = (mean / moments["variance"]).unsqueeze(-1)
    return torch.cat([first, like[..., first.shape[-1] :]], -1)


def _repeated(leaf: Tensor, count: int) -> Tensor:
    return leaf if leaf.shape[0] == count else leaf[:1].expand(count, *leaf.shape[1:])


def _at(tree: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
    return {key: value[index] for key, value in tree.items()}
