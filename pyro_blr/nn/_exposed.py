"""Which parameters of a module are random, and one vector that holds them all."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

__all__ = ["Expose", "Exposed", "plain_module"]

Expose = str | Iterable[str] | Callable[[str, Parameter], bool] | None


def plain_module(module: Module) -> Module:
    """The module itself where torch.compile wrapped it."""
    return getattr(module, "_orig_mod", module)


class Exposed:
    """The exposed parameters of a module by name, tied ones once, and their values as one vector (*batch, P).

    P counts all their elements, in the order of `named_parameters`; the vector is float32 at least.
    """

    def __init__(self, module: Module, expose: Expose):
        found = dict(plain_module(module).named_parameters())  # which names tied parameters once
        free = {name: parameter for name, parameter in found.items() if parameter.requires_grad}
        chosen = {name: parameter for name, parameter in free.items() if _is_chosen(expose, name, parameter)}
        if not chosen:
            raise ValueError(
                f"expose={expose!r}: found no parameter, expected some of those that require a gradient: {sorted(free)}"
            )
        for pattern in _patterns(expose):
            if not any(fnmatchcase(name, pattern) for name in chosen):
                frozen = [name for name in found if name not in free and fnmatchcase(name, pattern)]
                why = f"{frozen} are frozen (requires_grad=False)" if frozen else f"the module has {sorted(free)}"
                raise ValueError(f"expose: found pattern {pattern!r} that matches no parameter to expose; {why}")
        for name, parameter in chosen.items():
            if not parameter.is_floating_point():
                raise ValueError(f"expose: parameter {name!r} is {parameter.dtype}, expected a floating-point dtype")
        self.parameters: dict[str, Parameter] = chosen
        self.learned = {name: parameter for name, parameter in free.items() if name not in chosen}
        self._sizes = [parameter.numel() for parameter in chosen.values()]

    @property
    def size(self) -> int:
        """P."""
        return sum(self._sizes)

    @property
    def dtype(self) -> torch.dtype:
        """That of the vector."""
        result = torch.float32
        for parameter in self.parameters.values():
            result = torch.promote_types(result, parameter.dtype)
        return result

    @property
    def device(self) -> torch.device:
        """That of the vector: of the first parameter."""
        return next(iter(self.parameters.values())).device

    def joined(self, parts: Iterable[Tensor]) -> Tensor:
        """(P,) of one tensor for each parameter."""
        return torch.cat([part.to(self.device, self.dtype).reshape(-1) for part in parts])

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """name -> (*batch, *shape), in the parameter's dtype and on its device."""
        batch = vector.shape[:-1]
        parts = zip(self.parameters.items(), vector.split(self._sizes, -1), strict=True)
        return {name: part.reshape(*batch, *p.shape).to(p.device, p.dtype) for (name, p), part in parts}

    @contextlib.contextmanager
    def at(self, vector: Tensor) -> Iterator[None]:
        """The parameters at (P,) inside, in place; outside as they were, bit for bit."""
        if vector.shape != (self.size,):
            raise ValueError(f"found weights of shape {tuple(vector.shape)}, expected ({self.size},): one draw")
        held = [parameter.detach().clone() for parameter in self.parameters.values()]
        try:
            _write(self.parameters, self.split(vector.detach()))
            yield
        finally:
            _write(self.parameters, dict(zip(self.parameters, held, strict=True)))


@torch.no_grad()
def _write(parameters: Mapping[str, Parameter], values: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


def _patterns(expose: Any) -> list[str]:
    if expose is None or callable(expose):
        return []
    return [expose] if isinstance(expose, str) else list(expose)


def _is_chosen(expose: Any, name: str, parameter: Parameter) -> bool:
    if expose is None:
        return True
    if callable(expose):
        return bool(expose(name, parameter))
    return any(fnmatchcase(name, pattern) for pattern in _patterns(expose))
