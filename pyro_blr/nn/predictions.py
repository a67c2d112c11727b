"""Predictions of networks drawn from the posterior."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyro_blr.nn.optimizer import BLROptimizer

__all__ = ["predict"]


@torch.no_grad()
def predict(
    optimizer: BLROptimizer,
    module: Callable[..., Tensor],
    *data: Tensor,
    num_samples: int = 32,
    batch_size: int | None = None,
    draws_at_once: int = 1,
) -> Tensor:
    """f(x; θ_s) at θ_s ~ q, s = 1, …, num_samples: each draw of the weights predicts all data.

    optimizer: the one that trained the parameters of `module`.
    module: the network, in the mode it is to predict in (`module.eval()`), or a function that calls it and returns one tensor.
    data: its arguments, (n, ...) each.
    batch_size: rows that go through the network at once; None is all. Outputs then have the rows as their first dimension.
    draws_at_once: draws that go through it at once, by `torch.func.vmap`; more than one is faster for small networks, takes as many
        copies of the parameters and activations, and needs a module that vmap can map.

    Returns (num_samples, *shape of the output). Draws come from torch's generator; the module's weights are the mean again afterwards.

    Raises ValueError for counts below one, and where draws at once are asked of a function; RuntimeError before the first step, and
    where vmap cannot map the module.
    """
    for name, count in (("num_samples", num_samples), ("draws_at_once", draws_at_once), ("batch_size", batch_size)):
        if count is not None and count < 1:
            raise ValueError(f"{name} is {count}; expected one or more")
    parts = [data] if batch_size is None else list(zip(*(each.split(batch_size) for each in data), strict=True))
    if draws_at_once == 1:
        found = []
        for _ in range(num_samples):
            with optimizer.sampled():
                found.append(joined([module(*part) for part in parts], 0))
        return torch.stack(found)
    if not isinstance(module, torch.nn.Module):
        raise ValueError(
            "draws_at_once needs the module itself, not a function that calls it: pass it, or leave out draws_at_once"
        )
    counts = [min(draws_at_once, num_samples - start) for start in range(0, num_samples, draws_at_once)]
    return torch.cat([together(optimizer, module, parts, count) for count in counts])


def together(
    optimizer: BLROptimizer, module: torch.nn.Module, parts: Sequence[tuple[Tensor, ...]], count: int
) -> Tensor:
    """Outputs of `count` draws, mapped over copies of the parameters that the optimizer holds."""
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    named = {name: parameter for name, parameter in module.named_parameters() if parameter in held}
    draws = []
    for _ in range(count):
        with optimizer.sampled():
            draws.append({name: parameter.clone() for name, parameter in named.items()})
    stacked = {name: torch.stack([draw[name] for draw in draws]) for name in named}

    def outputs(parameters: dict[str, Tensor], *part: Tensor) -> Tensor:
        found: Tensor = torch.func.functional_call(module, parameters, part)
        return found

    try:
        return joined(
            [
                torch.func.vmap(outputs, in_dims=(0, *(None for _ in part)), randomness="different")(stacked, *part)
                for part in parts
            ],
            1,
        )
    except RuntimeError as error:
        raise RuntimeError(
            f"draws_at_once={count}: torch.func.vmap cannot map this module ({error}); leave out draws_at_once, or call module.eval() "
            "first where it updates buffers"
        ) from error


def joined(outputs: Sequence[Tensor], dim: int) -> Tensor:
    return outputs[0] if len(outputs) == 1 else torch.cat(list(outputs), dim)
