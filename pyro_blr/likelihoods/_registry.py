"""Distribution class -> likelihood template."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch.distributions import Distribution

from ._base import Likelihood

_LIKELIHOODS: dict[type[Distribution], Likelihood] = {}
_L = TypeVar("_L", bound=Likelihood)


def register_likelihood(*distribution_classes: type[Distribution]) -> Callable[[type[_L]], type[_L]]:
    """Class decorator: the template of factors that are distributions of these classes."""

    def register(likelihood_class: type[_L]) -> type[_L]:
        likelihood = likelihood_class()
        for distribution_class in distribution_classes:
            _LIKELIHOODS[distribution_class] = likelihood
        return likelihood_class

    return register


def likelihood_of(distribution_class: type[Distribution]) -> Likelihood | None:
    """The template registered for the class, or None.

    A subclass inherits its base's template only where it inherits both density and constructor: Pyro's
    ExtendedBinomial is a Binomial with another `log_prob`.
    """
    for base in distribution_class.__mro__:
        if base in _LIKELIHOODS:
            inherited = all(getattr(distribution_class, n) is getattr(base, n) for n in ("log_prob", "__init__"))
            return _LIKELIHOODS[base] if inherited else None
    return None
