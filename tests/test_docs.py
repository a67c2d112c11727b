"""What the pages show, runs, and prints what they say it prints."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = [
    "bayesian-networks.md",
    "diagnosing.md",
    "from-adamw-or-ivon.md",
    "heads.md",
    "reading-explain.md",
    "switching-from-svi.md",
]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)


def beginnings(text: str) -> list[str]:
    """The first word of each line that no other line goes on to; warnings apart."""
    return [line.split()[0] for line in text.splitlines() if line[:1].strip() and not line.startswith("WARNING")]


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run_in_order_and_print_what_is_shown(page: str, tmp_path: Path) -> None:
    """Numbers, and with them verdicts near a threshold, may move with a version of torch; rows may not, and `explain` has none."""
    script = tmp_path / "page.py"
    script.write_text("\n\n".join(blocks(page, "python")))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = "\n".join(line.rstrip() for line in done.stdout.splitlines())
    assert [block for block in blocks(page, "text") if "why not" in block and block not in lines + "\n"] == []
    printed = beginnings(done.stdout)
    shown = [word for block in blocks(page, "text") for word in beginnings(block)]
    assert len(shown) > 3
    assert [word for word in shown if printed.count(word) < shown.count(word)] == []
