"""`compile=True`: the same steps without the model's Python, only while that is so; otherwise plain steps, and why."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import oracle_case
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from pyro_blr import BLRInference
from pyro_blr.ascent import Ascent
from pyro_blr.bindings import replayed

EFFECTS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], dtype=torch.float64)
ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0], dtype=torch.float64)
CAPTURED_BY = 6  # steps: two that run the model, two that are taken both ways, two more


@pytest.fixture
def flat(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured steps are replayed operation by operation: torch's compiler takes ten seconds a program."""
    monkeypatch.setattr("pyro_blr.fusing._inductor", lambda module, example: replayed(module))


def schools(effects: Tensor, errors: Tensor, tempering: float = 1.0) -> None:
    mean = pyro.sample("mean", dist.Normal(effects.new_zeros(()), 5.0))
    precision = pyro.sample("precision", dist.Gamma(effects.new_tensor(2.0), 20.0))
    with pyro.plate("schools", len(effects)):
        school = pyro.sample("school", dist.Normal(mean, precision.rsqrt()))
        with poutine.scale(scale=tempering):
            pyro.sample("effect", dist.Normal(school, errors), obs=effects)


def some_masked(y: Tensor, mask: Tensor) -> None:
    mean, precision = pyro.sample("mean", dist.Normal(0.0, 1.0)), pyro.sample("precision", dist.Gamma(2.0, 2.0))
    with pyro.plate("rows", len(y)), poutine.mask(mask=mask):
        z = pyro.sample("z", dist.Normal(mean, precision.rsqrt()))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def compared(y: Tensor) -> None:
    """Elements of a plate that meet in a factor."""
    precision = pyro.sample("precision", dist.Gamma(2.0, 2.0))
    with pyro.plate("players", 4):
        skill = pyro.sample("skill", dist.Normal(0.0, 1.0))
    difference = skill[torch.tensor([0, 1, 2, 3, 0])] - skill[torch.tensor([1, 2, 3, 0, 2])]
    pyro.sample("y", dist.Normal(difference, precision.rsqrt()).to_event(1), obs=y)


def logistic(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)


def rate_as_location(y: Tensor) -> None:
    rate = pyro.sample("rate", dist.Gamma(2.0, 2.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(rate, 1.0), obs=y)


Y = torch.linspace(-1, 2, 5, dtype=torch.float64)
X = torch.stack([Y.cos(), Y], -1)
ORACLE_NAMES = ("linear_regression", "gaussian_mixture", "lda")
CASES: dict[str, tuple[Callable, tuple, dict[str, Any]]] = {
    **{name: (*oracle_case(name)[:2], {"init": oracle_case(name)[2]}) for name in ORACLE_NAMES},
    "schools": (schools, (EFFECTS, ERRORS), {}),
    "schools, float32": (schools, (EFFECTS.float(), ERRORS.float()), {}),
    "masked": (some_masked, (Y, Y > 0), {"blocks": "sites"}),
    "compared": (compared, (Y,), {"blocks": "elements"}),
    "settled at once": oracle_case("gamma_poisson")[:2] + ({},),
}


def stepped(number: int, model: Callable, args: tuple, **options: Any) -> tuple[BLRInference, list[float]]:
    pyro.set_rng_seed(1)
    pyro.clear_param_store()
    engine = BLRInference(model, **options)
    return engine, [engine.step(*args) for _ in range(number)]


def assert_same(engine: BLRInference, plain: BLRInference, relative: float = 1e-9) -> None:
    for name, natural in plain.guide.naturals.items():
        size = float(natural.abs().max())
        torch.testing.assert_close(engine.guide.naturals[name], natural, rtol=relative, atol=relative * size)
    assert engine.posterior.history == pytest.approx(plain.posterior.history, rel=relative, abs=relative)
    assert engine.posterior.num_steps == plain.posterior.num_steps
    assert engine.posterior.elbo_kind == plain.posterior.elbo_kind


def said(engine: BLRInference, *args: Any) -> str:
    """What `explain` says of compiled steps."""
    return next(note for note in engine.explain(*args).notes if note.startswith("compile=True"))


# -- the same steps ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_compiled_steps_are_the_plain_ones(name: str, flat: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """λ, losses, history and the random state; once a step is captured, neither the model nor a plain sweep runs."""
    model, args, options = CASES[name]
    plain, expected = stepped(CAPTURED_BY + 4, model, args, **options)
    state = torch.get_rng_state()
    engine, losses = stepped(CAPTURED_BY, model, args, compile=True, **options)
    with monkeypatch.context() as patch:
        patch.setattr(engine._programs, "run", lambda *_: pytest.fail("the model ran"))
        patch.setattr(Ascent, "sweep", lambda *_: pytest.fail("a plain sweep"))
        losses += [engine.step(*args) for _ in range(4)]
    relative = 1e-5 if "float32" in name else 1e-9
    assert losses == pytest.approx(expected, rel=relative, abs=relative)
    assert_same(engine, plain, relative)
    assert torch.equal(torch.get_rng_state(), state)
    assert "steps are" in said(engine, *args)


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="no C++ compiler")
@pytest.mark.slow
def test_fused_steps_are_the_plain_ones() -> None:
    plain, expected = stepped(12, schools, (EFFECTS, ERRORS))
    engine, losses = stepped(12, schools, (EFFECTS, ERRORS), compile=True)
    assert losses == pytest.approx(expected, rel=1e-9)
    assert_same(engine, plain)
    assert said(engine, EFFECTS, ERRORS) == "compile=True: steps are fused by torch.compile"


@pytest.mark.parametrize(("model", "args"), [(logistic, (X, (Y > 0).double())), (rate_as_location, (Y,))])
def test_settled_steps_do_not_run_the_model(
    model: Callable, args: tuple, flat: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By quadrature and by draws."""
    plain, expected = stepped(14, model, args)
    state = torch.get_rng_state()
    engine, losses = stepped(11, model, args, compile=True)
    monkeypatch.setattr(engine._programs, "run", lambda *_: pytest.fail("the model ran"))
    losses += [engine.step(*args) for _ in range(3)]
    monkeypatch.undo()
    assert losses == expected
    assert_same(engine, plain)
    assert torch.equal(torch.get_rng_state(), state)
    assert "settled" in said(engine, *args)


def test_the_same_seed_gives_the_same_steps(flat: None) -> None:
    (one, first), (other, second) = (stepped(9, schools, (EFFECTS, ERRORS), compile=True) for _ in range(2))
    assert first == second
    assert all(torch.equal(natural, other.guide.naturals[name]) for name, natural in one.guide.naturals.items())


def test_a_guide_of_the_users_own_holds_the_result(flat: None) -> None:
    """Its parameters are where λ lives; one that somebody moved is read again, by a plain step."""

    def model(effects: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
        with pyro.plate("schools", len(effects)):
            school = pyro.sample("school", dist.Normal(mean, 3.0))
            pyro.sample("effect", dist.Normal(school, 10.0), obs=effects)

    def fitted(compiled: bool) -> list[float]:
        pyro.clear_param_store()
        engine = BLRInference(model, AutoNormal(model), compile=compiled)
        losses = [engine.step(EFFECTS) for _ in range(CAPTURED_BY)]
        with torch.no_grad():
            pyro.param("AutoNormal.locs.mean").add_(3.0)
        losses += [engine.step(EFFECTS) for _ in range(3)]
        assert not compiled or "steps are" in said(engine, EFFECTS)
        return [*losses, *(pyro.param(f"AutoNormal.{name}.mean").item() for name in ("locs", "scales"))]

    assert fitted(True) == pytest.approx(fitted(False), rel=1e-9)


# -- what changes between steps -----------------------------------------------------------------------------------------


def other_data() -> tuple[Callable, tuple, Callable[[], tuple]]:
    return schools, (EFFECTS, ERRORS), lambda: (EFFECTS + 5, ERRORS)


def another_number() -> tuple[Callable, tuple, Callable[[], tuple]]:
    return schools, (EFFECTS, ERRORS, 1.0), lambda: (EFFECTS, ERRORS, 0.5)


def other_rows() -> tuple[Callable, tuple, Callable[[], tuple]]:
    model, (x, y), _ = CASES["linear_regression"]
    return model, (x, y), lambda: (x[: len(y) // 2], y[: len(y) // 2])


def written_into() -> tuple[Callable, tuple, Callable[[], tuple]]:
    effects = EFFECTS.clone()
    return schools, (effects, ERRORS), lambda: (effects.add_(5), ERRORS)


def written_into_what_it_closes_over() -> tuple[Callable, tuple, Callable[[], tuple]]:
    effects = EFFECTS.clone()
    return lambda: schools(effects, ERRORS), (), lambda: (effects.add_(5), ())[1]


def another_entry_of_a_list() -> tuple[Callable, tuple, Callable[[], tuple]]:
    held = {"effects": [EFFECTS]}

    def changed() -> tuple:
        held["effects"][0] = EFFECTS + 5
        return (held,)

    return lambda data: schools(data["effects"][0], ERRORS), (held,), changed


CHANGES = [
    other_data,
    another_number,
    other_rows,
    written_into,
    written_into_what_it_closes_over,
    another_entry_of_a_list,
]


@pytest.mark.parametrize("make", CHANGES, ids=lambda make: make.__name__)
def test_what_has_changed_is_captured_anew(make: Callable, flat: None) -> None:
    fitted: list[tuple[BLRInference, list[float]]] = []
    for compiled in (True, False):
        model, args, change = make()
        engine, losses = stepped(CAPTURED_BY, model, args, compile=compiled)
        after = change()
        fitted.append((engine, losses + [engine.step(*after) for _ in range(CAPTURED_BY)]))
    (engine, losses), (plain, expected) = fitted
    assert losses == pytest.approx(expected, rel=1e-9)
    assert_same(engine, plain)


def test_arguments_that_come_back(flat: None) -> None:
    fitted = []
    for compiled in (True, False):
        engine, losses = stepped(CAPTURED_BY, schools, (EFFECTS, ERRORS), compile=compiled)
        losses.append(engine.step(EFFECTS + 5, ERRORS))
        fitted.append(losses + [engine.step(EFFECTS, ERRORS) for _ in range(3)])
    assert fitted[0] == pytest.approx(fitted[1], rel=1e-9)


def test_a_plate_of_latents_keeps_its_size(flat: None) -> None:
    engine, _ = stepped(CAPTURED_BY, schools, (EFFECTS, ERRORS), compile=True)
    with pytest.raises(ValueError, match="found"):
        engine.step(torch.cat([EFFECTS, EFFECTS]), torch.cat([ERRORS, ERRORS]))


def test_steps_between_looks_and_runs(flat: None) -> None:
    """`run`, `evaluate_loss` and `explain`, on other data too, change nothing that a captured step relies on."""
    plain, _ = stepped(CAPTURED_BY, schools, (EFFECTS, ERRORS))
    engine, _ = stepped(CAPTURED_BY, schools, (EFFECTS, ERRORS), compile=True)
    losses: dict[BLRInference, list[float]] = {plain: [], engine: []}
    for each, found in losses.items():
        found.append(each.evaluate_loss(EFFECTS + 1, ERRORS))
        found += [each.step(EFFECTS, ERRORS) for _ in range(3)]
        each.explain(EFFECTS, ERRORS)
        found.append(each.run(EFFECTS, ERRORS, progress=False, max_steps=2).elbo)
        found += [each.step(EFFECTS, ERRORS) for _ in range(CAPTURED_BY)]
    assert losses[engine] == pytest.approx(losses[plain], rel=1e-9)
    assert_same(engine, plain)


def test_a_step_goes_on_from_a_saved_state(flat: None) -> None:
    """To rounding: the first steps after loading are plain ones."""
    whole, losses = stepped(16, schools, (EFFECTS, ERRORS), compile=True)
    first, _ = stepped(8, schools, (EFFECTS, ERRORS), compile=True)
    saved = first.guide.state_dict()
    second = BLRInference(schools, compile=True)
    second.guide.load_state_dict(saved)
    rest = [second.step(EFFECTS, ERRORS) for _ in range(8)]
    assert rest == pytest.approx(losses[8:], rel=1e-9)
    for name, natural in whole.guide.naturals.items():
        torch.testing.assert_close(second.guide.naturals[name], natural, rtol=1e-9, atol=1e-9)


# -- when steps stay plain, and why -----------------------------------------------------------------------------------


def beta(flips: Tensor, prior: Any = 10.0) -> None:
    p = pyro.sample("p", dist.Beta(prior, 10.0))
    with pyro.plate("flips", len(flips)):
        pyro.sample("flip", dist.Bernoulli(p), obs=flips)


class Counting:
    """A model that reads something else than its arguments: how often it ran."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, flips: Tensor) -> None:
        self.runs += 1
        beta(flips, 10.0 + self.runs)


def drawing(flips: Tensor) -> None:
    torch.rand(())
    beta(flips)


def with_parameter(flips: Tensor) -> None:
    beta(flips, pyro.param("prior", torch.tensor(10.0), constraint=dist.constraints.positive))


def subsampled(flips: Tensor) -> None:
    p = pyro.sample("p", dist.Beta(10.0, 10.0))
    with pyro.plate("flips", len(flips), subsample_size=3) as index:
        pyro.sample("flip", dist.Bernoulli(p), obs=flips[index])


def array(flips: Any) -> None:
    beta(torch.as_tensor(flips))


def of_its_own(flips: Tensor) -> None:
    """A guide without a family: p = sigmoid of a Normal whose location is a parameter that nothing else may have."""
    loc = pyro.param("loc", torch.tensor(0.0))
    u = pyro.sample("u", dist.Normal(loc * loc + loc, 0.5), infer={"is_auxiliary": True})
    pyro.sample("p", dist.Delta(u.sigmoid()))


FLIPS = torch.tensor([1.0] * 6 + [0.0] * 4, dtype=torch.float64)
PLAIN: dict[str, tuple[Callable[[], Callable], Any, str]] = {
    "another run": (Counting, FLIPS, "depends on something else"),
    "draws": (lambda: drawing, FLIPS, "draws from a random generator"),
    "parameters": (lambda: with_parameter, FLIPS, r"the model has parameters \(prior\)"),
    "subsampled": (lambda: subsampled, FLIPS, "other rows of a subsampled plate"),
    "an array": (lambda: array, FLIPS.numpy(), "an argument of type ndarray"),
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_steps_say_why(name: str) -> None:
    make, data, reason = PLAIN[name]
    plain, expected = stepped(8, make(), (data,))
    with pytest.warns(UserWarning, match=f"compile=True: steps run uncompiled: .*{reason}") as warned:
        engine, losses = stepped(8, make(), (data,), compile=True)
    assert len(warned) == 1
    assert losses == expected
    assert_same(engine, plain, 0.0)
    assert said(engine, data).startswith("compile=True: steps run uncompiled")


def test_arguments_that_are_new_at_every_step() -> None:
    engine = BLRInference(beta, compile=True)
    with pytest.warns(UserWarning, match="their arguments are other ones"):
        for _ in range(4):
            engine.step(FLIPS.clone())


def test_a_guide_that_takes_ordinary_gradients() -> None:
    with pytest.warns(UserWarning, match="the guide takes ordinary gradients"):
        engine = BLRInference(beta, of_its_own, compile=True)
        engine.step(FLIPS)


def test_without_a_compiler_operations_are_replayed_one_by_one() -> None:
    """torch finds no C++ compiler, and nothing that it compiled earlier."""
    config = torch._inductor.config
    plain, expected = stepped(9, schools, (EFFECTS, ERRORS))
    with config.patch({"cpp.cxx": ("/nonexistent/c++",), "force_disable_caches": True}):
        with pytest.warns(UserWarning, match="a flat list of operations; torch.compile failed.*C\\+\\+ compiler"):
            engine, losses = stepped(9, schools, (EFFECTS, ERRORS), compile=True)
    assert losses == pytest.approx(expected, rel=1e-9)
    assert_same(engine, plain)
    assert "a flat list of operations" in said(engine, EFFECTS, ERRORS)


def test_what_was_captured_is_held_against_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that gets it wrong is found out, and no step takes its result."""
    monkeypatch.setattr(
        "pyro_blr.fusing._inductor",
        lambda module, example: lambda *naturals: tuple(1.001 * x for x in replayed(module)(*naturals)),
    )
    plain, expected = stepped(8, schools, (EFFECTS, ERRORS))
    with pytest.warns(UserWarning, match="gave another result than the step"):
        engine, losses = stepped(8, schools, (EFFECTS, ERRORS), compile=True)
    assert losses == expected
    assert_same(engine, plain, 0.0)


def test_control_flow_on_a_latent(flat: None) -> None:
    """The model runs again for every draw, so steps are plain until they settle, if they do."""

    def model(y: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        loc = z if z > 0 else 2 * z
        pyro.sample("y", dist.Normal(loc, 0.5), obs=y)

    y = torch.tensor(1.0, dtype=torch.float64)
    plain, expected = stepped(3, model, (y,))
    state = torch.get_rng_state()
    engine, losses = stepped(3, model, (y,), compile=True)
    assert losses == expected
    assert_same(engine, plain, 0.0)
    assert torch.equal(torch.get_rng_state(), state)
    assert "settle" in said(engine, y)


# -- steps that fail --------------------------------------------------------------------------------------------------


def test_a_model_that_fails_changes_nothing(flat: None) -> None:
    engine, _ = stepped(CAPTURED_BY, schools, (EFFECTS, ERRORS), compile=True)
    plain, _ = stepped(CAPTURED_BY, schools, (EFFECTS, ERRORS))
    before = {name: natural.clone() for name, natural in engine.guide.naturals.items()}
    history, state = list(engine.posterior.history), torch.get_rng_state()
    bad = EFFECTS.clone()
    bad[2] = float("nan")
    with pytest.raises(ValueError, match="effect"):
        engine.step(bad, ERRORS)
    assert all(torch.equal(engine.guide.naturals[name], natural) for name, natural in before.items())
    assert engine.posterior.history == history
    assert torch.equal(torch.get_rng_state(), state)
    losses = [each.step(EFFECTS, ERRORS) for each in (engine, plain) for _ in range(CAPTURED_BY)]
    assert losses[:CAPTURED_BY] == pytest.approx(losses[CAPTURED_BY:], rel=1e-9)
    assert_same(engine, plain)


def test_a_step_that_leaves_the_domain_is_taken_plainly(flat: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A captured step that ends in no number is not committed: the plain step, which names the site, is asked."""
    engine, _ = stepped(CAPTURED_BY, schools, (EFFECTS, ERRORS), compile=True)
    plain, _ = stepped(CAPTURED_BY, schools, (EFFECTS, ERRORS))
    sweep = engine._compiled._sweep
    assert sweep is not None
    monkeypatch.setattr(engine._compiled, "_sweep", lambda *x: tuple(float("nan") * y for y in sweep(*x)))
    assert engine.step(EFFECTS, ERRORS) == pytest.approx(plain.step(EFFECTS, ERRORS), rel=1e-12)
    assert_same(engine, plain)


def test_an_interrupted_step_changes_nothing(flat: None, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _ = stepped(CAPTURED_BY, schools, (EFFECTS, ERRORS), compile=True)
    plain, _ = stepped(CAPTURED_BY + 1, schools, (EFFECTS, ERRORS))

    def interrupted(ascent: Ascent) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Ascent, "bound_kind", property(interrupted))
        with pytest.raises(KeyboardInterrupt):
            engine.step(EFFECTS, ERRORS)
    engine.step(EFFECTS, ERRORS)
    assert_same(engine, plain)


# -- devices ----------------------------------------------------------------------------------------------------------


def regression(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(x.new_zeros(x.shape[1]), 1.0).to_event(1))
    precision = pyro.sample("precision", dist.Gamma(x.new_ones(()), 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(x @ w, precision.rsqrt()), obs=y)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", ["schools", "regression"])
def test_on_a_device(name: str, device: str, request: pytest.FixtureRequest) -> None:
    """On a GPU fused and launched as one CUDA graph; here on the CPU, operation by operation."""
    if device == "cpu":
        request.getfixturevalue("flat")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100_000, 100, generator=generator, dtype=torch.float32)
    y = x.sum(-1) + torch.randn(100_000, generator=generator, dtype=torch.float32)
    model, args = {"schools": (schools, (EFFECTS, ERRORS)), "regression": (regression, (x, y))}[name]
    args = tuple(item.to(device) for item in args)
    plain, expected = stepped(12, model, args)
    engine, losses = stepped(12, model, args, compile=True)
    relative = 1e-5 if name == "regression" else 1e-9
    assert losses == pytest.approx(expected, rel=relative)
    assert_same(engine, plain, relative)
    assert all(natural.device.type == device for natural in engine.guide.naturals.values())
    if device == "cuda":
        assert "launched as one CUDA graph" in said(engine, *args)


def test_nothing_is_said_where_nothing_was_asked() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine, _ = stepped(4, subsampled, (FLIPS,))
    assert not any("compile" in note for note in engine.explain(FLIPS).notes)
