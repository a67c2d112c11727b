"""Two programs timed in one process, in turn, so that whatever else the machine does meets both; ratios of
neighbours, not of bests.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyro
import torch


def seconds(program: Callable[[], Any]) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    program()
    return time.perf_counter() - start


def in_turn(first: Callable[[], float], second: Callable[[], float], pairs: int) -> tuple[list[float], list[float]]:
    """Times of two programs called in turn, the order alternating; each call returns its own time."""
    one, two = [], []
    for pair in range(pairs):
        if pair % 2:
            two.append(second())
            one.append(first())
        else:
            one.append(first())
            two.append(second())
    return one, two


@contextmanager
def stamped(owner: Any, method: str, clock: Callable[[], float] = time.perf_counter) -> Iterator[list[float]]:
    """The times at which calls of a method return; the differences are what lies between two calls."""
    plain, stamps = getattr(owner, method), []

    def noted(*args: Any, **kwargs: Any) -> Any:
        result = plain(*args, **kwargs)
        stamps.append(clock())
        return result

    setattr(owner, method, noted)
    try:
        yield stamps
    finally:
        setattr(owner, method, plain)


def intervals(stamps: Sequence[float]) -> list[float]:
    """Seconds between neighbouring stamps."""
    return [after - before for before, after in zip(stamps, stamps[1:], strict=False)]


def row(name: str, first: Sequence[float], second: Sequence[float], limit: str) -> None:
    """One line: median times, and the ratios of neighbours as median (minimum to maximum)."""
    ratios = [a / b for a, b in zip(first, second, strict=True)]
    spread = f"{statistics.median(ratios):.3g} ({min(ratios):.3g} to {max(ratios):.3g})"
    times = f"{duration(statistics.median(first))} against {duration(statistics.median(second))}"
    print(f"{name}: ratio {spread} over {len(ratios)} pairs; {times}; wanted: {limit}")


def duration(value: float) -> str:
    """Seconds in a unit that suits them."""
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} µs"


def heading(title: str) -> None:
    """What is measured and on what."""
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    print(
        f"{title}\n{os.cpu_count()} cores, {torch.get_num_threads()} threads{load}; Python {platform.python_version()}, "
        f"torch {torch.__version__}, pyro {pyro.__version__}"
    )


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """One that shows a script's docstring as it is written."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
