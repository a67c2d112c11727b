"""Independent references kept outside the repository: in a folder `shared` beside it, or in PYRO_BLR_SHARED.

A test that asks for one and finds no folder is skipped, saying so.
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]


def shared_path(*parts: str) -> Path:
    """The path of a shared file; skips the test where it is absent."""
    folder = Path(os.environ.get("PYRO_BLR_SHARED") or ROOT.parent / "shared")
    path = folder.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"no reference data {'/'.join(parts)}: set PYRO_BLR_SHARED to the folder that holds it")
    return path


def oracle(name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """A seeded data set, and what an independent program reached on it: `bound` in nats, `model`, `q`."""
    expected = json.loads(shared_path("oracles", "expected.json").read_text())
    spec = importlib.util.spec_from_file_location("oracle_data", shared_path("oracles", "data.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)(), expected[name]


def posteriordb(name: str) -> dict[str, Any]:
    """A real data set with the mean, sd and quantiles of 10,000 reference draws of every parameter."""
    return json.loads(shared_path("data", "posteriordb", f"{name}.json").read_text())


def arrays(*parts: str) -> dict[str, np.ndarray]:
    """The arrays of a shared .npz file."""
    with np.load(shared_path("data", *parts)) as file:
        return dict(file)
