"""The latent sites of a model beside its networks: exact, quadrature or drawn messages, given a draw of the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyro_blr.ascent import Ascent
from pyro_blr.averages import FactorAverage
from pyro_blr.beliefs import Beliefs
from pyro_blr.blocks import Block
from pyro_blr.checks import check_same_block, check_same_sites
from pyro_blr.draws import Draws, fresh_seed
from pyro_blr.guides import AutoExponentialFamily
from pyro_blr.marginals import draws_of
from pyro_blr.nn._given import GivenNetworks, Spread
from pyro_blr.nn._pass import Pass
from pyro_blr.plans import FactorPlan, Verdict
from pyro_blr.program import Program, Programs
from pyro_blr.rules import Passes, RobbinsMonro
from pyro_blr.starts import apply_init
from pyro_blr.steps import take_step

__all__ = ["Others", "Outcome"]

Spreads = Mapping[str, Mapping[str, Spread]]

LOCAL_SWEEPS = 10  # over several local blocks, before the others move
DRAWN = 64  # draws for the expectation of a precision that has no closed form


@dataclass(frozen=True)
class Outcome:
    """λ of every block after a step, and the bound before it, up to what the networks' own Gaussians add."""

    naturals: dict[str, Tensor]
    bound: float
    priors: dict[str, tuple[Tensor, Tensor]]  # statement of a network's prior -> E δ and E δ m₀ / E δ at the new λ


class Others:
    """λ_e ← (1 − ρ) λ_e + (ρ / s_e) Σ_f s_f ∇_{μ_e} E_q[log f] for the sites e beside the networks.

    The prior of the weights is averaged over their q, which is exact: blocks that see nothing else of the networks have ρ = 1. What
    a network computed is taken at one draw of the weights: blocks that see data take a part ρ_t of the step, so that draws
    and minibatches average out.
    """

    schedule = RobbinsMonro(delay=1.0, decay=0.6)

    def __init__(self, model: Callable, guide: AutoExponentialFamily, options: Mapping[str, Any]):
        self.given = GivenNetworks(model)
        self.guide, self.options = guide, options
        self.programs = Programs(self.given, guide.factorisation)
        self.blocks: dict[str, Block] = {}
        self.naturals: dict[str, Tensor] = {}
        self.count = 0
        self.program: Program | None = None

    # -- values ----------------------------------------------------------------------------------------------------

    def choose(self) -> Callable[[str, Any, Mapping[str, Tensor]], Tensor | None]:
        """What gives every site one draw of q in a run, at the rows of its plates; None before q has begun, and for what it has not."""
        known: dict[str, Tensor] = {}
        of_site = {site: block for block in self.blocks.values() for site in block.site_names}

        def value(name: str, distribution: Any, indices: Mapping[str, Tensor]) -> Tensor | None:
            block = of_site.get(name)
            if block is not None and name not in known:
                known.update(draws_of(block, block.select(self.naturals[block.name], indices), torch.Size()))
            return known.get(name)

        return value

    # -- steps -----------------------------------------------------------------------------------------------------

    def understand(self, found: Pass, spreads: Spreads, args: tuple, kwargs: Mapping[str, Any]) -> Program:
        """The program of the sites given this pass; q begins where `init` says, or at the prior."""
        self.given.hold(found, spreads)
        program = self.programs.run(args, kwargs)
        if self.options.get("strict"):
            program.refuse_unproved()
        if not self.blocks:
            self.guide.follow(program.factorisation)
            self.guide.setup(program.graph)
            naturals = {name: natural.double() for name, natural in self.guide.naturals.items()}
            given = self.options.get("init"), self.options.get("init_loc_fn")
            naturals, _ = apply_init(program.graph, program.blocks, naturals, *given)
            self.naturals = {name: natural.double() for name, natural in naturals.items()}
        else:
            check_same_sites(self.blocks, program.blocks, "the model's latent sites changed between steps")
            for name, block in program.blocks.items():
                check_same_block(self.blocks[name], block)
        self.blocks, self.program = dict(program.blocks), program
        return program

    def stepped(self, found: Pass, spreads: Spreads, args: tuple, kwargs: Mapping[str, Any]) -> Outcome:
        """One step at this pass; λ itself is left as it is."""
        program = self.understand(found, spreads, args, kwargs)
        ascent = self.ascent(program)
        bound = ascent.bound_before()
        if program.is_exact:
            self._sweep(ascent)
        else:
            self._step(ascent)
        return Outcome(self._scattered(ascent), bound, expected_priors(ascent, _prior_names(spreads)))

    def priors(self, spreads: Spreads) -> dict[str, tuple[Tensor, Tensor]]:
        """The same at the present λ."""
        assert self.program is not None
        return expected_priors(self.ascent(self.program), _prior_names(spreads))

    def ascent(self, program: Program) -> Ascent:
        """q on this run."""
        indices = program.graph.subsamples
        naturals = {name: block.select(self.naturals[name], indices) for name, block in program.blocks.items()}
        return Ascent(program, Beliefs(program.blocks, naturals))

    def _scattered(self, ascent: Ascent) -> dict[str, Tensor]:
        program, indices = ascent.program, ascent.program.graph.subsamples
        return {
            name: block.scatter(self.naturals[name], ascent.beliefs.naturals[name], indices)
            for name, block in program.blocks.items()
        }

    def _rate(self, program: Program) -> float:
        if program.is_subsampled:
            return Passes(program.graph.steps_of_a_pass).rate(self.count)
        return self.schedule.rate(self.count)

    def _sweep(self, ascent: Ascent) -> None:
        """All messages exact given the draw: local blocks to their optimum, then the others."""
        program, rate = ascent.program, self._rate(ascent.program)
        local, averaged = program.local_blocks(), self.averaged(program)
        for _ in range(LOCAL_SWEEPS if len(local) > 1 else 1):
            ascent.sweep(local)
        for name in ascent.order:
            if name not in local:
                ascent.move(name, ascent.target(name, None), 1.0 if name in averaged else rate)

    def _step(self, ascent: Ascent) -> None:
        """Some by quadrature or draws: the engine's own step, of which those that see data take a part."""
        program, before = ascent.program, dict(ascent.beliefs.naturals)
        take_step(ascent, self.count)
        rate, averaged = 1.0 if program.is_subsampled else self._rate(program), self.averaged(program)
        for name, natural in before.items():
            if name not in averaged:
                ascent.beliefs.update(name, torch.lerp(natural, ascent.beliefs.naturals[name], rate))
        ascent.sweep([name for name in ascent.order if name in averaged and program.messages.is_exact(name)])

    def averaged(self, program: Program) -> set[str]:
        """Blocks of which no factor is observed but priors of weights: nothing that they see depends on the draw."""
        seen = {block for plan in program.plans.values() if self.is_drawn(plan) for block in plan.blocks}
        return set(program.blocks) - seen

    def is_drawn(self, plan: FactorPlan) -> bool:
        """Whether a factor may hold what a network computed at the draw."""
        return plan.factor.is_observed and plan.factor.name not in _prior_names(self.given.spreads)

    def verdicts(self, program: Program) -> list[Verdict]:
        """What is said about every pair, and which of it holds given a draw."""
        said = []
        for plan in program.plans.values():
            for one in plan.verdicts:
                how = f"{one.how}, given draws of the network" if self.is_drawn(plan) else one.how
                said.append(replace(one, how=how))
        return said


def _prior_names(spreads: Spreads) -> list[str]:
    return [f"{network}[{key}]" for network, of_network in spreads.items() for key in of_network]


@torch.no_grad()
def expected_priors(ascent: Ascent, names: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """(E δ, E δ m₀ / E δ) under q of these statements N(m₀, 1/δ), in their shapes: closed where the messages are, else from draws."""
    program, found = ascent.program, {}
    for name in names:
        plan = program.plans[name]
        if plan.exact and plan.likelihood is not None:
            average = FactorAverage(program.graph, program.blocks, plan)
            precision: Any = average.expected("precision", ascent.beliefs.wide)
            mean: Any = average.expected("loc", ascent.beliefs.wide)
            found[name] = precision.mean.double(), mean.mean.double()
            continue
        laws = [_law_at(program, name, leaves) for leaves in _draws(ascent, plan)]
        precisions = torch.stack([law.scale.double() ** -2 for law in laws])
        means = torch.stack([law.loc.double() for law in laws])
        found[name] = precisions.mean(0), (precisions * means).mean(0) / precisions.mean(0)
    return found


def _draws(ascent: Ascent, plan: FactorPlan) -> list[dict[str, Tensor]]:
    """Block -> its variable, at each of some draws."""
    names = list(plan.blocks)
    if not names:
        return [{}]
    leaves = Draws(fresh_seed(), DRAWN).leaves(ascent.program.blocks, names, ascent.beliefs, names)
    return [{name: leaf[i] for name, leaf in leaves.items()} for i in range(DRAWN)]


def _law_at(program: Program, name: str, leaves: Mapping[str, Tensor]) -> Any:
    """The Normal of a statement at values of blocks."""
    factor = program.graph.factors[name]
    if factor.constructed is None:
        return factor.distribution.base_dist
    values: dict[str, Tensor] = {}
    for block, leaf in leaves.items():
        values.update(program.blocks[block].values(leaf, factor.latents))
    return factor.constructed.rebuild(program.graph.tape, values)
