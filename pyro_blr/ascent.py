"""Sweeps: every block to its target, exact blocks at ρ = 1, others by safeguarded steps; the bound never falls unseen."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyro_blr.beliefs import Beliefs
from pyro_blr.checks import ImproperPosteriorError, check_natural
from pyro_blr.draws import Draws
from pyro_blr.estimators import standard_error
from pyro_blr.program import Program
from pyro_blr.quadrature import TOLERANCE
from pyro_blr.rules import BLR, gap
from pyro_blr.targets import Targets

__all__ = ["Ascent"]


class Ascent:
    """One run of the model and q on it, on the way up."""

    rule = BLR()

    def __init__(self, program: Program, beliefs: Beliefs, last: Sequence[str] = ()):
        self.program, self.beliefs = program, beliefs
        self.targets = Targets(program.messages, program.orders)
        self._bound: float | None = None
        self.bound_se = 0.0
        self.astray = 0.0  # nats between λ and targets outside the domain, since it was last set to zero
        self.last = list(last)  # updated last in a sweep: blocks whose start is given

    @property
    def bound_kind(self) -> str:
        if not self.program.is_deterministic or self.program.is_subsampled:
            return "estimate ± standard error"
        if not self.program.is_exact:
            error = self.program.messages.quadrature_error
            return "bound by quadrature" + (f", within {_power_of_ten(error)} nats" if error is not None else "")
        is_evidence = self.program.messages.are_separate and not self.program.is_confined
        return "exact evidence" if is_evidence else "exact bound"

    @property
    def order(self) -> list[str]:
        """Blocks in model order, those whose start is given last."""
        names = list(self.program.blocks)
        return [n for n in names if n not in self.last] + [n for n in names if n in self.last]

    def saved(self) -> Callable[[], None]:
        """What puts q, its bound, and all that the next sweep depends on back as they are now."""
        beliefs, bound = self.beliefs.copy(), (self._bound, self.bound_se, self.astray)
        targets, sweeps = self.targets, self.program.sweeps
        controls, hessians, count = dict(targets.controls), dict(targets.hessians), sweeps.count
        integrals = self.program.messages.saved()

        def restore() -> None:
            self.beliefs, (self._bound, self.bound_se, self.astray) = beliefs.copy(), bound
            targets.controls, targets.hessians, sweeps.count = dict(controls), dict(hessians), count
            for integral in integrals:
                integral()

        return restore

    # -- the equation -------------------------------------------------------------------------------------------------

    def sweep(self, names: list[str] | None = None, draws: Draws | None = None, rate: float = 1.0) -> None:
        """λ_i ← (1 − ρ) λ_i + (ρ / s_i) Σ_f s_f ∇_{μ_i} E_q[log f], one block after the other."""
        if names is None and rate == 1.0 and not self.beliefs.points and self._replayed_sweep():
            return
        for name in self.order if names is None else names:
            target = self.target(name, draws)
            self.move(name, target, rate)
        self._bound = None

    def _replayed_sweep(self) -> bool:
        """The same sweep as a flat list of operations, on a small model that has been swept often; False where it is not."""
        record = self.program.sweeps
        found = record.ready(self.pure_sweep, tuple(self.order), list(self.beliefs.naturals.values()))
        if found is None:
            return False
        *naturals, bound = found(*self.beliefs.naturals.values())
        self._bound = float(bound)
        if not math.isfinite(self._bound):
            return False  # the sweep below says which site left its domain
        for name, natural in zip(list(self.beliefs.naturals), naturals, strict=True):
            self.beliefs.update(name, natural)
        return True

    def pure_sweep(self, *naturals: Tensor) -> tuple[Tensor, ...]:
        """λ of every block ↦ λ after a sweep over exact blocks, and the bound there; not finite where a λ has left its domain."""
        before = dict(zip(self.beliefs.naturals, naturals, strict=True))
        ascent = Ascent(self.program, Beliefs(self.program.blocks, before), self.last)
        inside = []
        for name in self.order:
            target = ascent.target(name, None)
            inside.append(self.program.blocks[name].family.contains(target).all())
            ascent.beliefs.update(name, target)
        bound = ascent.estimates(None).squeeze(0)
        return *ascent.beliefs.naturals.values(), torch.where(torch.stack(inside).all(), bound, math.nan)

    def target(self, name: str, draws: Draws | None) -> Tensor:
        messages = self.program.messages
        if messages.sampled_factors(name):
            assert draws is not None
            return self.targets.sampled(name, self.beliefs, draws)
        if messages.is_coupled(name):
            exact = messages.is_exact(name)
            return (self.targets.coupled if exact else self.targets.together)(name, self.beliefs)
        return self.targets.exact(name, self.beliefs)

    def target_at_mean(self, name: str) -> Tensor:
        """The target with a Gaussian block's factors taken at its mean: where Newton's method moves it to."""
        if self.program.messages.sampled_factors(name):
            return self.target(name, Draws(0, 0))
        beliefs = self.beliefs
        self.beliefs = self.targets.narrowed(name, beliefs)
        try:
            return self.target(name, None)
        finally:
            self.beliefs = beliefs

    def move(self, name: str, target: Tensor, rate: float) -> None:
        block = self.program.blocks[name]
        if self.program.messages.is_exact(name):
            check_natural(block, target)
            if rate == 1.0:
                self.beliefs.update(name, target)
                return
        elif not bool(torch.isfinite(target).all()):
            raise ImproperPosteriorError(
                f"site {' and '.join(map(repr, block.site_names))}: found NaN or infinite messages from draws, expected finite ones. "
                "Check that the model's log density is finite at the draws of q (init, init_loc_fn), and its gradient too"
            )
        outside = ~block.family.contains(target)
        if bool(outside.any()):  # the step is bent, and its length says nothing about the distance
            nats = gap(block.family, self.beliefs.naturals[name], target)[outside]
            self.astray += block.scale * float(nats.sum(dtype=torch.float64))
        self.beliefs.update(name, self.rule.step(block.family, self.beliefs.naturals[name], target, rate))

    def refuse_improper(self, seed: int, size: int, settled: bool) -> None:
        """Raises where a climb ended and its target is outside the family, for any draws: the posterior is improper there.

        At an optimum λ is its own target.  A target that noise has thrown out of the domain is not far outside, nor twice.
        """
        for name in self.order:
            block, natural = self.program.blocks[name], self.beliefs.naturals[name]
            if self.program.messages.is_exact(name) or block.within or block.batch_shape.numel() > 10_000:
                continue
            inside = torch.zeros(block.batch_shape, dtype=torch.bool, device=natural.device)
            for attempt in (0, 1):
                target = self.target(name, Draws(seed + attempt, size))
                towards = natural + 0.75 * (target - natural) if settled else target
                inside = inside | block.family.contains(towards)
                if bool(inside.all()):
                    break
            else:
                check_natural(block, torch.where(inside.unsqueeze(-1), natural, towards))

    # -- the bound ------------------------------------------------------------------------------------------------------

    def take_bound(self, bound: float) -> None:
        """The ELBO at the present q, known from the step before."""
        self._bound = bound

    def bound_before(self) -> float:
        """The ELBO at the present q (with `init` values standing as the narrow start they give)."""
        if self._bound is None:
            draws = None if self.program.is_deterministic else Draws(_isolated_seed(), 32)
            beliefs = self.beliefs
            if beliefs.points:
                self.beliefs = Beliefs(beliefs.blocks, beliefs.naturals)
            try:
                self._bound, self.bound_se = self.estimate(draws)
            finally:
                self.beliefs = beliefs
        return self._bound

    def measure(self, draws: Draws) -> None:
        """Sets the bound from these draws."""
        self._bound, self.bound_se = self.estimate(draws)

    def estimate(self, draws: Draws | None) -> tuple[float, float]:
        """(ELBO, its standard error): exact terms, plus the average of the sampled ones."""
        values = self.estimates(draws, controlled=True)
        return self._finite(float(values.mean())), standard_error(values)

    @torch.no_grad()
    def estimates(self, draws: Draws | None, controlled: bool = False) -> Tensor:
        """The ELBO from each draw, (S,): exact terms, plus the sampled ones given that draw."""
        messages = self.program.messages
        exact = [name for name, plan in self.program.messages.plans.items() if plan.deterministic]
        silent, moments = self._silent(), None if self.beliefs.points else self.beliefs.wide
        total = messages.expected_log_prob(exact, self.beliefs.wide)
        total = total + messages.expected_log_jacobian(self.program.blocks, self.beliefs.wide)
        total = total + messages.entropy(self.beliefs.naturals, silent, moments).to(total.device)
        if len(exact) == len(self.program.messages.plans):
            return total.unsqueeze(0)
        assert draws is not None
        return total + self.targets.sampled_bound(self.beliefs, draws, controlled=controlled)

    def expected_log_joint(self, draws: Draws | None) -> Tensor:
        """Σ_f s_f E_q[log f], differentiable in the model's parameters."""
        messages = self.program.messages
        exact = [name for name, plan in self.program.messages.plans.items() if plan.deterministic]
        total = messages.expected_log_prob(exact, self.beliefs.wide)
        total = total + messages.expected_log_jacobian(self.program.blocks, self.beliefs.wide)
        if draws is not None and len(exact) < len(self.program.messages.plans):
            total = total + self.targets.sampled_bound(self.beliefs, draws).mean()
        return total

    def finite_estimates(self, draws: Draws | None) -> Tensor | None:
        """`estimates`, or None where one is not finite."""
        values = self.estimates(draws)
        return values if bool(values.isfinite().all()) else None

    def _silent(self) -> dict[str, Tensor]:
        result: dict[str, Tensor] = {}
        for name in self.program.blocks:
            mask = self.program.messages.masked(name)
            if mask is not None:
                message = self.targets.exact(name, self.beliefs)
                same = (message == self.beliefs.naturals[name]).all(-1)
                result[name] = mask & same
        return result

    def _finite(self, bound: float) -> float:
        if math.isfinite(bound):
            return bound
        messages = self.program.messages
        for name, plan in self.program.messages.plans.items():
            if plan.deterministic:
                value = float(messages.expected_log_prob([name], self.beliefs.moments))
                if not math.isfinite(value):
                    raise ImproperPosteriorError(
                        f"factor {name!r}: found an expected log density of {value} under the present q, expected a finite one. "
                        f"Check its data and arguments, or start elsewhere (init={{site: value}})"
                    )
        raise ImproperPosteriorError(
            f"found an ELBO of {bound} at the draws of q, expected a finite one: some factor's log density is not finite there. "
            "Start elsewhere (init={site: value}), or check the data"
        )


def _power_of_ten(error: float) -> str:
    """The error rounded up to a power of ten, 1e-9 at least."""
    return f"1e{math.ceil(math.log10(max(error, TOLERANCE))):d}"


def _isolated_seed() -> int:
    """A seed that leaves torch's global generator untouched."""
    return int(torch.initial_seed() % (2**31 - 1))
