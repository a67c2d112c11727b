"""Nothing is called exact that is not: random programs against the definition of a message, and
the check against seeded bugs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from programs import Written, programs, written
from soundness import check

from pyro_blr import averages, conjugacy, families, forms, likelihoods, messages
from pyro_blr.averages import FactorAverage
from pyro_blr.families import _gaussian
from pyro_blr.likelihoods import Linear, Positive, Probability, Vector

COUNTS: Counter[str] = Counter()


def _sound(program: Written) -> None:
    report = check(program)
    assert not report.failures, "\n".join([*report.failures, program.source])
    COUNTS.update(report.counts)
    COUNTS.update(program.features)
    COUNTS["programs"] += 1


def _settings(count: int) -> Callable:
    """The same programs at every run, the first failing one made small."""
    return settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )


@_settings(60)
@given(programs())
def test_small_random_programs_are_sound(program: Written) -> None:
    _sound(program)


@pytest.mark.parametrize("first", range(0, 140, 35))
def test_random_programs_are_sound(first: int) -> None:
    """Programs of plain seeds: larger ones than Hypothesis likes to draw."""
    for seed in range(first, first + 35):
        _sound(written(seed))


@pytest.mark.nightly
@_settings(1000)
@given(programs())
def test_a_thousand_small_random_programs_are_sound(program: Written) -> None:
    _sound(program)


@pytest.mark.nightly
@pytest.mark.parametrize("first", range(1000, 3000, 100))
def test_thousands_of_random_programs_are_sound(first: int) -> None:
    for seed in range(first, first + 100):
        _sound(written(seed))


def test_the_generator_reaches_what_it_is_for() -> None:
    """Of the first hundred programs: exact and inexact pairs, and every feature a few times."""
    pairs, features = Counter[bool](), Counter[str]()
    for seed in range(100):
        program = written(seed)
        pairs.update(program.pairs.values())
        features.update(program.features)
    assert pairs[True] > 200 and pairs[False] > 50
    wanted = "mixture gather sum product trap mask scale subsample event logits obs_mask".split()
    assert all(features[name] >= 3 for name in [*wanted, "latent mask"]), features


# ------------------------------------------------------------------------------------------------
# The check, checked


def _wrap(owner: Any, name: str, make: Callable[[Callable], Callable]) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(owner, name, make(getattr(owner, name)))


def _all_paths(change: Callable[[Any], Any]) -> Callable[[pytest.MonkeyPatch], None]:
    """Changes every factor before anything is made of it."""

    def apply(patch: pytest.MonkeyPatch) -> None:
        original = FactorAverage.__init__

        def changed(self: FactorAverage, graph: Any, blocks: Any, plan: Any) -> None:
            original(self, graph, blocks, replace(plan, factor=change(plan.factor)))

        patch.setattr(FactorAverage, "__init__", changed)

    return apply


def _unscaled(factor: Any) -> Any:
    return replace(factor, scale=1.0)


def _doubled(factor: Any) -> Any:
    return replace(factor, scale=2.0 * factor.scale) if factor.is_observed else factor


def _unmasked(factor: Any) -> Any:
    inner = factor.constructed and replace(factor.constructed, mask=None)
    return replace(factor, mask=None, constructed=inner)


def _single(original: Callable) -> Callable:
    """Templates without the sum over what an argument is broadcast to."""
    return lambda self, result, mask, scale: result * scale


def _shifted_states(original: Callable) -> Callable:
    def states(self: FactorAverage, name: str, position: int) -> Any:
        return {site: values.roll(1, 0) for site, values in original(self, name, position).items()}

    return states


def _without_variance(patch: pytest.MonkeyPatch) -> None:
    def terms(self: Any, value: Linear, loc: Linear, precision: Positive) -> Any:
        return original(self, value, Linear(loc.mean), precision)

    original = likelihoods.Normal.terms
    patch.setattr(likelihoods.Normal, "terms", terms)
    patch.setattr(averages, "summarise", lambda *_: None)


def _without_covariance(patch: pytest.MonkeyPatch) -> None:
    def terms(self: Any, value: Vector, loc: Vector, precision: Any) -> Any:
        diagonal = None if loc.covariance is None else torch.diag_embed(loc.covariance.diagonal(dim1=-2, dim2=-1))
        return original(self, value, Vector(loc.mean, diagonal), precision)

    original = likelihoods.MultivariateNormal.terms
    patch.setattr(likelihoods.MultivariateNormal, "terms", terms)


def _stale_point(patch: pytest.MonkeyPatch) -> None:
    """log E x where E log x is meant."""
    for likelihood in (likelihoods.Normal, likelihoods.Gamma, likelihoods.Exponential, likelihoods.Poisson):
        original = likelihood.terms

        def terms(self: Any, original: Callable = original, **arguments: Any) -> Any:
            stale = {k: Positive(v.mean, v.mean.log()) if isinstance(v, Positive) else v for k, v in arguments.items()}
            return original(self, **stale)

        patch.setattr(likelihood, "terms", terms)


def _uncomplemented(original: Callable) -> Callable:
    def terms(self: Any, value: Any, probs: Probability, **other: Any) -> Any:
        return original(self, value=value, probs=Probability(probs.log, (-probs.log.exp()).log1p()), **other)

    return terms


def _credulous(patch: pytest.MonkeyPatch) -> None:
    """Judges to whom everything is affine."""
    numerical = forms.numerical_form

    def believes(probe: Any, argument: Any, block: Any) -> Any:
        if argument.role is Linear and forms.is_gaussian(block.family):
            return forms.Form.AFFINE, 1
        return numerical(probe, argument, block)

    patch.setattr(forms, "numerical_form", believes)
    patch.setattr(forms, "_each_affine", lambda *_: True)


def _power_blind(patch: pytest.MonkeyPatch) -> None:
    """A precision that is any function of its site."""
    numerical = forms.numerical_form

    def believes(probe: Any, argument: Any, block: Any) -> Any:
        if argument.role is Positive and isinstance(block.family, families.Gamma):
            return forms.Form.MONOMIAL, 1
        return numerical(probe, argument, block)

    patch.setattr(forms, "numerical_form", believes)


def _each_place_by_itself(patch: pytest.MonkeyPatch) -> None:
    """A judge that does not count in how many arguments a site is."""
    find = conjugacy._Judge._find

    def finds(self: Any, factor: Any, arguments: Any, continuous: Any, reasons: dict) -> Any:
        before = dict(reasons)
        found = find(self, factor, arguments, continuous, reasons)
        for name in set(reasons) - set(before):
            if "two arguments" in reasons[name][0] and all(
                f.form is not None for (_, n), f in found.items() if n == name
            ):
                del reasons[name]
        return found

    patch.setattr(conjugacy._Judge, "_find", finds)


def _wrong_power(patch: pytest.MonkeyPatch) -> None:
    """scale⁻¹ for scale⁻²."""

    def canonical(self: Any, value: Any, arguments: Any) -> Any:
        found = original(self, value, arguments)
        return {**found, "precision": found["precision"] ** 0.5}

    original = likelihoods.Normal.canonical
    patch.setattr(likelihoods.Normal, "canonical", canonical)


def _no_twos(original: Callable) -> Callable:
    def pack(matrix: torch.Tensor) -> torch.Tensor:
        d = matrix.shape[-1]
        return 0.5 * original(matrix + matrix.diagonal(dim1=-2, dim2=-1).diag_embed()) if d > 1 else original(matrix)

    return pack


def _first_state(original: Callable) -> Callable:
    """Log-odds against the first state."""
    return lambda self, natural, gradients: gradients["probs"][..., 1:] - gradients["probs"][..., :1]


def _no_products(original: Callable) -> Callable:
    return lambda *_: ()


def _own_prior_forgotten(original: Callable) -> Callable:
    def message(self: Any, block: str, natural: Any, moments: Any, factors: Any = None) -> Any:
        result = original(self, block, natural, moments, factors)
        return torch.zeros_like(result) if list(factors or []) == [block] else result

    return message


BUGS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    "a factor counted twice": (_all_paths(_doubled), ""),
    "a plate's scale dropped": (_all_paths(_unscaled), "subsample"),
    "a mask ignored": (_all_paths(_unmasked), "mask"),
    "a latent's mask ignored": (_all_paths(_unmasked), "latent mask"),
    "a broadcast site counted once": (_wrap(FactorAverage, "_scaled", _single), ""),
    "states off by one": (_wrap(FactorAverage, "_state_values", _shifted_states), "mixture"),
    "the variance of a mean dropped": (_without_variance, ""),
    "covariances of a vector dropped": (_without_covariance, ""),
    "log E x for E log x": (_stale_point, ""),
    "log(1 - exp E log p) for E log(1 - p)": (_wrap(likelihoods.Bernoulli, "terms", _uncomplemented), ""),
    "a wrong power of the scale": (_wrong_power, ""),
    "no 2 on off-diagonals": (_wrap(_gaussian, "pack_dual", _no_twos), ""),
    "log-odds against the wrong state": (_wrap(families.Categorical, "message", _first_state), ""),
    "the variance of a product dropped": (_wrap(conjugacy, "products_of", _no_products), "product"),
    "elements of a sum taken for independent outputs": (_wrap(conjugacy, "mixed_dims", _no_products), "sum"),
    "a site's own prior forgotten": (_wrap(messages.Messages, "exact_message", _own_prior_forgotten), ""),
    "everything judged affine": (_credulous, "trap"),
    "every precision judged proportional": (_power_blind, "trap"),
}


def _with_feature(feature: str, count: int) -> Iterator[Written]:
    candidates = (written(seed) for seed in range(2000))
    found = (program for program in candidates if not feature or feature in program.features)
    for _, program in zip(range(count), found, strict=False):
        yield program


@pytest.mark.parametrize("bug", BUGS)
def test_the_check_catches(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A seeded bug is found within sixty of the programs that could show it, and those are sound
    without it."""
    apply, feature = BUGS[bug]
    for program in _with_feature(feature, 60):
        with monkeypatch.context() as patch:
            apply(patch)
            caught = check(program).unsound
        if caught:
            assert not check(program).failures
            return
    pytest.fail(f"{bug}: not caught")
