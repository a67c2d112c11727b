"""What runs of a model change at its statements: observed ones drawn, discrete ones at every state."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.messenger import Messenger

__all__ = ["AllStates", "Enumerated", "Generated"]


class Generated(Messenger):
    """Draws the named statements from their distributions although the model observes them."""

    def __init__(self, names: Iterable[str]):
        super().__init__()
        self.names = frozenset(names)

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.names:
            msg["is_observed"], msg["value"], msg["done"] = False, None, False


class Enumerated(Messenger):
    """Marks the named statements for parallel enumeration, whatever the model marks."""

    def __init__(self, names: Iterable[str]):
        super().__init__()
        self.names = frozenset(names)

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.names:
            msg["infer"] = {**msg["infer"], "enumerate": "parallel"}


class AllStates(EnumMessenger):
    """Pyro's parallel enumeration, also inside `torch.func.vmap`, where a value has a shape and no `data`."""

    def _pyro_post_sample(self, msg: Any) -> None:
        if isinstance(msg["value"], torch.Tensor):
            msg = {**msg, "value": torch.empty(msg["value"].shape, device="meta")}
        super()._pyro_post_sample(msg)
