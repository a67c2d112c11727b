"""A Pyro model as factors: log p(z, x) = Σ_f s_f log f, one factor a `sample` statement.

`run_model` runs the program plainly; `capture` runs it once more with recorded latents and returns a `FactorGraph`.
This is the only file that runs a model.
"""

from __future__ import annotations

import contextlib
import inspect
import random
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.distribution import COERCIONS
from pyro.distributions.torch_distribution import ExpandedDistribution, TorchDistributionMixin
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import SubsampleMessenger, _Subsample
from torch import Tensor
from torch.distributions import biject_to, constraints

from pyro_blr.expressions import Latent, Recorded, Recording, Ref, Tape, plain, source_line

__all__ = [
    "broadcast_shape",
    "Constructed",
    "Factor",
    "FactorGraph",
    "Plate",
    "Site",
    "capture",
    "dependencies",
    "generic_value",
    "isolated_random_state",
    "node_log_prob",
    "replayed_log_probs",
    "run_model",
    "same_run",
    "unfaithful_factors",
    "unwrap",
]


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

    @property
    def batch_shape(self) -> torch.Size:
        return self.shape[: len(self.shape) - self.distribution.event_dim]

    @property
    def support(self) -> Any:
        return _with_scalar_bounds(self.distribution.support)

    @property
    def scale(self) -> float:
        """s_i: the plates' part of the factor's scale, which the guide's own statement carries too."""
        scale = 1.0
        for plate in self.plates:
            scale *= plate.size / max(plate.subsample_size, 1)
        return scale


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
        names = list(self.arguments)
        values = tape.evaluate([self.arguments[name] for name in names], latents, inputs)
        return self.distribution_class(**dict(zip(names, values, strict=True)), validate_args=False)


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

    @property
    def batch_shape(self) -> torch.Size:
        return torch.Size(self.distribution.batch_shape)  # ImproperUniform has tuples


@dataclass
class FactorGraph:
    """Sites and factors of one run of a model, over one tape."""

    tape: Tape
    sites: dict[str, Site]
    factors: dict[str, Factor]
    values: dict[str, Tensor]
    subsamples: dict[str, Tensor]
    params: dict[str, Tensor] = field(default_factory=dict)
    deterministic: dict[str, Any] = field(default_factory=dict)
    failure: str | None = None

    @property
    def plates(self) -> dict[str, Plate]:
        found = {}
        for item in (*self.sites.values(), *self.factors.values()):
            found.update({plate.name: plate for plate in item.plates})
        return found

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
        result = constructed.rebuild(self.tape, latents).log_prob(value)
        result = result.expand(broadcast_shape(result.shape, constructed.batch_shape))
        if inner is not None:
            result = torch.where(torch.as_tensor(inner, dtype=torch.bool), result, 0.0)
        if constructed.reinterpreted:
            result = result.flatten(-constructed.reinterpreted).sum(-1)
        if mask is not None:
            result = torch.where(torch.as_tensor(mask, dtype=torch.bool, device=result.device), result, 0.0)
        return result * scale


def broadcast_shape(*shapes: Sequence[int]) -> tuple[int, ...]:
    """`torch.broadcast_shapes` for shapes that are known to broadcast, at a tenth of its cost."""
    rank = max(map(len, shapes))
    result = [1] * rank
    for shape in shapes:
        for dim, size in enumerate(shape, rank - len(shape)):
            if size != 1:
                result[dim] = size
    return tuple(result)


# --------------------------------------------------------------------------------------------------------------------
# Running a model


class _Substitute(Messenger):
    """Gives every latent the value that `choose(name, distribution)` says, and every subsampled plate its indices."""

    def __init__(self, choose: Callable[[str, Any], Tensor], subsamples: Mapping[str, Tensor] | None = None):
        super().__init__()
        self.choose, self.subsamples = choose, subsamples or {}

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or msg["value"] is not None:
            return
        if isinstance(msg["fn"], _Subsample):
            if msg["name"] in self.subsamples:
                msg["value"] = self.subsamples[msg["name"]]
        elif not _is_delta(msg["fn"]):
            msg["value"] = self.choose(msg["name"], msg["fn"])


def run_model(
    model: Callable,
    args: tuple,
    kwargs: Mapping[str, Any],
    choose: Callable[[str, Any], Tensor],
    subsamples: Mapping[str, Tensor] | None = None,
) -> poutine.Trace:
    """One plain run of the model with chosen latents; draws (subsample indices, new parameters) come from torch's generator."""
    with _Substitute(choose, subsamples), _named_empty_plates():
        return poutine.trace(model).get_trace(*args, **kwargs)


@contextlib.contextmanager
def _named_empty_plates() -> Iterator[None]:
    """Pyro divides by the size of an empty plate: the error says which one it is."""
    try:
        yield
    except ZeroDivisionError as error:
        frame, local = error.__traceback__, {}
        while frame is not None:
            frame, local = frame.tb_next, frame.tb_frame.f_locals
        if not isinstance(local.get("self"), SubsampleMessenger):
            raise
        name = local.get("name") or local["self"].name
        raise ValueError(
            f"plate {name!r} is empty: found no elements, expected at least one. Check the data that its size or its subsample is taken from"
        ) from error


def latent_nodes(trace: poutine.Trace) -> Iterator[tuple[str, dict]]:
    """The sample statements of a trace that inference has to find values for."""
    for name, node in trace.nodes.items():
        if node["type"] == "sample" and not node["is_observed"] and not isinstance(node["fn"], _Subsample):
            if not _is_delta(node["fn"]):
                yield name, node


def subsample_values(trace: poutine.Trace) -> dict[str, Tensor]:
    """The indices that each subsampled plate of a trace drew."""
    return {
        name: node["value"]
        for name, node in trace.nodes.items()
        if node["type"] == "sample" and isinstance(node["fn"], _Subsample)
    }


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
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            if seed is not None:
                pyro.set_rng_seed(seed)
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def node_log_prob(node: Mapping[str, Any]) -> Tensor:
    """s_f log f of a traced statement, masked and scaled, elementwise over its batch."""
    return scale_and_mask(node["fn"].log_prob(node["value"]), node["scale"], node["mask"])


def same_run(one: poutine.Trace, other: poutine.Trace) -> bool:
    """Whether two plain runs at the same latents made the same statements with equal arguments and data.

    The latents are generic, so that equal arguments mean equal inputs: whatever was computed from the first run still holds.
    """
    if list(one.nodes) != list(other.nodes):
        return False
    for name, node in one.nodes.items():
        mate = other.nodes[name]
        if node["type"] != mate["type"]:
            return False
        if node["type"] in ("sample", "param"):
            keys = ("fn", "value", "scale", "mask", "cond_indep_stack") if node["type"] == "sample" else ("value",)
            if not all(_same(node[key], mate[key]) for key in keys):
                return False
    return True


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and bool(_equal_values(a, b))
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (torch.distributions.Distribution, torch.distributions.Transform)):
        return _same(_contents(a), _contents(b))
    if isinstance(a, _Subsample):
        return (a.size, a.subsample_size) == (b.size, b.subsample_size)
    if isinstance(a, torch.distributions.constraints.Constraint):
        return True  # built from arguments that are compared themselves
    return bool(a == b)


def _contents(item: Any) -> dict:
    return {key: value for key, value in vars(item).items() if not key.startswith("_cached") and key != "_inv"}


def _equal_values(a: Tensor, b: Tensor) -> bool:
    if torch.equal(a, b):
        return True
    return a.is_floating_point() and bool(((a == b) | (a.isnan() & b.isnan())).all())


# --------------------------------------------------------------------------------------------------------------------
# Capturing a model


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


def unwrap(distribution: Any) -> tuple[Any, int, Any]:
    """(innermost distribution, number of batch dims that `to_event` reinterpreted, mask) below Independent, Expanded, Masked."""
    reinterpreted, mask = 0, None
    while True:
        if isinstance(distribution, dist.MaskedDistribution):
            mask = distribution._mask if mask is None else torch.as_tensor(mask) & torch.as_tensor(distribution._mask)
        elif isinstance(distribution, torch.distributions.Independent):
            reinterpreted += distribution.reinterpreted_batch_ndims
            if mask is not None and not isinstance(mask, bool):  # it was put on the whole event
                mask = mask[(..., *[None] * distribution.reinterpreted_batch_ndims)]
        elif not isinstance(distribution, ExpandedDistribution):
            return distribution, reinterpreted, mask
        distribution = distribution.base_dist


def capture(model: Callable, args: tuple, kwargs: Mapping[str, Any], trace: poutine.Trace) -> FactorGraph:
    """The factors of the run that `trace` holds, recorded by running the model again with the same latents and subsamples.

    Touches neither the global random state nor the parameters.  A model that cannot be recorded (it raises on recorded
    tensors) gives factors without expressions and says why in `failure`.
    """
    values = {name: plain(node["value"]).detach().clone() for name, node in latent_nodes(trace)}
    subsamples = subsample_values(trace)
    tape, failure = Tape(), None
    recorded: poutine.Trace = trace
    try:
        with isolated_random_state(0), pyro.validation_enabled(False), _recorded_constructors(), Recording(tape):
            recorded = run_model(
                model, args, kwargs, lambda name, _: tape.latent(name, values[name].clone()), subsamples
            )
    except Exception as error:  # the model's own code, run on an unusual tensor: any error means "not recordable"
        failure, tape, recorded = f"{type(error).__name__}: {error}", Tape(), trace
    if failure is not None:
        recorded = _with_latents(trace, tape, values)
    tape.closed = True
    graph = FactorGraph(tape, {}, {}, values, subsamples, failure=failure)
    for name, node in recorded.nodes.items():
        if node["type"] == "param":
            graph.params[name] = plain(node["value"])
        elif node["type"] == "sample" and not isinstance(node["fn"], _Subsample) and name in trace.nodes:
            _add_statement(graph, name, node, trace.nodes[name])
    return graph


def _with_latents(trace: poutine.Trace, tape: Tape, values: Mapping[str, Tensor]) -> poutine.Trace:
    """A plain run with its latents as leaves: the statements whose arguments hold no latent are recorded all the same."""
    copied = trace.copy()
    for name, value in values.items():
        copied.nodes[name] = {**trace.nodes[name], "value": tape.latent(name, value.clone())}
    return copied


def _add_statement(graph: FactorGraph, name: str, node: dict, plain_node: dict) -> None:
    tape = graph.tape
    plates = _plates_of(name, node)
    if node["infer"].get("_deterministic") or _is_its_own_value(tape, node):
        graph.deterministic[name] = tape.reference(node["value"])
        return
    if name in graph.values:
        value = graph.values[name]
        graph.sites[name] = Site(
            name, plain_node["fn"], value.shape, value.dtype, value.device, plates, dict(node["infer"])
        )
    factor = Factor(
        name=name,
        constructed=_constructed(tape, node["fn"]),
        distribution=plain_node["fn"],
        value=tape.reference(node["value"]),
        scale=tape.reference(node["scale"]),
        mask=tape.reference(node["mask"]),
        plates=plates,
        is_observed=node["is_observed"],
        latents=frozenset(),
        source=_line_of(node["fn"]),
    )
    graph.factors[name] = replace(factor, latents=_latents_of(graph, factor))


def _line_of(distribution: Any) -> str:
    """Where the program made the distribution; empty where it was made before the run."""
    remembered = getattr(unwrap(distribution)[0], "_pyro_blr_constructed", None)
    return remembered[2] if remembered is not None else ""


def _is_its_own_value(tape: Tape, node: dict) -> bool:
    """Whether a statement is Delta(v) at v itself, a name for a value: its log density is zero whatever the latents are."""
    base = unwrap(node["fn"])[0]
    if not isinstance(base, dist.Delta) or isinstance(base.log_density, Recorded) or bool((base.log_density != 0).any()):
        return False
    value, point = tape.reference(node["value"]), tape.reference(base.v)
    if isinstance(value, Ref) or isinstance(point, Ref):
        return _root(tape, value) == _root(tape, point)
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


def _constructed(tape: Tape, distribution: Any) -> Constructed | None:
    base, reinterpreted, mask = unwrap(distribution)
    remembered = getattr(base, "_pyro_blr_constructed", None)
    arguments = remembered[1] if remembered is not None else _attributes(base)
    if arguments is None:
        return None
    cls = remembered[0] if remembered is not None else type(base)
    references = {name: tape.reference(value) for name, value in arguments.items() if value is not None}
    if any(_holds_recorded(value) for value in references.values()):
        return None
    shape = torch.Size(base.batch_shape)
    outer = torch.Size(distribution.batch_shape)
    if reinterpreted:
        shape = outer + shape[len(shape) - reinterpreted :]
    else:
        shape = outer
    return Constructed(cls, references, shape, len(base.event_shape), reinterpreted, tape.reference(mask))


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


def _plates_of(name: str, node: dict) -> tuple[Plate, ...]:
    plates = []
    for frame in node["cond_indep_stack"]:
        if frame.vectorized:
            size = frame.full_size if frame.full_size is not None else frame.size
            plates.append(Plate(frame.name, frame.dim, size, frame.size))
    return tuple(sorted(plates, key=lambda plate: plate.dim))


# --------------------------------------------------------------------------------------------------------------------
# The arbiter: does the recording reproduce the model?


def unfaithful_factors(
    model: Callable, args: tuple, kwargs: Mapping[str, Any], graph: FactorGraph
) -> dict[str, frozenset[str]]:
    """The factors whose recorded expressions do not give the model's own log probability at other latents, and the latents
    that the model's own depends on.

    Latents are redrawn together, to other states and into both tails; a program that branches on a latent, or that takes one
    out of torch, is redrawn more often.
    """
    wrong: set[str] = set()
    draws = max(12 if graph.tape.departures else 4, min(_most_states(graph), 9) - 1)
    if sum(factor.batch_shape.numel() for factor in graph.factors.values()) > 200_000 and not graph.tape.departures:
        draws = 1
    for draw in range(1, draws + 1):
        if len(wrong) < len(graph.factors):
            wrong |= _disagreements(model, args, kwargs, graph, draw)
    return dependencies(model, args, kwargs, graph, wrong) if wrong else {}


_SITES_MOVED_ALONE = 30  # beyond this many sites the others are held in one place only


def dependencies(
    model: Callable, args: tuple, kwargs: Mapping[str, Any], graph: FactorGraph, names: Iterable[str]
) -> dict[str, frozenset[str]]:
    """The latents that move each of the named factors in the model's own words: one is redrawn, the others held, in several
    places; a factor that no latent alone moves is taken to depend on all."""
    depends: dict[str, set[str]] = {name: {name} & set(graph.sites) for name in names}
    places = 4 if len(graph.sites) <= _SITES_MOVED_ALONE else 1
    for place in range(places):
        held = {site.name: generic_value(site.name, site.distribution, place) for site in graph.sites.values()}
        base = _replay(model, args, kwargs, graph, held)
        if base is None:
            continue
        for site in graph.sites.values():
            for draw in _draws_of(site, place):
                moved = {**held, site.name: generic_value(site.name, site.distribution, draw, 3.0)}
                found = _replay(model, args, kwargs, graph, moved)
                for name, known in depends.items():
                    if found is not None and site.name not in known and not _agree(found[name], base[name]):
                        known.add(site.name)
    return {name: frozenset(known or graph.sites) for name, known in depends.items()}


def _draws_of(site: Site, place: int) -> list[int]:
    """Numbers of draws that differ from the one at `place`: all states of a small site, several values of others."""
    count = _states_of(site)
    return [d for d in range(min(count, 8)) if d != place] if count else [place + 11, place + 12, place + 13]


def _states_of(site: Site) -> int:
    return site.distribution.enumerate_support(expand=False).shape[0] if site.distribution.has_enumerate_support else 0


def _most_states(graph: FactorGraph) -> int:
    return max((_states_of(site) for site in graph.sites.values()), default=0)


def _disagreements(model: Callable, args: tuple, kwargs: Mapping[str, Any], graph: FactorGraph, draw: int) -> set[str]:
    radius = 1.0 + 0.5 * draw
    values = {site.name: generic_value(site.name, site.distribution, draw, radius) for site in graph.sites.values()}
    replayed = _replay(model, args, kwargs, graph, values)
    wrong = set()
    for name, expected in (replayed or {}).items():
        try:
            with torch.no_grad(), pyro.validation_enabled(False):
                found = graph.log_prob(name, values)
        except Exception:  # whatever a rebuilt distribution or a recorded call objects to, the recording does not reproduce
            wrong.add(name)
            continue
        if not _agree(found, expected):
            wrong.add(name)
    return wrong


def _replay(
    model: Callable, args: tuple, kwargs: Mapping[str, Any], graph: FactorGraph, values: Mapping[str, Tensor]
) -> dict[str, Tensor] | None:
    """Every factor's log probability in the model's own words, at the captured latents with some replaced; None where the
    program raises there (a value that it asserts against says nothing about dependencies)."""
    values = {**graph.values, **values}
    try:
        with torch.no_grad():
            return replayed_log_probs(model, args, kwargs, graph, values)
    except OtherStatementsError:
        raise
    except Exception:  # the model's own, at an unusual value
        return None


class OtherStatementsError(ValueError):
    """A model whose sample statements depend on its latents."""


def replayed_log_probs(
    model: Callable, args: tuple, kwargs: Mapping[str, Any], graph: FactorGraph, values: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """s_f log f of every factor, from a run of the model at given latents; differentiable as far as the program is."""

    def choose(name: str, distribution: Any) -> Tensor:
        return values[name] if name in values else generic_value(name, distribution)

    with isolated_random_state(0), pyro.validation_enabled(False):
        trace = run_model(model, args, kwargs, choose, graph.subsamples)
        found = {
            name: node_log_prob(node)
            for name, node in trace.nodes.items()
            if node["type"] == "sample"
            and not isinstance(node["fn"], _Subsample)
            and name not in graph.deterministic
            and not node["infer"].get("_deterministic")
        }
    _refuse_other_statements(graph, set(found))
    return found


def _refuse_other_statements(graph: FactorGraph, found: set[str]) -> None:
    if found == set(graph.factors):
        return
    more, fewer = sorted(found - set(graph.factors)), sorted(set(graph.factors) - found)
    departed = graph.tape.departures
    sites = sorted({site for departure in departed for site in departure.latents})
    where = f" ({departed[0].operation} on {' and '.join(sites)}, {departed[0].source})" if departed else ""
    raise OtherStatementsError(
        f"which statements the model makes depends on its latents{where}: found {more or 'none'} besides and {fewer or 'none'} missing at "
        "other values, expected the same sample statements at every value. Make them all, and switch them with "
        "poutine.mask(mask=...) or torch.where instead of a Python branch"
    )


def _agree(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        try:
            a, b = torch.broadcast_tensors(a, b)
        except RuntimeError:
            return False
    tolerance = 1e-9 if a.dtype == b.dtype == torch.float64 else 2e-4
    a, b = a.double(), b.double()  # a scalar is promoted otherwise before a plate expands it than after
    return bool(torch.isclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True).all())
