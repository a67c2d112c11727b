"""Whether what a program's plans call exact is what its definition says: bounds, messages and
verdicts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import pyro
import torch
from definitions import FEW_DRAWS, MANY_DRAWS, Belief, Definition, LogProb, definition, random_belief
from programs import Written
from torch import Tensor

from pyro_blr.beliefs import Beliefs
from pyro_blr.program import Program, Programs

# Conjugate constructions that are knowingly not found: what the reason says -> why that is so.
NOT_FOUND: dict[str, str] = {}


@dataclass
class Report:
    """What a check found."""

    unsound: list[str] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)
    counts: Counter = field(default_factory=Counter)

    @property
    def failures(self) -> list[str]:
        return self.unsound + self.missed


def understood(model: Callable[[], None]) -> Program:
    with pyro.validation_enabled(True):
        return Programs(model, "sites").run((), {})


def check(program: Written, seed: int = 0) -> Report:
    """Every exact message of the program against its definition, and every conjugate pair against
    its verdict."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(program.dtype)
    try:
        model = program.model()
        found = understood(model)
        torch.set_default_dtype(torch.float64)
        report = Report()
        _check_verdicts(program, found, report)
        check_messages(model, program.dtype, found, seed, report)
        return report
    finally:
        torch.set_default_dtype(before)


def _check_verdicts(program: Written, found: Program, report: Report) -> None:
    verdicts = {(v.factor, v.site): v for plan in found.plans.values() for v in plan.verdicts}
    for pair, conjugate in program.pairs.items():
        if pair not in verdicts:
            report.missed.append(f"{pair}: no verdict")
            continue
        verdict = verdicts[pair]
        report.counts["exact" if verdict.exact else "not exact"] += 1
        if conjugate and not verdict.exact:
            if not any(reason in verdict.reason for reason in NOT_FOUND):
                report.missed.append(f"{pair}: conjugate, but {verdict.how}: {verdict.reason}")
        if verdict.exact and not conjugate:
            report.counts["exact though not by construction"] += 1


def check_messages(model: Callable, dtype: torch.dtype, found: Program, seed: int, report: Report) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(2):  # the second q meets whatever sums the first left behind
        beliefs = {name: random_belief(block, generator) for name, block in found.blocks.items()}
        state = Beliefs(found.blocks, {name: belief.natural for name, belief in beliefs.items()})
        for name in found.blocks:
            found.messages.exact_message(name, beliefs[name].natural, state.moments)
    for name, plan in found.plans.items():
        if not plan.exact or not plan.blocks:
            continue
        bound = found.messages.expected_log_prob([name], state.moments)
        messages = {b: found.messages.exact_message(b, beliefs[b].natural, state.moments, [name]) for b in plan.blocks}
        problem = _against_definition(model, dtype, name, found, beliefs, bound, messages, seed, report)
        if problem:
            report.unsound.append(f"{name}: {problem}")


def _against_definition(
    model: Callable,
    dtype: torch.dtype,
    name: str,
    found: Program,
    beliefs: dict[str, Belief],
    bound: Tensor,
    messages: dict[str, Tensor],
    seed: int,
    report: Report,
) -> str:
    sites = list(messages)
    log_prob = LogProb(model, name, beliefs, found.graph.subsamples, dtype)
    problem = ""
    for draws in (FEW_DRAWS, MANY_DRAWS):
        expected = definition(log_prob, sites, seed, draws)
        problem = _difference(expected, bound, messages, dtype)
        if not problem:
            report.counts[f"factors by {expected.how}"] += 1
            report.counts["messages"] += len(messages)
            break
        if expected.how == "quadrature":
            break
    return problem


def _difference(expected: Definition, bound: Tensor, messages: dict[str, Tensor], dtype: torch.dtype) -> str:
    pairs = {"E log f": (bound, expected.bound, expected.bound_error)}
    for site, message in messages.items():
        definition = expected.messages[site]
        pairs[f"message to {site}"] = (message.reshape(definition.shape), definition, expected.errors[site])
    accuracy = 1e-8 if dtype == torch.float64 else 1e-3
    for what, (mine, theirs, error) in pairs.items():
        scale = 1 + float(theirs.abs().max())
        if not bool(((mine - theirs).abs() <= accuracy * scale + 5 * error).all()):
            return f"{what} by {expected.how} is {theirs.tolist()}, found {mine.tolist()}"
    return ""
