"""Steps that fail leave everything as it was; looks at a model leave it so in any case."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro

__all__ = ["AllOrNothing", "NothingKept"]


class AllOrNothing:
    """A step that fails leaves λ, steps, parameters and the random generators as they were."""

    _attributes = (
        "_points",
        "_last",
        "_seen",
        "_observed",
        "_ready",
        "_num_steps",
        "_history",
        "_outcome",
        "_call",
        "_bound",
        "_settled",
    )

    def __init__(self, engine: Any):
        self.engine = engine

    def __enter__(self) -> AllOrNothing:
        engine = self.engine
        self.others = [engine._q.saved(), engine._programs.saved()]
        self.forget = engine._programs.learnt()
        self.saved = {key: getattr(engine, key) for key in self._attributes}
        self.length = len(engine._history)
        self.generators = pyro.util.get_rng_state()
        return self

    def also(self, restore: Callable[[], None]) -> None:
        """Something else to put back: parameters, and what their optimiser remembers."""
        self.others.append(restore)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is not None:
            self.restore()
            self.forget()

    def restore(self) -> None:
        engine = self.engine
        for key, value in self.saved.items():
            setattr(engine, key, value)
        del engine._history[self.length :]
        pyro.util.set_rng_state(self.generators)
        for restore in self.others:
            restore()


class NothingKept(AllOrNothing):
    """A look at the model that changes nothing, whether it fails or not; the first one keeps its start."""

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is not None:
            self.forget()
        if kind is not None or self.saved["_ready"]:
            self.restore()
        else:
            pyro.util.set_rng_state(self.generators)
