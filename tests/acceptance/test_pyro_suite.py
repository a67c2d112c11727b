"""The plugin that runs Pyro's own tests: it swaps the engine, picks the tests that it concerns, and reports on each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SUITE = """
import pyro, torch
import pyro.distributions as dist
from pyro.infer import SVI, Trace_ELBO


def fit():
    def model():
        pyro.sample("z", dist.Gamma(2.0, 1.0))

    def guide():
        pyro.sample("z", dist.Gamma(pyro.param("a", torch.tensor(3.0)), pyro.param("b", torch.tensor(4.0))))

    SVI(model, guide, pyro.optim.SGD({"lr": 0.0}), Trace_ELBO()).step()


def test_moves_without_a_rate():
    fit()
    assert pyro.param("a").item() == 2.0


def test_never_ends():
    fit()
    while True:
        pass


def test_makes_no_engine():
    assert SVI is not None or fit


def test_of_something_else():
    pass
"""


@pytest.mark.parametrize(("engine", "outcome"), [("blr", "passed"), ("plain", "failed")])
def test_the_plugin(tmp_path: Path, engine: str, outcome: str) -> None:
    (tmp_path / "test_suite.py").write_text(SUITE)
    report = tmp_path / "report.jsonl"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "pyro_suite",
        "--svi",
        engine,
        "--svi-only",
        "--svi-timeout",
        "5",
    ]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'acceptance'}"}
    done = subprocess.run(
        [*command, "--svi-report", str(report), "test_suite.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    rows = {row["test"].split("::")[1]: row for row in map(json.loads, report.read_text().splitlines())}
    assert {name: (row["outcome"], row["made"]) for name, row in rows.items()} == {
        "test_moves_without_a_rate": (outcome, 1),
        "test_never_ends": ("failed", 1),
        "test_makes_no_engine": ("passed", 0),
    }
    assert "processor time, at step 1" in rows["test_never_ends"]["error"]
    assert "made in 2 tests" in done.stdout
