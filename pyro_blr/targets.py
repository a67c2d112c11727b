"""Targets: (1/s_i) Σ_f s_f ∇_{μ_i} E_q[log f], where the rule moves λ_i to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_blr.batches import batched
from pyro_blr.beliefs import Beliefs
from pyro_blr.blocks import is_gaussian
from pyro_blr.draws import Draws, unit_width
from pyro_blr.estimators import bonnet_price, enumerated, reparameterised, score_function
from pyro_blr.families import LogNormal
from pyro_blr.messages import Messages
from pyro_blr.smoothness import smoothness
from pyro_blr.together import gaussian_natural, moved_together

__all__ = ["Targets"]

_REPLAYED_STATES = 64  # runs of the model that enumerating a discrete block may take for one draw of the others
_REPLAYED_RUNS = 512  # and for all draws together
_TOGETHER = 1000  # elements of a factorised block at most whose means move together


class Targets:
    """Messages to each block, exact where they are, from draws where not, added."""

    def __init__(self, messages: Messages, orders: dict[str, int] | None = None):
        self.messages, self.blocks = messages, messages.blocks
        self._orders = {} if orders is None else orders
        self.controls: dict[str, dict[str, Tensor]] = {}  # the last messages from draws
        self.hessians: dict[str, Tensor] = {}  # of factorised Gaussian blocks whose elements interact
        self._every = tuple(dict.fromkeys(b for plan in messages.plans.values() for b in plan.sampled))

    def exact(self, name: str, beliefs: Beliefs) -> Tensor:
        """The target from the block's exact factors alone."""
        natural = beliefs.naturals[name]
        message = self.messages.exact_message(name, natural, beliefs.wide)
        return self._share(name, natural, message.to(natural.dtype))

    def _share(self, name: str, natural: Tensor, message: Tensor) -> Tensor:
        """Divides by s_i; an element that its own mask silences, and nothing else speaks of, keeps its λ."""
        scale = self.blocks[name].scale
        target = message if scale == 1.0 else message / scale
        copies = self.blocks[name].copies
        if copies is not None:
            target = target / copies.unsqueeze(-1)
        masked = self.messages.masked(name)
        if masked is None:
            return target
        return torch.where((masked & (message == 0).all(-1)).unsqueeze(-1), natural, target)

    def coupled(self, name: str, beliefs: Beliefs) -> Tensor:
        """The joint optimum of a factorised Gaussian block whose elements meet in a factor.

        E_q log f is a quadratic −½ mᵀ Λ m + hᵀ m in all means together, so the best product of Gaussians has
        m = Λ⁻¹ h, and as precision of each element its own diagonal block of Λ; moving elements by themselves
        at once could diverge.
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
        columns = [
            gradient(e.reshape(mean.shape)) - base
            for e in torch.eye(mean.numel(), dtype=mean.dtype, device=mean.device)
        ]
        precision = -torch.stack([column.flatten() for column in columns])
        optimum = torch.linalg.solve(0.5 * (precision + precision.mT), base.flatten()).reshape(mean.shape)
        wanted = family.moments(target)
        return gaussian_natural(family, optimum.to(target.dtype), wanted, target)

    def together(self, name: str, beliefs: Beliefs) -> Tensor:
        """The target of a factorised Gaussian block whose elements meet in a factor that is no quadratic.

        Its means move together by a Newton step with the Hessian of all of them, E ∇² log f.
        """
        target, block = self.exact(name, beliefs), self.blocks[name]
        moments = beliefs.wide[name]
        if moments["mean"].numel() > _TOGETHER:
            return target
        leaf = moments["mean"].detach().requires_grad_()
        factors = [f for f in self.messages.factors_of[name] if self.messages.plans[f].deterministic]
        with torch.enable_grad():
            changed = {**beliefs.wide, name: {**moments, "mean": leaf}}
            total = self.messages.expected_log_prob(factors, changed)
            total = total + self.messages.expected_log_jacobian([name], changed)
            (gradient,) = torch.autograd.grad(total, leaf, create_graph=True)
            rows = [torch.autograd.grad(g, leaf, retain_graph=True)[0].flatten() for g in gradient.flatten()]
        hessian = torch.stack(rows) / block.scale
        return moved_together(block.family, moments["mean"], target, 0.5 * (hessian + hessian.mT))

    def with_mean(self, name: str, beliefs: Beliefs, mean: Tensor) -> Tensor:
        """λ of a Gaussian block moved to another mean, its covariance kept."""
        family, natural = self.blocks[name].family, beliefs.naturals[name]
        return gaussian_natural(family, mean.to(natural), family.moments(natural), natural)

    # -- sampled ---------------------------------------------------------------------------------------------

    def sampled(self, name: str, beliefs: Beliefs, draws: Draws) -> Tensor:
        """The target with the messages of the block's other factors estimated from draws."""
        natural = beliefs.naturals[name]
        wide = (
            self.narrowed(name, beliefs) if draws.size == 0 and is_gaussian(self.blocks[name].family) else beliefs
        ).wide
        message = self.messages.exact_message(name, natural, wide).to(natural.dtype)
        self.hessians.pop(name, None)
        message = message + self.sampled_message(name, beliefs, draws).to(natural.dtype)
        target = self._share(name, natural, message)
        if name not in self.hessians:
            return target
        hessian = self.hessians[name] / self.blocks[name].scale
        return moved_together(self.blocks[name].family, beliefs.wide[name]["mean"], target, hessian)

    def sampled_message(self, name: str, beliefs: Beliefs, draws: Draws) -> Tensor:
        """Σ_f s_f ∇_μ E_q[log f] over the block's factors that need draws, of this block or of others."""
        plans = self.messages.plans
        factors = self.messages.sampled_factors(name)
        leaves = self._leaves(factors, beliefs, draws)
        pieces = [f for f in factors if name in plans[f].sampled]
        given = [f for f in factors if name not in plans[f].sampled]
        message = torch.zeros_like(beliefs.naturals[name])
        if pieces:
            message = message + self._through_draws(name, beliefs, pieces, leaves, draws)
        if given:
            message = message + self._given_draws(name, beliefs, given, leaves)
        return message

    def _leaves(self, factors: Sequence[str], beliefs: Beliefs, draws: Draws) -> dict[str, Tensor]:
        drawn = list(dict.fromkeys(b for f in factors for b in self.messages.plans[f].sampled))
        leaves = draws.leaves(self.blocks, drawn, beliefs, self._every)
        count = max((leaf.shape[0] for leaf in leaves.values()), default=1)
        return {
            b: leaf if leaf.shape[0] == count else leaf[:1].expand(count, *leaf.shape[1:]) for b, leaf in leaves.items()
        }

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
        messages, block, natural = self.messages, self.blocks[name], beliefs.naturals[name]
        mine = leaves[name]
        others = {b: leaf for b, leaf in leaves.items() if b != name}
        elements = messages.elements(factors)
        moments = dict(beliefs.moments)  # made here: what a transform of `function` makes must not outlive it

        def function(leaf: Tensor, other: Any) -> Tensor:
            total = messages.expected_log_prob(factors, moments, {**other, name: leaf})
            jacobian = block.log_jacobian(leaf)
            if jacobian is not None:
                total = total + block.scale * jacobian.sum(dtype=torch.float64)
            return total.to(leaf.dtype) if leaf.is_floating_point() else total

        if block.is_discrete:
            return self._discrete_message(name, natural, function, mine, others)
        order = self._smoothness(name, function, beliefs, factors, elements)
        if order == 0:
            with torch.no_grad():
                values = batched(function, mine, others, elements)
            return score_function(
                block.family,
                natural,
                values.detach().to(natural.dtype),
                block.statistics(mine).to(natural.dtype),
            )
        if is_gaussian(block.family):
            gradients = bonnet_price(
                function, beliefs.moments[name], mine, others, draws.seed, elements, twice=order == 2
            )
            self.controls[name] = gradients
            if "hessian" in gradients:
                self.hessians[name] = gradients["hessian"]
            return block.family.message(natural, {key: g.double() for key, g in gradients.items()})
        path = draws.path(self.blocks, name, beliefs, self._every)
        message = reparameterised(function, block.family, natural, path, others, elements, mine.dtype)
        self.controls[name] = {"statistics": message}
        return message

    def _discrete_message(
        self, name: str, natural: Tensor, function: Callable, mine: Tensor, others: Mapping[str, Tensor]
    ) -> Tensor:
        """A discrete block that only runs of the model can evaluate: every state of every element where that
        is cheap.
        """
        block = self.blocks[name]
        runs = mine[0].numel() * block.num_states
        if runs <= _REPLAYED_STATES and not block.family.event_shape:
            count = min(mine.shape[0], -(-_REPLAYED_RUNS // runs)) if others or mine[0].numel() > 1 else 1
            kept = {other: leaf[:count] for other, leaf in others.items()}
            with torch.no_grad():
                table = enumerated(function, block.num_states, mine[:count], kept)
            return block.family.message(natural, {"probs": table.to(natural.dtype)})
        values = torch.stack([function(mine[s], _at(others, s)) for s in range(mine.shape[0])])
        statistics = block.family.sufficient_statistics(mine).to(natural.dtype)
        return score_function(block.family, natural, values.detach().to(natural.dtype), statistics)

    def _smoothness(
        self, name: str, function: Callable, beliefs: Beliefs, factors: Sequence[str], elements: int
    ) -> int:
        """How many derivatives of the block's sampled factors are to be believed, seen once between draws of
        a wide q.
        """
        if name not in self._orders:
            wide = beliefs.copy()
            for point in (*beliefs.points, name):
                if is_gaussian(self.blocks[point].family):
                    width = unit_width(beliefs.wide[point])
                    if not any(bool(beliefs.wide[point][key].any()) for key in width):  # a value to start from, a mean
                        wide.set_moments(point, {**beliefs.wide[point], **width})
            leaves = self._leaves(factors, wide, Draws(7, 16))
            others = {b: leaf for b, leaf in leaves.items() if b != name}
            self._orders[name] = smoothness(function, leaves[name], others, elements)
        return self._orders[name]

    def sampled_bound(
        self, beliefs: Beliefs, draws: Draws, factors: Sequence[str] | None = None, controlled: bool = False
    ) -> Tensor:
        """Estimates of Σ_f s_f log f over the sampled factors, log-Jacobians included, one for each draw;
        shape (S,).

        `controlled` subtracts the blocks' last messages, ⟨m, T(u) − μ⟩, which average to zero: what is left
        is almost constant.
        """
        messages = self.messages
        if factors is None:
            factors = [name for name, plan in messages.plans.items() if not plan.deterministic]
        leaves = self._leaves(factors, beliefs, draws)
        values = messages.average_over(factors, beliefs.moments, leaves)
        for name, leaf in leaves.items():
            block = self.blocks[name]
            if block.log_jacobian(leaf[0]) is not None:
                jacobian = batched(lambda u, _, block=block: block.log_jacobian(u).sum(dtype=torch.float64), leaf, {})
                values = values + block.scale * jacobian
            if controlled and name in self.controls:
                values = values - self._control(name, beliefs, leaf)
        return values

    def _control(self, name: str, beliefs: Beliefs, leaf: Tensor) -> Tensor:
        """⟨m, T(u) − μ⟩ for stacked draws, (S,); a Gaussian's in differences from its mean, ∇_m·δ + δᵀ ∇_V δ
        − tr(∇_V V).
        """
        control, moments = self.controls[name], beliefs.moments[name]
        if "statistics" in control:
            family, natural = self.blocks[name].family, beliefs.naturals[name]
            spread = family.sufficient_statistics(leaf.to(natural.dtype)) - family.to_expectation(natural)
            return (spread * control["statistics"]).reshape(leaf.shape[0], -1).sum(-1)
        apart = leaf - moments["mean"]
        key = "covariance" if "covariance" in control else "variance"
        gradient = control[key]
        bent = torch.einsum("...ij,s...j->s...i", gradient, apart) if key == "covariance" else apart * gradient
        value = apart * (control["mean"] + bent)
        return value.reshape(leaf.shape[0], -1).sum(-1, dtype=torch.float64) - (gradient * moments[key]).sum(
            dtype=torch.float64
        )

    def narrowed(self, name: str, beliefs: Beliefs) -> Beliefs:
        """The same q with a Gaussian block's variance taken as zero."""
        narrow = beliefs.copy()
        narrow.set_moments(
            name, {key: v if key == "mean" else torch.zeros_like(v) for key, v in beliefs.wide[name].items()}
        )
        return narrow

    def at_mean(self, name: str, beliefs: Beliefs) -> float:
        """Σ_f s_f E[log f | u = its mean] over a Gaussian block's factors, E over the other blocks: what
        Newton's method climbs.
        """
        narrow = self.narrowed(name, beliefs)
        exact = [f for f in self.messages.factors_of[name] if self.messages.plans[f].deterministic]
        total = self.messages.expected_log_prob(exact, narrow.wide)
        total = total + self.messages.expected_log_jacobian([name], narrow.wide)
        if isinstance(self.blocks[name].family, LogNormal):  # of log x, whose mode it is
            total = total + self.blocks[name].scale * narrow.wide[name]["mean"].sum()
        return float(
            (total + self.sampled_bound(narrow, Draws(0, 0), self.messages.sampled_factors(name)).mean()).detach()
        )


def _at(tree: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
    return {key: value[index] for key, value in tree.items()}
