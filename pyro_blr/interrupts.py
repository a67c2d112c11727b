"""Changes that are made whole or not at all, Ctrl-C or no."""

from __future__ import annotations

import contextlib
import functools
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["cut_short", "patient", "patiently", "undone_by", "uninterrupted"]


class _Waiting:
    """A handler of SIGINT that only notes it; an impatient one lets the second through, where it is not held."""

    def __init__(self, before: Any, impatient: bool):
        self.before, self.impatient, self.count, self.held = before, impatient, 0, 0

    def __call__(self, number: int, frame: Any) -> None:
        self.count += 1
        if self.impatient and not self.held and self.count > 1:
            self.before(number, frame)

    def check(self) -> None:
        """Raises what was noted."""
        if self.count:
            self.count = 0
            self.before(signal.SIGINT, None)


class _Guard:
    """Waits with Ctrl-C from its beginning to its end.  (No generator: every step has two of these.)"""

    def __init__(self, impatient: bool):
        self.impatient = impatient

    def __enter__(self) -> Callable[[], None]:
        found: Any = signal.getsignal(signal.SIGINT)
        usable = callable(found) and _is_main()  # otherwise there is nobody to tell
        self.outer = found if usable and isinstance(found, _Waiting) else None
        self.mine = _Waiting(found, self.impatient) if usable and self.outer is None else None
        if self.mine is not None:
            signal.signal(signal.SIGINT, self.mine)
            return self.mine.check
        if self.outer is None:
            return _nothing
        if self.impatient:
            return self.outer.check if self.outer.impatient and not self.outer.held else _nothing
        self.outer.held, self.count = self.outer.held + 1, self.outer.count
        return _nothing

    def __exit__(self, *_: Any) -> None:
        if self.mine is not None:
            signal.signal(signal.SIGINT, self.mine.before)
            self.mine.check()
        elif self.outer is not None and not self.impatient:
            self.outer.held -= 1
            if self.outer.impatient and not self.outer.held and self.outer.count > max(self.count, 1):
                self.outer.before(signal.SIGINT, None)


def _nothing() -> None:
    """The guard outside decides."""


def uninterrupted() -> _Guard:
    """Ctrl-C (SIGINT) inside takes effect at the end."""
    return _Guard(impatient=False)


def patient() -> _Guard:
    """Ctrl-C inside takes effect where the function that it gives is called, or at the end; a second one at once.

    An exception anywhere would also fall into the middle of what the libraries below set and set back.
    """
    return _Guard(impatient=True)


def patiently(method: Callable) -> Callable:
    """A method all of which is `patient`."""

    @functools.wraps(method)
    def waiting(*args: Any, **kwargs: Any) -> Any:
        with patient():
            return method(*args, **kwargs)

    return waiting


def _is_main() -> bool:
    """Whether interrupts come to this thread."""
    return threading.current_thread() is threading.main_thread()


@contextlib.contextmanager
def undone_by(*calls: Callable[[], object]) -> Iterator[list[Callable[[], object]]]:
    """What fails inside is undone by these calls; the list is given, and is emptied where nothing is to be undone any more."""
    pending = list(calls)
    try:
        yield pending
    except BaseException:
        with uninterrupted():
            for call in pending:
                call()
        raise


def cut_short(error: BaseException, steps: int) -> str:
    """How a run ended that did not come to its end."""
    many = "1 step" if steps == 1 else f"{steps} steps"
    return f"cut short by {type(error).__name__} after {many}; the same call of run goes on from there"
