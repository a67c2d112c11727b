"""Running a model plainly, at chosen latents; nothing else in the package calls one."""

from __future__ import annotations

import contextlib
import random
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import ExpandedDistribution
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import SubsampleMessenger, _Subsample
from torch import Tensor
from torch.distributions import biject_to, constraints

from pyro_blr.generators import devices_in_use, seed_generators
from pyro_blr.graph import Site, log_prob
from pyro_blr.recorded import plain
from pyro_blr.sharing import shared_state

__all__ = [
    "generic_value",
    "isolated_random_state",
    "latent_nodes",
    "node_log_prob",
    "run_model",
    "run_sharing",
    "site_value",
    "subsample_values",
    "unwrap",
]


def unwrap(distribution: Any) -> tuple[Any, int, Any]:
    """(innermost distribution, number of batch dims that `to_event` reinterpreted, mask) below Independent, Expanded, Masked."""
    reinterpreted = 0
    mask: Any = None
    while True:
        if isinstance(distribution, dist.MaskedDistribution):
            mask = distribution._mask if mask is None else torch.as_tensor(mask) & torch.as_tensor(distribution._mask)
        elif isinstance(distribution, torch.distributions.Independent):
            reinterpreted += distribution.reinterpreted_batch_ndims
            if mask is not None and not isinstance(mask, bool):  # it was put on the whole event
                mask = mask.reshape(mask.shape + (1,) * distribution.reinterpreted_batch_ndims)
        elif not isinstance(distribution, ExpandedDistribution):
            return distribution, reinterpreted, mask
        distribution = distribution.base_dist


class _Substitute(Messenger):
    """Gives every latent the value that `choose(name, distribution)` says, and every subsampled plate its indices."""

    def __init__(
        self,
        choose: Callable[[str, Any], Tensor],
        subsamples: Mapping[str, Tensor] | None = None,
        share: bool = False,
    ):
        super().__init__()
        self.choose, self.subsamples, self.share = choose, subsamples or {}, share
        self.has_shared = False
        self.drawn: dict[str, Tensor] = {}  # indices of the plates that were not told theirs

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] and any(frame.size == _NO_SIZE for frame in msg["cond_indep_stack"]):
            msg["fn"] = _as_wide_as(msg["value"], msg["fn"])
        if msg["is_observed"] or msg["value"] is not None:
            return
        if isinstance(msg["fn"], _Subsample):
            if msg["name"] in self.subsamples:
                msg["value"] = self.subsamples[msg["name"]]
        elif not _is_delta(msg["fn"]):
            value = self.choose(msg["name"], msg["fn"])
            msg["value"] = shared_state(value, msg["fn"], msg["cond_indep_stack"]) if self.share else value
            self.has_shared |= msg["value"] is not value

    def _pyro_post_sample(self, msg: Any) -> None:
        if isinstance(msg["fn"], _Subsample):
            self.drawn[msg["name"]] = msg["value"]


_NO_SIZE = -1  # of `pyro.plate(name)`, which has as many elements as what is sampled in it


def _as_wide_as(value: Any, distribution: Any) -> Any:
    """The distribution with the batch shape that its data give it; itself where these do not fit."""
    shape = distribution.shape()
    try:
        wide = torch.broadcast_shapes(torch.as_tensor(value).shape, shape)
    except RuntimeError:
        return distribution
    return distribution if wide == shape else distribution.expand(wide[: len(wide) - distribution.event_dim])


def run_model(
    model: Callable,
    args: tuple,
    kwargs: Mapping[str, Any],
    choose: Callable[[str, Any], Tensor],
    subsamples: Mapping[str, Tensor] | None = None,
) -> poutine.Trace:
    """One plain run of the model with chosen latents; draws (subsample indices, new parameters) come from torch's generator."""
    return _traced(model, args, kwargs, _Substitute(choose, subsamples))


def run_sharing(
    model: Callable, args: tuple, kwargs: Mapping[str, Any], choose: Callable[[str, Any], Tensor]
) -> tuple[poutine.Trace, bool]:
    """The same with one state for all elements of large discrete sites, and whether the program ran so; where it did not, a
    run with a state an element, on the same subsamples.
    """
    substitute = _Substitute(choose, share=True)
    try:
        return _traced(model, args, kwargs, substitute), True
    except Exception:  # the program's own: it may rely on the site's shape
        if not substitute.has_shared:
            raise
    return run_model(model, args, kwargs, choose, substitute.drawn), False


def _traced(model: Callable, args: tuple, kwargs: Mapping[str, Any], substitute: _Substitute) -> poutine.Trace:
    with substitute, _named_empty_plates():
        return poutine.trace(model).get_trace(*args, **kwargs)


@contextlib.contextmanager
def _named_empty_plates() -> Iterator[None]:
    """Pyro divides by the size of an empty plate: the error says which one it is."""
    try:
        yield
    except ZeroDivisionError as error:
        frame: Any = error.__traceback__
        local: dict[str, Any] = {}
        while frame is not None:
            frame, local = frame.tb_next, frame.tb_frame.f_locals
        if not isinstance(local.get("self"), SubsampleMessenger):
            raise
        name = local.get("name") or local["self"].name
        raise ValueError(
            f"plate {name!r} is empty: found no elements, expected at least one. Check the data that its size or subsample is taken from"
        ) from error


def latent_nodes(trace: poutine.Trace) -> Iterator[tuple[str, Any]]:
    """The sample statements of a trace that inference has to find values for."""
    for name, node in trace.nodes.items():
        if node["type"] == "sample" and not node["is_observed"] and not isinstance(node["fn"], _Subsample):
            if not _is_delta(node["fn"]):
                yield name, node


def subsample_values(trace: poutine.Trace) -> dict[str, Tensor]:
    """The indices that each subsampled plate of a trace drew."""
    found: dict[str, Any] = {
        name: node["value"]
        for name, node in trace.nodes.items()
        if node["type"] == "sample" and isinstance(node["fn"], _Subsample)
    }
    return found


def generic_value(name: str, distribution: Any, draw: int = 0, radius: float = 1.0) -> Tensor:
    """A value inside the support, the same for the same (name, shape, draw), that no special structure can fit by chance."""
    generator = _generator(f"{name}:{draw}")
    if distribution.has_enumerate_support:
        states = distribution.enumerate_support(expand=False)
        shape = distribution.batch_shape
        if 0 < draw < states.shape[0]:  # the first draws go through every other state
            index = torch.randint(states.shape[0], tuple(shape), generator=_generator(f"{name}:0"), device="cpu") + draw
        else:
            index = torch.randint(states.shape[0], tuple(shape), generator=generator, device="cpu")
        index = (index % states.shape[0]).to(states.device)
        flat = states.reshape(states.shape[0], *distribution.event_shape)
        return flat[index]
    support = distribution.support
    if getattr(support, "is_discrete", False):
        with isolated_random_state(zlib.crc32(f"{name}:{draw}".encode())):
            return distribution.sample()
    reference = _reference_tensor(distribution)
    shape = torch.Size(distribution.batch_shape) + torch.Size(distribution.event_shape)
    if _innermost_support(support) is constraints.positive_definite:
        root = torch.randn(tuple(shape), generator=generator, device="cpu", dtype=torch.float64) * radius
        matrix = root @ root.mT / shape[-1] + 0.5 * torch.eye(shape[-1], dtype=torch.float64, device=root.device)
        return matrix.to(dtype=reference.dtype, device=reference.device)
    try:
        transform = biject_to(support)
    except NotImplementedError:
        with isolated_random_state(zlib.crc32(f"{name}:{draw}".encode())):
            return distribution.sample()
    shape = transform.inverse_shape(shape)
    unconstrained = (torch.rand(tuple(shape), generator=generator, device="cpu", dtype=torch.float64) * 2 - 1) * radius
    return transform(unconstrained.to(dtype=reference.dtype, device=reference.device))


def site_value(site: Site, draw: int = 0, radius: float = 1.0) -> Tensor:
    """A generic value of a site; of one state where the run gave it one."""
    value = generic_value(site.name, site.distribution, draw, radius)
    return value[(slice(0, 1),) * len(site.batch_shape)] if site.shared else value


def _generator(text: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(text.encode()))


def _innermost_support(support: Any) -> Any:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support


def _reference_tensor(distribution: Any) -> Tensor:
    """Any floating tensor of the distribution: it tells dtype and device."""
    for part in (distribution, *_wrapped(distribution)):
        for value in vars(part).values():
            if isinstance(value, Tensor) and value.is_floating_point():
                return plain(value)
    return torch.empty(())


def _wrapped(distribution: Any) -> Iterator[Any]:
    while hasattr(distribution, "base_dist"):
        distribution = distribution.base_dist
        yield distribution


def _is_delta(distribution: Any) -> bool:
    return isinstance(unwrap(distribution)[0], dist.Delta)


@contextlib.contextmanager
def isolated_random_state(seed: int | None = None) -> Iterator[None]:
    """Whatever is drawn inside (torch on every device, NumPy, `random`) leaves the global generators as they were."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = devices_in_use()
    try:
        with torch.random.fork_rng(devices=devices):
            if seed is not None:
                seed_generators(seed, devices)
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def node_log_prob(node: Mapping[str, Any]) -> Tensor:
    """s_f log f of a traced statement, masked and scaled, elementwise over its batch."""
    return scale_and_mask(log_prob(node["fn"], node["value"]), node["scale"], node["mask"])
