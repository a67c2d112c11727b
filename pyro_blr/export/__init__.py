"""A posterior as ArviZ's data structure."""

from ._to_arviz import to_arviz

__all__ = ["to_arviz"]
