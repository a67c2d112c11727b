"""The distributions of a guide's statements: which family each is of, its arguments, and λ at them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.distributions import biject_to
from torch.distributions.constraints import is_dependent
from torch.distributions.transforms import ComposeTransform

from pyro_blr.blocks import Block
from pyro_blr.families import ExponentialFamily, LogNormal, Normal, TransformedNormal, family_of
from pyro_blr.initial import diagonal_natural
from pyro_blr.parts import UnreadableGuide, independent_gaussian
from pyro_blr.running import unwrap

__all__ = ["Law", "grouped", "inner_of", "is_latent", "is_weighted", "law_of", "natural_in", "options_of_law"]


def is_latent(node: Mapping[str, Any]) -> bool:
    """Whether a node of a trace is a sample statement without data."""
    return node["type"] == "sample" and not node["is_observed"] and not isinstance(node["fn"], _Subsample)


def is_weighted(node: Mapping[str, Any]) -> bool:
    """Whether a statement counts otherwise than its plates say: its entropy then weighs as the program likes, at every step anew."""
    scale = math.prod(frame.full_size / max(frame.size, 1) for frame in node["cond_indep_stack"] if frame.full_size)
    found = torch.as_tensor(node["scale"], dtype=torch.float64)
    return not bool(torch.isclose(found, torch.tensor(scale, dtype=torch.float64, device=found.device)).all())


class Law(NamedTuple):
    """A distribution of the guide, as it was in one run."""

    base: Any  # the distribution that has the arguments, below Independent and a pushforward
    transform: Any  # of the pushforward
    family: ExponentialFamily | None
    arguments: dict[str, Tensor]

    @property
    def distribution_class(self) -> type:
        """The class that makes the distribution from its arguments."""
        return next(c for c in type(self.base).__mro__ if issubclass(c, TorchDistributionMixin))

    @property
    def is_valid(self) -> bool:
        """Whether the arguments are what the distribution takes: parameters without a constraint of their own may leave it."""
        checks = self.base.arg_constraints
        return all(
            bool(checks[name].check(x).all()) for name, x in self.arguments.items() if not is_dependent(checks[name])
        )

    def differentiable(self) -> Any:
        """The same distribution made again of its own arguments in float64, derivatives and all."""
        names = [alternatives[0] for alternatives in grouped(self.arguments)]
        arguments = {name: torch.as_tensor(getattr(self.base, name)).double() for name in names}
        return self.distribution_class(**arguments, validate_args=False)


def options_of_law(family: ExponentialFamily | None) -> dict[str, Any]:
    """`infer={"blr": ...}` of a site whose distribution in the guide is of this family; None: Normals pushed onto its support."""
    if family is None:
        return {"family": independent_gaussian, "block": "elements"}
    if family.is_discrete:
        return {}
    return {"family": family, **({"block": "elements"} if isinstance(family, Normal) else {})}


def natural_in(block: Block, name: str, family: ExponentialFamily | None, made: Any, transform: Any) -> Tensor:
    """λ of a site's distribution (*full_shape, p); raises where the model's site is another one."""
    if family is None:
        natural = _pushed_natural(block, made, transform)
    elif family_of(made) != block.family:
        raise UnreadableGuide(f"its {type(made).__name__} at {name} does not have the states that the model gives it")
    else:
        natural = block.family.from_distribution(made)
    if natural.shape[:-1] != block.full_shape:
        raise UnreadableGuide(
            f"its distribution at {name} has batch shape {tuple(natural.shape[:-1])}, the model's site {tuple(block.full_shape)}"
        )
    return natural


def _pushed_natural(block: Block, made: Any, transform: Any) -> Tensor:
    """λ of Normals pushed onto a site's support by the bijection that `biject_to` knows for it."""
    u = made.loc + made.scale
    if not torch.allclose(transform(u), biject_to(block.sites[0].support)(u)):
        raise UnreadableGuide(f"it pushes Normals by another bijection than {block.name}'s support has")
    base = block.family.base if isinstance(block.family, TransformedNormal) else block.family
    shape = (*block.full_shape, *base.event_shape)
    if made.loc.numel() != torch.Size(shape).numel():
        raise UnreadableGuide(
            f"its parameters at {block.name} have shape {tuple(made.loc.shape)}, expected {tuple(shape)}"
        )
    mean, scale = made.loc.reshape(shape), made.scale.reshape(shape)
    if isinstance(base, LogNormal):
        return base.from_distribution(dist.LogNormal(mean, scale, validate_args=False))
    return diagonal_natural(base, mean, scale.square())


def law_of(name: str, distribution: Any) -> Law:
    """A statement's distribution with its arguments; raises where it is no exponential family."""
    base, family = inner_of(name, distribution)
    # copies: an argument may be the parameter itself, which moves on
    arguments = {n: torch.as_tensor(getattr(base, n)).detach().clone() for n in _argument_names(base)}
    transforms = getattr(unwrap(distribution)[0], "transforms", []) if family is None else []
    return Law(base, ComposeTransform(list(transforms)), family, arguments)


def inner_of(name: str, distribution: Any) -> tuple[Any, ExponentialFamily | None]:
    """(distribution with the arguments, its family or None for pushed Normals)."""
    base, _, mask = unwrap(distribution)
    if mask is not None:
        raise UnreadableGuide(f"its distribution at {name} is masked")
    if isinstance(base, dist.Delta):
        raise UnreadableGuide(f"it is a point at {name}, which has no natural parameters")
    family = family_of(base)
    if family is not None:
        return base, family
    if isinstance(base, torch.distributions.TransformedDistribution):
        inner = unwrap(base.base_dist)[0]
        if isinstance(inner, torch.distributions.Normal):
            return inner, None
    raise UnreadableGuide(f"its {type(base).__name__} at {name} is no exponential family")


_ALTERNATIVES = ({"probs", "logits"}, {"scale_tril", "covariance_matrix", "precision_matrix"})


def _argument_names(base: Any) -> list[str]:
    """The arguments that a distribution has; one of several alternatives may have been made from another."""
    unused = {
        name for group in _ALTERNATIVES for name in group if name not in vars(base)
    }  # lazy: asking would make them
    return [name for name in base.arg_constraints if name not in unused]


def grouped(names: Iterable[str]) -> list[list[str]]:
    """Arguments of which each is needed, alternatives together."""
    names = list(names)
    groups = [[name for name in names if name in group] for group in _ALTERNATIVES]
    alone = [[name] for name in names if not any(name in group for group in groups)]
    return [*alone, *(group for group in groups if group)]
