"""A Pyro model as factors: log p(z, x) = Σ_f s_f log f, one factor a `sample` statement."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import ExpandedDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.utils import probs_to_logits

from pyro_blr.expressions import Recording
from pyro_blr.shapes import broadcast_shape
from pyro_blr.tape import Tape

__all__ = ["Constructed", "Factor", "FactorGraph", "Plate", "Site", "broadcast_shape", "log_prob"]


@dataclass(frozen=True)
class Plate:
    """A vectorised `pyro.plate` around a site: `size` elements of which `subsample_size` are in this run."""

    name: str
    dim: int
    size: int
    subsample_size: int


@dataclass(frozen=True)
class Site:
    """A latent `sample` statement: what its variational factor has to know."""

    name: str
    distribution: Any
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    plates: tuple[Plate, ...]
    infer: Mapping[str, Any]
    shared: bool = False  # this run gave all elements one state
    looped: float = 1.0  # size / subsample_size of the plates around it that are loops

    @property
    def batch_shape(self) -> torch.Size:
        return self.shape[: len(self.shape) - self.distribution.event_dim]

    @property
    def support(self) -> Any:
        return _with_scalar_bounds(_once_round(self.distribution))

    @property
    def scale(self) -> float:
        """s_i: the plates' part of the factor's scale, which the guide's own statement carries too."""
        return _scale_of(self.plates, self.looped)


def _scale_of(plates: Sequence[Plate], looped: float) -> float:
    return looped * math.prod(plate.size / max(plate.subsample_size, 1) for plate in plates)


def _once_round(distribution: Any) -> Any:
    """The support; of an angle (`VonMises`, whose density goes round for ever on the line) one round, where its integral is 1."""
    base = distribution
    while isinstance(base, (torch.distributions.Independent, dist.MaskedDistribution, ExpandedDistribution)):
        base = base.base_dist
    support = distribution.support
    if not isinstance(base, dist.VonMises):
        return support
    once = constraints.interval(-math.pi, math.pi)
    return constraints.independent(once, support.event_dim) if support.event_dim else once


def _with_scalar_bounds(support: Any) -> Any:
    """The same support, bounds that are equal throughout as numbers: they hold for the other rows of a plate too."""
    if isinstance(support, constraints.independent):
        base = _with_scalar_bounds(support.base_constraint)
        return constraints.independent(base, support.reinterpreted_batch_ndims)
    bounds = dict(vars(support))
    for name, bound in bounds.items():
        if isinstance(bound, Tensor) and bound.numel() > 0 and bool((bound == bound.flatten()[0]).all()):
            bounds[name] = bound.flatten()[0].item()
    if all(bounds[name] is bound for name, bound in vars(support).items()):
        return support
    return type(support)(**bounds)


@dataclass(frozen=True)
class Constructed:
    """A distribution as the program wrote it: its class and the arguments of its constructor, as expressions."""

    distribution_class: type
    arguments: Mapping[str, Any]
    batch_shape: torch.Size
    event_dim: int
    reinterpreted: int
    mask: Any = None

    def rebuild(self, tape: Tape, latents: Mapping[str, Tensor], inputs: Any = None) -> Any:
        """The distribution at given latents, before Independent and masks."""
        return self.built(tape.evaluate(list(self.arguments.values()), latents, inputs))

    def built(self, values: Sequence[Any]) -> Any:
        """The distribution with these arguments, unchecked (an ImproperUniform's constructor has no such option)."""
        options = {} if issubclass(self.distribution_class, dist.ImproperUniform) else {"validate_args": False}
        return self.distribution_class(**dict(zip(self.arguments, values, strict=True)), **options)


@dataclass(frozen=True)
class Factor:
    """One term s_f log f of the joint density, over the expressions of its arguments, value, scale and mask."""

    name: str
    constructed: Constructed | None
    distribution: Any
    value: Any
    scale: Any
    mask: Any
    plates: tuple[Plate, ...]
    is_observed: bool
    latents: frozenset[str]
    source: str
    looped: float = 1.0

    @property
    def batch_shape(self) -> torch.Size:
        return torch.Size(self.distribution.batch_shape)  # ImproperUniform has tuples


@dataclass
class FactorGraph:
    """Sites and factors of one run of a model, over one tape."""

    recording: Recording
    sites: dict[str, Site]
    factors: dict[str, Factor]
    values: dict[str, Tensor]
    subsamples: dict[str, Tensor]
    params: dict[str, Tensor] = field(default_factory=dict)
    deterministic: dict[str, Any] = field(default_factory=dict)
    failure: str | None = None

    @property
    def tape(self) -> Tape:
        return self.recording.tape

    @property
    def plates(self) -> dict[str, Plate]:
        plates = [site.plates for site in self.sites.values()] + [factor.plates for factor in self.factors.values()]
        return {plate.name: plate for some in plates for plate in some}

    @property
    def is_subsampled(self) -> bool:
        whole = all(plate.subsample_size == plate.size for plate in self.plates.values())
        return not whole or any(factor.looped != 1.0 for factor in self.factors.values())

    @property
    def steps_of_a_pass(self) -> float:
        """How many subsamples of this size are as large as the data: the largest scale that plates give a factor."""
        return max((_scale_of(factor.plates, factor.looped) for factor in self.factors.values()), default=1.0)

    @property
    def shared(self) -> frozenset[str]:
        """The discrete sites that this run gave one state for all elements (`sharing`)."""
        return frozenset(name for name, site in self.sites.items() if site.shared)

    @property
    def max_plate_nesting(self) -> int:
        ranks = [len(site.batch_shape) for site in self.sites.values()]
        return max([*ranks, *(len(factor.batch_shape) for factor in self.factors.values())], default=0)

    def log_prob(self, name: str, latents: Mapping[str, Tensor]) -> Tensor:
        """s_f log f at given latents, masked and scaled, one value for each element of the factor's batch."""
        factor = self.factors[name]
        if factor.constructed is None:
            raise ValueError(f"factor {name!r} has no recorded constructor")
        constructed = factor.constructed
        value, mask, scale, inner = self.tape.evaluate(
            [factor.value, factor.mask, factor.scale, constructed.mask], latents
        )
        result = log_prob(constructed.rebuild(self.tape, latents), value)
        result = result.expand(broadcast_shape(result.shape, constructed.batch_shape))
        if inner is not None:
            result = torch.where(torch.as_tensor(inner, dtype=torch.bool), result, 0.0)
        if constructed.reinterpreted:
            result = result.flatten(-constructed.reinterpreted).sum(-1)
        if mask is not None:
            result = torch.where(torch.as_tensor(mask, dtype=torch.bool, device=result.device), result, 0.0)
        return result * scale


def log_prob(distribution: Any, value: Tensor) -> Tensor:
    """log f(value); a Categorical's without the logarithms of all the states that the value is not."""
    own = vars(distribution)
    if type(distribution) is not dist.Categorical or "probs" not in own or "logits" in own:
        return distribution.log_prob(value)
    probs, index = own["probs"], value.long()
    shape = broadcast_shape(index.shape, probs.shape[:-1])
    chosen = probs.expand(*shape, probs.shape[-1]).gather(-1, index.expand(shape).unsqueeze(-1))
    return probs_to_logits(chosen.squeeze(-1))
