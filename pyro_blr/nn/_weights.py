"""The weights' own Gaussian as others see it: its part of the bound, what hierarchical priors need of it, and as λ of a block."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_blr.blocks import Block
from pyro_blr.capture import capture
from pyro_blr.groupings import blocks_of
from pyro_blr.nn._buckets import Bucket, buckets, state_dtype
from pyro_blr.nn._given import Spread
from pyro_blr.nn._pass import Announced
from pyro_blr.nn._priors import Assigned, Prior
from pyro_blr.nn.optimizer import BLROptimizer
from pyro_blr.running import generic_value, isolated_random_state, run_model

__all__ = ["Weights"]


class Weights:
    """q(θ) = N(m, diag(1/s)) of all networks of a model, which one `BLROptimizer` holds."""

    def __init__(self, networks: Mapping[str, Announced], num_data: float, settings: Mapping[str, Any]):
        self.networks = {name: found.network for name, found in networks.items()}
        self.places = {
            (network, name): place
            for place, (network, name) in enumerate(
                (key, name) for key, network in self.networks.items() for name in network.exposed.parameters
            )
        }
        parameters = [self.networks[network].exposed.parameters[name] for network, name in self.places]
        self.numbers: list[Prior | None] = [None for _ in parameters]  # priors that are numbers
        for name, found in networks.items():
            for assigned in found.assigned:
                for parameter in assigned.names if assigned.prior.is_number else ():
                    self.numbers[self.places[name, parameter]] = assigned.prior
        self.optimizer = BLROptimizer(parameters, num_data, **settings)
        self.group = self.optimizer.param_groups[0]
        self._values: list[list[Any]] = [[1.0] * len(parameters), [0.0] * len(parameters)]
        for place, prior in enumerate(self.numbers):
            if prior is not None:
                self._values[0][place], self._values[1][place] = float(prior.precision), float(prior.mean)
        self._of_precisions: tuple[Any, float] = (None, 0.0)
        self._version = 0  # of what is not counted by measurements
        self._share()

    # -- priors ----------------------------------------------------------------------------------------------------

    def set_prior(self, network: str, assigned: Assigned, precision: Tensor, mean: Tensor) -> None:
        """E δ and E δ m₀ / E δ of parameters whose prior has values of other sites."""
        for name in assigned.names:
            self._keep_definite(network, name, precision)
        for values, value in zip(self._values, (precision, mean), strict=True):
            plain = float(value) if value.numel() == 1 else value.detach()
            for name in assigned.names:
                values[self.places[network, name]] = plain
        self._share()

    @torch.no_grad()
    def _keep_definite(self, network: str, name: str, precision: Tensor) -> None:
        """s = N h + δ does not fall with δ where h is negative, as the Hessian's and Price's may be: measurements move it."""
        state = self.optimizer.state[self.networks[network].exposed.parameters[name]]
        if state:
            curvature, count = state["curvature"], self.group["num_data"]
            before, after = (
                torch.as_tensor(x).to(curvature) for x in (self._values[0][self.places[network, name]], precision)
            )
            least = (count * curvature + before - after) / count
            curvature.copy_(torch.where(curvature < 0, torch.maximum(curvature, least), curvature))

    def _share(self) -> None:
        """One number for the group where all parameters have the same."""
        self._version += 1
        for name, values in zip(("prior_precision", "prior_mean"), self._values, strict=True):
            alike = all(isinstance(value, float) and value == values[0] for value in values)
            self.group[name] = values[0] if alike else list(values)

    def spreads(self, networks: Mapping[str, Announced]) -> dict[str, dict[str, Spread]]:
        """Network -> key of a prior that is no number -> second moments of its elements under q."""
        found: dict[str, dict[str, Spread]] = {name: {} for name in networks}
        for name, announced in networks.items():
            for assigned in announced.assigned:
                if not assigned.prior.is_number:
                    shapes = [torch.as_tensor(x).shape for x in (assigned.prior.mean, assigned.prior.precision)]
                    means, variances = zip(*(self._moments(name, one) for one in assigned.names), strict=True)
                    shape = torch.broadcast_shapes(*shapes)
                    found[name][assigned.key] = Spread.of(list(means), list(variances), shape)
        return found

    # -- moments ---------------------------------------------------------------------------------------------------

    @property
    def has_begun(self) -> bool:
        """Whether a step was taken, so that there is a posterior."""
        return any(self.optimizer.state[parameter] for parameter in self.group["params"])

    def _moments(self, network: str, name: str) -> tuple[Tensor, Tensor]:
        """Mean and variance of a parameter: its value and none before the first step, the prior's where no loss depends on it."""
        parameter = self.networks[network].exposed.parameters[name]
        state = self.optimizer.state[parameter]
        if state:
            return state["mean"], self.optimizer.stddev(parameter).square()
        like = torch.zeros_like(parameter, dtype=state_dtype(parameter))
        if not self.has_begun:
            return parameter.detach().to(like), like
        precision, mean = (values[self.places[network, name]] for values in self._values)
        return like + mean, like + 1 / precision

    def drawn(self) -> contextlib.AbstractContextManager[Any]:
        """The weights at a draw from torch's generator inside."""
        return self.optimizer._perturbed(key=int(torch.randint(2**62, ()).item()))

    def _buckets(self) -> Iterator[Bucket]:
        for group, entries in self.optimizer._by_group():
            yield from buckets(group, [entry for entry in entries if entry.state])

    @torch.no_grad()
    def bound(self) -> float:
        """Σ_j H(q_j), plus Σ_j E_q log p(θ_j) = ½ (log δ/2π − δ (1/s + (m − m₀)²)) of priors that are numbers.

        All but (m − m₀)² stays as it is until curvatures are measured again.
        """
        states = [self.optimizer.state[parameter] for parameter in self.group["params"]]
        key = self._version, *(state["measurements"] if state else None for state in states)
        if self._of_precisions[0] != key:
            self._of_precisions = key, self._constants() - 0.5 * self._precision_terms()
        kept = [(s["mean"], prior) for s, prior in zip(states, self.numbers, strict=True) if s and prior is not None]
        if not kept:
            return self._of_precisions[1]
        away = [mean for mean, _ in kept]
        if any(prior.mean for _, prior in kept):
            away = list(torch._foreach_sub(away, [float(prior.mean) for _, prior in kept]))
        squares = torch.stack([norm.to(away[0].device) for norm in torch._foreach_norm(away)]).double().square()
        weights = torch.tensor([float(prior.precision) for _, prior in kept], dtype=torch.float64)
        return self._of_precisions[1] - 0.5 * (weights * squares.cpu()).sum().item()

    def _precision_terms(self) -> float:
        """Σ_j log s, and δ / s of priors that are numbers."""
        total = 0.0
        for bucket in self._buckets():
            precision = bucket.precision()
            kept = [i for i, entry in enumerate(bucket.entries) if self.numbers[entry.place] is not None]
            if kept:
                inverse = _sums(torch._foreach_reciprocal([precision[i] for i in kept]))
                own = [self.numbers[bucket.entries[i].place] for i in kept]
                weights = torch.tensor([float(p.precision) for p in own if p is not None], dtype=torch.float64)
                total += (weights * inverse).sum().item()
            torch._foreach_log_(precision)
            total += _sums(precision).sum().item()
        return total

    def _constants(self) -> float:
        """Σ_j ½ (1 + log 2π), and ½ log δ/2π of priors that are numbers; where no loss depends on a parameter q is its prior."""
        total = 0.0
        for place, (parameter, prior) in enumerate(zip(self.group["params"], self.numbers, strict=True)):
            if self.optimizer.state[parameter]:
                each = 1 + math.log(2 * math.pi)
                each += math.log(prior.precision / (2 * math.pi)) if prior is not None else 0.0
                total += 0.5 * parameter.numel() * each
            elif prior is None:
                precision = torch.as_tensor(self._values[0][place]).double().expand(parameter.shape)
                total += float((0.5 * (1 + math.log(2 * math.pi) - precision.log())).sum())
        return total

    # -- as λ ------------------------------------------------------------------------------------------------------

    def natural(self, name: str) -> Tensor:
        """λ = (m s, −s/2) of every element of a network's vector, (P, 2), float64."""
        network = self.networks[name]
        means, variances = zip(*(self._moments(name, one) for one in network.exposed.parameters), strict=True)
        mean, variance = network.exposed.joined(means).double(), network.exposed.joined(variances).double()
        return torch.stack([mean / variance, -0.5 / variance], -1)

    @torch.no_grad()
    def adopt(self, name: str, natural: Tensor) -> None:
        """q of a network from λ: means, and curvatures h = (s − δ) / N; momenta stay."""
        network = self.networks[name]
        precision = -2 * natural[..., 1]
        means, precisions = network.split(natural[..., 0] / precision), network.split(precision)
        for one, parameter in network.exposed.parameters.items():
            state, place = self.optimizer.state[parameter], self.places[name, one]
            prior = torch.as_tensor(self._values[0][place]).to(precisions[one])
            parameter.copy_(means[one])
            state["mean"].copy_(means[one])
            state["curvature"].copy_((precisions[one] - prior) / self.group["num_data"])
        self._version += 1

    def blocks(self) -> dict[str, Block]:
        """A block for each network: Normals, element by element."""
        return {name: _block(network) for name, network in self.networks.items()}


def _sums(tensors: Iterable[Tensor]) -> Tensor:
    """Of each tensor, in its precision; to be added in float64."""
    return torch.stack([tensor.sum() for tensor in tensors]).double().cpu()


def _block(network: Any) -> Block:
    def statement() -> None:
        network.sample()

    with isolated_random_state(0):
        trace = run_model(statement, (), {}, generic_value)
        return blocks_of(capture(statement, (), {}, trace), "elements")[network.name]
