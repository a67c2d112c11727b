"""A model run at many draws of its latents: vectorised where the model allows it, else draw by draw."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.func import vmap

from pyro_blr.running import generic_value, isolated_random_state, run_model

from ._handlers import AllStates, Enumerated, Generated
from ._statements import Statement, log_density

__all__ = ["ModelRuns", "Record"]

CHUNK_ELEMENTS = 2**22
NUM_COMPARED = 8
TRIAL = 3  # draws on which a way of running many at once is tried first


@dataclass
class Record:
    """What a run gave; each tensor begins with a dim of draws, except of a single run.

    `log_probs` are unscaled, one for each element of the statement's batch, NaN where masked; `joint` is the
    sum of all, masked and scaled, as it stands in the ELBO, in float64.  `undefined` says which statements
    have NaN elsewhere.
    """

    values: dict[str, Tensor] = field(default_factory=dict)
    log_probs: dict[str, Tensor] = field(default_factory=dict)
    joint: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    undefined: dict[str, Tensor] = field(default_factory=dict)

    def kept(self, values: Collection[str], log_probs: Collection[str]) -> Record:
        """Only the named statements, on the CPU."""
        return Record(
            {name: self.values[name].cpu() for name in values},
            {name: self.log_probs[name].cpu() for name in log_probs},
            self.joint.cpu(),
        )


def _draw(name: str, distribution: Any) -> Tensor:
    try:
        return distribution()
    except NotImplementedError as error:
        raise NotImplementedError(
            f"site {name!r}: {type(distribution).__name__} cannot be sampled, which "
            "posterior_predictive and prior ask for; pass posterior_predictive=False and prior=False, or "
            "give the site another distribution"
        ) from error


class ModelRuns:
    """Runs of one model on one set of arguments.

    Subsampled plates keep the indices in `subsamples`, where the first run enters those that it draws.
    """

    def __init__(
        self,
        model: Callable,
        args: tuple,
        kwargs: Mapping[str, Any],
        *,
        subsamples: dict[str, Tensor] | None = None,
        parallel: bool = True,
    ):
        self.model, self.args, self.kwargs = model, args, kwargs
        self.subsamples = {} if subsamples is None else subsamples
        self.statements: dict[str, Statement] = {}
        self._ways: dict[bool, list[Callable[..., Record]]] = {
            False: [self._in_a_plate, self._in_a_map] if parallel else [],
            True: [self._in_a_plate] if parallel else [],  # vmap cannot draw for each of its elements
        }
        self._agreed: set[bool] = set()
        first = self.trace({}, generate=False, choose=generic_value)
        for name, node in first.nodes.items():
            if node["type"] == "sample" and isinstance(node["fn"], _Subsample):
                self.subsamples.setdefault(name, torch.as_tensor(node["value"]))
        self.first = self._read(first)

    def names(self, kind: str) -> list[str]:
        return [statement.name for statement in self.statements.values() if statement.kind == kind]

    def run(
        self,
        draws: Mapping[str, Tensor],
        num: int,
        values: Collection[str] = (),
        log_probs: Collection[str] = (),
        generate: bool = False,
    ) -> Record:
        """Values and log densities of the named statements at every draw, on the CPU.

        `generate` draws observed statements from their distributions; latents that `draws` lacks always are.
        """
        laid = {name: self.statements[name].select(value, self.subsamples) for name, value in draws.items()}
        parts = []
        for start in range(0, num, self._chunk):
            stop = min(start + self._chunk, num)
            chunk = {name: value[start:stop] for name, value in laid.items()}
            part = self._run_chunk(chunk, stop - start, generate)
            undefined = sorted(name for name, found in part.undefined.items() if bool(found.any()))
            if undefined:
                raise ValueError(
                    f"statements {undefined} have log density NaN at draws of the posterior; "
                    "expected numbers. Look for NaN in the data (mask what is missing) or overflow"
                )
            parts.append(part.kept(values, log_probs))
        return _join(parts, torch.cat)

    @cached_property
    def _chunk(self) -> int:
        held = sum(item.numel() for item in (*self.first.values.values(), *self.first.log_probs.values()))
        return max(1, CHUNK_ELEMENTS // max(held, 1))

    def _run_chunk(self, draws: Mapping[str, Tensor], num: int, generate: bool) -> Record:
        """All draws in one run, in the first way that gives what single runs give; else single runs."""
        ways = self._ways[generate]
        while ways:
            try:
                if generate not in self._agreed and num > TRIAL:  # a program that pairs draws fails here, not at num²
                    with isolated_random_state(0):
                        ways[0]({name: value[:TRIAL] for name, value in draws.items()}, TRIAL, generate)
                record = ways[0](draws, num, generate)
                if generate in self._agreed or self._agrees(record, draws, num, generate):
                    self._agreed.add(generate)
                    return record
            except Exception:  # the model's own code on unusual shapes: any error means "does not vectorise"
                pass
            ways.pop(0)
            self._agreed.discard(generate)
        return _join([self._single(draws, i, generate) for i in range(num)], torch.stack)

    def _single(self, draws: Mapping[str, Tensor], index: int, generate: bool) -> Record:
        return self._read(self.trace({name: value[index] for name, value in draws.items()}, generate))

    def _in_a_plate(self, draws: Mapping[str, Tensor], num: int, generate: bool) -> Record:
        """The draws as one more plate, left of all: what programs of elementwise operations take."""
        return self._read(self.trace(self._lay_out(draws, num), generate, num), num)

    def _in_a_map(self, draws: Mapping[str, Tensor], num: int, generate: bool) -> Record:
        """The draws through `torch.func.vmap`, which the program does not see: it may index its latents."""

        def one(index: Tensor, values: dict[str, Tensor]) -> tuple:
            record = self._read(self.trace(values, generate))
            return record.values, record.log_probs, record.joint, record.undefined

        return Record(*vmap(one)(torch.arange(num), dict(draws)))

    def _agrees(self, record: Record, draws: Mapping[str, Tensor], num: int, generate: bool) -> bool:
        """Whether single runs at some of the draws, given all that was drawn, give the same."""
        given = {**draws, **{n: record.values[n] for n in self.names("latent") if n not in draws}}
        if generate:
            given.update({name: record.values[name] for name in self.names("observed")})
        for i in torch.linspace(0, num - 1, min(num, NUM_COMPARED)).long().tolist():
            with isolated_random_state(0):
                single = self._single(given, i, generate)
            pairs = [(record.log_probs[name][i], single.log_probs[name]) for name in single.log_probs]
            pairs += [(record.values[name][i], single.values[name]) for name in single.values]
            if not all(_close(one, other) for one, other in pairs):
                return False
        return True

    def trace(
        self,
        values: Mapping[str, Tensor],
        generate: bool = False,
        num: int | None = None,
        choose: Callable[[str, Any], Tensor] = _draw,
        enumerated: Collection[str] = (),
    ) -> poutine.Trace:
        """One run at these values; with `num`, inside a plate of draws; with `enumerated`, at every state of
        these sites, each on a dim of its own.
        """

        def model(*args: Any, **kwargs: Any) -> Any:
            with self._handlers(generate, enumerated):
                if num is None:
                    return self.model(*args, **kwargs)
                with pyro.plate("_pyro_blr_draws", num, dim=-self._rank - 1):
                    return self.model(*args, **kwargs)

        def value_of(name: str, distribution: Any) -> Tensor:
            return values[name] if name in values else choose(name, distribution)

        with torch.no_grad(), pyro.validation_enabled(False):
            return run_model(model, self.args, self.kwargs, value_of, self.subsamples)

    @contextlib.contextmanager
    def _handlers(self, generate: bool, enumerated: Collection[str]) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if enumerated:
                stack.enter_context(AllStates(first_available_dim=-self._rank - 1))
                stack.enter_context(Enumerated(enumerated))
            if generate:
                stack.enter_context(Generated(self.names("observed")))
            yield

    @cached_property
    def _rank(self) -> int:
        ranks = [len(statement.batch_shape) for statement in self.statements.values()]
        return max([*ranks, *(-plate.dim for s in self.statements.values() for plate in s.plates)], default=0)

    def _lay_out(self, draws: Mapping[str, Tensor], num: int) -> dict[str, Tensor]:
        """Values (draws, *batch, *event) with the draws left of all plates."""
        laid = {}
        for name, value in draws.items():
            padding = (1,) * (self._rank - len(self.statements[name].batch_shape))
            laid[name] = value.reshape(num, *padding, *value.shape[1:])
        return laid

    def _read(self, trace: poutine.Trace, num: int | None = None) -> Record:
        """A run's record; statements are entered at their first sight, in a single run."""
        record = Record()
        for name, node in trace.nodes.items():
            if node["type"] != "sample" or isinstance(node["fn"], _Subsample):
                continue
            if num is None:
                self.statements.setdefault(name, Statement.of(name, node))
            self._enter(record, self.statements[name], node, num)
        return record

    def _enter(self, record: Record, statement: Statement, node: Mapping[str, Any], num: int | None) -> None:
        name = statement.name
        value = node["value"]
        record.values[name] = value if num is None else _draws_first(value, num, statement.shape)
        if statement.kind == "derived":
            return
        if num is not None and node["fn"].batch_shape.numel() > num * statement.batch_shape.numel():
            raise ValueError(f"statement {name!r}: the program pairs draws with each other, or with its own dims")
        log_prob, mask = log_density(node)
        record.undefined[name] = (log_prob.isnan() & mask).any()
        contribution = torch.where(mask, log_prob, 0.0) * node["scale"]
        log_prob = torch.where(mask, log_prob, torch.nan)
        if num is None:
            record.joint = record.joint + contribution.sum(dtype=torch.float64)
        else:
            log_prob = _draws_first(log_prob, num, statement.batch_shape)
            contribution = _draws_first(contribution, num, statement.batch_shape)
            record.joint = record.joint + contribution.reshape(num, -1).sum(-1, dtype=torch.float64)
        record.log_probs[name] = log_prob


def _draws_first(value: Tensor, num: int, shape: torch.Size) -> Tensor:
    """(draws, 1, ..., *shape), or `shape` itself where nothing depends on the draw -> (draws, *shape)."""
    return value.expand(num, *shape) if value.shape == shape else value.reshape(num, *shape)


def _join(records: list[Record], join: Callable[[list[Tensor]], Tensor]) -> Record:
    """Records of successive draws as one."""
    result = Record(joint=join([record.joint for record in records]))
    for name in records[0].values:
        result.values[name] = _joined(name, [record.values.get(name) for record in records], join)
    for name in records[0].log_probs:
        result.log_probs[name] = _joined(name, [record.log_probs.get(name) for record in records], join)
    for name in records[0].undefined:
        result.undefined[name] = torch.stack([record.undefined[name].any() for record in records])
    return result


def _joined(name: str, parts: list[Tensor | None], join: Callable[[list[Tensor]], Tensor]) -> Tensor:
    found = [part for part in parts if part is not None]
    if len(found) == len(parts):
        with contextlib.suppress(RuntimeError):
            return join(found)
    shapes = sorted({"absent" if part is None else str(tuple(part.shape)) for part in parts})
    raise ValueError(
        f"statement {name!r} is {' at one draw and '.join(shapes)} at another; expected one structure at all "
        "draws, which an array can hold. Use posterior.sample() and run the model on each draw"
    )


def _close(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    # The dtypes may differ: a scalar latent takes the dtype of the data it meets, a vectorised one does not.
    tolerance = 1e-8 if one.dtype == other.dtype == torch.float64 else 1e-3
    return torch.allclose(one.double(), other.double(), rtol=tolerance, atol=tolerance, equal_nan=True)
