"""Statements of a guide that do not fill their family: fixed or shared arguments, bounds, functions of parameters."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import transform_to
from torch.utils.weak import WeakIdKeyDictionary

from pyro_blr.blocks import Block, is_gaussian
from pyro_blr.laws import is_latent, is_weighted, law_of, natural_in, options_of_law
from pyro_blr.messages import Messages
from pyro_blr.parameters import Slot, statement_slot
from pyro_blr.parts import Part, UnreadableGuide
from pyro_blr.projections import Projection
from pyro_blr.running import isolated_random_state
from pyro_blr.together import gaussian_natural

__all__ = ["Curved", "survey_curved"]

_MOST = 200  # parameters of one site
_SEEDS = (1, 2, 3)  # of runs in which other latents differ


class Curved(Part):
    """A site whose q is λ(θ), a family's λ as a function of parameters θ that no other site has: a curved exponential family.

    Where the rule moves to λ̂, q moves to the nearest member that the guide has, argmin_θ KL(q_λ(θ) ‖ q_λ̂), which for exact
    messages is the maximum of the bound in θ. The first step of that search is (Jᵀ F J)⁻¹ Jᵀ F (λ̂ − λ) to first order, J = ∂λ/∂θ: the
    natural gradient in θ; where λ(θ) fills the family, its end is λ̂.
    """

    def __init__(self, statement: _Statement, slots: Sequence[Slot]):
        self.statement, self.sites, self._slots = statement, (statement.site,), list(slots)
        self._options = options_of_law(statement.law(self._slots, self._here).family)
        self._places: Any = WeakIdKeyDictionary()  # λ that were found -> θ
        self._block: Block | None = None
        self._start: list[Tensor] = []
        self._projection: Projection | None = None

    @property
    def slots(self) -> list[Slot]:
        return self._slots

    @property
    def _here(self) -> list[Tensor]:
        return [slot.leaf.detach().double() for slot in self._slots]

    def options(self, name: str) -> dict[str, Any]:
        return {**self._options, "within": self.nearest}

    def read(self, blocks: Mapping[str, Block]) -> dict[str, Tensor]:
        self._block, self._start = blocks[self.statement.site], self._here
        with torch.no_grad():
            natural = self._natural(self._start)
        if not bool(self._block.family.contains(natural).all()):
            raise UnreadableGuide(f"its distribution at {self.statement.site} is improper")
        try:
            self._projection = Projection.of(self._natural, self._start, self._block.family)
        except ValueError as error:
            raise UnreadableGuide(f"at {self.statement.site} {error}") from None
        self._places[natural] = self._start
        return {self.statement.site: natural}

    def write(self, blocks: Mapping[str, Block], naturals: Mapping[str, Tensor]) -> None:
        if self.statement.site not in naturals:
            return
        place = self._places[self.nearest(naturals[self.statement.site])]
        with torch.no_grad():
            for slot, value in zip(self._slots, place, strict=True):
                slot.leaf.copy_(value)

    def nearest(self, natural: Tensor, near: Tensor | None = None) -> Tensor:
        """The λ of the guide from which this one has the least divergence; the search begins at `near`, one that was found before."""
        if natural in self._places:
            return natural
        assert self._projection is not None
        start = self._start if near is None else self._places.get(near, self._start)
        found, place = self._projection.nearest(natural, start)
        self._places[found] = place
        return found

    @property
    def note(self) -> str:
        return (
            f"{self.statement.site}: the guide's {', '.join(repr(slot.name) for slot in self._slots)} need not give every member of its "
            "family; it moves to the nearest that they give"
        )

    def obstacle(
        self, blocks: Mapping[str, Block], messages: Messages, targets: Callable[[], Mapping[str, Tensor]]
    ) -> str:
        block = blocks[self.statement.site]
        if messages.masked(block.name) is not None:
            return f"some elements of {block.name} are masked, and the guide does not fill its family there"
        if messages.is_coupled(block.name) and not self._moves_means_apart(block):
            return f"elements of {block.name} meet in a factor, and share parameters in the guide"
        return ""

    def _moves_means_apart(self, block: Block) -> bool:
        """Whether every element's mean goes where it likes: only then do elements that meet in a factor reach their joint optimum."""
        assert self._projection is not None
        if not is_gaussian(block.family):
            return False
        with torch.no_grad():
            here = self._natural(self._start)
            moments = block.family.moments(here)
            generator = torch.Generator().manual_seed(0)
            noise = torch.randn(moments["mean"].shape, generator=generator, dtype=torch.float64).to(here)
            wanted = moments["mean"] + 0.5 * noise
            target = gaussian_natural(block.family, wanted, moments, here)
        found = block.family.moments(self._projection.nearest(target, self._start)[0])["mean"]
        return bool(torch.allclose(found, wanted, rtol=1e-5, atol=1e-6))

    def _natural(self, place: Sequence[Tensor]) -> Tensor:
        """λ(θ)."""
        assert self._block is not None
        law = self.statement.law(self._slots, place)
        natural = natural_in(self._block, self.statement.site, law.family, law.differentiable(), law.transform)
        return natural if law.is_valid else torch.full_like(natural, torch.nan)


@dataclass(frozen=True)
class _Statement:
    """A sample statement of a guide, found by running the guide as far as there."""

    site: str
    guide: Any
    args: tuple
    kwargs: Mapping[str, Any]

    def law(self, slots: Sequence[Slot], place: Sequence[Tensor], seed: int = 0) -> Any:
        """Its distribution where these parameters have these unconstrained values."""
        values = {slot.name: transform_to(slot.constraint)(x) for slot, x in zip(slots, place, strict=True)}
        # places where a distribution objects to its arguments are told by `is_valid`
        with isolated_random_state(seed), poutine.block(), _AsFarAs(self.site, values) as stop:
            try:
                with pyro.validation_enabled(False):
                    self.guide(*self.args, **self.kwargs)
            except _Reached:
                return law_of(self.site, stop.distribution)
        raise UnreadableGuide(f"it samples {self.site} in some runs only")


class _Reached(Exception):
    """The statement was reached."""


class _AsFarAs(Messenger):
    """Runs a guide as far as a statement, some of its parameters being other values."""

    def __init__(self, site: str, values: Mapping[str, Tensor]):
        super().__init__()
        self.site, self.values, self.distribution = site, values, None

    def _pyro_param(self, msg: Any) -> None:
        if msg["name"] in self.values:
            msg["value"] = self.values[msg["name"]]

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == self.site:
            self.distribution = msg["fn"]
            raise _Reached


class _Cut(Messenger):
    """Values of latents pass no gradient on."""

    def _pyro_post_sample(self, msg: Any) -> None:
        if isinstance(msg["value"], Tensor):
            msg["value"] = msg["value"].detach()


# --------------------------------------------------------------------------------------------------------
# Which statements are functions of parameters of their own


def survey_curved(guide: Any, args: tuple, kwargs: Mapping[str, Any], names: Collection[str]) -> list[Curved]:
    """Of these sites those whose distribution is a family's, and a function of parameters that no other site has and of nothing else:
    neither other latents, nor data, nor rows that a plate drew. None where one of them has more than 200 parameters: all are left to
    `optim` then, whose steps cost less than messages from draws to so many.
    """
    with isolated_random_state(0), torch.enable_grad(), poutine.block(), poutine.trace() as tracer, _Cut():
        guide(*args, **kwargs)
    nodes: Mapping[str, Any] = tracer.trace.nodes
    slots = {n: statement_slot(n, node) for n, node in nodes.items() if node["type"] == "param"}
    slots = {n: slot for n, slot in slots.items() if slot.leaf.requires_grad}
    users = {name: _parameters_of(node["fn"], slots) for name, node in nodes.items() if is_latent(node)}
    found = []
    for name in names:
        mine = [slot for slot in slots.values() if slot.name in users.get(name, ())]
        others = {parameter for site, used in users.items() if site != name for parameter in used}
        drawn = any(frame.full_size != frame.size for frame in nodes[name]["cond_indep_stack"] if frame.vectorized)
        if not mine or drawn or is_weighted(nodes[name]) or any(slot.name in others for slot in mine):
            continue
        statement = _Statement(name, guide, args, kwargs)
        if _is_function(statement, mine) and _is_itself(statement, mine, nodes[name]["fn"]):
            if sum(slot.leaf.numel() for slot in mine) > _MOST:
                return []
            found.append(Curved(statement, mine))
    return found


def _parameters_of(distribution: Any, slots: Mapping[str, Slot]) -> set[str]:
    """The parameters that tensors of a distribution are made of."""
    tensors = [tensor for tensor in _tensors(distribution) if tensor.requires_grad]
    if not tensors or not slots:
        return set()
    total = torch.stack([tensor.double().sum() for tensor in tensors]).sum()
    gradients = torch.autograd.grad(total, [slot.leaf for slot in slots.values()], allow_unused=True, retain_graph=True)
    return {name for name, gradient in zip(slots, gradients, strict=True) if gradient is not None}


def _tensors(distribution: Any) -> list[Tensor]:
    found = []
    for value in vars(distribution).values():
        if isinstance(value, torch.distributions.Distribution):
            found += _tensors(value)
        elif isinstance(value, Tensor):
            found.append(value)
    return found


def _is_function(statement: _Statement, slots: Sequence[Slot]) -> bool:
    """Whether a statement is a family's, and the same whatever other latents and data are; and moves with all its parameters."""
    place = [(slot.leaf.detach().double() + 0.1 + 0.1 * number).requires_grad_() for number, slot in enumerate(slots)]
    other = _Statement(statement.site, statement.guide, _altered(statement.args), _altered(dict(statement.kwargs)))
    try:
        with torch.enable_grad():
            laws = [each.law(slots, place, seed) for each in (statement, other) for seed in _SEEDS]
            total = torch.stack([getattr(laws[0].base, name).double().sum() for name in laws[0].arguments]).sum()
            torch.autograd.grad(total, place)
    except Exception:  # no family, or the guide's own at altered data
        return False
    first = laws[0].arguments
    return all(_alike(first, law.arguments) for law in laws[1:])


def _is_itself(statement: _Statement, slots: Sequence[Slot], distribution: Any) -> bool:
    """Whether the parameters' own values give the distribution that was seen: a module may have constraints that only it knows."""
    seen = law_of(statement.site, distribution).arguments
    made = statement.law(slots, [slot.leaf.detach().double() for slot in slots]).arguments
    return seen.keys() == made.keys() and all(torch.allclose(seen[n].double(), made[n], rtol=1e-4) for n in seen)


def _alike(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(x, other[name]) for name, x in one.items())


def _altered(value: Any) -> Any:
    """The same with every float tensor in it another one, numbers in [0, 1] still in it and positive ones positive."""
    if isinstance(value, Tensor):
        return 0.5 * value + 0.25 if value.is_floating_point() else value
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(_altered(each) for each in value)
    return {name: _altered(each) for name, each in value.items()} if isinstance(value, dict) else value
