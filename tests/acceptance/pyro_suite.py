"""A pytest plugin for Pyro's own tests: what they call `SVI` is `BLRInference`, and the report says which tests used it.

    PYTHONPATH=/path/to/pyro_blr/tests/acceptance pytest -p pyro_suite tests/infer/test_inference.py

in a checkout of Pyro, with Pyro installed in the version of that checkout.  Without the swap (`--svi plain`) the same tests are
the baseline.  What a test that never makes an `SVI` says is no news: `--svi-only` leaves it out.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

import pyro.infer
import pyro.infer.svi
import pytest
from pyro.infer import SVI

from pyro_blr import BLRInference


class InPlaceOfSVI(BLRInference):
    """`BLRInference` behind the whole signature of `SVI`, what is deprecated there included."""

    def __init__(
        self,
        model: Callable,
        guide: Callable,
        optim: Any,
        loss: Any,
        loss_and_grads: Any = None,
        num_samples: int = 0,
        num_steps: int = 0,
        **kwargs: Any,
    ):
        if loss_and_grads is not None:
            raise TypeError(
                "loss_and_grads: a gradient of the caller's own is none that the learning rule could follow"
            )
        super().__init__(model, guide, optim, loss, **kwargs)


class Tally:
    """What one test did with the engines that it made."""

    def __init__(self) -> None:
        self.made = self.steps = 0
        self.seconds = 0.0


class Suite:
    """Swaps the engine, stops tests that take too long, and writes one line of JSON a test."""

    def __init__(self, config: pytest.Config):
        self.swapped = config.getoption("svi") == "blr"
        self.limit: int = config.getoption("svi_timeout")
        self.only: bool = config.getoption("svi_only")
        self.path: str | None = config.getoption("svi_report")
        self.now = Tally()
        self.rows: list[dict[str, Any]] = []
        pyro.infer.SVI = pyro.infer.svi.SVI = self._counting(InPlaceOfSVI if self.swapped else SVI)

    def _counting(self, base: type) -> type:
        suite = self

        def __init__(engine: Any, *args: Any, **kwargs: Any) -> None:
            suite.now.made += 1
            base.__init__(engine, *args, **kwargs)  # type: ignore[misc]

        def step(engine: Any, *args: Any, **kwargs: Any) -> Any:
            suite.now.steps += 1
            begin = time.process_time()
            try:
                return base.step(engine, *args, **kwargs)  # type: ignore[attr-defined]
            finally:
                suite.now.seconds += time.process_time() - begin

        return type("SVI", (base,), {"__init__": __init__, "step": step})

    def pytest_report_header(self) -> str:
        return f"SVI is {'BLRInference' if self.swapped else 'SVI'}; pyro {pyro.__version__} from {pyro.__path__[0]}"

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        if not self.only:
            return
        kept = [item for item in items if reaches_svi(item)]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        self.now = Tally()

        def stop(*_: Any) -> None:
            pytest.fail(f"stopped after {self.limit} seconds of processor time, at step {self.now.steps}")

        before = signal.signal(signal.SIGPROF, stop)
        signal.setitimer(signal.ITIMER_PROF, self.limit)
        try:
            return (yield)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, before)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
        report: Any = yield
        if call.when == "call" or report.outcome != "passed":
            outcome = "xfailed" if hasattr(report, "wasxfail") and report.skipped else report.outcome
            excinfo = None if call.excinfo is None else f"{call.excinfo.typename}: {call.excinfo.value}"
            row = {"test": item.nodeid, "outcome": outcome, "made": self.now.made, "steps": self.now.steps}
            row |= {"step_seconds": round(self.now.seconds, 3), "seconds": round(call.duration, 2)}
            row["error"] = None if excinfo is None else excinfo[:1000]
            self.rows.append(row)
            if self.path is not None:
                with open(self.path, "a") as file:
                    file.write(json.dumps(row) + "\n")
        return report

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        users = [row for row in self.rows if row["made"]]
        passed = sum(row["outcome"] == "passed" for row in users)
        steps, seconds = sum(row["steps"] for row in users), sum(row["step_seconds"] for row in users)
        name = "BLRInference" if self.swapped else "SVI"
        terminalreporter.section(f"{name} in these tests")
        terminalreporter.line(
            f"made in {len(users)} tests, of which {passed} passed; {steps} steps, {seconds:.1f} s in them"
        )


def reaches_svi(item: pytest.Item) -> bool:
    """Whether the test's code names `SVI`, itself or through functions and methods that it names."""
    function = getattr(item, "function", None)
    cls = getattr(item, "cls", None)
    seen: set[CodeType] = set()
    waiting = [function]
    while waiting:
        function = waiting.pop()
        codes = [getattr(function, "__code__", None)]
        scope = getattr(function, "__globals__", {})
        while codes:
            code = codes.pop()
            if code is None or code in seen:
                continue
            seen.add(code)
            if "SVI" in code.co_names:
                return True
            codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
            waiting += [scope[name] for name in code.co_names if callable(scope.get(name))]
            waiting += [getattr(cls, name) for name in code.co_names if hasattr(cls, name)]
    return False


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("svi")
    group.addoption("--svi", choices=["blr", "plain"], default="blr", help="what the tests get as SVI")
    group.addoption("--svi-only", action="store_true", help="only tests whose code reaches SVI")
    group.addoption("--svi-timeout", type=int, default=120, help="seconds of processor time a test may take")
    group.addoption("--svi-report", help="file that gets one line of JSON a test")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Suite(config), "pyro-suite")
