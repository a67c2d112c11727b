"""The arbiter: does the recording reproduce the model?  The model itself, run at other latents, answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pyro
import torch
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from pyro_blr.graph import FactorGraph, Site
from pyro_blr.running import generic_value, isolated_random_state, node_log_prob, run_model, site_value

__all__ = ["OtherStatementsError", "dependencies", "replayed_log_probs", "unfaithful_factors"]


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
        held = {site.name: site_value(site, place) for site in graph.sites.values()}
        base = _replay(model, args, kwargs, graph, held)
        if base is None:
            continue
        for site in graph.sites.values():
            for draw in _draws_of(site, place):
                moved = {**held, site.name: site_value(site, draw, 3.0)}
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
    values = {site.name: site_value(site, draw, radius) for site in graph.sites.values()}
    replayed = _replay(model, args, kwargs, graph, values)
    wrong = set()
    for name, expected in (replayed or {}).items():
        try:
            with torch.no_grad(), pyro.validation_enabled(False):
                found = graph.log_prob(name, values)
        except (
            Exception
        ):  # whatever a rebuilt distribution or a recorded call objects to, the recording does not reproduce
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
        nodes: Mapping[str, Any] = trace.nodes
        found = {
            name: node_log_prob(node)
            for name, node in nodes.items()
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
