"""The tests that `pyro-api` has for any backend, with `SVI` the engine; once with its guides, once with ours.

Its models are written against `pyroapi.infer` and the like, which look names up in the backend's modules: here
Pyro's own, and one that has `BLRInference` in the place of `SVI`.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator

import pyro.infer
import pytest
import torch

from pyro_blr import BLRInference

pyroapi = pytest.importorskip("pyroapi", reason="the pyro-api package has the tests")
pyroapi_tests = pytest.importorskip("pyroapi.tests")

MADE: list[BLRInference] = []


class WithItsGuide(BLRInference):
    def __init__(self, model, guide, optim, loss):
        super().__init__(model, guide, optim, loss)
        MADE.append(self)


class WithOurGuide(BLRInference):
    def __init__(self, model, guide, optim, loss):
        super().__init__(model, None, optim, loss)
        MADE.append(self)


def backend_module(svi: type) -> str:
    """The name of a module that is `pyro.infer` but for its SVI."""
    name = f"pyroapi_{svi.__name__}"
    module = types.ModuleType(name)
    module.__dict__.update({key: value for key, value in vars(pyro.infer).items() if not key.startswith("__")})
    module.SVI = svi
    sys.modules[name] = module
    return name


@pytest.fixture(params=[WithItsGuide, WithOurGuide], ids=["its guide", "our guide"])
def backend(request) -> Iterator[type]:
    """What `pyroapi.tests` asks for: the backend, and float32 as its data are."""
    torch.set_default_dtype(torch.float32)
    MADE.clear()
    pyroapi.register_backend("blr", {"pyro": "pyro", "infer": backend_module(request.param), "optim": "pyro.optim"})
    with pyroapi.pyro_backend("blr"):
        yield request.param


TESTS = {name: test for name, test in vars(pyroapi_tests).items() if name.startswith("test_") and callable(test)}


def cases() -> Iterator[tuple[str, Callable, dict]]:
    """Every test of the package with every choice of its own parametrisation."""
    for name, test in TESTS.items():
        choices: list[dict] = [{}]
        for mark in getattr(test, "pytestmark", []):
            names = [part.strip() for part in mark.args[0].split(",")]
            values = [value if len(names) > 1 else (value,) for value in mark.args[1]]
            choices = [{**choice, **dict(zip(names, value, strict=True))} for choice in choices for value in values]
        for choice in choices:
            label = "-".join([name, *(str(value) for value in choice.values() if not isinstance(value, dict))])
            yield label, test, choice


CASES = list(cases())
# Models without a latent site: there is nothing for our guide to be a guide of.
WITHOUT_LATENTS = {"test_optimizer", "test_nonempty_model_empty_guide_ok"}
WITHOUT_INFERENCE = {"test_generate_data", "test_generate_data_plate"}


def test_the_package_has_tests():
    assert len(TESTS) >= 8
    assert len(CASES) >= 15


@pytest.mark.filterwarnings("ignore:.*jit.*", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(("test", "choice"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_pyroapi(backend, test, choice):
    if backend is WithOurGuide and test.__name__ in WITHOUT_LATENTS:
        with pytest.raises(ValueError, match="the model has no latent sample site .*: there is nothing to infer"):
            test(backend, **choice)
        return
    test(backend, **choice)
    assert bool(MADE) != (test.__name__ in WITHOUT_INFERENCE)
    for engine in MADE:
        assert isinstance(engine, BLRInference)


@pytest.mark.parametrize("name", ["eight_schools", "beta_binomial", "logistic_regression"])
def test_models_of_the_package_have_a_posterior(name):
    """The generic models that the package ships for testing interfaces, without a guide of their own."""
    from pyroapi.testing import MODELS

    torch.set_default_dtype(torch.float32)
    with pyroapi.pyro_backend("pyro"):
        made = MODELS[name]()
        model, args, data = made["model"], made["model_args"], made.get("model_kwargs", {})
        posterior = BLRInference(model).run(*args, **data, progress=False, max_steps=60)
    for site in posterior.natural:
        assert bool(torch.isfinite(posterior.natural[site]).all())
