"""E_q[log f] of factors that only running the model can evaluate: their expressions do not hold what it does with a latent."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyro_blr.arguments import Moments
from pyro_blr.blocks import Block
from pyro_blr.families import Categorical
from pyro_blr.graph import FactorGraph
from pyro_blr.plans import FactorPlan

__all__ = ["Replays"]


@dataclass
class Replays:
    """The model, run again: at the draws of some blocks, at every joint state of the discrete ones that are enumerated."""

    graph: FactorGraph
    blocks: Mapping[str, Block]
    plans: Mapping[str, FactorPlan]
    replay: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
    _tables: dict[tuple[str, ...], dict[tuple[int, ...], dict[str, Tensor]]] = field(default_factory=dict)

    def total(self, factors: Sequence[str], moments: Moments, samples: Mapping[str, Tensor]) -> Tensor:
        """Σ_f s_f E_q[log f], a float64 scalar: Σ_states q(states) log f(states, draws)."""
        total = torch.zeros((), dtype=torch.float64)
        groups: dict[tuple[str, ...], list[str]] = {}
        for name in factors:
            groups.setdefault(self.plans[name].enumerated, []).append(name)
        for enumerated, names in groups.items():
            for states, log_probs in self._runs(enumerated, samples):
                value = sum(log_probs[name].sum(dtype=torch.float64) for name in names)
                total = total + self._weight(enumerated, states, moments) * value
        return total

    def state_scores(self, factors: Sequence[str], block: str, moments: Moments) -> Tensor:
        """Σ_f s_f E_q[log f | state of a block], (*batch, K)."""
        probs = moments[block]["probs"].detach().requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad(self.total(factors, {**moments, block: {"probs": probs}}, {}), probs)[0]

    def _runs(
        self, enumerated: tuple[str, ...], samples: Mapping[str, Tensor]
    ) -> Iterator[tuple[tuple[int, ...], Mapping[str, Tensor]]]:
        """(states, log probabilities of all factors) for every joint state; kept where they can never change."""
        fixed = not samples and not self.graph.params
        if fixed and enumerated in self._tables:
            yield from self._tables[enumerated].items()
            return
        table = {}
        for states in itertools.product(*(range(self.blocks[name].num_states) for name in enumerated)):
            values = {**self.graph.values, **self._drawn(samples)}
            for name, state in zip(enumerated, states, strict=True):
                values.update(self._at_state(name, state))
            log_probs = dict(self.replay(values))
            if fixed:
                table[states] = log_probs
            yield states, log_probs
        if fixed:
            self._tables[enumerated] = table

    def _weight(self, enumerated: Iterable[str], states: Iterable[int], moments: Moments) -> Tensor:
        weight = torch.ones((), dtype=torch.float64)
        for name, state in zip(enumerated, states, strict=True):
            weight = weight * moments[name]["probs"].reshape(-1)[state].double()
        return weight

    def _drawn(self, samples: Mapping[str, Tensor]) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        for name, leaf in samples.items():
            block = self.blocks[name]
            values.update(self._states(name, leaf) if block.is_discrete else block.values(leaf))
        return values

    def _at_state(self, name: str, state: int) -> dict[str, Tensor]:
        block = self.blocks[name]
        assert block.states is not None
        site = block.sites[0]
        return {site.name: block.states[state].to(device=site.device, dtype=site.dtype).expand(site.shape).clone()}

    def _states(self, name: str, leaf: Tensor) -> dict[str, Tensor]:
        block = self.blocks[name]
        assert block.states is not None
        site = block.sites[0]
        if isinstance(block.family, Categorical) and not block.family.one_hot:
            leaf = block.states.to(leaf.device)[leaf]
        return {site.name: leaf.to(site.dtype)}
