"""Steps that fail leave everything as it was; looks at a model leave it so in any case."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyro_blr.generators import GeneratorStates
from pyro_blr.interrupts import uninterrupted

__all__ = ["AllOrNothing", "NothingKept"]


class AllOrNothing:
    """A step that fails leaves λ, steps, parameters and the random generators as they were.

    `draws` is false for a step that draws nothing and learns nothing of the model: saving the generators takes longer than it.
    """

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
        "_settling",
        "_attempts",
    )

    def __init__(self, engine: Any, draws: bool = True):
        self.engine, self.draws, self.is_done = engine, draws, False

    def __enter__(self) -> AllOrNothing:
        self.take()
        return self

    def take(self) -> None:
        """What fails from here on leaves everything as it is now."""
        engine = self.engine
        self.others = [engine._q.saved(), engine._programs.saved()]
        self.forget = engine._programs.learnt() if self.draws else _nothing
        self.saved = {key: getattr(engine, key) for key in self._attributes}
        self.length = len(engine._history)
        self.generators: Any = GeneratorStates() if self.draws else None

    def done(self) -> None:
        """Nothing is undone any more."""
        self.is_done = True

    def also(self, restore: Callable[[], None]) -> None:
        """Something else to put back: parameters, and what their optimiser remembers."""
        self.others.append(restore)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is not None and not self.is_done:
            with uninterrupted():
                self.restore()
                self.forget()

    def restore(self) -> None:
        engine = self.engine
        for key, value in self.saved.items():
            setattr(engine, key, value)
        del engine._history[self.length :]
        if self.draws:
            self.generators.restore()
        for restore in self.others:
            restore()


def _nothing() -> None:
    """There is nothing to put back."""


class NothingKept(AllOrNothing):
    """A look at the model that changes nothing, whether it fails or not; the first one keeps its start."""

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        with uninterrupted():
            if kind is not None:
                self.forget()
            if kind is not None or self.saved["_ready"]:
                self.restore()
            else:
                self.generators.restore()
