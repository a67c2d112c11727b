"""What the README shows, runs; what it tells to type is what continuous integration types."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from pyro_blr import BLRInference

ROOT = Path(__file__).resolve().parents[1]


def blocks(language: str) -> list[str]:
    text = (ROOT / "README.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_python_blocks_run_in_order(tmp_path: Path) -> None:
    """One program from top to bottom, in a fresh interpreter: what a reader gets who pastes them."""
    assert blocks("python")
    script = tmp_path / "readme.py"
    script.write_text("\n\n".join(blocks("python")))
    environment = {**os.environ, "MPLBACKEND": "Agg"}
    command = [sys.executable, str(script)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_table_is_what_explain_prints() -> None:
    """The README's model, with HalfCauchy on the scale, in a file of its own."""
    (table,) = [block for block in blocks("text") if "exact?" in block]
    program = blocks("python")[0]
    for old, new in (
        (
            'precision = pyro.sample("precision", dist.Gamma(1.0, 1.0))',
            'scale = pyro.sample("scale", dist.HalfCauchy(1.0))',
        ),
        ("precision.rsqrt()", "scale"),
    ):
        assert old in program
        program = program.replace(old, new)
    names: dict[str, Any] = {}
    exec(compile(program, "model.py", "exec"), names)
    printed = str(BLRInference(names["model"]).explain(names["x"], names["y"]))
    assert [line.rstrip() for line in printed.splitlines()] == table.splitlines()


def test_two_commands_set_up_and_ci_runs_the_second() -> None:
    commands = [line for block in blocks("sh") for line in block.splitlines() if line.strip()]
    assert len(commands) == 2
    quickstart, tests = commands
    assert quickstart.endswith("python examples/quickstart.py")
    assert tests in (ROOT / ".ci" / "run").read_text().splitlines()


def test_files_that_the_readme_links_to_exist() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text())
    assert [t for t in targets if "://" not in t and not (ROOT / t).exists()] == []


def test_the_lowest_versions_are_those_that_are_asked_for() -> None:
    """`.ci/lowest.txt` pins every dependency to the version that pyproject.toml begins at."""
    text = (ROOT / "pyproject.toml").read_text()
    floors = dict(re.findall(r'^ *"([\w-]+)>=([\d.]+)",$', text, re.MULTILINE))
    runtime = re.findall(r'"([\w-]+)>=', text[text.index("\ndependencies") : text.index("\n[project.optional")])
    pins = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / ".ci" / "lowest.txt").read_text(), re.MULTILINE))
    assert runtime and set(runtime) <= set(pins)
    for name, pin in pins.items():
        assert pin.removesuffix(".0") == floors[name].removesuffix(".0"), name
