"""What the engine is asked for, refused before a model runs where it has no meaning."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import pyro
from pyro.infer import (
    JitTrace_ELBO,
    JitTraceEnum_ELBO,
    JitTraceGraph_ELBO,
    JitTraceMeanField_ELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.elbo import ELBO

__all__ = ["check_callable_guide", "check_loss", "check_optim", "check_run_arguments", "refuse_without_blocks"]

_LOSSES = (
    Trace_ELBO,
    TraceMeanField_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    JitTrace_ELBO,
    JitTraceMeanField_ELBO,
    JitTraceEnum_ELBO,
    JitTraceGraph_ELBO,
)


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


def check_loss(loss: Any) -> None:
    """Raises for a loss that has no meaning here."""
    if loss is None or type(loss) in _LOSSES:
        return
    expected = "Trace_ELBO, TraceMeanField_ELBO, TraceEnum_ELBO or TraceGraph_ELBO (or leave loss out)"
    if isinstance(loss, type) and issubclass(loss, ELBO):
        raise TypeError(f"loss: found the class {loss.__name__}, expected an instance; write {loss.__name__}()")
    if isinstance(loss, ELBO):
        reason = "it is another objective than the ELBO, whose natural gradient the learning rule follows"
    elif callable(loss):
        reason = "a bare function does not say which factors it sums, so no message can be read from it"
    else:
        reason = "it is no ELBO"
    raise TypeError(f"loss: found {type(loss).__name__}, expected {expected}: {reason}")


def check_optim(optim: Any) -> None:
    """Raises for an optimiser that is none of Pyro's."""
    if optim is not None and not isinstance(optim, pyro.optim.PyroOptim):
        raise TypeError(
            f"optim: found {type(optim).__name__}, expected one of pyro.optim's (such as pyro.optim.Adam({{'lr': 0.01}})), or None. "
            "Wrap a torch optimiser in pyro.optim.PyroOptim"
        )
