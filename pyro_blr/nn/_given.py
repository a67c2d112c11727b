"""A model with its networks held at one draw: what is left is a model of the other sites."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_blr.nn._pass import Pass
from pyro_blr.nn._priors import Assigned
from pyro_blr.remainder import Substituted

__all__ = ["GivenNetworks", "Spread", "prior_law"]


@dataclass(frozen=True)
class Spread:
    """Σ_j E_q (θ_j − c)² for every c, over the `count` elements that share a prior: `values` (2, *shape), each standing for count / 2.

    With values x̄ ± r, x̄ the mean of E θ_j and r² = mean of E (θ_j − x̄)², the sum of squares is exactly that of two data.
    """

    count: int
    values: Tensor

    @classmethod
    def of(cls, means: list[Tensor], variances: list[Tensor], shape: torch.Size) -> Spread:
        """From mean and variance of every element, summed over the dims that `shape` has at size one, in float64."""
        count = sum(mean.numel() for mean in means) // shape.numel()
        size = torch.Size(shape)
        wide = [mean.double() for mean in means]
        centre = sum((_summed(mean, size) for mean in wide), torch.zeros(size, device=wide[0].device)) / count
        squares = [
            _summed((mean - centre).square() + variance.double(), size)
            for mean, variance in zip(wide, variances, strict=True)
        ]
        radius = (sum(squares, torch.zeros(size, device=wide[0].device)) / count).sqrt()
        return cls(count, torch.stack([centre + radius, centre - radius]).to(means[0].dtype))


def _summed(values: Tensor, shape: torch.Size) -> Tensor:
    return values.sum_to_size(shape) if shape else values.sum()


def prior_statement(name: str, assigned: Assigned, spread: Spread) -> None:
    """E_q log N(θ | m₀, 1/δ) of all elements that share a prior, as an observed statement about m₀ and δ.

    It is their sum of squares that m₀ and δ see, so that two data, each `count / 2` times, say all; constants included.
    """
    with poutine.scale(scale=spread.count / 2):
        pyro.sample(f"{name}[{assigned.key}]", prior_law(assigned, spread), obs=spread.values)


def prior_law(assigned: Assigned, spread: Spread) -> Any:
    """N(m₀, 1/δ) for both values of every entry."""
    mean, precision = assigned.prior.mean, assigned.prior.precision
    precision = torch.as_tensor(precision, dtype=spread.values.dtype, device=spread.values.device)
    shape = spread.values.shape
    return dist.Normal(mean, precision.rsqrt()).expand(shape).to_event(len(shape))


class GivenNetworks:
    """z ↦ E_{q(θ)} log p(θ | z) + log p(z, x | θ at a draw), as a Pyro model of the other sites z.

    The prior of the weights is averaged over q, and what the networks computed is data: their outputs at the draw, which a call with
    equal arguments gets again. Calls with other ones (of values of z) run the network as it stands.
    """

    def __init__(self, model: Callable):
        self.model = model
        self.__name__ = getattr(model, "__name__", type(model).__name__)
        self._pass: Pass | None = None
        self.spreads: Mapping[str, Mapping[str, Spread]] = {}

    def hold(self, found: Pass, spreads: Mapping[str, Mapping[str, Spread]]) -> None:
        """The pass at the draw, and network -> key of a prior -> what q says about its elements."""
        self._pass, self.spreads = found, spreads

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        assert self._pass is not None
        with _Given(self._pass, self.spreads), Substituted(self._pass.indices):
            return self.model(*args, **kwargs)


class _Given(Messenger):
    def __init__(self, found: Pass, spreads: Mapping[str, Mapping[str, Spread]]):
        super().__init__()
        self.found, self.spreads = found, spreads

    def _pyro_blr_own_fit(self, msg: Any) -> None:
        network, name = msg["infer"]["network"], msg["name"]
        for assigned in network.assigned(msg["infer"]["prior"]):
            if not assigned.prior.is_number:
                prior_statement(name, assigned, self.spreads[name][assigned.key])
        msg["value"], msg["stop"] = _Recalled(network, self.found.calls[name]), True


class _Recalled:
    """x ↦ what the module gave for x in the pass."""

    def __init__(self, network: Any, calls: list[tuple[tuple, dict[str, Any], Any]]):
        self.network, self.calls = network, calls

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for known_args, known_kwargs, result in self.calls:
            if _is_same(known_args, args) and _is_same(known_kwargs, kwargs):
                return _detached(result)
        return self.network.module(*args, **kwargs)


def _is_same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(_is_same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_is_same(value, other[key]) for key, value in one.items())
    return bool(one == other)


def _detached(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return tree.detach()
    if isinstance(tree, (tuple, list)):
        return type(tree)(map(_detached, tree)) if type(tree) in (tuple, list) else tree
    if isinstance(tree, dict):
        return {key: _detached(value) for key, value in tree.items()} if type(tree) is dict else tree
    return tree
