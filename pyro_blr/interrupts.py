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
    """A handler of SIGINT that only notes it; an impatient one lets the second through."""

    def __init__(self, before: Any, impatient: bool):
        self.before, self.impatient, self.count = before, impatient, 0

    def __call__(self, number: int, frame: Any) -> None:
        self.count += 1
        if self.impatient and self.count > 1:
            self.before(number, frame)

    def check(self) -> None:
        """Raises what was noted."""
        if self.count:
            self.count = 0
            self.before(signal.SIGINT, None)


@contextlib.contextmanager
def _waiting(impatient: bool) -> Iterator[_Waiting]:
    before: Any = signal.getsignal(signal.SIGINT)
    handler = _Waiting(before, impatient)
    if not callable(before) or not _is_main():
        yield handler  # there is nobody to tell
        return
    signal.signal(signal.SIGINT, handler)
    try:
        yield handler
    finally:
        signal.signal(signal.SIGINT, before)
        handler.check()


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C (SIGINT) inside takes effect at the end."""
    with _waiting(impatient=False):
        yield


@contextlib.contextmanager
def patient() -> Iterator[Callable[[], None]]:
    """Ctrl-C inside takes effect where the function that is given is called, or at the end; a second one at once.

    An exception anywhere would also fall into the middle of what the libraries below set and set back.
    """
    outer = signal.getsignal(signal.SIGINT)
    if isinstance(outer, _Waiting) and _is_main():  # which decides
        yield outer.check if outer.impatient else lambda: None
        return
    with _waiting(impatient=True) as handler:
        yield handler.check


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
