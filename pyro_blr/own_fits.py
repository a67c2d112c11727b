"""Statements that bring a fit for the whole model: how they announce it, and how the engine takes it over."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from pyro.poutine.messenger import Messenger

from pyro_blr.interrupts import patiently

__all__ = ["ANNOUNCEMENT", "Listening", "OwnFit", "adopting"]

# The type of a Pyro message that comes before the statement; `infer["fit"]` makes the fit. Nobody needs to hear it: then the
# statement is an ordinary one.
ANNOUNCEMENT = "blr_own_fit"


class OwnFit(Exception):
    """A statement of the model announced a fit for all of it; `make` takes what the engine was told."""

    def __init__(self, name: str, make: Callable[..., Any]):
        super().__init__(f"site {name!r} brings a fit of its own")
        self.name, self.make = name, make


class Listening(Messenger):
    """Raises OwnFit at the first announcement inside."""

    def _pyro_blr_own_fit(self, msg: Any) -> None:
        raise OwnFit(msg["name"], msg["infer"]["fit"])


def adopting(method: Callable) -> Callable:
    """A patient method of an engine that, where the model announces a fit of its own, adopts it and is called again."""

    @functools.wraps(method)
    @patiently
    def called(engine: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(engine, *args, **kwargs)
        except OwnFit as found:
            engine.adopt(found)
        return method(engine, *args, **kwargs)

    return called
