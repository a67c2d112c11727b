"""λ ← (1 − ρ) λ + ρ λ̂: Bayes' rule at ρ = 1, never outside the domain, at rates that Robbins and Monro
allow.
"""

from __future__ import annotations

import pytest
import torch
from conjugate import PAIRS
from family_cases import BATCHES, NAMES, make
from hypothesis import given, settings
from hypothesis import strategies as st

from pyro_blr import BLRInference
from pyro_blr.rules import BLR, RobbinsMonro, gap

RULE = BLR()


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", NAMES)
def test_a_full_step_is_the_target(name: str, batch: tuple[int, ...]) -> None:
    family, natural, _ = make(name, batch)
    target = make(name, batch)[1]
    assert torch.equal(RULE.step(family, natural, target, 1.0), target)


@pytest.mark.parametrize("rate", [0.01, 0.3, 0.9])
@pytest.mark.parametrize("name", NAMES)
def test_a_part_step_between_members_is_the_mixture(name: str, rate: float) -> None:
    family, natural, _ = make(name, (3,))
    target = make(name, (3,))[1]
    expected = (1 - rate) * natural + rate * target
    torch.testing.assert_close(RULE.step(family, natural, target, rate), expected)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=20, deadline=None)
@given(rate=st.floats(1e-3, 1.0), size=st.floats(1e-3, 1e6), seed=st.integers(0, 2**31 - 1))
def test_no_step_leaves_the_domain(name: str, rate: float, size: float, seed: int) -> None:
    """Towards any target at all, and however long the step."""
    torch.manual_seed(seed)
    family, natural, _ = make(name, (4,))
    target = natural + size * torch.randn_like(natural)
    moved = RULE.step(family, natural, target, rate)
    assert bool(family.contains(moved).all())


@pytest.mark.parametrize("name", NAMES)
def test_short_steps_follow_the_straight_line_also_where_it_leaves(name: str) -> None:
    """(step(ρ) − λ) / ρ → λ̂ − λ for a target outside the domain."""
    family, natural, _ = make(name, (4,))
    target = natural + 50 * torch.randn_like(natural)
    slope = (RULE.step(family, natural, target, 1e-6) - natural) / 1e-6
    torch.testing.assert_close(slope, target - natural, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", NAMES)
def test_the_gap_is_the_square_of_the_step_in_the_fisher_metric(name: str) -> None:
    """½ dᵀ F d with the family's own F, d = λ̂ − λ of any length and direction."""
    family, natural, _ = make(name, (4,))
    direction = torch.randn_like(natural)
    expected = 0.5 * torch.einsum("bi,bij,bj->b", direction, family.fisher(natural), direction)
    torch.testing.assert_close(gap(family, natural, natural + direction), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", sorted(PAIRS))
def test_a_full_step_on_a_conjugate_model_is_bayes_rule(name: str) -> None:
    """Prior and data add up to the posterior that SciPy's formulas give, in one step.

    Also for `logit_normal`, whose prior is sampled: draws have no error on quadratics.
    """
    pair = PAIRS[name]()
    engine = BLRInference(pair.plate_model())
    engine.step()
    values = engine.posterior["z"].sample((20,))
    expected = pair.posterior.log_prob(values)
    torch.testing.assert_close(engine.posterior["z"].log_prob(values), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("delay, decay", [(1.0, 0.6), (1.0, 0.7), (10.0, 1.0), (64.0, 0.6)])
def test_rates_sum_to_infinity_and_their_squares_do_not(delay: float, decay: float) -> None:
    """Σ ρ_t from t to 2t grows as 2^(1−κ) and never shrinks; Σ ρ_t² there shrinks as 2^(1−2κ), a geometric
    series.
    """
    schedule = RobbinsMonro(delay, decay)
    ends = [2**k for k in range(13, 17)]
    rates = [schedule.rate(t) for t in range(2 * ends[-1])]
    sums = [sum(rates[t : 2 * t]) for t in ends]
    squares = [sum(r * r for r in rates[t : 2 * t]) for t in ends]
    for k in range(1, len(ends)):
        assert sums[k] >= 0.99 * sums[k - 1]
        assert sums[k] / sums[k - 1] == pytest.approx(2 ** (1 - decay), rel=1e-2)
        assert squares[k] / squares[k - 1] == pytest.approx(2 ** (1 - 2 * decay), rel=1e-2)
    assert all(0 < later < earlier <= 1 for earlier, later in zip(rates, rates[1:], strict=False))
    assert rates[0] == pytest.approx(delay**-decay)
