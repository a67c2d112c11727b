"""The sum of messages: Σ_f s_f ∇_{μ_i} E_q[log f], and the bound it is the gradient of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_blr.averages import FactorAverage, Moments
from pyro_blr.blocks import Block
from pyro_blr.conjugacy import FactorPlan
from pyro_blr.graph import FactorGraph

__all__ = ["Messages"]


@dataclass
class Messages:
    """The factors of one run of a model, ready to be averaged under q.

    `natural`s here are those of the elements in this run, `moments` the families' named expectations.
    """

    graph: FactorGraph
    blocks: Mapping[str, Block]
    plans: Mapping[str, FactorPlan]

    def __post_init__(self) -> None:
        self.averages = {name: FactorAverage(self.graph, self.blocks, plan) for name, plan in self.plans.items()}
        self.factors_of: dict[str, list[str]] = {name: [] for name in self.blocks}
        for name, plan in self.plans.items():
            for block in plan.blocks:
                self.factors_of[block].append(name)

    def is_exact(self, block: str) -> bool:
        """Whether every message to the block is in closed form."""
        return all(self.plans[name].exact for name in self.factors_of[block])

    def neighbours(self, block: str) -> set[str]:
        """Blocks that share a factor with this one."""
        return {other for name in self.factors_of[block] for other in self.plans[name].blocks} - {block}

    def exact_message(self, block: str, natural: Tensor, moments: Moments, factors: Iterable[str] | None = None) -> Tensor:
        """Σ_f s_f ∇_μ E_q[log f] over the block's exact factors, in closed form; shape of λ."""
        factors = [name for name in self.factors_of[block] if self.plans[name].exact] if factors is None else factors
        leaves = {key: value.detach().requires_grad_() for key, value in moments[block].items()}
        with torch.enable_grad():
            total = self.expected_log_prob(factors, {**moments, block: leaves})
            gradients: tuple = (None,) * len(leaves)
            if total.requires_grad:
                gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        found = {key: g for key, g in zip(leaves, gradients, strict=True) if g is not None}
        with torch.no_grad():
            return self.blocks[block].family.message(natural, found)

    def expected_log_prob(self, factors: Iterable[str], moments: Moments, samples: Mapping[str, Tensor] | None = None) -> Tensor:
        """Σ_f s_f E_q[log f] over some factors, a float64 scalar."""
        total = torch.zeros((), dtype=torch.float64)
        for name in factors:
            total = total + self.averages[name].total(moments, samples or {}).to(total.device)
        return total

    def entropy(self, naturals: Mapping[str, Tensor]) -> Tensor:
        """Σ_i s_i H(q_i), in the block's own variable; a float64 scalar."""
        total = torch.zeros((), dtype=torch.float64)
        for name, block in self.blocks.items():
            entropy = block.family.entropy(naturals[name]).sum(dtype=torch.float64)
            total = total + block.scale * entropy.to(total.device)
        return total
