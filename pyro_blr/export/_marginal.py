"""log Σ_z p(θ, z, x): the joint density of a model with its finite discrete sites summed out, exactly."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import opt_einsum
import pyro
import torch
from pyro import poutine
from pyro.ops import packed
from pyro.ops.contract import contract_to_tensor
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.func import vmap

from pyro_blr.running import isolated_random_state

from ._runs import CHUNK_ELEMENTS, NUM_COMPARED, ModelRuns

__all__ = ["log_marginal"]


def log_marginal(runs: ModelRuns, draws: Mapping[str, Tensor], num: int, discrete: Collection[str]) -> Tensor | None:
    """(S,) log Σ_z p(θ_s, z, x) in float64, z being the named sites: tensor variable elimination (Obermeyer et
    al. 2019) through Pyro's contraction.

    None where the model cannot be run at all states at once (a branch on z, a use of z that does not
    broadcast): every statement's table is compared with single runs at the z of some draws.
    """
    laid = {name: runs.statements[name].select(value, runs.subsamples) for name, value in draws.items()}
    given = {name: value for name, value in laid.items() if name not in discrete}
    try:
        with isolated_random_state(0):
            for i in torch.linspace(0, num - 1, min(num, NUM_COMPARED)).long().tolist():
                table = _packed(runs.trace(_at(given, i), enumerated=discrete))
                if not _agrees(table, _packed(runs.trace(_at(laid, i))), _at(laid, i), discrete):
                    return None
    except Exception:  # whatever a program objects to when it is given all states at once
        return None

    entries = sum(node["packed"]["log_prob"].numel() for node in _statements(table))
    size = max(1, CHUNK_ELEMENTS // max(entries, 1))
    parts = [{name: value[start : start + size] for name, value in given.items()} for start in range(0, num, size)]
    return torch.cat([_chunk(runs, part, min(size, num - i * size), discrete) for i, part in enumerate(parts)])


def _chunk(runs: ModelRuns, given: Mapping[str, Tensor], num: int, discrete: Collection[str]) -> Tensor:
    """The same for some of the draws: their tables in one run where that gives what single runs give."""
    trace = poutine.Trace()

    def one(index: Tensor, values: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        nonlocal trace
        trace = _packed(runs.trace(values, enumerated=discrete))
        return tuple(node["packed"]["log_prob"].double() for node in _statements(trace))

    singles = {i: one(torch.tensor(i), _at(given, i)) for i in (0, num - 1)}
    dims = [node["packed"]["log_prob"]._pyro_dims for node in _statements(trace)]
    try:
        tables = vmap(one)(torch.arange(num), dict(given))
        same = all(_close(t[i], s) for i, single in singles.items() for t, s in zip(tables, single, strict=True))
    except Exception:  # a program that cannot be batched runs draw by draw
        same = False
    if not same:
        rows = [one(torch.tensor(i), _at(given, i)) for i in range(num)]
        tables = tuple(torch.stack(column) for column in zip(*rows, strict=True))
    return _contracted(trace, tables, dims)


def _at(draws: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
    return {name: value[index] for name, value in draws.items()}


def _packed(trace: poutine.Trace) -> poutine.Trace:
    """With s_f log f of every statement, masked, each dim named by its plate or by its enumerated site."""
    with pyro.validation_enabled(False):  # a look at values, which vmap has not
        trace.compute_log_prob()
    trace.pack_tensors()
    return trace


def _statements(trace: poutine.Trace) -> list[Any]:
    nodes: list[Any] = [node for node in trace.nodes.values() if node["type"] == "sample"]
    return [node for node in nodes if not isinstance(node["fn"], _Subsample)]


def _contracted(trace: poutine.Trace, tables: Sequence[Tensor], dims: Sequence[str]) -> Tensor:
    """log Σ_z exp Σ_f s_f log f, (S,), from the statements' tables (S, *dims); S is a plate around all others."""
    draws = opt_einsum.get_symbol(2 * len(trace.plate_to_symbol))  # plates have even ones, states odd
    factors: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
    for node, table, symbols in zip(_statements(trace), tables, dims, strict=True):
        plates = [trace.plate_to_symbol[frame.name] for frame in node["cond_indep_stack"] if frame.vectorized]
        table._pyro_dims = draws + symbols  # type: ignore[attr-defined]
        factors.setdefault(frozenset([draws, *plates]), []).append(table)
    states = set(trace.symbol_to_dim) - set(trace.plate_to_symbol.values())
    with opt_einsum.shared_intermediates() as cache:
        return contract_to_tensor(factors, states, target_ordinal=frozenset([draws]), cache=cache)


def _agrees(
    table: poutine.Trace, single: poutine.Trace, values: Mapping[str, Tensor], discrete: Collection[str]
) -> bool:
    """Whether every statement's table, read off at one assignment of z, is that statement in a run at this z."""
    states: dict[str, Tensor] = {}
    for name in discrete:
        node: Any = table.nodes[name]
        support = node["fn"].enumerate_support(expand=False)
        support = support.reshape(support.shape[0], *node["fn"].event_shape)
        event = support.dim() - 1
        same = values[name].unsqueeze(-event - 1) == support
        index = (same.flatten(-event).all(-1) if event else same).to(torch.int64).argmax(-1)
        states[node["infer"]["_enumerate_symbol"]] = packed.pack(index, node["infer"]["_dim_to_symbol"])
    plates = {table.plate_to_symbol[plate]: symbol for plate, symbol in single.plate_to_symbol.items()}
    for node in _statements(table):
        mate: Any = single.nodes[node["name"]]
        wide, expected = node["packed"]["log_prob"], mate["packed"]["log_prob"]
        order = [symbol for symbol in plates if symbol in wide._pyro_dims or plates[symbol] in expected._pyro_dims]
        found = _read_off(wide, states, order)
        renamed = {plates[symbol]: symbol for symbol in order}
        rest = _spread(expected, "".join(renamed[s] for s in expected._pyro_dims), order)
        if not _close(*torch.broadcast_tensors(found, rest)):
            return False
    return True


def _close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one.double(), other.double(), rtol=1e-4, atol=1e-4, equal_nan=True)


def _read_off(table: Any, states: Mapping[str, Any], order: list[str]) -> Tensor:
    """The entries of a packed table at the states' indices, a dim for each plate in `order`."""
    index = []
    for symbol, size in zip(table._pyro_dims, table.shape, strict=True):
        if symbol in states:
            index.append(_spread(states[symbol], states[symbol]._pyro_dims, order))
        else:
            index.append(_spread(torch.arange(size, device=table.device), symbol, order))
    return table[tuple(index)] if index else table


def _spread(tensor: Tensor, symbols: str, order: list[str]) -> Tensor:
    """A tensor with dims `symbols`, in the order of `order`, with 1 for what it lacks."""
    if set(symbols) - set(order):
        raise ValueError("a state outside the plates of the statement that uses it")
    tensor = tensor.permute([symbols.index(s) for s in order if s in symbols])
    sizes = iter(tensor.shape)
    return tensor.reshape([next(sizes) if s in symbols else 1 for s in order])
