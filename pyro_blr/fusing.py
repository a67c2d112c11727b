"""A function of tensors as one program: fused by torch's compiler, and on a GPU launched as one CUDA graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from pyro_blr.bindings import replayed
from pyro_blr.lowering import flattened

__all__ = ["OneProgram", "fused"]

_WARM_UP = 3  # calls before a CUDA graph is recorded: libraries set themselves up in the first


@dataclass(frozen=True)
class OneProgram:
    """A function, how it is run, and why not better where something was in the way (empty where nothing was)."""

    call: Callable[..., tuple[Tensor, ...]]
    how: str
    shortfall: str


def fused(function: Callable[..., Any], example: Sequence[Tensor]) -> OneProgram:
    """The same function of tensors of the same shapes, as `lowered` takes it.  Where torch's compiler fails (it needs a C++
    compiler on a CPU, Triton on a GPU), a flat list of operations."""
    module, shortfall = flattened(function, example), ""
    try:
        call, how = _inductor(module, example), "fused by torch.compile"
    except Exception as error:  # whatever the compiler objects to
        call, how = replayed(module), "a flat list of operations"
        shortfall = f"torch.compile failed ({_first_line(error)})"
    if example[0].is_cuda:
        try:
            with torch.cuda.device(example[0].device):
                return OneProgram(_as_graph(call, example), f"{how}, launched as one CUDA graph", shortfall)
        except Exception as error:  # an operation that waits for the device, most likely
            shortfall = "; ".join(filter(None, [shortfall, f"no CUDA graph ({_first_line(error)})"]))
    return OneProgram(call, how, shortfall)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _inductor(module: fx.GraphModule, example: Sequence[Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """The flat operations through torch.compile's own back end: they are traced already, so nothing has to be guarded at a call."""
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # torch's, about itself
        compiled = torch._inductor.compile(module, list(example))
        compiled(*example)  # some failures show at the first call

    def call(*arguments: Tensor) -> tuple[Tensor, ...]:
        with torch.inference_mode():
            found = compiled(*arguments)
        return tuple(item.clone() for item in found)  # an argument, or a constant, may come back

    return call


def _as_graph(call: Callable[..., tuple[Tensor, ...]], example: Sequence[Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """The kernels of a call, recorded once and launched together, on memory of their own."""
    held = [item.clone() for item in example]
    side, current = torch.cuda.Stream(), torch.cuda.current_stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(_WARM_UP):
            call(*held)
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call(*held)

    def launch(*arguments: Tensor) -> tuple[Tensor, ...]:
        for mine, argument in zip(held, arguments, strict=True):
            mine.copy_(argument)
        with torch.cuda.device(held[0].device):
            graph.replay()
        return tuple(item.clone() for item in found)

    return launch
