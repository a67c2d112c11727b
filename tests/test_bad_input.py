"""What cannot be inferred is refused by name (site, found, expected, what to do), and leaves all as it was.

That is λ, the steps and their history, the parameters and what their optimiser remembers, and the random
generators; for a new engine as for one that has taken a step.  The next good step is the one that would
have come.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    EnergyDistance,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceTMC_ELBO,
)
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam
from torch.distributions import constraints

from pyro_blr import BLRInference
from pyro_blr.checks import ImproperPosteriorError
from pyro_blr.guides import AutoExponentialFamily

NAN, INF = float("nan"), float("inf")


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


Y = tensor(1.2, -0.4, 2.1)


def line(y):
    """The model of most cases: two latents, one parameter."""
    m = pyro.sample("m", dist.Normal(torch.tensor(0.0), 1.0))
    tau = pyro.sample("tau", dist.Gamma(torch.tensor(2.0), 1.0))
    shift = pyro.param("shift", torch.tensor(0.1))
    with pyro.plate("n", y.shape[-1]):
        pyro.sample("x", dist.Normal(m + shift, tau.rsqrt()), obs=y)


def counts(y):
    rate = pyro.sample("rate", dist.Gamma(torch.tensor(2.0), 1.0))
    with pyro.plate("n", len(y)):
        pyro.sample("x", dist.Poisson(rate), obs=y)


def flags(y):
    p = pyro.sample("p", dist.Beta(torch.tensor(2.0), 1.0))
    with pyro.plate("n", len(y)):
        pyro.sample("x", dist.Bernoulli(p), obs=y)


def waits(y):
    rate = pyro.sample("rate", dist.Gamma(torch.tensor(2.0), 1.0))
    with pyro.plate("n", len(y)):
        pyro.sample("x", dist.Gamma(2.0, rate), obs=y)


def kinds(y):
    p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("n", len(y)):
        pyro.sample("x", dist.Categorical(p), obs=y)


def vectors(y):
    m = pyro.sample("m", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("n", 3):
        pyro.sample("x", dist.Normal(m, 1.0).to_event(1), obs=y)


def five(y):
    m = pyro.sample("m", dist.Normal(torch.tensor(0.0), 1.0))
    with pyro.plate("n", 5):
        pyro.sample("x", dist.Normal(m, 1.0), obs=y)


def named(name):
    m = pyro.sample(name, dist.Normal(torch.tensor(0.0), 1.0))
    pyro.sample("x", dist.Normal(m, 1.0), obs=Y[0])


def several(names):
    found = [pyro.sample(name, dist.Normal(torch.tensor(0.0), 1.0)) for name in names]
    pyro.sample("x", dist.Normal(found[0], 1.0), obs=Y[0])


def sized(dim):
    m = pyro.sample("m", dist.Normal(torch.zeros(dim), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(m.sum(), 1.0), obs=Y[0])


def local(size):
    with pyro.plate("n", size):
        m = pyro.sample("m", dist.Normal(torch.tensor(0.0), 1.0))
        pyro.sample("x", dist.Normal(m, 1.0), obs=torch.ones(size))


def prior(distribution):
    m = pyro.sample("m", distribution)
    pyro.sample("x", dist.Normal(0.0, 1.0 + m.exp()), obs=Y[0])


def flat(data):
    pyro.sample("m", dist.ImproperUniform(constraints.real, (), ()))
    u = pyro.sample("u", dist.Normal(torch.tensor(0.0), 1.0))
    pyro.sample("x", dist.Normal(u, 1.0), obs=data)


def growing(slope):
    tau = pyro.sample("tau", dist.Gamma(torch.tensor(2.0), 1.0))
    pyro.factor("growth", slope * tau)


def bending(curvature):
    z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
    pyro.factor("bend", curvature * z**2)


def subsampled(index):
    m = pyro.sample("m", dist.Normal(torch.tensor(0.0), 1.0))
    with pyro.plate("n", 3, subsample=index) as rows:
        pyro.sample("x", dist.Normal(m, 1.0), obs=Y[rows])


def plus_infinity(value):
    m = pyro.sample("m", dist.Normal(torch.tensor(0.0), 1.0))
    pyro.factor("f", torch.as_tensor(value))
    pyro.sample("x", dist.Normal(m, 1.0), obs=Y[0])


def window(y):
    m = pyro.sample("m", dist.Normal(torch.tensor(0.0), 1.0))
    pyro.sample("x", dist.Uniform(m - 100.0, m + 100.0), obs=y)


def maybe_observed(y=None):
    m = pyro.sample("m", dist.Normal(torch.tensor(0.0), 1.0))
    pyro.sample("x", dist.Normal(m, 1.0), obs=y)


def nothing_latent(y):
    pyro.sample("x", dist.Normal(torch.tensor(0.0), 1.0), obs=y)


def nothing_at_all():
    return 1


def uncountable(data):
    k = pyro.sample("k", dist.Poisson(torch.tensor(3.0)), obs=data)
    z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
    pyro.sample("x", dist.Normal(k + z, 1.0), obs=Y[0])


class OwnError(Exception):
    """The model's own."""


def raises(when):
    m = pyro.sample("m", dist.Normal(torch.tensor(0.0), 1.0))
    if when:
        raise OwnError("mine, unchanged")
    pyro.sample("x", dist.Normal(m, 1.0), obs=Y[0])


def branching(k_matters):
    k = pyro.sample("k", dist.Categorical(torch.ones(3) / 3))
    if k_matters and k == 1:
        pyro.sample("extra", dist.Normal(torch.tensor(0.0), 1.0))
    pyro.sample("x", dist.Normal(torch.tensor([0.0, 1.0, 2.0])[k], 1.0), obs=Y[0])


def scaled(scale):
    m = pyro.sample("m", dist.Normal(torch.tensor(0.0), 1.0))
    with poutine.scale(scale=scale):
        pyro.sample("x", dist.Normal(m, 1.0), obs=Y[0])


def design(x):
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("n", 3):
        pyro.sample("x", dist.Normal(x @ w, 1.0), obs=Y)


def twice(names):
    for name in names:
        pyro.sample(name, dist.Normal(torch.tensor(0.0), 1.0))
    pyro.sample("x", dist.Normal(torch.tensor(0.0), 1.0), obs=Y[0])


X = torch.tensor([[1.0, 0.2], [0.3, -1.0], [0.5, 2.0]], dtype=torch.float64)


class Case(NamedTuple):
    name: str
    model: Callable
    good: tuple
    bad: tuple
    error: type[Exception]
    message: str
    options: dict[str, Any] = {}


CASES = [
    # data
    Case(
        "NaN in the data",
        line,
        (Y,),
        (tensor(1, NAN, 2),),
        ValueError,
        r"observed site 'x': found 1 values that are NaN or infinite \(first at index \(1,\)\), "
        r"expected finite data.*mask",
    ),
    Case(
        "infinite data",
        line,
        (Y,),
        (tensor(INF, 1, -INF),),
        ValueError,
        r"observed site 'x': found 2 values that are NaN or infinite \(first at index \(0,\)\)",
    ),
    Case(
        "a negative count",
        counts,
        (tensor(1, 2),),
        (tensor(1, -2),),
        ValueError,
        r"observed site 'x': found 1 values outside the support .* of its Poisson \(first at index \(1,\)\)",
    ),
    Case(
        "half a count",
        counts,
        (tensor(1, 2),),
        (tensor(0.5, 2),),
        ValueError,
        r"observed site 'x': found 1 values outside the support .* of its Poisson \(first at index \(0,\)\)",
    ),
    Case(
        "a flag of two",
        flags,
        (tensor(1, 0),),
        (tensor(1, 2),),
        ValueError,
        "outside the support .* of its Bernoulli",
    ),
    Case(
        "a negative wait",
        waits,
        (tensor(1, 2),),
        (tensor(1, -2),),
        ValueError,
        "outside the support .* of its Gamma",
    ),
    Case(
        "a kind too many",
        kinds,
        (torch.tensor([0, 2]),),
        (torch.tensor([0, 3]),),
        ValueError,
        "outside the support .* of its Categorical",
    ),
    Case(
        "fewer data than the plate has",
        five,
        (torch.ones(5),),
        (torch.ones(3),),
        ValueError,
        r"observed site 'x': found data of shape \(3,\), expected \(5,\), the shape of its Normal. "
        r"Check the plates",
    ),
    Case(
        "data that are transposed",
        vectors,
        (torch.ones(3, 2),),
        (torch.ones(2, 3),),
        ValueError,
        r"observed site 'x': found data of shape \(2, 3\), expected \(3, 2\)",
    ),
    Case(
        "NaN in the design",
        design,
        (X,),
        (torch.where(X < 0, NAN, X),),
        ValueError,
        r"loc .* to satisfy the constraint Real",
    ),
    Case("a design of another width", design, (X,), (torch.ones(3, 4),), RuntimeError, "size mismatch"),
    Case(
        "no data at an observed site",
        maybe_observed,
        (Y[0],),
        (),
        ValueError,
        r"observed site 'x': found no data \(obs=None\) in this step, expected data as in the steps "
        r"before. .*Predictive",
    ),
    # structure
    Case(
        "a renamed site",
        named,
        ("a",),
        ("b",),
        ValueError,
        r"latent sites changed between steps: found \['b'\], expected \['a'\]. Make a new BLRInference",
    ),
    Case(
        "a missing site",
        several,
        (["a", "b"],),
        (["a"],),
        ValueError,
        r"found \['a'\], expected \['a', 'b'\]",
    ),
    Case("one site more", several, (["a"],), (["a", "b"],), ValueError, r"found \['a', 'b'\], expected \['a'\]"),
    Case(
        "a site of another shape",
        sized,
        (2,),
        (3,),
        ValueError,
        r"site 'm' changed between steps: found MultivariateNormal\(dimension=3\).* expected "
        r"MultivariateNormal\(dimension=2\)",
    ),
    Case(
        "a site of another family",
        prior,
        (dist.Normal(torch.tensor(0.0), 1.0),),
        (dist.Gamma(torch.tensor(2.0), 1.0),),
        ValueError,
        r"site 'm' changed between steps: found Gamma\(\).*, expected Normal\(\)",
    ),
    Case(
        "a plate of another size",
        local,
        (3,),
        (5,),
        ValueError,
        r"site 'm': found plate 'n' of size 5 in this step, expected 3 as in the steps "
        r"before.*pyro.plate\('n', 3, subsample",
    ),
    Case(
        "an empty plate",
        line,
        (Y,),
        (tensor(),),
        ValueError,
        "plate 'n' is empty: found no elements, expected at least one",
    ),
    Case(
        "an empty subsample",
        subsampled,
        (torch.tensor([0, 2]),),
        (torch.zeros(0, dtype=torch.long),),
        ValueError,
        "plate 'n' is empty: found no elements",
    ),
    Case(
        "statements in a branch",
        branching,
        (False,),
        (True,),
        ValueError,
        r"which statements the model makes depends on its latents \(.* on k, test_bad_input.py:\d+\): "
        r"found \['extra'\]",
    ),
    Case("one name twice", twice, (["a", "b"],), (["a", "a"],), RuntimeError, "Multiple sample sites named 'a'"),
    Case("a discrete site without end", uncountable, (torch.tensor(2.0),), (None,), ValueError, "site 'k'"),
    # densities
    Case(
        "a prior of scale zero",
        prior,
        (dist.Normal(torch.tensor(0.0), 1.0),),
        (dist.Normal(torch.tensor(0.0), torch.tensor(0.0), validate_args=False),),
        ValueError,
        "(factor|site) 'm': found (an expected log density of nan|NaN or infinite messages).*, expected .*finite",
    ),
    Case(
        "a likelihood of zero",
        plus_infinity,
        (0.0,),
        (-INF,),
        ImproperPosteriorError,
        "factor 'f': found an expected log density of -inf under the present q, expected a finite one.*init=",
    ),
    Case("an infinite density", plus_infinity, (0.0,), (NAN,), ValueError, "log_factor"),
    Case(
        "data that no latent explains",
        window,
        (tensor(3.0)[0],),
        (tensor(1e6)[0],),
        ImproperPosteriorError,
        r"found an (ELBO of -inf at the draws of q|expected log density of nan under the present q), "
        r"expected a finite one.*init=\{site: value\}",
    ),
    Case("a negative scale", scaled, (1.0,), (-1.0,), ValueError, "Expected scale > 0 but got -1.0"),
    Case("an exception of the model's own", raises, (False,), (True,), OwnError, "^mine, unchanged"),
    # arguments
    Case(
        "a keyword that the model has not",
        line,
        (Y,),
        (Y, Y),
        TypeError,
        "takes 1 positional argument but 2 were given",
    ),
    Case("no argument", line, (Y,), (), TypeError, "missing 1 required positional argument: 'y'"),
]

AT_THE_START = [
    Case(
        "nothing latent",
        nothing_latent,
        (),
        (Y[0],),
        ValueError,
        r"the model has no latent sample site \(observed: \['x'\]\): there is nothing to infer",
    ),
    Case(
        "no statement",
        nothing_at_all,
        (),
        (),
        ValueError,
        r"the model has no latent sample site \(observed: \[\]\)",
    ),
    Case(
        "a discrete prior without end",
        uncountable,
        (),
        (None,),
        ValueError,
        "site 'k': Poisson is discrete with infinite support.*or pass its data if it is observed",
    ),
    Case(
        "init is NaN",
        line,
        (),
        (Y,),
        ValueError,
        "init of site 'm': found NaN or infinite values",
        {"init": {"m": NAN}},
    ),
    Case(
        "init is infinite",
        line,
        (),
        (Y,),
        ValueError,
        "init of site 'm': found NaN or infinite",
        {"init": {"m": INF}},
    ),
    Case(
        "init of an unknown site",
        line,
        (),
        (Y,),
        ValueError,
        r"init names \['q'\], expected latent sites of the model: \['m', 'tau'\]",
        {"init": {"q": 0.0}},
    ),
    Case("init of an observed site", line, (), (Y,), ValueError, r"init names \['x'\]", {"init": {"x": Y}}),
    Case(
        "init outside the support",
        line,
        (),
        (Y,),
        ValueError,
        "init of site 'tau': found a value outside its support",
        {"init": {"tau": -1.0}},
    ),
    Case(
        "init on the boundary",
        line,
        (),
        (Y,),
        ValueError,
        "init of site 'tau': found a value on the boundary of its support",
        {"init": {"tau": 0.0}},
    ),
    Case(
        "init of another shape",
        line,
        (),
        (Y,),
        ValueError,
        r"init of site 'm': found shape \(4,\), expected \(\)",
        {"init": {"m": torch.zeros(4)}},
    ),
    Case(
        "init of another family",
        line,
        (),
        (Y,),
        ValueError,
        "init of site 'tau': found Normal .* expected one of the family Gamma",
        {"init": {"tau": dist.Normal(torch.tensor(0.0), 1.0)}},
    ),
    Case(
        "init_loc_fn gives NaN",
        line,
        (),
        (Y,),
        ValueError,
        "init of site 'm': found NaN",
        {"init_loc_fn": lambda site: torch.tensor(NAN)},
    ),
    Case(
        "blocks of an unknown site",
        line,
        (),
        (Y,),
        ValueError,
        r"blocks names 'zz', which is no latent site of the model; it has \['m', 'tau'\]",
        {"blocks": [["m", "zz"]]},
    ),
    Case("blocks of an observed site", line, (), (Y,), ValueError, "blocks names 'x'", {"blocks": [["m", "x"]]}),
    Case(
        "blocks that overlap",
        line,
        (),
        (Y,),
        ValueError,
        "blocks names site 'm' twice",
        {"blocks": [["m"], ["m", "tau"]]},
    ),
    Case(
        "blocks in a word of one's own",
        line,
        (),
        (Y,),
        ValueError,
        'blocks=\'all\': expected "sites", "elements" or a list of groups',
        {"blocks": "all"},
    ),
    Case(
        "blocks without groups",
        line,
        (),
        (Y,),
        ValueError,
        r"found site names, expected groups of them; one group of all is \[\['m', 'tau'\]\]",
        {"blocks": ["m", "tau"]},
    ),
    Case(
        "a discrete site in a group",
        branching,
        (),
        (False,),
        ValueError,
        "blocks groups 'k', which is discrete|blocks names 'x'",
        {"blocks": [["k", "x"]]},
    ),
]


def everything(engine: BLRInference) -> dict[str, Any]:
    """All that a failed step must leave alone."""
    store = pyro.get_param_store()
    optim = engine.optim
    return {
        "natural": {name: natural.clone() for name, natural in engine.guide.naturals.items()},
        "blocks": {name: (block.family, block.full_shape) for name, block in engine.guide.blocks.items()},
        "history": list(engine.posterior.history) if engine._ready else [],
        "steps": engine.posterior.num_steps if engine._ready else 0,
        "parameters": {name: store[name].detach().clone() for name in store.keys()},
        "optimiser": repr([single.state_dict() for single in optim.optim_objs.values()]) if optim is not None else "",
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].copy(),
        "python": random.getstate(),
    }


def assert_same(before: Any, after: Any, where: str = "state") -> None:
    if isinstance(before, dict):
        assert before.keys() == after.keys(), where
        for key in before:
            assert_same(before[key], after[key], f"{where}[{key!r}]")
    elif isinstance(before, (torch.Tensor, np.ndarray)):
        assert before.shape == after.shape and bool((before == after).all()), where
    else:
        assert before == after, where


CALLS = {
    "step": lambda engine, args: engine.step(*args),
    "run": lambda engine, args: engine.run(*args, progress=False, max_steps=30),
    "evaluate_loss": lambda engine, args: engine.evaluate_loss(*args),
    "explain": lambda engine, args: engine.explain(*args),
}


def name_of(case: Case) -> str:
    return case.name.replace(" ", "_")


def new_engine(case: Case) -> BLRInference:
    pyro.clear_param_store()
    pyro.set_rng_seed(3)
    return BLRInference(case.model, None, Adam({"lr": 0.01}), **case.options)


def refused(case: Case, engine: BLRInference, call: str) -> None:
    """The call fails with the case's message and nothing has changed; a parameter may have been created."""
    before = everything(engine)
    with pytest.raises(case.error, match=case.message):
        CALLS[call](engine, case.bad)
    after = everything(engine)
    after["parameters"] = {name: after["parameters"][name] for name in before["parameters"]}
    assert_same(before, after)


@pytest.mark.parametrize("call", ["step", "run"])
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_after_a_good_step_nothing_changes(case, call):
    engine = new_engine(case)
    engine.step(*case.good)
    refused(case, engine, call)
    engine.step(*case.good)
    resumed = everything(engine)

    undisturbed = new_engine(case)
    undisturbed.step(*case.good)
    undisturbed.step(*case.good)
    assert_same(everything(undisturbed), resumed)


@pytest.mark.parametrize("call", ["evaluate_loss", "explain"])
@pytest.mark.parametrize("case", CASES[:3] + CASES[11:16], ids=name_of)
def test_a_look_that_fails_changes_nothing(case, call):
    engine = new_engine(case)
    engine.step(*case.good)
    refused(case, engine, call)


BETWEEN_STEPS = {
    "no data at an observed site",
    "a renamed site",
    "a missing site",
    "one site more",
    "a site of another shape",
    "a site of another family",
    "a plate of another size",
}


@pytest.mark.parametrize("case", [c for c in CASES if c.name not in BETWEEN_STEPS] + AT_THE_START, ids=name_of)
def test_at_the_first_step_nothing_changes(case):
    engine = new_engine(case)
    refused(case, engine, "step")
    with pytest.raises(RuntimeError, match="there is no posterior yet: call step or run first"):
        _ = engine.posterior
    if case.good:
        engine.step(*case.good)
        resumed = everything(engine)
        undisturbed = new_engine(case)
        undisturbed.step(*case.good)
        assert_same(everything(undisturbed), resumed)


def test_there_are_enough_cases():
    names = [case.name for case in CASES + AT_THE_START]
    assert len(set(names)) == len(names) >= 25


# -- improper posteriors: no distribution that λ could become ------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [
        Case(
            "a flat prior and no data",
            flat,
            (),
            (Y[0],),
            ImproperPosteriorError,
            "site 'm': its factors add up to no proper distribution.*give the site a proper prior",
        ),
        Case(
            "a density that grows",
            growing,
            (),
            (3.0,),
            ImproperPosteriorError,
            "site 'tau': its factors add up to",
        ),
        Case(
            "a density that bends up",
            bending,
            (),
            (2.0,),
            ImproperPosteriorError,
            "site 'z': found a log density that rose by .* faster and faster",
        ),
    ],
    ids=name_of,
)
def test_improper_posterior(case):
    engine = new_engine(case)
    before = everything(engine)
    with pytest.raises(case.error, match=case.message):
        engine.run(*case.bad, progress=False)
    assert_same(before, everything(engine))


def test_a_flat_prior_with_data_is_proper():
    def model():
        m = pyro.sample("m", dist.ImproperUniform(constraints.real, (), ()))
        pyro.sample("x", dist.Normal(m, 2.0), obs=Y[0])

    m = BLRInference(model).run(progress=False)["m"]
    assert abs(float(m.mean) - 1.2) < 1e-6 and abs(float(m.stddev) - 2.0) < 1e-6


def test_init_of_scalar_sites_is_taken():
    """What the refusals above leave through: a number for a site of any family."""
    engine = BLRInference(line, init={"m": 0.7, "tau": 2.0}, blocks="sites")
    posterior = engine.run(Y, progress=False, max_steps=50)
    other = BLRInference(line, init={"m": torch.tensor(-3.0)}).run(Y, progress=False, max_steps=50)
    assert float(posterior["m"].stddev) > 0 and float(other["m"].stddev) > 0


# -- without Pyro's validation: our own words ----------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [
        Case("NaN in the design", design, (X,), (torch.where(X < 0, NAN, X),), ValueError, "'x'|'w'"),
        Case(
            "a prior at NaN",
            prior,
            (dist.Normal(torch.tensor(0.0), 1.0),),
            (dist.Normal(torch.tensor(NAN), 1.0, validate_args=False),),
            ValueError,
            "'m'",
        ),
        Case(
            "NaN in the data",
            line,
            (Y,),
            (tensor(1, NAN, 2),),
            ValueError,
            "observed site 'x': found 1 values that are NaN",
        ),
        Case(
            "a negative count",
            counts,
            (tensor(1, 2),),
            (tensor(1, -2),),
            ValueError,
            "observed site 'x': found 1 values outside",
        ),
    ],
    ids=name_of,
)
def test_without_validation(case):
    pyro.enable_validation(False)
    engine = new_engine(case)
    engine.step(*case.good)
    refused(case, engine, "step")


# -- at the constructor, and arguments of run ----------------------------------------------------------------


def other_guide(y):
    pyro.sample("zz", dist.Normal(torch.tensor(0.0), 1.0))


def losses():
    yield RenyiELBO(), "found RenyiELBO, expected Trace_ELBO, .*another objective than the ELBO"
    yield ReweightedWakeSleep(), "found ReweightedWakeSleep, .*another objective"
    yield TraceTMC_ELBO(), "found TraceTMC_ELBO, .*another objective"
    yield EnergyDistance(), "found EnergyDistance, expected Trace_ELBO"
    yield (lambda model, guide: 0.0), "found function, .*a bare function does not say which factors it sums"
    yield Trace_ELBO, r"found the class Trace_ELBO, expected an instance; write Trace_ELBO\(\)"
    yield "elbo", "found str, .*it is no ELBO"


@pytest.mark.parametrize(("loss", "message"), list(losses()))
def test_loss_without_a_meaning(loss, message):
    with pytest.raises(TypeError, match=f"loss: {message}"):
        BLRInference(line, None, None, loss)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((3,), {}, TypeError, "model: found int, expected a callable Pyro model"),
        ((line, 3), {}, TypeError, "guide: found int, expected a Pyro guide"),
        ((line, None, 3), {}, TypeError, "optim: found int, expected one of pyro.optim's .*PyroOptim"),
        (
            (line, None, torch.optim.Adam([torch.zeros(1, requires_grad=True)])),
            {},
            TypeError,
            "optim: found Adam, expected one of",
        ),
        ((line,), {"block": "sites"}, TypeError, "unexpected keyword argument 'block'"),
        ((line, other_guide), {"init": {"m": 0.0}}, ValueError, "init: found beside a guide of your own"),
        ((line, other_guide), {"blocks": "elements"}, ValueError, "blocks: found beside a guide of your own"),
    ],
)
def test_constructor(arguments, options, error, message):
    before = torch.get_rng_state()
    with pytest.raises(error, match=message):
        BLRInference(*arguments, **options)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tol": -1.0}, "tol: found -1.0, expected a positive number of nats"),
        ({"tol": NAN}, "tol: found nan, expected a positive number of nats"),
        ({"max_steps": 0}, "max_steps: found 0, expected at least 1"),
        ({"num_restarts": 0}, "num_restarts: found 0, expected at least 1"),
    ],
)
def test_arguments_of_run(options, message):
    engine = BLRInference(line)
    before = everything(engine)
    with pytest.raises(ValueError, match=message):
        engine.run(Y, progress=False, **options)
    assert_same(before, everything(engine))


def test_a_keyword_that_run_shadows():
    def model(y, tol=0.1):
        line(y + tol)

    engine = BLRInference(model)
    with pytest.raises(
        ValueError,
        match=r"the model's own arguments \['tol'\] are also arguments of run: rename them in the model",
    ):
        engine.run(Y, progress=False)
    engine.step(Y, tol=0.2)


# -- guides for another model --------------------------------------------------------------------------------


def test_a_hand_written_guide_for_another_model():
    engine = BLRInference(line, other_guide)
    before = torch.get_rng_state()
    with pytest.raises(
        ValueError,
        match=r"the guide is for another model: found its sample sites \['zz'\], expected some of .*\['m', "
        r"'tau'\]",
    ):
        engine.step(Y)
    assert torch.equal(before, torch.get_rng_state())


def test_an_autoguide_for_another_model():
    with pytest.raises(ValueError, match=r"the guide is for another model: found its sample sites \['p'\]"):
        BLRInference(line, AutoNormal(flags)).step(Y)


@pytest.mark.parametrize("subsample_size", [None, 2])
def test_a_plate_of_the_guide_alone(subsample_size):
    """Indices that the guide draws for itself are none of the model's: Pyro warns of such a plate, and so do we."""

    def model(y, plate="rows"):
        with pyro.plate(plate, 3, subsample_size=subsample_size) as index:
            z = pyro.sample("z", dist.Normal(tensor(0), 1))
            pyro.sample("y", dist.Normal(z, 1), obs=y[index])

    def guide(y, plate="lines"):
        loc = pyro.param("loc", torch.zeros(3))
        with pyro.plate("lines", 3, subsample_size=subsample_size) as index:
            pyro.sample("z", dist.Normal(loc[index], pyro.param("scale", torch.ones(3))[index]))

    with pytest.warns(UserWarning, match=r"in guide but not model: \['lines'\] \(the model's plates: \['rows'\]\)"):
        BLRInference(model, guide).evaluate_loss(Y)
    BLRInference(model, guide).evaluate_loss(Y, plate="lines")
    with pyro.validation_enabled(False):
        BLRInference(model, guide).evaluate_loss(Y)


def test_a_guide_that_counts_on_the_dims_of_its_loss():
    """Run by itself it fails; under `TraceEnum_ELBO`, which is how it is meant to run, it does not."""

    def model():
        z = pyro.sample("z", dist.Bernoulli(tensor(0.3)), infer={"enumerate": "parallel"})
        assert z.shape == (2, 1), "not enumerated"
        pyro.sample("x", dist.Bernoulli(0.2 + 0.5 * z), obs=tensor(1))

    def guide():
        pass

    engine = BLRInference(model, guide, None, TraceEnum_ELBO(max_plate_nesting=1))
    assert -engine.evaluate_loss() == pytest.approx(np.log(0.3 * 0.7 + 0.7 * 0.2))
    assert -engine.step() == pytest.approx(np.log(0.3 * 0.7 + 0.7 * 0.2))


def test_our_own_guide_of_another_model():
    guide = AutoExponentialFamily(counts)
    BLRInference(counts, guide).step(tensor(1, 2))
    natural = guide.naturals["rate"].clone()
    with pytest.raises(
        ValueError,
        match=r"the guide was made for other latent sites: found \['m', 'tau'\], expected \['rate'\]",
    ):
        BLRInference(line, guide).step(Y)
    assert torch.equal(guide.naturals["rate"], natural)
