"""Names that a loop numbers, said as one: year_0 … year_9."""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["FEWEST", "alike", "counted", "in_series", "shift", "shortened", "span", "told_once", "without_numbers"]

FEWEST = 3  # names that make a series
_MANY = 3  # names of a list beyond which the rest are counted
_NUMBER = re.compile(r"(\d+)")
_LIST = re.compile(r"\b[A-Za-z_][\w.]*(?:, [A-Za-z_][\w.]*)+")


def shift(first: str, other: str) -> int | None:
    """By how much the one number that tells two names apart differs; None where more than one does, or words."""
    a, b = _NUMBER.split(first), _NUMBER.split(other)
    pairs = [(x, y) for x, y in zip(a, b, strict=False) if x != y]
    if len(a) != len(b) or len(pairs) != 1 or not (pairs[0][0].isdecimal() and pairs[0][1].isdecimal()):
        return None
    return int(pairs[0][1]) - int(pairs[0][0])


def without_numbers(name: str) -> str:
    """What the names of a series have in common."""
    return _NUMBER.sub("#", name)


def alike(first: str, other: str, by: int) -> bool:
    """Whether two texts say the same of statements whose numbers are `by` apart."""
    a, b = _NUMBER.split(first), _NUMBER.split(other)
    return len(a) == len(b) and all(
        x == y or (x.isdecimal() and y.isdecimal() and int(y) - int(x) == by) for x, y in zip(a, b, strict=True)
    )


def span(first: str, last: str) -> str:
    """A series by its ends."""
    return first if first == last else f"{first} … {last}"


def in_series(names: Sequence[str]) -> list[str]:
    """The names, in their order, with series of three and more as one."""
    runs: list[list[str]] = []
    for name in names:
        if runs and shift(runs[-1][-1], name) == 1 and shift(runs[-1][0], name) == len(runs[-1]):
            runs[-1].append(name)
        else:
            runs.append([name])
    return [text for run in runs for text in ([span(run[0], run[-1])] if len(run) >= FEWEST else run)]


def counted(names: Sequence[str]) -> str:
    """The names, in series; where they are still many, how many more there are."""
    said = in_series(names)
    if len(said) <= _MANY + 1:
        return ", ".join(said)
    return f"{', '.join(said[:_MANY])} and {len(said) - _MANY} more"


def shortened(text: str) -> str:
    """A text whose lists of names are said in series."""
    return _LIST.sub(lambda found: ", ".join(in_series(found.group().split(", "))), text)


def told_once(texts: Sequence[str]) -> list[str]:
    """Texts in their order; of three and more that say the same of one statement after the other, the first."""
    runs: list[list[str]] = []
    for text in texts:
        if runs and alike(runs[-1][0], text, len(runs[-1])) and text != runs[-1][0]:
            runs[-1].append(text)
        else:
            runs.append([text])
    told = [([f"{run[0]} (and {len(run) - 1} alike)"] if len(run) >= FEWEST else run) for run in runs]
    return [text for run in told for text in run]
