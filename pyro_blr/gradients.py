"""What has no natural gradient: parameters of the model, and whole guides that are not read as families."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer import JitTrace_ELBO, JitTraceEnum_ELBO, JitTraceGraph_ELBO, JitTraceMeanField_ELBO
from pyro.infer.elbo import ELBO
from torch import Tensor

from pyro_blr.ascent import Ascent
from pyro_blr.draws import Draws, fresh_seed
from pyro_blr.explain import Explanation
from pyro_blr.program import Program

__all__ = ["GuideFit", "OrdinaryGradients", "ParameterUpdate", "check_loss"]

_LOSSES = (
    Trace_ELBO,
    TraceMeanField_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    JitTrace_ELBO,
    JitTraceMeanField_ELBO,
    JitTraceEnum_ELBO,
    JitTraceGraph_ELBO,
)
_LEARNING_RATE = 0.01


def check_loss(loss: Any) -> None:
    """Raises for a loss that has no meaning here."""
    if loss is None or type(loss) in _LOSSES:
        return
    expected = "Trace_ELBO, TraceMeanField_ELBO, TraceEnum_ELBO or TraceGraph_ELBO (or leave loss out)"
    if isinstance(loss, type) and issubclass(loss, ELBO):
        raise TypeError(f"loss: found the class {loss.__name__}, expected an instance; write {loss.__name__}()")
    if isinstance(loss, ELBO):
        reason = "it is another objective than the ELBO, whose natural gradient the learning rule follows"
    elif callable(loss):
        reason = "a bare function does not say which factors it sums, so no message can be read from it"
    else:
        reason = "it is no ELBO"
    raise TypeError(f"loss: found {type(loss).__name__}, expected {expected}: {reason}")


class ParameterUpdate:
    """One step of `optim` on the model's parameters: the gradient of the ELBO at the present q."""

    def __init__(self, model: Any, optim: Any):
        self.model, self.optim = model, optim

    def found(self, program: Program) -> dict[str, Tensor]:
        """Name -> unconstrained parameter that the run used and that wants a gradient."""
        result = {}
        for name, value in program.graph.params.items():
            unconstrained = value.unconstrained() if hasattr(value, "unconstrained") else value
            if unconstrained.requires_grad:
                result[name] = unconstrained
        return result

    def step(self, program: Program, ascent: Ascent) -> None:
        """Moves the parameters; a run without any does nothing."""
        params = self.found(program)
        if not params:
            return
        if self.optim is None:
            self.optim = pyro.optim.Adam({"lr": _LEARNING_RATE})
        with torch.enable_grad():
            draws = None if program.is_exact else Draws(fresh_seed(), 32)
            objective = ascent.expected_log_joint(draws)
            gradients = torch.autograd.grad(objective, list(params.values()), allow_unused=True, retain_graph=True)
        used = []
        for param, gradient in zip(params.values(), gradients, strict=True):
            if gradient is not None:
                param.grad = -gradient
                used.append(param)
        self.optim(used)
        pyro.infer.util.zero_grads(used)


@dataclass
class GuideFit:
    """What a run with a guide of the user's own ends with: the guide holds the posterior."""

    guide: Any
    model: Any
    args: tuple
    kwargs: Mapping[str, Any]
    elbo: float
    history: list[float]
    converged: bool
    stop_reason: str
    num_steps: int
    elbo_kind: str = "estimate ± standard error"

    def sample(self, sample_shape: torch.Size | tuple = ()) -> dict[str, Tensor]:
        """Site -> draws of the guide."""
        count = torch.Size(sample_shape).numel()
        draws = Predictive(self.guide, num_samples=max(count, 1))(*self.args, **self.kwargs)
        return {name: x.reshape(*sample_shape, *x.shape[1:]) for name, x in draws.items() if not name.startswith("_")}


class OrdinaryGradients:
    """SVI behind the engine's face, for guides that are not read as exponential families."""

    def __init__(self, model: Any, guide: Any, optim: Any, loss: Any):
        if not callable(guide):
            raise TypeError(f"guide: found {type(guide).__name__}, expected a Pyro guide (a callable), or None")
        self.guide, self.model = guide, model
        optim = pyro.optim.Adam({"lr": _LEARNING_RATE}) if optim is None else optim
        self.svi = SVI(model, guide, optim, Trace_ELBO() if loss is None else loss)
        self.history: list[float] = []
        self._fit: GuideFit | None = None

    def step(self, *args: Any, **kwargs: Any) -> float:
        loss = float(self.svi.step(*args, **kwargs))
        self.history.append(-loss)
        return loss

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> float:
        return float(self.svi.evaluate_loss(*args, **kwargs))

    def run(self, args: tuple, kwargs: Mapping[str, Any], *, max_steps: int, tol: float, progress: bool) -> GuideFit:
        from pyro_blr.runs import has_levelled

        converged = False
        for number in range(max_steps):
            self.step(*args, **kwargs)
            if number >= 200 and number % 10 == 0 and has_levelled(self.history, 100, tol):
                converged = True
                break
        reason = "the running mean of the ELBO levelled off" if converged else f"max_steps={max_steps} reached"
        elbo = sum(self.history[-100:]) / len(self.history[-100:])
        self._fit = GuideFit(self.guide, self.model, args, kwargs, elbo, self.history, converged, reason, len(self.history))
        return self._fit

    def posterior(self) -> GuideFit:
        if self._fit is None:
            raise RuntimeError("there is no posterior yet: call run first; the guide itself is engine.guide")
        return self._fit

    def explain(self, *args: Any, **kwargs: Any) -> Explanation:
        with pyro.poutine.block(), torch.random.fork_rng():
            trace = pyro.poutine.trace(self.guide).get_trace(*args, **kwargs)
        reason = "the guide is not read as exponential families: ordinary gradient of loss through optim, as under SVI"
        sites = {name: reason for name in trace.stochastic_nodes}
        return Explanation([], {}, "estimate ± standard error", [], sites)
