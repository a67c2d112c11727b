"""Which form arguments have in probabilities: entries, complements, rows, and products of powers as sticks that are broken give."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_blr.blocks import Block
from pyro_blr.kinds import Form
from pyro_blr.likelihoods import Simplex
from pyro_blr.probe import Probe, close

__all__ = ["Powers", "powers_form", "powers_map", "powers_of", "probability_form", "simplex_form"]

_MOST = 100  # probabilities whose exponents are read off
_MORE = 4  # points beyond those that determine them


def probability_form(probe: Probe, ref: Any, block: Block) -> Form | None:
    """p or 1 − p, elementwise: what commutes with squaring p, or does so up to complement."""
    forms = {Form.SELECTION, Form.COMPLEMENT}
    for _ in range(3):
        a = probe.point(block)
        value, squared = (probe.evaluate(ref, {block.name: x}) for x in (a, a**2))
        constant = probe.evaluate(ref, {block.name: torch.full_like(a, 0.3)})
        if not (close(squared, value**2) and close(constant, torch.full_like(constant, 0.3))):
            forms.discard(Form.SELECTION)
        if not (close(1 - squared, (1 - value) ** 2) and close(constant, torch.full_like(constant, 0.7))):
            forms.discard(Form.COMPLEMENT)
    return forms.pop() if len(forms) == 1 else None


def simplex_form(probe: Probe, ref: Any, block: Block) -> Form | None:
    """Entries of the site, in rows that sum to one; the rows commute with squaring."""
    for _ in range(3):
        a = probe.point(block)
        value, squared = (probe.evaluate(ref, {block.name: x}) for x in (a, a**2))
        total = value.sum(-1)
        if not (close(total, torch.ones_like(total)) and close(squared, value**2)):
            return None
    return Form.MONOMIAL


def powers_form(probe: Probe, ref: Any, block: Block) -> tuple[Form | None, int]:
    """Rows that sum to one, of products of whole powers of probabilities and of their complements; at how many points."""
    like = probe.point(block)
    found = powers_of(lambda leaf: probe.evaluate(ref, {block.name: leaf}), like)
    return (Form.POWERS if found is not None else None), 2 * like.numel() + _MORE


@dataclass(frozen=True)
class Powers:
    """log p_k = c_k + Σ_i (a_ki log z_i + b_ki log(1 − z_i)): c (*out), a and b (n, *out)."""

    offset: Tensor
    powers: Tensor
    complements: Tensor

    def expectation(self, moments: Mapping[str, Tensor]) -> Simplex:
        """E log p under a Beta's E log z and E log(1 − z)."""
        parts = ((self.powers, moments["log"]), (self.complements, moments["log_complement"]))
        log = sum((torch.einsum("i,i...->...", x.reshape(-1), powers.to(x)) for powers, x in parts), self.offset)
        return Simplex(log.to(moments["log"].dtype))


def powers_map(
    name: str, function: Callable[[Mapping[str, Tensor]], Tensor], like: Tensor
) -> Callable[[Mapping[str, Mapping[str, Tensor]]], Simplex] | None:
    """moments ↦ the expectations of an argument that is such rows of one block, a function of leaves; None where it is not."""
    found = powers_of(lambda leaf: function({name: leaf}), like)
    return None if found is None else lambda moments: found.expectation(moments[name])


def powers_of(function: Callable[[Tensor], Tensor], like: Tensor) -> Powers | None:
    """The exponents of rows that sum to one, as a function of probabilities in the shape of `like`; None where they are
    something else.

    2n + 1 points determine them, and others are there to contradict; that they are whole leaves nothing to rounding.
    """
    count = like.numel()
    if count > _MOST:
        return None
    generator = torch.Generator().manual_seed(7)
    points = 0.1 + 0.8 * torch.rand(
        2 * count + 1 + _MORE, count, generator=generator, device="cpu", dtype=torch.float64
    )
    points = points.to(like.device)
    values = torch.stack([function(point.reshape(like.shape)) for point in points])
    if values.dim() < 2 or not bool((values > 0).all()) or not close(values.sum(-1), torch.ones_like(values[..., 0])):
        return None
    logs = values.log().flatten(1).double()
    features = torch.cat([points.log(), (1 - points).log()], 1)
    solved = torch.linalg.lstsq(torch.cat([torch.ones_like(points[:, :1]), features], 1), logs).solution[1:]
    exponents = solved.round()
    offsets = logs - features @ exponents
    if float((solved - exponents).abs().max()) > 1e-3 or not close(offsets.exp(), offsets[0].exp().expand_as(offsets)):
        return None
    powers, complements = exponents.reshape(2, count, *values.shape[1:])
    return Powers(offsets[0].reshape(values.shape[1:]), powers, complements)
