"""What the engine is asked for, refused before a model runs where it has no meaning."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

__all__ = ["check_callable_guide", "check_run_arguments", "refuse_without_blocks"]


def check_callable_guide(guide: Any) -> None:
    """Raises for a guide that is none."""
    if not callable(guide):
        raise TypeError(f"guide: found {type(guide).__name__}, expected a Pyro guide (a callable), or None")


def refuse_without_blocks(blocks: Any, init: Any, init_loc_fn: Any) -> None:
    """Raises where `blocks` or a start is given beside a guide of the user's own."""
    given = [
        name
        for name, value in (("blocks", blocks), ("init", init), ("init_loc_fn", init_loc_fn))
        if value not in (None, "auto")
    ]
    if given:
        raise ValueError(
            f"{' and '.join(given)}: found beside a guide of your own, expected without one: the guide says how q factorises and where it "
            "starts. Leave the guide out, or start it where you want"
        )


def check_run_arguments(model: Callable, max_steps: int, tol: float, num_restarts: int) -> None:
    """Raises for arguments of `run` that have no meaning, or that the model takes too."""
    try:
        taken = {"max_steps", "tol", "num_restarts", "progress"} & set(signature(model).parameters)
    except (TypeError, ValueError):
        taken = set()
    if taken:
        raise ValueError(
            f"the model's own arguments {sorted(taken)} are also arguments of run: rename them in the model, or call step in a loop"
        )
    if max_steps < 1:
        raise ValueError(f"max_steps: found {max_steps}, expected at least 1")
    if not tol > 0:
        raise ValueError(f"tol: found {tol}, expected a positive number of nats")
    if num_restarts < 1:
        raise ValueError(f"num_restarts: found {num_restarts}, expected at least 1")
