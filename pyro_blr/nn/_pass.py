"""One run of a Pyro model at the weights that its networks hold: what it observed, and what each network made of its inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.func import functional_call

from pyro_blr.nn._exposed import plain_module
from pyro_blr.nn._priors import Assigned
from pyro_blr.running import latent_nodes, node_log_prob

__all__ = ["Announced", "Labels", "Pass", "PlacedModule"]


@dataclass(frozen=True)
class Announced:
    """A network's statement: the network, and the prior of each of its parameters in this run."""

    network: Any
    assigned: list[Assigned]


@dataclass(frozen=True)
class Labels:
    """Observed statements as one distribution: `log_prob` has √(s_i n / N) log p(y_i) for each of all n data, with s_i the scale of a
    datum and N the number that `num_data` says.

    (1/n) (∇ Σ_i)² at labels drawn is then, in expectation, (1/N) Σ_i s_i (∇ log p)²: the curvature of the mean loss, whatever the
    scales and masks.
    """

    nodes: list[dict[str, Any]]
    num_data: float

    def sample(self) -> list[Tensor]:
        return [node["fn"].sample() for node in self.nodes]

    def log_prob(self, labels: list[Tensor]) -> Tensor:
        parts, weights = [], []
        for node, label in zip(self.nodes, labels, strict=True):
            parts.append(node["fn"].log_prob(label))
            weight = torch.ones_like(parts[-1]) * node["scale"]
            weights.append(weight if node["mask"] is None else weight * node["mask"])
        count = sum(part.numel() for part in parts)
        scaled = [(w * (count / self.num_data)).sqrt() * part for w, part in zip(weights, parts, strict=True)]
        return torch.cat([part.reshape(-1) for part in scaled])


class PlacedModule:
    """x ↦ module(x) at the weights it holds, each call remembered."""

    def __init__(self, network: Any, calls: list[tuple[tuple, dict[str, Any], Any]]):
        self.network, self.calls = network, calls
        learned = network.learned() if network.exposed.learned else {}
        own = network.exposed.learned
        self._elsewhere = {name: value for name, value in learned.items() if value is not own[name]}  # a loaded store

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._elsewhere:
            result = functional_call(plain_module(self.network.module), self._elsewhere, args, kwargs)
        else:
            result = self.network.module(*args, **kwargs)
        self.calls.append((args, kwargs, result))
        return result


class Pass(Messenger):
    """Runs of a model inside: networks as they stand, other latent sites by `choose(name, distribution, indices)`.

    Collects networks, their calls, statements, parameters, and the indices of subsampled plates; these are drawn unless given.
    """

    def __init__(
        self,
        choose: Callable[[str, Any, Mapping[str, Tensor]], Tensor | None],
        indices: Mapping[str, Tensor] | None = None,
    ):
        super().__init__()
        self.choose, self.given = choose, indices or {}
        self.indices: dict[str, Tensor] = {}
        self.networks: dict[str, Announced] = {}
        self.calls: dict[str, list[tuple[tuple, dict[str, Any], Any]]] = {}
        self.nodes: dict[str, Any] = {}
        self.params: dict[str, Tensor] = {}

    def _pyro_blr_own_fit(self, msg: Any) -> None:
        network, name = msg["infer"]["network"], msg["name"]
        plates = [frame.name for frame in msg["cond_indep_stack"]]
        if plates:
            raise ValueError(
                f"site {name!r}: found a network sampled inside plates {plates}, expected one outside: sample it before them"
            )
        if name in self.networks:
            raise ValueError(
                f"site {name!r}: found a second statement of the network, expected one a run: call network.sample() once, and what it "
                "returns as often as wanted"
            )
        if not isinstance(msg["scale"], float) or msg["scale"] != 1.0 or msg["mask"] is not None:
            raise ValueError(
                f"site {name!r}: found a network inside poutine.scale or poutine.mask, expected neither: scale the observed statements"
            )
        self.networks[name] = Announced(network, network.assigned(msg["infer"]["prior"]))
        self.calls[name] = []
        msg["value"], msg["stop"] = PlacedModule(network, self.calls[name]), True

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or msg["value"] is not None:
            return
        if isinstance(msg["fn"], _Subsample):
            msg["value"] = self.given.get(msg["name"])
        else:
            msg["value"] = self.choose(msg["name"], msg["fn"], self.indices)

    def _pyro_post_sample(self, msg: Any) -> None:
        if isinstance(msg["fn"], _Subsample):
            self.indices[msg["name"]] = torch.as_tensor(msg["value"])
        elif not msg["infer"].get("_deterministic"):
            self.nodes[msg["name"]] = {key: msg[key] for key in ("type", "fn", "value", "scale", "mask", "is_observed")}

    def _pyro_post_param(self, msg: Any) -> None:
        value = msg["value"]
        self.params[msg["name"]] = value.unconstrained() if hasattr(value, "unconstrained") else value

    # -- what it found ---------------------------------------------------------------------------------------------

    def latents(self) -> list[str]:
        """Latent sites beside the networks."""
        return [name for name, _ in latent_nodes(self)]  # type: ignore[arg-type]

    def log_probs(self) -> dict[str, Tensor]:
        """Statement -> s_f log f summed, of all that depend on a network or parameter, and of what is observed."""
        found = {name: node_log_prob(node).sum() for name, node in self.nodes.items()}
        return {name: x for name, x in found.items() if x.requires_grad or self.nodes[name]["is_observed"]}

    def labels(self, log_probs: Mapping[str, Tensor], num_data: float) -> Labels | None:
        """The statements that depend on a network, where labels can be drawn from all of them; else None."""
        nodes = [self.nodes[name] for name, value in log_probs.items() if value.requires_grad]
        if not nodes or any(isinstance(node["fn"], dist.Unit) for node in nodes):  # pyro.factor
            return None
        return Labels(nodes, num_data)

    def num_data(self, log_probs: Mapping[str, Tensor]) -> float:
        """N: the data of the observed statements that depend on a network, each as often as its scale says."""
        total = 0.0
        for name, value in log_probs.items():
            node = self.nodes[name]
            if value.requires_grad and node["is_observed"]:
                total += float((torch.ones(node["fn"].batch_shape) * torch.as_tensor(node["scale"]).cpu()).sum())
        if not total > 0 or not math.isfinite(total):
            raise ValueError(
                f"found {total:g} data whose distribution depends on the network {' or '.join(map(repr, self.networks))}, expected one or "
                "more: observe what the network predicts, on data that are not empty"
            )
        return total
