"""What has no natural gradient: parameters of the model, and whole guides that are not read as families."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.optim.pytorch_optimizers import Adam  # type: ignore[attr-defined]
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from pyro_blr.ascent import Ascent
from pyro_blr.draws import Draws, fresh_seed
from pyro_blr.explain import Explanation
from pyro_blr.generators import GeneratorStates
from pyro_blr.interrupts import cut_short, patient, undone_by, uninterrupted
from pyro_blr.program import Program
from pyro_blr.running import isolated_random_state, latent_nodes
from pyro_blr.sameness import Call
from pyro_blr.stopping import has_levelled

__all__ = [
    "GuideFit",
    "OrdinaryGradients",
    "ParameterUpdate",
    "reason_of",
    "unconstrained",
]

_LEARNING_RATE = 0.01


def _holders(single: Any) -> list[Any]:
    """A torch optimiser, or a schedule with the optimiser below it."""
    return [single, single.optimizer] if hasattr(single, "optimizer") else [single]


def _parts(single: Any) -> list[dict]:
    return [part.state_dict() for part in _holders(single)]


def reason_of(error: Exception) -> str:
    """The first line of an error, for a table."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


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

    def saved(self, program: Program) -> Callable[[], None]:
        """What puts the parameters back as they are now, with all that their optimiser remembers."""
        values = [(parameter, parameter.detach().clone()) for parameter in self.found(program).values()]
        optim = self.optim
        singles = dict(optim.optim_objs) if optim is not None else {}
        states = {parameter: deepcopy(_parts(single)) for parameter, single in singles.items()}

        def restore() -> None:
            self.optim = optim
            with torch.no_grad():
                for parameter, value in values:
                    parameter.copy_(value)
            if optim is not None:
                optim.optim_objs = singles
            for parameter, single in singles.items():
                for part, state in zip(_holders(single), states[parameter], strict=True):
                    part.load_state_dict(state)

        return restore

    def step(self, program: Program, ascent: Ascent) -> None:
        """Moves the parameters, all or none; a run without any does nothing."""
        params = self.found(program)
        if not params:
            return
        if self.optim is None:
            self.optim = Adam({"lr": _LEARNING_RATE})
        with torch.enable_grad():
            draws = None if program.is_exact else Draws(fresh_seed(), 32)
            objective = ascent.expected_log_joint(draws)
            gradients = torch.autograd.grad(objective, list(params.values()), allow_unused=True, retain_graph=True)
        used = []
        for param, gradient in zip(params.values(), gradients, strict=True):
            if gradient is not None:
                param.grad = -gradient
                used.append(param)
        try:
            _refuse_nan(params, -float(objective.detach()))
            with uninterrupted():
                self.optim(used)
        finally:
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
    elbo_kind: str

    def sample(self, sample_shape: torch.Size | tuple = ()) -> dict[str, Tensor]:
        """Site -> draws of the guide."""
        count = torch.Size(sample_shape).numel()
        draws = Predictive(self.guide, num_samples=max(count, 1))(*self.args, **self.kwargs)
        return {name: x.reshape((*sample_shape, *x.shape[1:])) for name, x in draws.items() if not name.startswith("_")}


def check_guide(model: Any, guide: Any, args: tuple, kwargs: Mapping[str, Any]) -> None:
    """Raises for a guide that samples what the model does not; leaves generators and parameters as they were."""
    try:
        with isolated_random_state(0), pyro.poutine.block(), torch.no_grad():
            of_guide = pyro.poutine.trace(guide).get_trace(*args, **kwargs)
            of_model = pyro.poutine.trace(pyro.poutine.replay(model, trace=of_guide)).get_trace(*args, **kwargs)
    except Exception:  # it may count on the dims that `loss` runs it in: the first loss says what is wrong
        return
    ours = {n for n in of_model.nodes if of_model.nodes[n]["type"] == "sample"}
    latent = {name for name, _ in latent_nodes(of_model)}
    found = {
        name
        for name, node in of_guide.nodes.items()
        if node["type"] == "sample"
        and not node["is_observed"]
        and not node["infer"].get("is_auxiliary")
        and not name.startswith("_")
    }
    unknown = sorted(found - ours)
    if unknown:
        raise ValueError(
            f"the guide is for another model: found its sample sites {unknown}, expected some of the model's {sorted(latent)}. "
            "Give each the name of the model's site, or mark it infer={'is_auxiliary': True}"
        )


def unconstrained(trace: pyro.poutine.Trace) -> dict[str, Tensor]:
    """Name -> the tensor behind every parameter of a trace that an optimiser moves."""
    nodes: Mapping[str, Any] = trace.nodes
    values = {name: node["value"] for name, node in nodes.items() if node["type"] == "param"}
    return {name: x.unconstrained() if hasattr(x, "unconstrained") else x for name, x in values.items()}


def _refuse_nan(leaves: Mapping[str, Tensor], loss: float) -> None:
    for name, leaf in leaves.items():
        if leaf.grad is not None and bool(leaf.grad.isnan().any()):
            raise ValueError(
                f"parameter {name!r}: found NaN in the gradient of a loss of {loss}, expected numbers; nothing was moved. "
                "Check the data, start elsewhere, or take smaller steps (optim)"
            )


@dataclass
class _Cut:
    """A run that was cut short: its call, options and last step, its first step, and the generators."""

    call: Call
    options: tuple
    first: int
    generators: GeneratorStates

    def is_same(self, args: tuple, kwargs: Mapping[str, Any], options: tuple) -> bool:
        return self.options == options and self.call.is_repeated(args, kwargs)


class OrdinaryGradients:
    """SVI behind the engine's face, for guides that are not read as exponential families."""

    elbo_kind = "estimate ± standard error"

    def __init__(self, model: Any, guide: Any, optim: Any, loss: Any, reason: str):
        self.guide, self.model, self.reason = guide, model, reason
        optim = Adam({"lr": _LEARNING_RATE}) if optim is None else optim
        self.loss = Trace_ELBO() if loss is None else loss
        self.svi = SVI(model, guide, optim, self.loss)
        self.history: list[float] = []
        self.has_run = False
        self._fit: GuideFit | None = None
        self._cut: _Cut | None = None

    def step(self, *args: Any, **kwargs: Any) -> float:
        if not self.history:
            check_guide(self.model, self.guide, args, kwargs)
        with undone_by(partial(pyro.util.set_rng_state, pyro.util.get_rng_state())) as pending:
            loss, leaves = self.gradient(args, kwargs)
            with uninterrupted():
                pending.clear()
                self.move(list(leaves.values()))
                self.has_run = True
                self.history.append(-loss)
        return loss

    def gradient(self, args: tuple, kwargs: Mapping[str, Any]) -> tuple[float, dict[str, Tensor]]:
        """(loss, name -> unconstrained parameter with the gradient of loss), as `SVI.step` has them before it moves any."""
        with pyro.poutine.trace(param_only=True) as params:
            try:
                loss = float(self.svi.loss_and_grads(self.model, self.guide, *args, **kwargs))
                leaves = unconstrained(params.trace)
                _refuse_nan(leaves, loss)
            except BaseException:
                pyro.infer.util.zero_grads(unconstrained(params.trace).values())
                raise
        return loss, leaves

    def move(self, leaves: list[Tensor]) -> None:
        """A step of `optim`, gradients used up."""
        self.svi.optim(list({id(leaf): leaf for leaf in leaves}.values()))
        pyro.infer.util.zero_grads(leaves)

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> float:
        loss = float(self.svi.evaluate_loss(*args, **kwargs))
        self.has_run = True
        return loss

    def run(self, args: tuple, kwargs: Mapping[str, Any], *, max_steps: int, tol: float, progress: bool) -> GuideFit:
        with patient() as check, self._goes_on(args, kwargs, (max_steps, tol)) as first:
            while not (converged := self._has_levelled(len(self.history) - first, tol)):
                if len(self.history) - first >= max_steps:
                    break
                self.step(*args, **kwargs)
                check()
        reason = "the running mean of the ELBO levelled off" if converged else f"max_steps={max_steps} reached"
        return self._ended(args, kwargs, converged, reason, self._last_elbo())

    def _has_levelled(self, steps: int, tol: float) -> bool:
        return steps > 200 and steps % 10 == 1 and has_levelled(self.history, 100, tol)

    @contextmanager
    def _goes_on(self, args: tuple, kwargs: Mapping[str, Any], options: tuple) -> Iterator[int]:
        """The number of the run's first step: where this call begins, or began before it was cut short."""
        cut, first = self._cut, len(self.history)
        if cut is not None and cut.is_same(args, kwargs, (*options, first)):
            first = cut.first
            cut.generators.restore()
        try:
            yield first
        except BaseException as error:
            if len(self.history) > first:
                reason = cut_short(error, len(self.history) - first)
                self._ended(args, kwargs, False, reason, self._last_elbo())
                self._cut = _Cut(Call(args, kwargs), (*options, len(self.history)), first, GeneratorStates())
            raise

    def _last_elbo(self) -> float:
        return sum(self.history[-100:]) / len(self.history[-100:])

    def _ended(self, args: tuple, kwargs: Mapping[str, Any], converged: bool, reason: str, elbo: float) -> GuideFit:
        history = list(self.history)
        self._fit = GuideFit(
            self.guide, self.model, args, kwargs, elbo, history, converged, reason, len(history), self.elbo_kind
        )
        self._cut = None
        return self._fit

    def posterior(self) -> GuideFit:
        if self._fit is None:
            raise RuntimeError("there is no posterior yet: call run first; the guide itself is engine.guide")
        return self._fit

    def explain(self, *args: Any, **kwargs: Any) -> Explanation:
        with pyro.poutine.block(), isolated_random_state():
            trace = pyro.poutine.trace(self.guide).get_trace(*args, **kwargs)
        reason = f"the guide is not read as exponential families ({self.reason}): ordinary gradient of loss through optim, as under SVI"
        nodes: Mapping[str, Any] = trace.nodes
        sites = {n: reason for n in trace.stochastic_nodes if not isinstance(nodes[n]["fn"], _Subsample)}
        return Explanation([], {}, "estimate ± standard error", [], sites)
