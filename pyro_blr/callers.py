"""Who made a call: the user's line, or the library's."""

from __future__ import annotations

import os
import sys

import torch

__all__ = ["asked_by_the_program", "source_line"]

# Library code between the user's line and the torch call is skipped when a source line is sought.
_LIBRARIES = tuple(
    os.path.dirname(os.path.abspath(file)) + os.sep
    for file in (torch.__file__, sys.modules["pyro"].__file__ if "pyro" in sys.modules else None, __file__)
    if file is not None
)


# Between a call and the tape that it reached.
_RECORDERS = (os.path.join(os.path.dirname(__file__), name) for name in ("expressions.py", "recorded.py"))
_ON_THE_WAY = frozenset({__file__, *_RECORDERS, torch.overrides.__file__, torch._tensor.__file__})


def source_line() -> str:
    """`file.py:12` of the innermost frame outside torch, Pyro and this package; empty where there is none."""
    frame = sys._getframe(1)
    while frame is not None:
        filename = frame.f_code.co_filename
        if not filename.startswith(_LIBRARIES) and not filename.startswith("<"):
            if f"{os.sep}pyro{os.sep}" not in filename and f"{os.sep}contextlib" not in filename:
                return f"{os.path.basename(filename)}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""


def asked_by_the_program() -> bool:
    """Whether the call that reached the tape stands outside torch, Pyro and this package."""
    frame = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename in _ON_THE_WAY:
        frame = frame.f_back  # type: ignore[assignment]
    filename = frame.f_code.co_filename if frame is not None else ""
    return not filename.startswith(_LIBRARIES) and f"{os.sep}pyro{os.sep}" not in filename
