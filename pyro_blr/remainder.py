"""A model with the sites that q does not read held at one draw of the rest of its guide."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from pyro_blr.draws import fresh_seed
from pyro_blr.running import isolated_random_state, node_log_prob, subsample_values

__all__ = ["HeldModel", "Substituted", "rest_of"]


class Substituted(Messenger):
    """Gives sample statements these values, observed or not."""

    def __init__(self, values: Mapping[str, Tensor], observed: bool = False):
        super().__init__()
        self.values, self.observed = values, observed

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values and msg["value"] is None:
            msg["value"], msg["is_observed"] = self.values[msg["name"]], self.observed


def rest_of(trace: poutine.Trace, mine: Collection[str]) -> Iterator[tuple[str, Any]]:
    """The guide's sample statements that are not those of the sites that are read."""
    for name, node in trace.nodes.items():
        if node["type"] == "sample" and name not in mine and not isinstance(node["fn"], _Subsample):
            yield name, node


class HeldModel:
    """z_e ↦ log p(z_e, z_r, x) − log q(z_r | z_e) at one draw z_r = z_r(z_e, ε) of the rest of the guide, as a Pyro model.

    Its average over z_e ~ q_e, plus the entropy of q_e, is an unbiased estimate of the ELBO, and so are its messages to the sites
    e that are read, which this model has as latents; the others are data. Where the rest of the guide does not follow z_e
    it is drawn once; where it does, the guide runs again inside the model, on the same noise.
    """

    def __init__(
        self, model: Callable, guide: Callable, read: Collection[str], auxiliary: Collection[str], follows: bool
    ):
        self.model, self.guide, self.follows = model, guide, follows
        self.read, self.mine = frozenset(read), frozenset(read) | frozenset(auxiliary)
        self.__name__ = getattr(model, "__name__", type(model).__name__)
        self._seed = 0
        self._values: dict[str, Tensor] = {}
        self._indices: dict[str, Tensor] = {}

    def draw(self, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """Holds the rest of the guide at another draw; its seed comes from torch's generator."""
        self._seed = fresh_seed()
        with torch.no_grad():
            trace = self.guided(args, kwargs, {})
        self._values = {name: node["value"].detach() for name, node in rest_of(trace, self.mine)}
        self._indices = subsample_values(trace)

    def guided(self, args: tuple, kwargs: Mapping[str, Any], known: Mapping[str, Tensor]) -> poutine.Trace:
        """The guide on the held noise, with the values that are known of the sites that are read."""
        with isolated_random_state(self._seed), poutine.block():
            with poutine.trace() as tracer, _OwnNoise(self._seed), Substituted(known):
                self.guide(*args, **kwargs)
        return tracer.trace

    def holds(self, name: str) -> bool:
        """Whether a site of the model is the rest's."""
        return name in self._values

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.follows:
            with Substituted(self._values, observed=True), Substituted(self._indices):
                return self.model(*args, **kwargs)
        following = _Following(self, args, kwargs)
        with following, Substituted(self._indices):
            result = self.model(*args, **kwargs)
        pyro.factor("_minus_log_q_of_the_rest", -following.log_q())
        return result


class _OwnNoise(Messenger):
    """Every statement draws from a seed of its own: the same noise whatever was drawn before it."""

    def __init__(self, seed: int):
        super().__init__()
        self.seed = seed

    def _pyro_sample(self, msg: Any) -> None:
        if msg["value"] is None and not msg["is_observed"]:
            with isolated_random_state((self.seed + zlib.crc32(msg["name"].encode())) % 2**31):
                msg["value"] = msg["fn"](*msg["args"], **msg["kwargs"])


class _Following(Messenger):
    """Values of the rest of the guide at the values that the model's latents have in this run."""

    def __init__(self, held: HeldModel, args: tuple, kwargs: Mapping[str, Any]):
        super().__init__()
        self.held, self.call = held, (args, kwargs)
        self.known: dict[str, Tensor] = {}
        self._seen: tuple[int, poutine.Trace] | None = None

    def _trace(self) -> poutine.Trace:
        if self._seen is None or self._seen[0] != len(self.known):
            self._seen = len(self.known), self.held.guided(*self.call, self.known)
        return self._seen[1]

    def _pyro_sample(self, msg: Any) -> None:
        if self.held.holds(msg["name"]) and msg["value"] is None:
            msg["value"], msg["is_observed"] = self._trace().nodes[msg["name"]]["value"], True

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] in self.held.read:
            self.known[msg["name"]] = msg["value"]

    def log_q(self) -> Tensor:
        terms = [node_log_prob(node).sum() for _, node in rest_of(self._trace(), self.held.mine)]
        return torch.stack(terms).sum()
