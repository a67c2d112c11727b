"""The guide q(z) = Π_i q_i(z_i): an ordinary Pyro guide whose parameters are natural parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import sum_rightmost
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from pyro_blr.arbiter import unfaithful_factors
from pyro_blr.blocks import Block
from pyro_blr.capture import capture
from pyro_blr.graph import FactorGraph, Site
from pyro_blr.groupings import Grouping, blocks_of
from pyro_blr.groups import choose_groups
from pyro_blr.initial import initial_natural
from pyro_blr.marginals import bijection_of, marginal, member_values, site_distribution, variable_distribution
from pyro_blr.masks import row_masks
from pyro_blr.plates import GivenIndices, enter_plates, frame_of, mask_of, masked, rows_of
from pyro_blr.posterior import Posterior
from pyro_blr.quantiles import median, quantile
from pyro_blr.running import generic_value, isolated_random_state, run_model

__all__ = ["AutoExponentialFamily"]


class AutoExponentialFamily(AutoGuide):
    """q(z) = Π_i q_i(z_i), q_i(z_i) ∝ exp⟨λ_i, T_i(z_i)⟩, on the sites and in the plates of a model.

    `blocks` says how q factorises: "auto" (Gaussian sites that are jointly affine in their factors, or share a
    non-conjugate factor, form one Gaussian), "sites" (one factor a site, full covariance within its event),
    "elements", or a list of groups of site names. `naturals` holds the full λ of each block, (*batch, p) with every plate
    at its full size; entries are replaced, never written into. A subsampled plate uses the rows of λ that it
    drew, or that the model gives it (`subsample=`). Statements carry the masks and the plates' scale of the
    model, not `poutine.scale`. A block of several sites samples `_<block>_latent`, then its sites as Deltas.
    """

    def __init__(
        self, model: Any, blocks: str | Sequence[Sequence[str]] = "auto", *, create_plates: Any = None
    ) -> None:
        super().__init__(model, create_plates=create_plates)
        self.factorisation: str | Sequence[Sequence[str]] | Grouping = blocks
        self.blocks: dict[str, Block] = {}
        self.naturals: dict[str, Tensor] = {}
        self._masks: dict[str, Any] = {}
        self._rows_masked: dict[str, Any] = {}  # of the rows that the present call drew
        self._gives_indices: bool | None = None

    def follow(self, factorisation: str | Sequence[Sequence[str]] | Grouping) -> None:
        """Takes the groups that the engine chose, where the choice was left to it."""
        if self.factorisation == "auto":
            self.factorisation = factorisation

    def setup(self, graph: FactorGraph) -> None:
        """Takes blocks, plates and masks from a captured run; λ that fit stay, others start at the prior."""
        if self.factorisation == "auto":
            self.factorisation = choose_groups(graph, {})
        blocks = blocks_of(graph, self.factorisation)
        naturals = {}
        for name in set() if self.blocks else set(self.naturals) - set(blocks):
            raise ValueError(
                f"block {name!r}: found λ of shape {tuple(self.naturals[name].shape)} in the loaded state, expected "
                f"blocks {list(blocks)}; load a state saved for this model and these data"
            )
        for name, block in blocks.items():
            shape = torch.Size((*block.full_shape, block.family.num_parameters))
            old = self.naturals.get(name)
            if old is not None and old.shape != shape and not self.blocks:
                raise ValueError(
                    f"block {name!r}: found λ of shape {tuple(old.shape)} in the loaded state, expected "
                    f"{tuple(shape)}; load a state saved for this model and these data"
                )
            kept = old is not None and old.shape == shape and self._same_family(name, block)
            naturals[name] = old if old is not None and kept else initial_natural(block)
        self._masks = {name: mask_of(graph, site) for name, site in graph.sites.items()}
        self._gives_indices = None
        # plates around observed sites only are the model's own: they may change size with the data
        self._prototype_frames = {p.name: frame_of(p) for site in graph.sites.values() for p in site.plates}
        self.blocks, self.naturals = blocks, naturals

    def _same_family(self, name: str, block: Block) -> bool:
        return name not in self.blocks or self.blocks[name].family == block.family

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        with poutine.block(), isolated_random_state():
            trace = run_model(self.model, args, kwargs, generic_value)
            graph = capture(self.model, args, kwargs, trace)
            if self.factorisation == "auto":
                self.factorisation = choose_groups(graph, unfaithful_factors(self.model, args, kwargs, graph))
        self.prototype_trace = trace
        if self.master is not None:
            self.master()._check_prototype(_latents_only(trace))
        self.setup(graph)

    def _prepared(self, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Block]:
        if not self.blocks:
            self._setup_prototype(*args, **kwargs)
        return self.blocks

    # ----------------------------------------------------------------------------------------------------
    # The guide as a program

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Samples every latent site, and returns site name -> value."""
        blocks = self._prepared(args, kwargs)
        plates = self._create_plates(*args, **kwargs)
        self._rows_masked = row_masks(self.model, args, kwargs, blocks, self._masks, plates)
        result: dict[str, Tensor] = {}
        for name, block in blocks.items():
            natural = rows_of(block, self.naturals[name], plates)
            natural = natural.to(block.dtype) if block.is_discrete else natural
            if not block.is_joint:
                site = block.sites[0]
                with self._context(site, plates):
                    result[site.name] = pyro.sample(site.name, site_distribution(block, natural))
            else:
                result.update(self._sample_joint(block, natural, plates))
        return result

    def _sample_joint(self, block: Block, natural: Tensor, plates: Mapping[str, Any]) -> dict[str, Tensor]:
        with ExitStack() as stack:
            enter_plates(stack, block.plates, plates)
            stack.enter_context(masked(self._joint_mask(block), block.plates, plates))
            distribution = variable_distribution(block, natural)
            leaf = pyro.sample(f"_{block.name}_latent", distribution, infer={"is_auxiliary": True})
        result = {}
        for site, (value, u) in zip(block.sites, member_values(block, leaf).values(), strict=True):
            event_dim, log_density = site.distribution.event_dim, 0.0
            if u is not None and poutine.get_mask() is not False:
                jacobian = -bijection_of(site)[0].log_abs_det_jacobian(u, value)
                log_density = sum_rightmost(jacobian, jacobian.dim() - value.dim() + event_dim)
            delta = dist.Delta(value, log_density=log_density, event_dim=event_dim)
            with self._context(site, plates):
                result[site.name] = pyro.sample(site.name, delta)
        return result

    @contextlib.contextmanager
    def _context(self, site: Site, plates: Mapping[str, Any]) -> Any:
        with ExitStack() as stack:
            enter_plates(stack, site.plates, plates)
            stack.enter_context(masked(self._masks.get(site.name), site.plates, plates))
            if site.name in self._rows_masked:
                stack.enter_context(poutine.mask(mask=self._rows_masked[site.name]))
            copies = site.infer.get("blr", {}).get("copies")
            if copies is not None:
                stack.enter_context(poutine.scale(scale=torch.as_tensor(copies)))
            yield

    def _joint_mask(self, block: Block) -> Any:
        """An element of a joint block is masked where all its sites are."""
        masks = [self._masks.get(name) for name in block.site_names]
        if not block.batch_shape or any(mask is None for mask in masks):
            return None
        result = torch.as_tensor(masks[0])
        for mask in masks[1:]:
            result = result | torch.as_tensor(mask)
        return result

    def _create_plates(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The model's plates; one whose indices the model chooses itself (`subsample=`) gets these."""
        if self.master is not None or self.create_plates is not None:
            return super()._create_plates(*args, **kwargs)
        given = self._given_indices(args, kwargs)
        self.plates = {}
        for name, frame in sorted(self._prototype_frames.items()):
            options = {"subsample": given[name]} if name in given else {"subsample_size": frame.size}
            self.plates[name] = pyro.plate(name, frame.full_size, dim=frame.dim, **options)
        return self.plates

    def _given_indices(self, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        if self._gives_indices is False or not self._prototype_frames:
            return {}
        with poutine.block(), isolated_random_state(), GivenIndices() as found:
            run_model(self.model, args, kwargs, generic_value)
        self._gives_indices = bool(found.indices)
        return {name: found.indices[name] for name in self._prototype_frames if name in found.indices}

    # ----------------------------------------------------------------------------------------------------
    # What q says

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Site -> a point of its support, the marginal median where the support is a product."""
        return {site.name: median(q, site.device).to(site.dtype) for site, q in self._marginals(args, kwargs)}

    @torch.no_grad()
    def quantiles(self, quantiles: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Site -> marginal quantiles of every element, (len(quantiles), *batch, *event)."""
        levels = torch.as_tensor(quantiles, dtype=torch.float64).reshape(-1)
        if not bool(((levels >= 0) & (levels <= 1)).all()):
            raise ValueError(f"quantiles: found levels {levels.tolist()}, expected numbers between 0 and 1")
        return {
            site.name: quantile(q, levels.to(site.device)).to(site.dtype) for site, q in self._marginals(args, kwargs)
        }

    def _marginals(self, args: tuple, kwargs: Mapping[str, Any]) -> Iterable[tuple[Site, Any]]:
        for name, block in self._prepared(args, kwargs).items():
            for site in block.sites:
                yield site, marginal(block, site.name, self.naturals[name])

    def sample_latent(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """One draw of every latent site, as the guide samples it."""
        return self.forward(*args, **kwargs)

    def get_posterior(self, *args: Any, **kwargs: Any) -> Posterior:
        """q at the present λ."""
        blocks = self._prepared(args, kwargs)
        return Posterior(blocks, self.naturals, model=self.model, args=args, kwargs=kwargs)

    # ----------------------------------------------------------------------------------------------------
    # State

    def refresh(self) -> bool:
        """Whether somebody else moved λ; here nobody can."""
        return False

    def notes(self) -> list[str]:
        """What a user should know about the guide."""
        return []

    def saved(self) -> Callable[[], None]:
        """What puts λ back as it is now."""
        naturals, blocks = dict(self.naturals), dict(self.blocks)

        def restore() -> None:
            self.naturals, self.blocks = naturals, blocks

        return restore

    def get_extra_state(self) -> dict[str, Any]:
        return {"naturals": {name: natural.detach().clone() for name, natural in self.naturals.items()}}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """λ of a saved guide; a guide that has not seen its model checks shapes when it does."""
        naturals = dict(state["naturals"])
        if self.blocks:
            found, expected = _shapes(naturals), _shapes(self.naturals)
            if found != expected:
                raise ValueError(f"state of the guide: found λ of shapes {found}, expected {expected}")
        self.naturals = naturals

    def _apply(self, fn: Any, recurse: bool = True) -> AutoExponentialFamily:
        super()._apply(fn, recurse)
        self.naturals = {name: fn(natural) for name, natural in self.naturals.items()}
        return self


def _latents_only(trace: poutine.Trace) -> poutine.Trace:
    result = poutine.Trace()
    for name, node in trace.iter_stochastic_nodes():
        result.add_node(name, **node)
    return result


def _shapes(naturals: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(natural.shape) for name, natural in naturals.items()}
