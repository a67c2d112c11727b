"""Σ w E_q[log f] over a whole batch, by summing the weighted data first.

Given responsibilities w, a mixture's expected log likelihood depends on the data through a few sums, such as Σ_n w_kn x_n
and Σ_n w_kn x_n².  They are kept for as long as weights and data stay the same.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyro_blr.shapes import broadcast_shape

from ._terms import Lookup, Product, Square, Term


@dataclass
class WeightedSums:
    """Sums of data under fixed weights (*batch), and what of the data does not depend on weights."""

    weights: Tensor
    sums: dict[str, Tensor] = field(default_factory=dict)
    data: dict[str, Tensor] = field(default_factory=dict)

    def once(self, key: str, make: Callable[[], Tensor]) -> Tensor:
        """The sum called `key`, made on first use."""
        if key not in self.sums:
            self.sums[key] = make()
        return self.sums[key]

    def of_data(self, key: str, make: Callable[[], Tensor]) -> Tensor:
        """Likewise for what outlives the weights."""
        if key not in self.data:
            self.data[key] = make()
        return self.data[key]


def weighted_total(
    terms: Sequence[Term | Tensor], num_event_dims: int, batch_shape: Sequence[int], sums: WeightedSums
) -> Tensor | None:
    """Σ w Σ_j term_j over all dims; None where that is no cheaper than going over the data.

    `batch_shape` is that of the factor, states and event dims included; data and weights must not require gradients.
    """
    full = torch.Size(batch_shape)
    totals = []
    for position, term in enumerate(terms):
        total = _term_total(term, full, num_event_dims, sums, str(position))
        if total is None:
            return None
        totals.append(total.double())
    result = totals[0]
    for total in totals[1:]:
        result = result + total
    return result


def _term_total(
    term: Term | Tensor, full: torch.Size, num_event_dims: int, sums: WeightedSums, key: str
) -> Tensor | None:
    weights = sums.weights[(...,) + (None,) * num_event_dims]
    if isinstance(term, Tensor):
        if not _is_small(term.shape, full):
            return None
        total = sums.once(key, lambda: _onto(weights, None, term.shape, full))
        return (term * total).sum()
    if isinstance(term, Product):
        if term.statistic.requires_grad or not _is_small(term.operands[0], full):
            return None
        wide = weights[(...,) + (None,) * term.inner]
        inner = broadcast_shape(*(x.shape[x.dim() - term.inner :] for x in (term.coefficient, term.statistic)))
        total = sums.once(key, lambda: _onto(wide, term.statistic, term.coefficient.shape, full + inner))
        return (term.coefficient * total).sum()
    if isinstance(term, Square):
        return _square_total(term, weights, full, sums, key)
    if isinstance(term, Lookup):
        return _lookup_total(term, weights, full, sums, key)
    return None


def _square_total(term: Square, weights: Tensor, full: torch.Size, sums: WeightedSums, key: str) -> Tensor | None:
    """Σ w c (x − m)² from Σ w, Σ w x and Σ w x², x relative to its mean; in float64."""
    x, m, c = term.value.mean, term.loc.mean, term.coefficient
    onto = broadcast_shape(m.shape, c.shape)
    if x.requires_grad or term.value.variance is not None or not _is_small(onto, full):
        return None
    dims = [d for d in range(-x.dim(), 0) if x.size(d) > 1 and (-d > len(onto) or onto[d] == 1)]
    reference = sums.of_data(f"{key}.ref", lambda: x.double().mean(dims, keepdim=True) if dims else x.double().mean())
    shifted = sums.of_data(f"{key}.x", lambda: x.double() - reference)
    wide = weights.double()
    count = sums.once(f"{key}.0", lambda: _onto(wide, None, onto, full))
    first = sums.once(f"{key}.1", lambda: _onto(wide, shifted, onto, full))
    second = sums.once(f"{key}.2", lambda: _onto(wide, sums.of_data(f"{key}.xx", shifted.square), onto, full))
    mean = m.double() - reference
    spread = mean.square() if term.loc.variance is None else mean.square() + term.loc.variance
    return (c.double() * (second - 2 * mean * first + spread * count)).sum()


def _lookup_total(term: Lookup, weights: Tensor, full: torch.Size, sums: WeightedSums, key: str) -> Tensor | None:
    """Σ w log a[k] from the weighted counts of every state k."""
    log, index = term.log, term.index
    if not _is_small(log.shape, full):
        return None

    def counts() -> Tensor:
        size, batch = log.shape[-1], log.shape[:-1]
        onto = broadcast_shape(batch, index.shape)
        wide = _onto(weights, None, onto, full)
        rows = torch.arange(batch.numel(), device=log.device).reshape(batch)
        position = sums.of_data(f"{key}.position", lambda: (rows * size + index.long()).expand(onto).flatten())
        return counts_at(position, wide.expand(onto), log.shape)

    return (log * sums.once(key, counts)).sum()


def counts_at(position: Tensor, weights: Tensor, shape: torch.Size) -> Tensor:
    """Σ of the weights that stand at each (flat) position."""
    flat = torch.zeros(shape.numel(), dtype=weights.dtype, device=weights.device)
    return flat.index_add(0, position, weights.flatten()).reshape(shape)


def _is_small(shape: Sequence[int], full: Sequence[int]) -> bool:
    """Whether sums onto `shape` are much smaller than going over the batch."""
    return 4 * torch.Size(shape).numel() < torch.Size(full).numel()


def _onto(weights: Tensor, statistic: Tensor | None, shape: Sequence[int], full: torch.Size) -> Tensor:
    """Σ of weights × statistic over the dims along which `shape` has size one; dims that neither has count as long as they are."""
    rank = len(full)
    kept = [d for d in range(-len(shape), 0) if shape[d] != 1]
    operands, specs, present = [], [], set()
    for x in (weights, statistic):
        if x is None:
            continue
        dims = [d for d in range(-x.dim(), 0) if x.size(d) != 1]
        operands.append(x.reshape([x.size(d) for d in dims]))
        specs.append("".join(string.ascii_letters[rank + d] for d in dims))
        present.update(dims)
    out = [d for d in kept if d in present]
    dtype = torch.promote_types(operands[0].dtype, operands[-1].dtype)
    result = torch.einsum(
        f"{','.join(specs)}->{''.join(string.ascii_letters[rank + d] for d in out)}", *(x.to(dtype) for x in operands)
    )
    missing = [d for d in range(-rank, 0) if d not in present and d not in kept]
    result = result * torch.Size([full[d] for d in missing]).numel()
    return result.reshape([shape[d] if d in out else 1 for d in range(-len(shape), 0)])
