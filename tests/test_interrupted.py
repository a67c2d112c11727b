"""A run that is cut short leaves the posterior of its last whole sweep, and the same call goes on from there, bit for bit.

Cut short by Ctrl-C (a real SIGINT, wherever it may fall), by an error in the model, by NaN in data, in a parameter or in a gradient.
The reference is a run that nothing disturbed: what it had after every sweep, and what it ended with.
"""

from __future__ import annotations

import contextlib
import random
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoIAFNormal
from pyro.optim import Adam
from test_bad_input import assert_same, tensor
from torch import Tensor
from torch.distributions import constraints

from pyro_blr import BLRInference, Posterior, runs
from pyro_blr.checks import ImproperPosteriorError
from pyro_blr.interrupts import patient, uninterrupted
from pyro_blr.messages import Messages


@pytest.fixture(autouse=True)
def default_handler() -> Iterator[None]:
    """Python's own handler: what a shell starts in the background ignores Ctrl-C."""
    kept = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, kept)


GENERATOR = torch.Generator().manual_seed(5)


def normals(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


X = normals(30, 3)
Y = X @ tensor(1.0, -0.5, 0.2) + 0.5 * normals(30)
LABELS = (Y > 0).double()
CLASSES = torch.arange(30) % 4
MIXED = torch.cat([normals(12) - 2.0, normals(18) + 2.0])


class Watched:
    """A model that does something at chosen runs of it."""

    def __init__(self, model: Callable):
        self.model, self.runs = model, 0
        self.events: dict[int, Callable[[], None]] = {}

    def __call__(self, *args: Any) -> Any:
        self.runs += 1
        self.events.get(self.runs, lambda: None)()
        return self.model(*args)


# -- models, one for each way to run ------------------------------------------------------------------------


def mixture(y):
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
    with pyro.plate("components", 2):
        centre = pyro.sample("centre", dist.Normal(torch.tensor(0.0), 3.0))
        precision = pyro.sample("precision", dist.Gamma(torch.tensor(2.0), 2.0))
    with pyro.plate("rows", len(y)):
        k = pyro.sample("k", dist.Categorical(weights))
        pyro.sample("y", dist.Normal(centre[k], precision[k].rsqrt()), obs=y)


def scales(y):
    """Exact, small and slow: beyond a hundred sweeps they run as a flat list of operations."""
    a = pyro.sample("a", dist.Normal(torch.tensor(0.0), 100.0))
    tau = pyro.sample("tau", dist.Gamma(torch.tensor(1.0), 1.0))
    with pyro.plate("groups", 5):
        b = pyro.sample("b", dist.Normal(a, tau.rsqrt()))
        with pyro.plate("rows", 6):
            pyro.sample("y", dist.Normal(b, 3.0), obs=y.reshape(6, 5))


def logistic(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 2.0).to_event(1))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)


def softmax(x, y):
    """Four predictors a row: integrals at random points, of which there may be more later."""
    w = pyro.sample("w", dist.Normal(torch.zeros(3, 4), 2.0).to_event(2))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Categorical(logits=x @ w), obs=y)


def wave(y):
    """A Gamma and a Normal under one factor."""
    a = pyro.sample("a", dist.Normal(torch.tensor(0.0), 1.0))
    g = pyro.sample("g", dist.Gamma(torch.tensor(4.0), 2.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(torch.sin(a) * g, 0.5 + g), obs=y)


def leaving(y):
    """A latent leaves torch, so that the model is run again for every draw."""
    z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
    mean = torch.sinh(z) if float(z) < 0.3 else 1.3 * z - 0.1
    pyro.sample("y", dist.Normal(mean, 0.7).expand([len(y)]).to_event(1), obs=y)


def subsampled(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 2.0).to_event(1))
    tau = pyro.sample("tau", dist.Gamma(torch.tensor(2.0), 2.0))
    with pyro.plate("rows", len(y), subsample_size=10) as rows:
        pyro.sample("y", dist.Normal(x[rows] @ w, tau.rsqrt()), obs=y[rows])


def subsampled_logistic(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 2.0).to_event(1))
    with pyro.plate("rows", len(y), subsample_size=10) as rows:
        pyro.sample("y", dist.Bernoulli(logits=x[rows] @ w), obs=y[rows])


def empirical(x, y):
    """The prior's scale is a parameter."""
    scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
    w = pyro.sample("w", dist.Normal(torch.zeros(3), scale).to_event(1))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)


def halves(x, y):
    """A guide of the user's own: `w` has a family's parameters, `tau` a shared one."""
    loc = pyro.param("loc", torch.zeros(3))
    scale = pyro.param("scale", torch.ones(3), constraint=constraints.positive)
    shared = pyro.param("shared", torch.tensor(0.0))
    pyro.sample("w", dist.Normal(loc, scale).to_event(1))
    pyro.sample("tau", dist.LogNormal(shared, 0.1 + shared**2))


class Program(NamedTuple):
    name: str
    model: Callable
    args: tuple
    guide: Callable[[Any], Any] = lambda model: None
    options: dict[str, Any] = {}
    run: dict[str, Any] = {}

    def engine(self, model: Callable | None = None) -> BLRInference:
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        model = model or self.model
        return BLRInference(model, self.guide(model), Adam({"lr": 0.02}), **self.options)

    def go(self, engine: BLRInference, **more: Any) -> Any:
        return engine.run(*self.args, **{"progress": False, **self.run, **more})


PROGRAMS = [
    Program("exact", mixture, (MIXED,), run={"max_steps": 25}),
    Program("exact and flat", scales, (MIXED,), options={"blocks": "sites"}, run={"max_steps": 130, "tol": 1e-300}),
    Program("exact, three starts", mixture, (MIXED,), run={"max_steps": 12, "num_restarts": 3}),
    Program("quadrature", logistic, (X, LABELS)),
    Program("quadrature at random points", softmax, (X, CLASSES)),
    Program("draws", wave, (MIXED,), options={"blocks": "sites"}, run={"max_steps": 14}),
    Program("draws, the model run again", leaving, (MIXED[:3],), run={"max_steps": 12}),
    Program("minibatches", subsampled, (X, Y), run={"max_steps": 12}),
    Program("minibatches and quadrature", subsampled_logistic, (X, LABELS), run={"max_steps": 8}),
    Program("a parameter", empirical, (X, Y), run={"max_steps": 25}),
    Program("an autoguide", logistic, (X, LABELS), guide=AutoDiagonalNormal),
    Program("an autoguide and minibatches", subsampled, (X, Y), guide=AutoDiagonalNormal, run={"max_steps": 6}),
    Program("half a guide", subsampled, (X, Y), guide=lambda model: halves, run={"max_steps": 8}),
    Program(
        "no family", logistic, (X, LABELS), guide=lambda m: AutoIAFNormal(m, hidden_dim=[5]), run={"max_steps": 12}
    ),
    Program("points", logistic, (X, LABELS), guide=AutoDelta),
    Program("points and a parameter", empirical, (X, Y), guide=AutoDelta, run={"max_steps": 12}),
]


def program(name: str) -> Program:
    return next(one for one in PROGRAMS if one.name == name)


every_program = pytest.mark.parametrize("case", PROGRAMS, ids=lambda case: case.name.replace(" ", "_"))


# -- what there is to compare -------------------------------------------------------------------------------


def held(engine: BLRInference) -> dict[str, Any]:
    """λ or the guide's parameters, those of the model, and what their optimiser remembers."""
    store = pyro.get_param_store()
    naturals = getattr(engine._q, "naturals", {})
    inner = getattr(engine._ordinary, "_q", None)
    optim = engine.optim
    return {
        "natural": {name: natural.clone() for name, natural in naturals.items()},
        "guide": {name: natural.clone() for name, natural in (inner.naturals if inner is not None else {}).items()},
        "parameters": {name: store[name].detach().clone() for name in store.keys()},
        "optimiser": dict(enumerate(sorted(repr(single.state_dict()) for single in optim.optim_objs.values()))),
    }


def generators() -> dict[str, Any]:
    return {"torch": torch.get_rng_state(), "numpy": np.random.get_state()[1].copy(), "python": random.getstate()}


def ended(engine: BLRInference) -> dict[str, Any]:
    """All that a run ends with."""
    posterior = engine.posterior
    words = {key: getattr(posterior, key) for key in ("history", "num_steps", "elbo", "converged", "stop_reason")}
    words["se"], words["restarts"] = getattr(posterior, "elbo_se", 0.0), list(getattr(posterior, "restarts", ()))
    return {**held(engine), **words, "generators": generators()}


@contextmanager
def recorded(engine: BLRInference) -> Iterator[list[dict[str, Any]]]:
    """What the engine would have, were it stopped there, after every sweep."""
    found: list[dict[str, Any]] = []
    tick = runs.Run._tick

    def ticked(run: Any, *args: Any, **kwargs: Any) -> None:
        tick(run, *args, **kwargs)
        state, indices, whole = held(engine), run.program.graph.subsamples, engine._q.naturals
        naturals = run.ascent.beliefs.naturals
        state["natural"] = {
            name: block.scatter(whole[name], naturals[name], indices).clone()
            for name, block in run.program.blocks.items()
        }
        if engine._q is not engine.guide:
            state["parameters"] = {}  # they take λ when the run ends
        found.append({"history": list(run.history), **state})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs.Run, "_tick", ticked)
        yield found


class Reference(NamedTuple):
    end: dict[str, Any]
    sweeps: list[dict[str, Any]]
    calls: int  # of Python functions


REFERENCES: dict[str, Reference] = {}


def reference(case: Program) -> Reference:
    """An undisturbed run: its end, what it had after every sweep, and how many calls of functions it took."""
    if case.name not in REFERENCES:
        case.go(case.engine())  # imports and caches
        engine = case.engine()
        with recorded(engine) as sweeps:
            case.go(engine)
        end, engine = ended(engine), case.engine()
        with interrupted_at(sys.maxsize) as calls:
            case.go(engine)
        assert_same(end, ended(engine))
        REFERENCES[case.name] = Reference(end, sweeps, calls[0])
    return REFERENCES[case.name]


@contextmanager
def interrupted_at(number: int) -> Iterator[list[int]]:
    """A SIGINT at the n-th call of a Python function."""
    calls = [0]

    def count(frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            calls[0] += 1
            if calls[0] == number:
                signal.raise_signal(signal.SIGINT)

    sys.setprofile(count)
    try:
        yield calls
    finally:
        sys.setprofile(None)


def check_what_is_left(case: Program, engine: BLRInference, before: dict[str, Any]) -> int:
    """λ, parameters and history are those of the last whole sweep, or nothing has changed; the number of sweeps."""
    wanted = reference(case)
    try:
        posterior = engine.posterior
    except RuntimeError:
        now = held(engine)
        assert_same(before, {key: {name: now[key][name] for name in before[key]} for key in before})
        return 0
    count = len(posterior.history)
    assert posterior.num_steps == count > 0
    if posterior.stop_reason == wanted.end["stop_reason"]:  # too late to cut anything short
        return count
    assert not posterior.converged and posterior.stop_reason.startswith("cut short by "), posterior.stop_reason
    assert f"after {count} step" in posterior.stop_reason
    if wanted.sweeps:
        found = {"history": posterior.history, **held(engine)}
        matching = [sweep for sweep in wanted.sweeps if sweep["history"] == posterior.history]
        assert matching, "a history that the undisturbed run never had"
        for key in ("natural", "parameters", "optimiser") if matching[0]["parameters"] else ("natural",):
            assert_same(matching[0][key], found[key], key)
    else:
        assert posterior.history == wanted.end["history"][:count]
    if isinstance(posterior, Posterior):
        for site in posterior:
            assert bool(torch.isfinite(posterior[site].mean).all())
        assert posterior.elbo == posterior.history[-1]
    return count


# -- Ctrl-C, anywhere -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@every_program
def test_an_interrupt_anywhere(case: Program) -> None:
    """At calls drawn from all calls of a run, at the first ones and at the last ones; every second run is cut short twice."""
    wanted = reference(case)
    drawn = random.Random(11)
    numbers = [1, *(drawn.randrange(wanted.calls // 3, wanted.calls) for _ in range(4)), wanted.calls - 2]
    kept = 0
    for attempt, number in enumerate(numbers):
        engine = case.engine()
        before = held(engine)
        for cut in range(1 + attempt % 2):
            with contextlib.suppress(KeyboardInterrupt):  # the last calls are a finaliser's, where Python loses it
                with interrupted_at(number if not cut else number // 2):
                    case.go(engine)
            kept += check_what_is_left(case, engine, before) > 0
            if not engine_is_unfinished(engine):
                break
            torch.rand(3) if engine_has_posterior(engine) else None  # a look at the posterior, say
        if engine_is_unfinished(engine):
            case.go(engine)
        assert_same(wanted.end, ended(engine), f"call {number} of {wanted.calls}")
    assert kept >= 2


def engine_has_posterior(engine: BLRInference) -> bool:
    try:
        return engine.posterior is not None
    except RuntimeError:
        return False


def engine_is_unfinished(engine: BLRInference) -> bool:
    return not engine_has_posterior(engine) or engine.posterior.stop_reason.startswith("cut short")


def test_a_second_interrupt_does_not_wait() -> None:
    """The first one waits for the end of the sweep, the second is raised in the middle of it; both leave the same."""
    for presses in (1, 2):
        watched = Watched(leaving)  # runs in every sweep
        case = program("draws, the model run again")
        wanted, engine = reference(case), case.engine(watched)
        case.go(engine)
        number, engine = 3 * watched.runs // 4, case.engine(watched)
        watched.runs = 0
        ends: list[bool] = []

        def press(presses=presses, ends=ends) -> None:
            for _ in range(presses):
                signal.raise_signal(signal.SIGINT)
            ends.append(True)  # what follows is still run

        watched.events[number] = press
        with pytest.raises(KeyboardInterrupt):
            case.go(engine)
        assert bool(ends) == (presses == 1)
        assert check_what_is_left(case, engine, {}) > 0
        watched.events.clear()
        case.go(engine)
        assert_same(wanted.end, ended(engine))


@pytest.mark.parametrize("presses", [0, 1, 2, 3])
@pytest.mark.parametrize("earlier", [0, 1])
def test_the_second_interrupt_waits_where_nothing_may_interrupt(presses: int, earlier: int) -> None:
    """One Ctrl-C waits to the end of what is patient, the second to the end of what may not be interrupted."""
    reached: list[str] = []

    def go() -> None:
        with patient():
            for _ in range(earlier):
                signal.raise_signal(signal.SIGINT)
            with uninterrupted():
                with uninterrupted(), patient() as check:
                    for _ in range(presses):
                        signal.raise_signal(signal.SIGINT)
                    check()
                    reached.append("inside")
                reached.append("still inside")
            reached.append("after it")

    with pytest.raises(KeyboardInterrupt) if earlier + presses else contextlib.nullcontext():
        go()
    at_once = presses > 0 and earlier + presses > 1
    assert reached == ["inside", "still inside", *(["after it"] if not at_once else [])]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_by_the_clock() -> None:
    """A timer's SIGINT while a long run is under way."""
    case = program("a parameter")._replace(run={"max_steps": 80, "tol": 1e-300})
    engine = case.engine()
    case.go(engine)
    wanted, engine = ended(engine), case.engine()
    before = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    signal.setitimer(signal.ITIMER_REAL, 0.25)
    try:
        with pytest.raises(KeyboardInterrupt):
            case.go(engine)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert engine_is_unfinished(engine)
    case.go(engine)
    assert_same(wanted, ended(engine))


# -- errors where they come from ------------------------------------------------------------------------------


class Broken(RuntimeError):
    """An error of the model's own."""


def fails(error: BaseException) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


RERUN = ["minibatches", "minibatches and quadrature", "a parameter", "an autoguide and minibatches", "half a guide"]
RERUN += ["no family", "draws, the model run again"]


@pytest.mark.parametrize("error", [Broken("no data today"), KeyboardInterrupt()], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("name", RERUN)
def test_an_error_in_the_model(name: str, error: BaseException) -> None:
    """At its last run but five."""
    case = program(name)
    watched = Watched(case.model)
    wanted, engine = reference(case), case.engine(watched)
    case.go(engine)
    number, engine = watched.runs - 5, case.engine(watched)
    before, watched.runs = held(engine), 0
    watched.events[number] = fails(error)
    with pytest.raises(type(error)):
        case.go(engine)
    assert check_what_is_left(case, engine, before) > 0
    case.go(engine)
    end = ended(engine)
    assert_same(wanted.end, end)


@pytest.mark.parametrize("name", ["exact", "quadrature", "draws", "minibatches", "a parameter"])
@pytest.mark.parametrize("place", ["in a message", "in the progress bar"])
def test_an_interrupt_in_the_middle(name: str, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raised on the spot, as a second Ctrl-C is."""
    case = program(name)
    wanted, engine = reference(case), case.engine()
    owner, method = (Messages, "exact_message") if place == "in a message" else (runs.tqdm, "update")
    if name == "draws" and owner is Messages:
        method = "average_over"
    plain, calls = getattr(owner, method), [0]

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return plain(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, method, counted)
        case.go(engine)
    total, engine = calls[0], case.engine()
    before, calls[0] = held(engine), 0

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if calls[0] == total - 2:
            raise KeyboardInterrupt
        return counted(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, method, interrupted)
        case.go(engine)
    assert check_what_is_left(case, engine, before) > 0
    case.go(engine)
    assert_same(wanted.end, ended(engine))


@pytest.mark.parametrize("name", ["minibatches", "half a guide", "no family"])
def test_nan_in_the_data_of_one_step(name: str) -> None:
    """The data are there again for the next call."""
    case, spoilt = program(name), [0.0]
    wanted = reference(case)
    watched = Watched(lambda x, y: case.model(x, y + spoilt[0]))
    engine = case.engine(watched)
    case.go(engine)
    number, engine = watched.runs - 5, case.engine(watched)
    before, watched.runs = held(engine), 0
    watched.events[number] = lambda: spoilt.__setitem__(0, float("nan"))
    with pytest.raises(ValueError, match="NaN|nan"):
        case.go(engine)
    assert check_what_is_left(case, engine, before) > 0
    spoilt[0] = 0.0
    case.go(engine)
    assert_same(wanted.end, ended(engine))


class Bad(torch.autograd.Function):
    """The identity, whose gradient is NaN where `Bad.active`."""

    active = False

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return gradient * float("nan") if Bad.active else gradient


def bad_gradient(x, y):
    scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
    w = pyro.sample("w", dist.Normal(torch.zeros(3), Bad.apply(scale)).to_event(1))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)


@pytest.mark.parametrize("guide", [lambda model: None, AutoIAFNormal], ids=["families", "no family"])
@pytest.mark.parametrize("call", ["run", "step"])
def test_a_gradient_that_is_nan(guide: Callable, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters and their optimiser are what they were before it, whatever is called next what would have been."""
    if guide is AutoIAFNormal:
        guide = program("no family").guide
    monkeypatch.setattr(Bad, "active", False)
    watched = Watched(bad_gradient)
    case = Program("bad", watched, (X, Y), guide=guide, run={"max_steps": 9})

    def go(engine: BLRInference) -> None:
        if call == "run":
            case.go(engine)
        for _ in range(0 if call == "run" else 10):
            engine.step(X, Y)

    engine = case.engine()
    go(engine)
    total = watched.runs
    go(engine)
    wanted, engine, watched.runs = held(engine), case.engine(), 0
    if call == "run":
        watched.events[total - 3] = lambda: setattr(Bad, "active", True)
    else:
        go(engine)
        Bad.active = True
    before = held(engine)
    for _ in range(2):  # what fails once more changes nothing
        with pytest.raises(ValueError, match="found NaN in the gradient"):
            go(engine)
        if call == "run":
            assert engine.posterior.stop_reason.startswith("cut short") and len(engine.posterior.history) > 2
            before = held(engine)
        assert_same(before, held(engine))
        before = held(engine)
    Bad.active = False
    watched.events.clear()
    go(engine)
    if call == "run":
        go(engine)
    assert_same(wanted, held(engine))


def test_an_improper_posterior_is_no_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweeps before it was found out are undone: nothing there was on the way to a posterior."""
    case = program("exact")
    engine, plain, calls = case.engine(), Messages.exact_message, [0]

    def improper(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == 20:
            raise ImproperPosteriorError("found out late")
        return plain(*args, **kwargs)

    monkeypatch.setattr(Messages, "exact_message", improper)
    with pytest.raises(ImproperPosteriorError):
        case.go(engine)
    with pytest.raises(RuntimeError, match="there is no posterior yet"):
        _ = engine.posterior


# -- another call, another process ------------------------------------------------------------------------------


def test_another_call_begins_anew_where_the_last_one_ended() -> None:
    case = program("minibatches")
    engine = case.engine()
    case.go(engine, max_steps=4)
    case.go(engine, max_steps=8)
    wanted = ended(engine)
    watched = Watched(case.model)
    engine = case.engine(watched)
    watched.events[watched.runs + 30] = lambda: None
    case.go(engine, max_steps=4)
    runs_before = watched.runs
    watched.events[runs_before + 1] = fails(Broken())
    with pytest.raises(Broken):
        case.go(engine, max_steps=8)
    assert engine.posterior.num_steps == 4  # nothing of the second call was done
    case.go(engine, max_steps=8)
    assert_same(wanted, ended(engine))


def test_what_is_saved_in_between_is_what_goes_on(tmp_path: Any) -> None:
    """The posterior, the parameter store and torch's generator on disk are those of the last whole sweep; a guide of the user's
    own, whose parameters hold λ, goes on from them in another engine.
    """
    case = program("an autoguide")
    watched = Watched(case.model)
    engine = case.engine(watched)
    end = case.go(engine)
    engine, tick, ticks = case.engine(watched), runs.Run._tick, [0]

    def ticked(run: Any, *args: Any, **kwargs: Any) -> None:
        tick(run, *args, **kwargs)
        ticks[0] += 1
        if ticks[0] == 2:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runs.Run, "_tick", ticked)
        case.go(engine)
    engine.posterior.save(tmp_path / "q")
    pyro.get_param_store().save(tmp_path / "store")
    loaded = Posterior.load(tmp_path / "q")
    assert_same(dict(engine.posterior.natural), dict(loaded.natural))
    assert loaded.stop_reason == engine.posterior.stop_reason and not loaded.converged
    other = case.engine(watched)
    other.guide(*case.args)
    pyro.get_param_store().load(tmp_path / "store")
    found = case.go(other)
    for site in end:
        assert torch.allclose(found[site].mean, end[site].mean, atol=1e-6)
    other = case.engine(watched)
    other.guide(*case.args)
    pyro.get_param_store().load(tmp_path / "store")
    again = case.go(other)
    assert_same(dict(found.natural), dict(again.natural))
