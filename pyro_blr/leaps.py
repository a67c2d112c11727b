"""Leaps: where sweeps that creep would settle, if a sweep were an affine map of λ (Anderson acceleration)."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_blr.ascent import Ascent
from pyro_blr.beliefs import Beliefs
from pyro_blr.blocks import Block
from pyro_blr.draws import Draws
from pyro_blr.estimators import standard_error

__all__ = ["PATIENCE", "SOON", "Leaps", "Step", "longest", "moved_nats"]

PATIENCE = 10  # sweeps before the first leap: most models have settled then, or are still far away
SOON = 3  # the same on draws, where a sweep costs a Hessian a draw and a leap one value
MEMORY = 10  # differences of sweeps that a leap is made from
LARGEST = 200_000  # numbers in λ at most: a leap keeps some thirty copies
_LONGEST = 100.0  # nats of a move for every unknown: a log density far out may be all rounding, and look like a gain
_LONGEST_WAIT = 8  # sweeps after a leap that was refused
_RIDGE = 1e-12  # beside a Gram matrix with a diagonal of ones


@dataclass(frozen=True)
class Step:
    """The λ at which a full step begins, its change f = (G(λ) − λ) / ρ, and that of s_i μ_i; all blocks in one vector (p)."""

    start: Tensor
    natural: Tensor
    expectation: Tensor

    @staticmethod
    def between(
        blocks: Mapping[str, Block], start: Mapping[str, Tensor], end: Mapping[str, Tensor], rate: float = 1.0
    ) -> Step:
        """From `start` to `end`, block -> λ, at the rate ρ."""
        apart = {name: (end[name] - start[name]) / rate for name in blocks}
        changes = {
            name: (block.family.to_expectation(end[name]) - block.family.to_expectation(start[name]))
            * (block.scale / rate)
            for name, block in blocks.items()
        }
        return Step(_joined(blocks, start), _joined(blocks, apart), _joined(blocks, changes))

    def overlap(self, before: Step) -> float:
        """⟨this, before⟩ / ⟨before, before⟩ in the Fisher metric: negative where steps overshoot.

        Steps that shrink by q at rate ρ along one direction vanish at the rate ρ / (1 − q).
        """
        size = float(before.natural @ before.expectation)
        ratio = float(self.natural @ before.expectation) / size if size > 0 else 1.0
        return ratio if math.isfinite(ratio) else 1.0


@dataclass(frozen=True)
class Leaps:
    """λ_k + ρ f_k − Σ_j γ_j (Δλ_j + ρ Δf_j) with γ = argmin ‖f_k − Σ_j γ_j Δf_j‖ in the Fisher metric, Δλ · Δμ.

    (Anderson 1965; Walker and Ni 2011, eq. 2.2.)  A leap is kept where λ is inside its domain and the bound no lower than where
    the leap began, so that a bound which rises goes on rising; on draws by no more than one standard error of the difference.
    """

    patience: int = PATIENCE
    seen: int = 0  # sweeps
    steps: tuple[Step, ...] = ()
    wait: int = 0  # sweeps before the next leap
    pause: int = 0  # of the last wait

    @staticmethod
    def of(ascent: Ascent, patience: int = PATIENCE) -> Leaps:
        """Leaps of this q; none, however long the climb, where λ is very large."""
        size = sum(natural.numel() for natural in ascent.beliefs.naturals.values())
        return Leaps(patience if size <= LARGEST else sys.maxsize)

    @property
    def is_waiting(self) -> bool:
        """Whether there is no leap yet, so that nothing need be remembered either."""
        return self.seen < self.patience - 2

    def after(self, step: Step | None) -> Leaps:
        """The same after another sweep, of which nothing need be known while there is no leap yet."""
        steps = () if self.is_waiting or step is None else (*self.steps[-MEMORY:], step)
        return replace(self, seen=self.seen + 1, steps=steps, wait=max(0, self.wait - 1))

    def leap(
        self, ascent: Ascent, draws: Draws | None, rate: float, before: Tensor | float
    ) -> tuple[Tensor | None, Leaps]:
        """Moves q, and returns the bound's estimates there; None where it stays, since they would be lower than `before`."""
        if self.seen < self.patience or len(self.steps) < 2 or self.wait > 0:
            return None, self
        naturals, kept = self._destination(ascent, rate), ascent.beliefs
        if naturals is not None:
            ascent.beliefs = kept.copy()
            for name, natural in naturals.items():
                ascent.beliefs.update(name, natural)
            with contextlib.suppress(torch.linalg.LinAlgError):
                values = ascent.finite_estimates(draws)
                gain = values - before if values is not None else torch.full((1,), -math.inf)
                if float(gain.mean()) >= -standard_error(gain) and moved_nats(ascent, kept) < longest(ascent):
                    return values, replace(self, pause=0)
            ascent.beliefs = kept
        pause = min(2 * self.pause + 1, _LONGEST_WAIT)
        return None, replace(self, pause=pause, wait=pause + 1)

    def _destination(self, ascent: Ascent, rate: float) -> dict[str, Tensor] | None:
        """λ of every block; None where it would leave its domain."""
        weights = self._weights()
        ends = torch.stack([step.start + rate * step.natural for step in self.steps])
        whole = ends[-1] - weights.to(ends) @ ends.diff(dim=0)
        if not bool(torch.isfinite(whole).all()):
            return None
        naturals, start = {}, 0
        for name, block in ascent.program.blocks.items():
            shape = block.batch_shape + (block.family.num_parameters,)
            naturals[name] = whole[start : start + shape.numel()].reshape(shape)
            start += shape.numel()
            if not bool(block.family.contains(naturals[name]).all()):
                return None
        return naturals

    def _weights(self) -> Tensor:
        """γ, (memory)."""
        apart = torch.stack([step.natural for step in self.steps])
        products = apart @ torch.stack([step.expectation for step in self.steps]).mT
        products = 0.5 * (products + products.mT).cpu()
        gram, right = products.diff(dim=0).diff(dim=1), products[:, -1].diff()
        unit = gram.diagonal().abs().clamp_min(torch.finfo(gram.dtype).tiny).rsqrt()
        white = unit.unsqueeze(-1) * gram * unit + _RIDGE * torch.eye(len(gram), dtype=gram.dtype)
        return unit * torch.linalg.lstsq(white, (unit * right).unsqueeze(-1)).solution.squeeze(-1)


def _joined(blocks: Mapping[str, Block], tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].double().flatten() for name in blocks])


def longest(ascent: Ascent) -> float:
    """How many nats a move may take q."""
    return _LONGEST * sum(b.batch_shape.numel() * b.num_directions for b in ascent.program.blocks.values())


def moved_nats(ascent: Ascent, start: Beliefs) -> float:
    """Σ_i s_i KL(q_i ‖ q_i before)."""
    total = 0.0
    for name, block in ascent.program.blocks.items():
        new, old = ascent.beliefs.naturals[name], start.naturals[name]
        if new is not old:
            kl = float(block.scale * block.family.kl(new, old).sum(dtype=torch.float64))
            total += max(kl, 0.0) if math.isfinite(kl) else math.inf
    return total
