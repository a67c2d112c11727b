"""Guides that are points: the rule with every expectation taken at the mean, which is Newton's method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import JitTraceEnum_ELBO, Trace_ELBO, TraceEnum_ELBO
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from pyro_blr.explain import Explanation
from pyro_blr.gradients import GuideFit, OrdinaryGradients, check_guide
from pyro_blr.interrupts import patient, undone_by, uninterrupted
from pyro_blr.running import isolated_random_state, unwrap

__all__ = ["PointFit", "ordinary_fit"]

_DENSE = 300  # unknowns up to which the Hessian is formed
_HALVINGS = 30
_FLAT = 1e-10  # curvature, relative to the largest, below which a direction is taken to be flat
_LONGEST = 10.0  # of a step, in unconstrained space
_DONE = (
    1e-12  # nats to be gained, relative to the loss, below which nothing is moved; in float32 as many as it can tell
)


def ordinary_fit(
    model: Any, guide: Any, optim: Any, loss: Any, reason: str, args: tuple, kwargs: Mapping[str, Any]
) -> OrdinaryGradients:
    """What fits a guide that denotes no families: Newton's method where it is a point, else `loss` through `optim`."""
    try:
        is_point = _is_point(guide, args, kwargs)
    except Exception:  # its first step says what is wrong with it
        is_point = False
    kind = PointFit if is_point else OrdinaryGradients
    return kind(model, guide, optim, loss, reason)


def _is_point(guide: Any, args: tuple, kwargs: Mapping[str, Any]) -> bool:
    with isolated_random_state(0), poutine.block(), torch.no_grad():
        trace = poutine.trace(guide).get_trace(*args, **kwargs)
    nodes = [node for node in trace.nodes.values() if node["type"] == "sample" and not node["is_observed"]]
    laws = [unwrap(node["fn"])[0] for node in nodes if not isinstance(node["fn"], _Subsample)]
    return bool(laws) and all(isinstance(law, dist.Delta) for law in laws)


class PointFit(OrdinaryGradients):
    """u ← u − ρ |H|⁻¹ ∇ℓ(u) on the guide's unconstrained parameters, ℓ the loss at the point, H its Hessian.

    It is the learning rule on a Gaussian whose expectations are taken at the mean (Khan and Rue 2023, section 4.1): natural
    gradients of a point.  |H| has the absolute eigenvalues of H, so that steps descend at saddles too; ρ is halved
    while ℓ rises. Beyond 300 unknowns L-BFGS stands for H. Parameters of the model take a step of `optim` each time.
    Where ℓ is random (minibatches), or nothing is free, all is as under SVI.
    """

    def __init__(self, model: Any, guide: Any, optim: Any, loss: Any, reason: str):
        super().__init__(model, guide, optim, loss, reason)
        enumerates = isinstance(loss, (TraceEnum_ELBO, JitTraceEnum_ELBO))
        self.elbo: Any = Trace_ELBO()
        if enumerates:
            self.elbo = TraceEnum_ELBO(
                max_plate_nesting=loss.max_plate_nesting, strict_enumeration_warning=loss.strict_enumeration_warning
            )
        self._is_random: bool | None = None
        self._mine: set[int] = set()  # the guide's parameters
        self._stuck: float | None = None  # the loss that steps do not change: rounding hides what is left
        self._inverse: Callable[[Tensor], Tensor] | None = None
        self._quasi: torch.optim.LBFGS | None = None
        self.decrement = float("inf")

    def step(self, *args: Any, **kwargs: Any) -> float:
        self._ready(args, kwargs)
        if self._is_random or not self._mine:
            return super().step(*args, **kwargs)

        def objective() -> Any:
            return self.elbo.differentiable_loss(self.model, self.guide, *args, **kwargs)

        with undone_by(partial(pyro.util.set_rng_state, pyro.util.get_rng_state())) as pending:
            with poutine.trace(param_only=True) as params:
                value = objective()
            found = _unconstrained(params.trace)
            leaves = [leaf for leaf in found if id(leaf) in self._mine]
            others = [leaf for leaf in found if id(leaf) not in self._mine]
            if len(leaves) != len(self._mine):  # the store was cleared or loaded: other tensors have their place
                leaves, others = self._leaves(args, kwargs)
                self._mine = {id(leaf) for leaf in leaves}
            pending.append(self._saved(leaves))
            loss = self._descend(leaves, others, value, objective)
            with uninterrupted():
                pending.clear()
                if others:
                    self.move(others)
                    self._inverse = None  # another function from now on
                self.has_run = True
                self.history.append(-loss)
        return loss

    def _ready(self, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """The first time: the guide is checked, its loss for noise, and which parameters are its own."""
        if self._is_random is None:
            check_guide(self.model, self.guide, args, kwargs)
            is_random = self._has_noise(args, kwargs)
            self._mine = {id(leaf) for leaf in self._leaves(args, kwargs)[0]}
            self._is_random = is_random

    def _saved(self, leaves: list[Tensor]) -> Callable[[], None]:
        """What puts the point, and what is remembered of its surroundings, back as they are now."""
        held = [(leaf, leaf.detach().clone()) for leaf in leaves]
        known = self._inverse, self.decrement, self._quasi
        memory = deepcopy(self._quasi.state_dict()) if self._quasi is not None else None

        def restore() -> None:
            _put_back(held)
            pyro.infer.util.zero_grads(leaves)
            self._inverse, self.decrement, self._quasi = known
            if self._quasi is not None and memory is not None:
                self._quasi.load_state_dict(memory)

        return restore

    def _has_noise(self, args: tuple, kwargs: Mapping[str, Any]) -> bool:
        losses = []
        for seed in (1, 2):
            with isolated_random_state(seed):  # TraceEnum_ELBO refuses no_grad
                losses.append(float(self.elbo.differentiable_loss(self.model, self.guide, *args, **kwargs).detach()))
        return losses[0] != losses[1]

    def _leaves(self, args: tuple, kwargs: Mapping[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
        """Unconstrained parameters of the guide, and those of the model alone."""
        with isolated_random_state(0), poutine.block():
            of_guide = poutine.trace(self.guide).get_trace(*args, **kwargs)
            of_model = poutine.trace(poutine.replay(self.model, trace=of_guide)).get_trace(*args, **kwargs)
        mine = _unconstrained(of_guide)
        ids = {id(leaf) for leaf in mine}
        return mine, [leaf for leaf in _unconstrained(of_model) if id(leaf) not in ids]

    # -- one step ------------------------------------------------------------------------------------------------------

    def _descend(
        self, leaves: list[Tensor], others: list[Tensor], value: Tensor, objective: Callable[[], Any]
    ) -> float:
        """A step from where the objective has this value."""
        gradients = torch.autograd.grad(
            value, [*leaves, *others], create_graph=True, allow_unused=True, materialize_grads=True
        )
        loss, gradient = float(value.detach()), _flat(gradients[: len(leaves)])
        if not bool(gradient.isfinite().all()):
            raise ValueError(
                f"found a loss of {loss} with a gradient that is not finite at the guide's point, expected finite ones. "
                "Start elsewhere (init_loc_fn), or check the data"
            )
        if others:
            pairs = zip(others, gradients[len(leaves) :], strict=True)
            for leaf, slope in pairs:
                leaf.grad = slope.detach()
        if gradient.numel() > _DENSE:
            self._quasi_newton(leaves, objective)
        elif loss != self._stuck and not self._is_done(gradient.detach(), loss):
            self._newton(leaves, gradient, loss, objective)
        return loss

    def _is_done(self, gradient: Tensor, loss: float) -> bool:
        """Whether the last Hessian says that nothing is to be gained: then a step costs one gradient."""
        if self._inverse is None or self._inverse(gradient).shape != gradient.shape:
            return False
        self.decrement = 0.5 * float(gradient @ self._inverse(gradient))
        return self.decrement <= _rounding(gradient) * max(1.0, abs(loss))

    def _newton(self, leaves: list[Tensor], gradient: Tensor, loss: float, objective: Callable[[], Any]) -> None:
        hessian = _hessian(gradient, leaves)
        values, vectors = torch.linalg.eigh(0.5 * (hessian + hessian.mT).double())
        curvature = values.abs().clamp(min=_FLAT * max(float(values.abs().max()), 1e-300))

        def inverse(g: Tensor) -> Tensor:
            return (
                (vectors @ ((vectors.mT @ g.double()) / curvature)).to(g)
                if g.numel() == len(curvature)
                else g.new_zeros(0)
            )

        self._inverse = inverse
        flat = gradient.detach()
        step = -inverse(flat)
        step = step * min(1.0, _LONGEST / max(float(step.abs().max()), 1e-300))
        self.decrement = -0.5 * float(flat @ step)
        start = [(leaf, leaf.detach().clone()) for leaf in leaves]
        for halvings in range(_HALVINGS):
            _move(start, 0.5**halvings * step)
            reached = float(objective().detach())
            if reached <= loss + _rounding(flat) * abs(loss):
                gains = loss - reached > _rounding(flat) * max(1.0, abs(loss))
                self._stuck = None if gains else reached
                return
        _put_back(start)
        self._stuck = loss

    def _quasi_newton(self, leaves: list[Tensor], objective: Callable[[], Any]) -> None:
        known = self._quasi is not None and all(
            a is b for a, b in zip(self._quasi.param_groups[0]["params"], leaves, strict=True)
        )
        if not known:
            self._quasi = torch.optim.LBFGS(leaves, max_iter=5, history_size=20, line_search_fn="strong_wolfe")
        assert self._quasi is not None

        def closure() -> Tensor:
            pyro.infer.util.zero_grads(leaves)
            value = objective()
            value.backward()
            return value

        self._quasi.step(closure)
        self.decrement = max(float(leaf.grad.abs().max()) if leaf.grad is not None else 0.0 for leaf in leaves)
        pyro.infer.util.zero_grads(leaves)

    # -- runs and words --------------------------------------------------------------------------------------------------

    def run(self, args: tuple, kwargs: Mapping[str, Any], *, max_steps: int, tol: float, progress: bool) -> GuideFit:
        self._ready(args, kwargs)
        leaves, others = self._leaves(args, kwargs)
        if self._is_random or others or not leaves:
            return super().run(args, kwargs, max_steps=max_steps, tol=tol, progress=progress)
        with patient() as check, self._goes_on(args, kwargs, (max_steps, tol)) as first:
            while len(self.history) == first or (
                self.decrement >= 1e-3 * tol and len(self.history) - first < max_steps
            ):
                self.step(*args, **kwargs)
                check()
            elbo = -self.evaluate_loss(*args, **kwargs)
        converged = self.decrement < 1e-3 * tol
        reason = "Newton's method has nothing left to gain" if converged else f"max_steps={max_steps} reached"
        return self._ended(args, kwargs, converged, reason, elbo)

    @property
    def elbo_kind(self) -> str:  # type: ignore[override]
        """What the ELBO of a run is."""
        return "estimate ± standard error" if self._is_random else "log density at a point"

    def _last_elbo(self) -> float:
        return super()._last_elbo() if self._is_random else self.history[-1]

    def explain(self, *args: Any, **kwargs: Any) -> Explanation:
        plain = super().explain(*args, **kwargs)
        if self._is_random is None:
            self._is_random = self._has_noise(args, kwargs)
        if self._is_random:
            return plain
        reason = "a point: Newton's method on loss in the guide's unconstrained parameters (natural gradients, expectations at the mean)"
        return Explanation([], {}, "log density at a point", [], dict.fromkeys(plain.ordinary, reason))


def _unconstrained(trace: poutine.Trace) -> list[Tensor]:
    found: list[Tensor] = []
    for node in trace.nodes.values():
        if node["type"] == "param":
            value: Any = node["value"]
            leaf = value.unconstrained() if hasattr(value, "unconstrained") else value
            if leaf.requires_grad and all(leaf is not other for other in found):
                found.append(leaf)
    return found


def _rounding(gradient: Tensor) -> float:
    """The relative difference in the loss that says nothing."""
    return max(_DONE, torch.finfo(gradient.dtype).eps)


def _flat(tensors: Any) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _hessian(gradient: Tensor, leaves: list[Tensor]) -> Tensor:
    if not gradient.requires_grad:
        return gradient.new_zeros(gradient.numel(), gradient.numel())
    rows = [
        _flat(torch.autograd.grad(slope, leaves, retain_graph=True, allow_unused=True, materialize_grads=True))
        for slope in gradient
    ]
    return torch.stack(rows).detach()


@torch.no_grad()
def _move(start: list[tuple[Tensor, Tensor]], step: Tensor) -> None:
    position = 0
    for leaf, value in start:
        leaf.copy_(value + step[position : position + leaf.numel()].reshape(leaf.shape))
        position += leaf.numel()


@torch.no_grad()
def _put_back(held: list[tuple[Tensor, Tensor]]) -> None:
    for leaf, value in held:
        leaf.copy_(value)
