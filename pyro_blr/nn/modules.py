"""`bayesian`: a torch module whose parameters are one sample site of a Pyro model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.poutine.runtime import am_i_wrapped, apply_stack
from torch import Tensor
from torch.func import functional_call, vmap
from torch.nn import Module

from pyro_blr.nn._exposed import Expose, Exposed, plain_module
from pyro_blr.nn._fit import NetworkFit
from pyro_blr.nn._priors import Assigned, PriorLike, assign, laid_out
from pyro_blr.own_fits import ANNOUNCEMENT

__all__ = ["BayesianModule", "DrawnModule", "bayesian"]


def bayesian(
    module: Module, prior: PriorLike = 1.0, expose: Expose = None, *, name: str = "network", **settings: Any
) -> BayesianModule:
    """θ ~ N(m₀, diag(1/δ)), f(x) = module(x) at θ: a network for Pyro models, the module itself left as it is.

        network = bayesian(torch.nn.Linear(3, 1), prior=1.0)

        def model(x, y=None):
            mean = network(x).squeeze(-1)
            with pyro.plate("data", len(x)):
                return pyro.sample("y", dist.Normal(mean, 0.1), obs=y)

    module: any torch module. Its buffers, frozen parameters and dtypes are kept, tied parameters are one.
    prior: a precision (number or tensor), a `Prior`, a mapping from patterns of parameter names to either, or a function of
        (name, parameter); `sample` takes another one, made of values of other sites.
    expose: which parameters are random: a pattern of names, several, a function of (name, parameter), or None for all that require a
        gradient. Others that require one are learned as points: `pyro.param`s called `<name>.<parameter>`.
    name: of the sample site, a vector of all exposed elements.
    settings: `BLROptimizer`'s, for steps of `BLRInference` (lr, momentum, curvature, samples, seed, ...); nothing has to be said.

    Raises ValueError where nothing is exposed, and for a prior that is none.
    """
    return BayesianModule(module, prior, expose, name, settings)


class BayesianModule:
    """A module and the sample site of its exposed parameters; made by `bayesian`.

    No torch module itself, so that nothing that walks through modules finds its parameters twice: `.module` is the one to move,
    compile, save, or set to `eval()`.
    """

    def __init__(self, module: Module, prior: PriorLike, expose: Expose, name: str, settings: Mapping[str, Any]):
        if not isinstance(module, Module):
            raise TypeError(f"module: found {type(module).__name__}, expected a torch.nn.Module")
        self.module, self.name, self.prior, self.settings = module, name, prior, dict(settings)
        self.exposed = Exposed(module, expose)
        found = assign([prior], self.exposed.parameters)  # says now what is wrong with it
        self._fixed = found if all(group.prior.is_number for group in found) else None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output at weights drawn by a sample statement of their own; for several calls at one draw, `sample`."""
        return self.sample()(*args, **kwargs)

    def sample(self, prior: PriorLike | None = None) -> Callable[..., Any]:
        """The sample statement; returns the module at the weights drawn, to be called as often as wanted.

        prior: as for `bayesian`, and before it where both speak of a parameter; precisions may be values of other sites.
        """
        message = _announced(self, prior) if am_i_wrapped() else None
        if message is not None and message["value"] is not None:
            return message["value"]
        frames = message["cond_indep_stack"] if message is not None else ()
        sizes = {frame.dim: frame.size for frame in frames if frame.vectorized}
        plates = torch.Size(sizes.get(dim, 1) for dim in range(min(sizes, default=0), 0))
        value = pyro.sample(self.name, self._distribution(prior, plates))
        return DrawnModule(self, value, len(plates))

    def assigned(self, prior: PriorLike | None = None) -> list[Assigned]:
        """Every exposed parameter with its prior."""
        if prior is None and self._fixed is not None:
            return self._fixed
        return assign([prior, self.prior], self.exposed.parameters)

    def _distribution(self, prior: PriorLike | None, plates: torch.Size) -> Any:
        """The prior of the vector."""
        means, scales = {}, {}
        for group in self.assigned(prior):
            for name in group.names:
                parameter = self.exposed.parameters[name]
                means[name] = laid_out(group.prior.mean, parameter, name, plates)
                scales[name] = laid_out(group.prior.precision, parameter, name, plates).rsqrt()
        return dist.Normal(self._vector(means), self._vector(scales)).to_event(1)

    def _vector(self, parts: dict[str, Tensor]) -> Tensor:
        wanted = [parts[name].to(self.exposed.device, self.exposed.dtype) for name in self.exposed.parameters]
        batch = torch.broadcast_shapes(*(part.shape[:-1] for part in wanted))
        return torch.cat([part.expand(*batch, part.shape[-1]) for part in wanted], -1)

    def learned(self) -> dict[str, Tensor]:
        """What requires a gradient and is not exposed, as parameters of the Pyro model."""
        return {name: pyro.param(f"{self.name}.{name}", value) for name, value in self.exposed.learned.items()}

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """Parameter name -> its part of weights (*batch, P), (*batch, *shape)."""
        return self.exposed.split(vector)

    @contextlib.contextmanager
    def at(self, vector: Tensor) -> Iterator[Module]:
        """The module with weights (P,) written into its parameters, for methods beside `forward`; the old ones return bit for bit."""
        with self.exposed.at(vector):
            yield self.module


class DrawnModule:
    """x ↦ module(x) at weights (*batch, P), which stay part of the gradient's graph; the module is not written into.

    Over a batch of weights the module is mapped by `torch.func.vmap`, and outputs begin with its dims, in line with the plates they
    come from: the first dim of the module's own output stands in the innermost plate.
    """

    def __init__(self, network: BayesianModule, weights: Tensor, plates: int = 0):
        self.network, self.weights = network, weights
        self._learned = network.learned() if network.exposed.learned else {}
        batch = weights.dim() - 1
        while plates and batch >= plates and self.weights.shape[-2] == 1:  # where the output's own first dim goes
            self.weights, batch = self.weights.squeeze(-2), batch - 1

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        def at(vector: Tensor) -> Any:
            parameters = {**self._learned, **self.network.exposed.split(vector)}
            return functional_call(plain_module(self.network.module), parameters, args, kwargs)

        mapped = at
        for _ in range(self.weights.dim() - 1):
            mapped = vmap(mapped, randomness="different")
        return mapped(self.weights)


def _announced(network: BayesianModule, prior: PriorLike | None) -> Any:
    """The message by which handlers may take the site over: `value`, where one did, is what is called instead of the module."""
    message: Any = {
        "type": ANNOUNCEMENT,
        "name": network.name,
        "fn": lambda: None,
        "is_observed": False,
        "args": (),
        "kwargs": {},
        "value": None,
        "scale": 1.0,
        "mask": None,
        "cond_indep_stack": (),
        "done": False,
        "stop": False,
        "continuation": None,
        "infer": {"fit": NetworkFit, "network": network, "prior": prior},
    }
    apply_stack(message)
    return message
