"""The product of inference: q as Pyro distributions on the model's own supports, whatever fitted it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints, transforms
from torch import Tensor

from pyro_blr import storage
from pyro_blr.blocks import Block, is_gaussian
from pyro_blr.diagnostics import LinearResponse, Restart
from pyro_blr.distributions import PushedNormal
from pyro_blr.export import to_arviz
from pyro_blr.families import LogNormal, TransformedNormal
from pyro_blr.marginals import bijection_of, draws_of, gaussian_moments, log_prob_of, marginal
from pyro_blr.report import psis, summary

__all__ = ["Posterior"]


class Posterior:
    """q(z) = Π_i q_i(z_i) at fixed λ: `posterior["w"]` is a Pyro distribution shaped as the model's site.

    Its `mean`, `variance` and `stddev` are always defined: closed forms, quadrature for an elementwise
    function of a Gaussian, a fixed quasi-random sequence for a simplex or a Cholesky factor made of one.
    Plates have their full size. Besides λ it holds the bound (`elbo`, higher is better; `elbo_kind` says what
    it is), its `history`, how the run ended, and where its `restarts` did.
    """

    def __init__(
        self,
        blocks: Mapping[str, Block],
        naturals: Mapping[str, Tensor],
        *,
        elbo: float = math.nan,
        elbo_kind: str = "",
        elbo_se: float = 0.0,
        history: Iterable[float] = (),
        converged: bool = False,
        stop_reason: str = "",
        num_steps: int = 0,
        model: Callable | None = None,
        args: tuple = (),
        kwargs: Mapping[str, Any] | None = None,
        restarts: Iterable[Restart] = (),
        response: Callable[[], LinearResponse] | None = None,
        search: Callable[[], list[Restart]] | None = None,
    ) -> None:
        self._blocks = {name: storage.snapshot(block) for name, block in blocks.items()}
        self._naturals = {name: naturals[name].detach().clone() for name in blocks}
        self.elbo, self.elbo_kind, self.elbo_se = elbo, elbo_kind, elbo_se
        self.history = [float(value) for value in history]
        self.converged, self.stop_reason, self.num_steps = converged, stop_reason, num_steps
        self.model, self.args, self.kwargs = model, args, dict(kwargs or {})
        self._block_of = {site: name for name, block in blocks.items() for site in block.site_names}
        self._marginals: dict[str, Any] = {}
        self.restarts = tuple(Restart(*one) for one in restarts)
        self._response, self._search = response, search

    @property
    def blocks(self) -> Mapping[str, Block]:
        """The factors of q by name; a joint one is named after its sites, `a+b`."""
        return MappingProxyType(self._blocks)

    @property
    def natural(self) -> Mapping[str, Tensor]:
        """Block (a site, unless several are joint) -> λ, (*batch, p)."""
        return MappingProxyType(self._naturals)

    # ----------------------------------------------------------------------------------------------------
    # Distributions

    def __getitem__(self, name: str) -> Any:
        block = self._find(name)
        if name not in self._marginals:
            self._marginals[name] = marginal(block, name, self._naturals[block.name])
        return self._marginals[name]

    def _find(self, name: str) -> Block:
        if name not in self._block_of:
            raise KeyError(f"found site {name!r}, expected a latent site of the model: {list(self._block_of)}")
        return self._blocks[self._block_of[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._block_of)

    def __contains__(self, name: object) -> bool:
        return name in self._block_of

    def __len__(self) -> int:
        return len(self._block_of)

    def keys(self) -> Iterable[str]:
        """Names of the latent sites."""
        return self._block_of.keys()

    def joint(self, names: Sequence[str]) -> Any:
        """The joint of Gaussian sites: a MultivariateNormal over their values, flattened and in this order.

        Sites that are elementwise functions of a Gaussian (positive, bounded) give its pushforward. Sites of
        one block keep the block's plates as batch; sites of several blocks are flattened whole.
        """
        names = [names] if isinstance(names, str) else list(names)
        if not names or len(set(names)) != len(names):
            raise ValueError(f"joint: found {names}, expected one or more different site names")
        blocks = [self._find(name) for name in names]
        for name, block in zip(names, blocks, strict=True):
            if not is_gaussian(block.family):
                raise ValueError(
                    f"joint: found site {name!r} of family {type(block.family).__name__}, expected Gaussian "
                    f"sites; this one is independent of the others in q: use posterior[{name!r}]"
                )
        if all(block is blocks[0] for block in blocks):
            mean, covariance = self._entries(blocks[0], names)
        else:
            parts = [
                self._flat(block, [n for n in names if self._block_of[n] == block.name]) for block in _unique(blocks)
            ]
            order = [n for block in _unique(blocks) for n in names if self._block_of[n] == block.name]
            mean, covariance = torch.cat([m for m, _ in parts]), torch.block_diag(*(c for _, c in parts))
            index = _permutation(order, names, {name: self._size(name, flat=True) for name in names}).to(mean.device)
            mean, covariance = mean[index], covariance[index][:, index]
        gaussian = dist.MultivariateNormal(mean, covariance, validate_args=False)
        dtype = blocks[0].dtype
        if mean.dtype != dtype:  # factored in the precision of λ, rounded after
            scale_tril = gaussian.scale_tril.to(dtype)
            gaussian = dist.MultivariateNormal(mean.to(dtype), scale_tril=scale_tril, validate_args=False)
        return self._pushed(names, gaussian, len(_unique(blocks)) > 1)

    def _entries(self, block: Block, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Mean and covariance of some sites of a block, in the order of names."""
        natural = self._naturals[block.name]
        if not block.is_joint:
            return gaussian_moments(block, natural)
        ranges = {m.site.name: torch.arange(m.start, m.stop, device=natural.device) for m in block.members}
        return gaussian_moments(block, natural, torch.cat([ranges[name] for name in names]))

    def _flat(self, block: Block, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        """The same with the batch flattened too: site by site, each in the order of its own elements."""
        mean, covariance = self._entries(block, names)
        batch, size = mean.shape[:-1].numel(), mean.shape[-1]
        whole = torch.block_diag(*covariance.reshape(batch, size, size)) if batch else mean.new_zeros(0, 0)
        rows = torch.arange(batch * size, device=mean.device).reshape(batch, size)
        index = torch.cat([part.flatten() for part in rows.split([self._size(name, flat=False) for name in names], -1)])
        return mean.flatten()[index], whole[index][:, index]

    def _size(self, name: str, flat: bool) -> int:
        """Length of a site's unconstrained value, for one batch element of its block or for all."""
        block = self._find(name)
        if block.is_joint:
            size = next(member.stop - member.start for member in block.members if member.site.name == name)
        else:
            base = block.family.base if isinstance(block.family, TransformedNormal) else block.family
            batch = len(block.batch_shape) - block.elements
            size = base.event_shape.numel() * block.batch_shape[batch:].numel()
        return size * block.batch_shape[: len(block.batch_shape) - block.elements].numel() if flat else size

    def _pushed(self, names: Sequence[str], gaussian: Any, flat: bool) -> Any:
        bijections = [self._scalar_bijection(name) for name in names]
        if all(bijection is None for bijection in bijections):
            return gaussian
        lengths = [self._size(name, flat) for name in names]
        parts = [transforms.identity_transform if b is None else b for b in bijections]
        supports = [_scalar_support(self._find(name), name) for name in names]
        support = constraints.cat(supports, dim=-1, lengths=lengths)
        return PushedNormal(gaussian, [transforms.CatTransform(parts, dim=-1, lengths=lengths)], support)

    def _scalar_bijection(self, name: str) -> Any:
        """The function of one element that maps a site's Gaussian variable to its value; None on ℝ."""
        block = self._find(name)
        if isinstance(block.family, LogNormal):
            return transforms.ExpTransform()
        site = next(site for site in block.sites if site.name == name)
        bijection, _ = bijection_of(site)
        while isinstance(bijection, transforms.IndependentTransform):
            bijection = bijection.base_transform
        if bijection is not None and (bijection.domain.event_dim or _has_tensor_bounds(site.support)):
            raise ValueError(
                f"joint: found site {name!r} with support {site.support}, expected elements that are free and"
                " equally bounded; use posterior.sample and .log_prob"
            )
        return bijection

    # ----------------------------------------------------------------------------------------------------
    # Draws and densities

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> dict[str, Tensor]:
        """Site -> draws from q, (*sample_shape, *batch, *event), from torch's global generator."""
        shape = torch.Size([sample_shape] if isinstance(sample_shape, int) else sample_shape)
        result: dict[str, Tensor] = {}
        for block in self._blocks.values():
            result.update(draws_of(block, self._naturals[block.name], shape))
        return {name: result[name] for name in self._block_of}

    def log_prob(self, values: Mapping[str, Tensor]) -> Tensor:
        """log q(z), (*sample_shape), at the values of all sites, (*sample_shape, *batch, *event)."""
        missing, unknown = (
            sorted(set(self._block_of) - set(values)),
            sorted(set(values) - set(self._block_of)),
        )
        if missing or unknown:
            raise ValueError(
                f"log_prob: found no values of sites {missing}, values of unknown sites {unknown}; expected "
                f"exactly {list(self._block_of)}; use posterior[name].log_prob for one site"
            )
        for name in self._block_of:
            self._check_shape(name, values[name])
        total: Tensor | float = 0.0
        for block in self._blocks.values():
            total = total + log_prob_of(block, self._naturals[block.name], values)
        return torch.as_tensor(total)

    def _check_shape(self, name: str, value: Any) -> None:
        site = next(site for site in self._find(name).sites if site.name == name)
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        expected = tuple(site.shape)
        if not isinstance(value, Tensor) or found[len(found) - len(expected) :] != expected:
            raise ValueError(
                f"log_prob: site {name!r}: found a value of shape {found}, expected a tensor of shape "
                f"(*sample_shape, {', '.join(map(str, expected))}); plates have their full size"
            )

    # ----------------------------------------------------------------------------------------------------
    # Files and print

    to_arviz, psis, summary = to_arviz, psis, summary

    def linear_response(self) -> LinearResponse:
        """Covariances that q's factors leave out, from how the optimum moves when the model is tilted."""
        if self._response is None:
            raise ValueError("q has a network, or was read or copied without its engine; use engine.posterior")
        return self._response()

    def other_optima(self) -> Sequence[Restart]:
        """Where short climbs from scattered starts end, this q first; empty where they are not made (`searches`)."""
        return self._search() if self._search is not None else ()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_response": None, "_search": None}  # copies and pickles are of q, not of the engine

    def save(self, path: str | os.PathLike) -> None:
        """Writes λ, the bound and its history, and all that rebuilding q takes, to one .safetensors file."""
        about = {name: getattr(self, name) for name in _ABOUT}
        storage.write(path, self.blocks, self.natural, about)

    @classmethod
    def load(cls, path: str | os.PathLike, device: Any = "cpu") -> Posterior:
        """The posterior that `save` wrote, bit for bit, without its model."""
        blocks, naturals, about = storage.read(path, device)
        return cls(blocks, naturals, **{name: about[name] for name in _ABOUT if name in about})

    def __repr__(self) -> str:
        rows = [("site", "q", "batch", "event")]
        for name in self._block_of:
            block = self._find(name)
            family = type(block.family).__name__ + (f" of {block.name}" if block.is_joint else "")
            q = self[name]
            rows.append((name, family, str(tuple(q.batch_shape)), str(tuple(q.event_shape))))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        kind = f" ({self.elbo_kind})" if self.elbo_kind else ""
        head = f"Posterior: elbo {self.elbo:.6g}{kind}, {self.num_steps} steps"
        return "\n".join([head + (f", {self.stop_reason}" if self.stop_reason else ""), *lines])


_ABOUT = ("elbo", "elbo_kind", "elbo_se", "history", "converged", "stop_reason", "num_steps", "restarts")


def _unique(blocks: Sequence[Block]) -> list[Block]:
    return list({block.name: block for block in blocks}.values())


def _permutation(order: Sequence[str], names: Sequence[str], sizes: Mapping[str, int]) -> Tensor:
    """Where the entries of `names`, in that order, stand in the concatenation by `order`."""
    starts, position = {}, 0
    for name in order:
        starts[name], position = position, position + sizes[name]
    return torch.cat([torch.arange(starts[name], starts[name] + sizes[name]) for name in names])


def _scalar_support(block: Block, name: str) -> Any:
    support = next(site.support for site in block.sites if site.name == name)
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support


def _has_tensor_bounds(support: Any) -> bool:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return any(isinstance(value, Tensor) and value.dim() > 0 for value in vars(support).values())
