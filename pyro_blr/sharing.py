"""Discrete sites of large plates, in one state throughout: what a program looks up by them then has one row, not one an element.

A program that says `phi[z]` makes a row of phi for each of N elements, N times the size of one.  With z of shape (1,), every element in
the same state, it makes one row, which broadcasts over the plate.  The recorded expressions are the same where the program
treats the elements alike, and that can be read off them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from pyro_blr.graph import FactorGraph
from pyro_blr.tape import Input, Latent, Node, Ref, Tape

__all__ = ["LARGE", "shared_state", "treats_elements_alike"]

LARGE = 10_000  # elements of a discrete site from which on sharing pays


def shared_state(value: Tensor, distribution: Any, frames: Iterable[Any]) -> Tensor:
    """The state of a discrete site's first element, with size one along each of its plates; the value itself where the site is
    small, or has batch dims that are no plate's.
    """
    batch = torch.Size(distribution.batch_shape)
    if batch.numel() < LARGE or not distribution.has_enumerate_support:
        return value
    plates = {frame.dim: frame.size for frame in frames if frame.vectorized}
    if any(size not in (1, plates.get(dim)) for dim, size in zip(range(-len(batch), 0), batch, strict=True)):
        return value
    return value[(slice(0, 1),) * len(batch)]


def treats_elements_alike(graph: FactorGraph) -> bool:
    """Whether the program, recorded with one state for all elements of its shared sites, means the same for a state an element.

    Only lookups by a state, functions of single elements and sums over what is to their right may follow it, nothing may ask for
    its shape, and a factor it enters must stand in its plates.
    """
    shared = graph.shared
    tape = graph.tape
    if (
        graph.failure is not None
        or shared & graph.recording.measured
        or any(shared & d.latents for d in tape.departures)
    ):
        return False
    rank = max(len(graph.sites[name].batch_shape) for name in shared)
    outputs: list[Any] = []
    for factor in graph.factors.values():
        made = factor.constructed
        plates = {plate for name in shared & factor.latents for plate in graph.sites[name].plates}
        if made is None or not plates <= set(factor.plates):
            return False
        outputs += [factor.value, factor.scale, factor.mask, made.mask, *made.arguments.values()]
    return all(
        _is_alike(tape, tape.nodes[index], shared, rank)
        for index in tape.needed(outputs)
        if shared & tape.latents_of(Ref(index))
    )


_ELEMENTWISE = frozenset(
    "identity clone detach contiguous add radd sub rsub mul rmul div rdiv truediv rtruediv true_divide multiply divide "
    "subtract pow rpow neg negative pos exp expm1 log log1p sqrt rsqrt square reciprocal abs sigmoid softplus tanh relu sign clamp "
    "clamp_min clamp_max eq ne lt le gt ge where logical_and logical_or logical_not and or invert rand ror "
    "to float double long int bool type type_as".split()
)
_OVER_THE_RIGHT = frozenset("sum mean logsumexp softmax log_softmax prod".split())


def _is_alike(tape: Tape, node: Node, shared: frozenset[str], rank: int) -> bool:
    """Whether one operation commutes with repeating its operands along the plates."""
    if isinstance(node.function, Latent):
        return True
    if node.name in _ELEMENTWISE:
        return not any(isinstance(argument, (list, tuple)) for argument in node.args)
    if node.name == "getitem":
        return _looks_up(tape, node.args[0], node.args[1], shared)
    if node.name == "unsqueeze":
        return _named(node, "dim") == -1
    if node.name in _OVER_THE_RIGHT:
        dim, source = _named(node, "dim"), node.args[0]
        width = len(tape.nodes[source.index].shape or ()) if isinstance(source, Ref) else 0
        return isinstance(dim, int) and not isinstance(dim, bool) and dim < 0 and width + dim >= rank
    return False


def _named(node: Node, name: str) -> Any:
    return node.args[1] if len(node.args) > 1 else node.kwargs.get(name)


def _looks_up(tape: Tape, table: Any, index: Any, shared: frozenset[str]) -> bool:
    """`table[z]`, `table[z, column]`, `table[row, z]`, with integers; and `x[..., None]` of what was looked up."""
    items = list(index) if isinstance(index, tuple) else [index]
    if shared & tape.latents_of(table):
        return len(items) == 2 and items[0] is Ellipsis and items[1] is None
    while items and (items[-1] is Ellipsis or items[-1] == slice(None)):
        items.pop()
    return all(type(item) is int or (isinstance(item, (Ref, Input)) and _holds_integers(tape, item)) for item in items)


def _holds_integers(tape: Tape, item: Ref | Input) -> bool:
    dtype = tape.nodes[item.index].dtype if isinstance(item, Ref) else tape.inputs[item.index].dtype
    return dtype in (torch.int64, torch.int32)
