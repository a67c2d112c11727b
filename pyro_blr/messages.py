"""The sum of messages: Σ_f s_f ∇_{μ_i} E_q[log f], and the bound it is the gradient of."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_blr.arguments import Moments
from pyro_blr.averages import FactorAverage
from pyro_blr.batches import batched
from pyro_blr.blocks import Block
from pyro_blr.families import MultivariateNormal, SparseNormal
from pyro_blr.graph import FactorGraph
from pyro_blr.integrals import FactorIntegral, log_jacobian
from pyro_blr.plans import FactorPlan
from pyro_blr.replays import Replays
from pyro_blr.tape import Ref

__all__ = ["Messages"]

ROUGH = 1e-5  # of the average magnitude of the rows: quadrature on the way to an optimum


@dataclass
class Messages:
    """The factors of one run of a model, ready to be averaged under q.

    `natural`s here are those of the elements in this run, `moments` the families' named expectations.
    """

    graph: FactorGraph
    blocks: Mapping[str, Block]
    plans: Mapping[str, FactorPlan]
    replay: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]

    def __post_init__(self) -> None:
        self.replays = Replays(self.graph, self.blocks, self.plans, self.replay)
        self.averages = {name: FactorAverage(self.graph, self.blocks, plan) for name, plan in self.plans.items()}
        self.factors_of: dict[str, list[str]] = {name: [] for name in self.blocks}
        for name, plan in self.plans.items():
            for block in plan.blocks:
                self.factors_of[block].append(name)

    @property
    def device(self) -> torch.device:
        """Where the sites are, and with them λ and every sum."""
        return next(iter(self.blocks.values())).device

    def is_exact(self, block: str) -> bool:
        """Whether every message to the block is in closed form."""
        return all(self.plans[name].exact for name in self.factors_of[block])

    def sampled_factors(self, block: str) -> list[str]:
        """The block's factors that need draws."""
        return [name for name in self.factors_of[block] if not self.plans[name].deterministic]

    def drawn(self, block: str) -> bool:
        """Whether some factor is averaged over draws of the block, and its log-Jacobian with it."""
        return any(block in self.plans[name].sampled for name in self.factors_of[block])

    @property
    def quadrature_error(self) -> float | None:
        """Nats that the integrals of all factors may be off together, as last seen; None before any was taken."""
        errors = [integral.error for integral in self._integrals if integral.error is not None]
        return sum(errors) if errors else None

    @property
    def quadrature_noise(self) -> float:
        """Nats by which integrals over random points may contradict their own derivatives."""
        return sum(integral.noise for integral in self._integrals)

    def refine(self) -> bool:
        """More random points from now on where that is worth while; whether it is anywhere."""
        return any([integral.refine() for integral in self._integrals])

    @contextlib.contextmanager
    def rough(self, tolerance: float = ROUGH) -> Iterator[None]:
        """Quadrature no finer than this inside: wide q, far from any optimum, costs many times what q at the optimum does."""
        integrals = self._integrals
        before = [integral.tolerance for integral in integrals]
        for integral in integrals:
            integral.tolerance = max(integral.tolerance, tolerance)
        try:
            yield
        finally:
            for integral, fine in zip(integrals, before, strict=True):
                integral.tolerance = fine

    def saved(self) -> list[Callable[[], None]]:
        """What puts the integrals' points and errors back as they are now."""
        return [integral.saved() for integral in self._integrals]

    @property
    def _integrals(self) -> list[FactorIntegral]:
        return [average.integral for average in self.averages.values() if average.integral is not None]

    def is_coupled(self, block: str) -> bool:
        """Whether some factor combines several batch elements of a Gaussian block, which q holds to be independent."""
        event = 1 if isinstance(self.blocks[block].family, (MultivariateNormal, SparseNormal)) else 0
        return any(
            dim < -event
            for name in self.factors_of[block]
            for argument in self.plans[name].all_arguments
            for dim in argument.mixed.get(block, ())
        )

    def masked(self, block: str) -> Tensor | None:
        """The batch elements that the model masks out at the site's own statement; None where there is no mask."""
        if self.blocks[block].is_joint:
            return None
        factor = self.graph.factors[self.blocks[block].site_names[0]]
        inner = factor.constructed.mask if factor.constructed is not None else None
        masks = [m for m in (factor.mask, inner) if m is not None and not isinstance(m, Ref) and m is not True]
        if not masks:
            return None
        mask = torch.ones((), dtype=torch.bool, device=self.blocks[block].device)
        for item in masks:
            wide = torch.as_tensor(item, dtype=torch.bool, device=mask.device)
            if item is inner:
                mask = mask & self._masked_elements(block, wide)
            else:
                mask = mask & wide.reshape(wide.shape + (1,) * self.blocks[block].elements)
        return ~mask.expand(self.blocks[block].batch_shape)

    def _masked_elements(self, block: str, mask: Tensor) -> Tensor:
        """A distribution's own mask, before `to_event`: an element of q is heard where any entry of its event is."""
        constructed = self.graph.factors[self.blocks[block].site_names[0]].constructed
        assert constructed is not None
        within = constructed.reinterpreted - self.blocks[block].elements
        return mask.expand(constructed.batch_shape).flatten(-within).any(-1) if within > 0 else mask

    @functools.cached_property
    def are_separate(self) -> bool:
        """Whether no factor joins two blocks, nor several elements of one: what is exact is then exact together."""
        return not any(self.neighbours(name) or self.is_coupled(name) for name in self.blocks)

    def neighbours(self, block: str) -> set[str]:
        """Blocks that share a factor with this one."""
        return {other for name in self.factors_of[block] for other in self.plans[name].blocks} - {block}

    def exact_message(
        self, block: str, natural: Tensor, moments: Moments, factors: Iterable[str] | None = None
    ) -> Tensor:
        """Σ_f s_f ∇_μ E_q[log f] over the block's factors in closed form or by quadrature; shape of λ."""
        factors = (
            [name for name in self.factors_of[block] if self.plans[name].deterministic] if factors is None else factors
        )
        if self.blocks[block].is_discrete:
            with torch.no_grad():
                scores = self.state_table(block, moments, factors).to(natural.dtype)
                return self.blocks[block].family.message(natural, {"probs": scores})
        leaves = {key: value.detach().requires_grad_() for key, value in moments[block].items()}
        with torch.enable_grad():
            total = self.expected_log_prob(factors, {**moments, block: leaves})
            total = total + self.expected_log_jacobian([block], {**moments, block: leaves})
            gradients: tuple = (None,) * len(leaves)
            if total.requires_grad:
                gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        found = {key: g.to(natural.dtype) for key, g in zip(leaves, gradients, strict=True) if g is not None}
        with torch.no_grad():
            return self.blocks[block].family.message(natural, found)

    def expected_log_prob(
        self, factors: Iterable[str], moments: Moments, samples: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Σ_f s_f E_q[log f] over some factors, a float64 scalar."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        replayed = [name for name in factors if self.plans[name].replayed]
        for name in factors:
            if name not in replayed:
                total = total + self.averages[name].total(moments, samples or {})
        if replayed:
            total = total + self.replays.total(replayed, moments, samples or {})
        return total

    def expected_log_jacobian(self, names: Iterable[str], moments: Moments) -> Tensor:
        """Σ_i s_i E log|dx_i/du_i| over blocks that no factor draws, a float64 scalar."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for name in names:
            if not self.blocks[name].is_discrete and not self.drawn(name):
                total = total + self.blocks[name].scale * log_jacobian(self.blocks[name], moments[name])
        return total

    def state_table(self, block: str, moments: Moments, factors: Iterable[str]) -> Tensor:
        """Σ_f s_f E_q[log f | state], (*batch, K): the gradient in the probabilities of a discrete block."""
        factors = list(factors)
        replayed = [name for name in factors if self.plans[name].replayed]
        tables = [self.averages[name].state_scores(block, moments) for name in factors if name not in replayed]
        if replayed:
            tables.append(self.replays.state_scores(replayed, block, moments))
        probs = moments[block]["probs"]
        return (
            functools.reduce(torch.add, [table.to(probs.dtype) for table in tables])
            if tables
            else torch.zeros_like(probs)
        )

    def average_over(self, factors: Sequence[str], moments: Moments, leaves: Mapping[str, Tensor]) -> Tensor:
        """Σ_f s_f E_q[log f] given each of the stacked draws `leaves`; shape (S,)."""
        if not leaves:
            return self.expected_log_prob(factors, moments).unsqueeze(0)
        count = max(leaf.shape[0] for leaf in leaves.values())
        leaves = {k: v if v.shape[0] == count else v[:1].expand(count, *v.shape[1:]) for k, v in leaves.items()}
        names = list(leaves)
        return batched(
            lambda leaf, other: self.expected_log_prob(factors, moments, {**other, names[0]: leaf}),
            leaves[names[0]],
            {name: leaves[name] for name in names[1:]},
            self.elements(factors),
        )

    def elements(self, factors: Iterable[str]) -> int:
        """The numbers in the largest intermediate result of one evaluation of the factors."""
        largest = 1
        for name in factors:
            factor = self.plans[name].factor
            made = factor.constructed
            outputs = [factor.value, factor.scale, factor.mask, *(made.arguments.values() if made is not None else ())]
            outputs += [argument.ref for argument in self.plans[name].arguments]
            shapes = [self.graph.tape.nodes[index].shape or () for index in self.graph.tape.needed(outputs)]
            states = math.prod(self.blocks[block].num_states for block in self.plans[name].enumerated)
            largest = max(largest, states * max(map(math.prod, [factor.distribution.shape(), *shapes])))
        return largest

    def entropy(
        self, naturals: Mapping[str, Tensor], silent: Mapping[str, Tensor] | None = None, moments: Moments | None = None
    ) -> Tensor:
        """Σ_i s_i H(q_i), in the block's own variable, without silent elements; a float64 scalar.  `moments` are λ's own, if at hand."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for name, block in self.blocks.items():
            if moments is None or not block.is_discrete:
                entropy = block.family.entropy(naturals[name])
            else:
                entropy = block.family.entropy_from(naturals[name], moments[name])
            if silent is not None and name in silent:
                entropy = torch.where(silent[name], 0.0, entropy)
            if block.copies is not None:
                entropy = entropy * block.copies
            total = total + block.scale * entropy.sum(dtype=torch.float64)
        return total
