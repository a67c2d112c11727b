"""Capturing a model: it runs once more with recorded latents, and its statements become factors over expressions."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.distribution import COERCIONS
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from pyro_blr.callers import source_line
from pyro_blr.expressions import Recording
from pyro_blr.graph import Constructed, Factor, FactorGraph, Plate, Site
from pyro_blr.recorded import Recorded, plain
from pyro_blr.running import isolated_random_state, latent_nodes, run_model, subsample_values, unwrap
from pyro_blr.tape import Latent, Ref, Tape

__all__ = ["capture"]


@contextlib.contextmanager
def _recorded_constructors() -> Iterator[None]:
    """Distributions remember the arguments they were constructed with (attributes are normalised copies of them)."""

    def construct(cls: type, args: tuple, kwargs: dict) -> Any:
        distribution = type.__call__(cls, *args, **kwargs)
        if not isinstance(distribution, TorchDistributionMixin):
            return distribution
        try:
            bound = inspect.signature(cls).bind(*args, **kwargs).arguments
        except (TypeError, ValueError):
            return distribution
        arguments = dict(bound)
        arguments.pop("validate_args", None)
        arguments.update(arguments.pop("kwargs", {}))
        _remember(distribution, (cls, arguments, source_line()))
        return distribution

    COERCIONS.insert(0, construct)
    try:
        yield
    finally:
        COERCIONS.remove(construct)


def _remember(distribution: Any, constructed: tuple) -> None:
    """Attaches the constructor's arguments, here and to what `expand` makes of the distribution."""
    expand = distribution.expand

    def remembering_expand(*args: Any, **kwargs: Any) -> Any:
        expanded = expand(*args, **kwargs)
        if type(expanded) is type(distribution):
            _remember(expanded, constructed)
        return expanded

    distribution.__dict__["_pyro_blr_constructed"] = constructed
    distribution.__dict__["expand"] = remembering_expand


def capture(model: Callable, args: tuple, kwargs: Mapping[str, Any], trace: poutine.Trace) -> FactorGraph:
    """The factors of the run that `trace` holds, recorded by running the model again with the same latents and subsamples.

    Touches neither the global random state nor the parameters.  A model that cannot be recorded (it raises on recorded
    tensors) gives factors without expressions and says why in `failure`.
    """
    values = {name: plain(node["value"]).detach().clone() for name, node in latent_nodes(trace)}
    subsamples = subsample_values(trace)
    shared = frozenset(name for name, node in latent_nodes(trace) if _is_shared(node))
    recording, failure = Recording(watched=shared), None
    recorded: poutine.Trace = trace
    try:
        with isolated_random_state(0), pyro.validation_enabled(False), _recorded_constructors(), recording:
            recorded = run_model(
                model, args, kwargs, lambda name, _: recording.latent(name, values[name].clone()), subsamples
            )
    except Exception as error:  # the model's own code, run on an unusual tensor: any error means "not recordable"
        failure, recorded = f"{type(error).__name__}: {error}", trace
        recording = Recording(watched=shared)
    if failure is not None:
        recorded = _with_latents(trace, recording, values)
    graph = FactorGraph(recording, {}, {}, values, subsamples, failure=failure)
    node: Any
    for name, node in recorded.nodes.items():
        if node["type"] == "param":
            graph.params[name] = plain(node["value"])
        elif node["type"] == "sample" and not isinstance(node["fn"], _Subsample) and name in trace.nodes:
            plain_node: Any = trace.nodes[name]
            _add_statement(graph, name, node, plain_node)
    return graph


def _is_shared(node: Mapping[str, Any]) -> bool:
    """Whether the plain run gave a discrete site one state for all elements."""
    return node["fn"].has_enumerate_support and node["value"].shape != node["fn"].shape()


def _with_latents(trace: poutine.Trace, recording: Recording, values: Mapping[str, Tensor]) -> poutine.Trace:
    """A plain run with its latents as leaves: the statements whose arguments hold no latent are recorded all the same."""
    copied = trace.copy()
    for name, value in values.items():
        copied.nodes[name] = {**trace.nodes[name], "value": recording.latent(name, value.clone())}
    return copied


def _add_statement(graph: FactorGraph, name: str, node: dict, plain_node: dict) -> None:
    recording = graph.recording
    plates, looped = _plates_of(name, node)
    if node["infer"].get("_deterministic") or _is_its_own_value(recording, node):
        graph.deterministic[name] = recording.reference(node["value"])
        return
    if name in graph.values:
        value, distribution = graph.values[name], plain_node["fn"]
        shared = name in recording.watched
        shape = torch.Size(distribution.shape()) if shared else value.shape
        infer = dict(node["infer"])
        graph.sites[name] = Site(name, distribution, shape, value.dtype, value.device, plates, infer, shared, looped)
    factor = Factor(
        name=name,
        constructed=_constructed(recording, node["fn"]),
        distribution=plain_node["fn"],
        value=recording.reference(node["value"]),
        scale=recording.reference(node["scale"]),
        mask=recording.reference(node["mask"]),
        plates=plates,
        is_observed=node["is_observed"],
        latents=frozenset(),
        source=_line_of(node["fn"]),
        looped=looped,
    )
    graph.factors[name] = replace(factor, latents=_latents_of(graph, factor))


def _line_of(distribution: Any) -> str:
    """Where the program made the distribution; empty where it was made before the run."""
    remembered = getattr(unwrap(distribution)[0], "_pyro_blr_constructed", None)
    return remembered[2] if remembered is not None else ""


def _is_its_own_value(recording: Recording, node: dict) -> bool:
    """Whether a statement is Delta(v) at v itself, a name for a value: its log density is zero whatever the latents are."""
    base = unwrap(node["fn"])[0]
    if (
        not isinstance(base, dist.Delta)
        or isinstance(base.log_density, Recorded)
        or bool((base.log_density != 0).any())
    ):
        return False
    value, point = recording.reference(node["value"]), recording.reference(base.v)
    if isinstance(value, Ref) or isinstance(point, Ref):
        return _root(recording.tape, value) == _root(recording.tape, point)
    return torch.equal(torch.as_tensor(value), torch.as_tensor(point))


_SAME = frozenset("identity clone expand expand_as contiguous broadcast_to view reshape view_as reshape_as".split())


def _root(tape: Tape, ref: Any) -> Any:
    """The expression that `ref` is a copy or an expanded view of."""
    while isinstance(ref, Ref) and not isinstance(tape.nodes[ref.index].function, Latent):
        node = tape.nodes[ref.index]
        if node.name not in _SAME:
            break
        ref = node.args[0]
    return ref


def _latents_of(graph: FactorGraph, factor: Factor) -> frozenset[str]:
    expressions = [factor.value, factor.scale, factor.mask]
    if factor.constructed is not None:
        expressions += [*factor.constructed.arguments.values(), factor.constructed.mask]
    return frozenset().union(*(graph.tape.latents_of(item) for item in expressions))


def _constructed(recording: Recording, distribution: Any) -> Constructed | None:
    base, reinterpreted, mask = unwrap(distribution)
    remembered = getattr(base, "_pyro_blr_constructed", None)
    arguments = remembered[1] if remembered is not None else _attributes(base)
    if arguments is None:
        return None
    cls = remembered[0] if remembered is not None else type(base)
    references = {name: recording.reference(value) for name, value in arguments.items() if value is not None}
    if any(_holds_recorded(value) for value in references.values()):
        return None
    shape = torch.Size(base.batch_shape)
    outer = torch.Size(distribution.batch_shape)
    if reinterpreted:
        shape = outer + shape[len(shape) - reinterpreted :]
    else:
        shape = outer
    return Constructed(cls, references, shape, len(base.event_shape), reinterpreted, recording.reference(mask))


_ALTERNATIVES = ({"probs", "logits"}, {"scale_tril", "covariance_matrix", "precision_matrix"})


def _attributes(base: Any) -> dict[str, Any] | None:
    """The constructor's arguments of a distribution that was made before the run (a module-level prior, a PyroSample)."""
    derived = isinstance(base, torch.distributions.TransformedDistribution) or "_categorical" in vars(base)
    found: dict[str, Any] = {}
    for name, parameter in inspect.signature(type(base).__init__).parameters.items():
        if name in ("self", "validate_args") or any(name in group and group & set(found) for group in _ALTERNATIVES):
            continue
        if name in vars(base) or (derived and hasattr(base, name)):
            found[name] = getattr(base, name)
        elif parameter.default is inspect.Parameter.empty:
            return None
    return found


def _holds_recorded(value: Any) -> bool:
    """Whether an argument (a distribution, a transform) hides a latent where its expression cannot be seen."""
    if isinstance(value, Recorded):
        return True
    if isinstance(value, (Ref, Tensor, float, int, bool, str, torch.Size)) or value is None:
        return False
    if isinstance(value, (tuple, list)):
        return any(_holds_recorded(item) for item in value)
    if isinstance(value, dict):
        return any(_holds_recorded(item) for item in value.values())
    return any(_holds_recorded(item) for item in getattr(value, "__dict__", {}).values() if item is not value)


def _plates_of(name: str, node: dict) -> tuple[tuple[Plate, ...], float]:
    """The vectorised plates around a statement, and how much those that are loops are subsampled."""
    plates, looped = [], 1.0
    for frame in node["cond_indep_stack"]:
        if frame.vectorized:
            found = (1,) * -frame.dim + tuple(
                node["fn"].batch_shape
            )  # a plate without a size has that of its statement
            drawn = frame.size if frame.size >= 0 else found[frame.dim]
            full = frame.full_size if frame.full_size is not None and frame.full_size >= 0 else drawn
            plates.append(Plate(frame.name, frame.dim, full, drawn))
        elif frame.size and frame.full_size is not None:
            looped *= float(frame.full_size / frame.size)
    return tuple(sorted(plates, key=lambda plate: plate.dim)), looped
