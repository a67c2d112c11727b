"""All programs, file by file, and where SVI ended on them."""

from __future__ import annotations

import json
from pathlib import Path

from acceptance import baseball, chains, coins, mixtures, networks, regressions
from acceptance.scripts import LISTED, Program

__all__ = ["PROGRAMS", "RECORD", "recorded"]

FILES = [module.__name__ for module in (coins, regressions, baseball, mixtures, chains, networks)]
PROGRAMS: list[Program] = sorted(LISTED, key=lambda program: FILES.index(program.build.__module__))
RECORD = Path(__file__).with_name("svi.json")  # made by: python tests/benchmarks/programs.py --record


def recorded() -> dict[str, dict[str, float]]:
    """Program -> SVI's final ELBO, its standard error and processor seconds."""
    found: dict[str, dict[str, float]] = json.loads(RECORD.read_text())
    return found
