"""From distributions and supports to families."""

from collections.abc import Callable
from typing import Any, TypeVar

from ._base import ExponentialFamily

Family = TypeVar("Family", bound=type[ExponentialFamily])

_FAMILIES: dict[type, type[ExponentialFamily]] = {}


def register_family(*classes: type) -> Callable[[Family], Family]:
    """Class decorator: distributions of these classes (and torch's of the same name) belong to the family."""

    def register(family: Family) -> Family:
        for cls in classes:
            for ancestor in cls.__mro__:
                if ancestor.__name__ == cls.__name__:
                    _FAMILIES[ancestor] = family
        return family

    return register


def family_of(distribution: Any) -> ExponentialFamily | None:
    """The family of a distribution not wrapped in Independent, Expanded or Masked; None if there is none.

    A subclass counts as its registered ancestor unless it overrides `log_prob`: then it is another law.
    """
    for ancestor in type(distribution).__mro__:
        if ancestor in _FAMILIES:
            unchanged = type(distribution).log_prob is ancestor.log_prob  # type: ignore[attr-defined]
            return _FAMILIES[ancestor].of(distribution) if unchanged else None
    return None
