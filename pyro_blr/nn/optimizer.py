"""`BLROptimizer`: the Bayesian learning rule in the place of AdamW."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.optim import Optimizer

from pyro_blr.nn._buckets import Bucket, Entry
from pyro_blr.nn._curvature import is_due
from pyro_blr.nn._draws import mean_loss, perturbed
from pyro_blr.nn._evidence import Evidence
from pyro_blr.nn._measure import observe
from pyro_blr.nn._monitor import drift, warn_of_drift
from pyro_blr.nn._noise import noise_numbers
from pyro_blr.nn._ranks import sharded_like, world_size
from pyro_blr.nn._settings import NO_DRAW, NO_GRADIENT, TWO_DRAWS, check_group, check_samples, check_seed, check_shared
from pyro_blr.nn._step import begin, collect, take

__all__ = ["BLROptimizer"]


class BLROptimizer(Optimizer):
    """The Bayesian learning rule for q(θ) = N(m, diag(1/s)) over the parameters of a network.

        s ← (1 − ρ) s + ρ (N E_q[∂² ℓ] + δ),     m ← m − α (N E_q[∇ℓ] + δ (m − m₀)) / s,

    with ℓ the mean loss of a minibatch (minus the mean log-likelihood), N the number of data and N(m₀, 1/δ) the prior
    (Khan and Rue 2023, eq. 3; Khan et al. 2018; Shen et al. 2024). Between steps the parameters hold the mean m.

        def closure():
            return Categorical(logits=model(x)), y      # or: the mean loss, after its backward()
        loss = optimizer.step(closure)

        with torch.no_grad(), optimizer.sampled():
            predictions = model(x)                      # of one network drawn from q

    A closure that returns the observed distribution and the labels leaves loss and backward to the optimizer, which then measures
    the curvature at labels that the model draws. One that calls backward and returns the mean loss, as for AdamW and
    LBFGS, has it measured by Price's theorem: no more passes, but more steps. Gradients are cleared before each call.

    params: parameters, or groups of them, which may have values of their own for every argument but samples and antithetic.
    num_data: N, how many data the mean loss stands for; for a language model, tokens.
    prior_precision, prior_mean: δ and m₀; δ / N is AdamW's weight decay. In a group also a list, for each parameter a number or a tensor
        that broadcasts to it.
    lr, decay: α = lr / (1 + k / decay), where k counts steps at rest: it grows by 2 whenever a gradient turns against those before
        it. decay=0 keeps α, and ρ, constant.
    momentum: β₁ of the gradient's running mean.
    metric: "diagonal" is the equation above; "joint" moves the mean in the Gauss-Newton matrix of the group's parameters together, to the
        same end in fewer steps, at D² numbers; "auto" is "joint" for at most 1,000 parameters whose labels' distribution is known.
    curvature: "labels" (Gauss-Newton at sampled labels, one more backward), "examples" (the same from the gradient of every example:
        VOGN), "hessian" (of the loss at the observed labels, by products with it), "price", or "auto": where the first step sees no
        distribution "price", otherwise "hessian" for at most 1,000 parameters and labels that are told, else "labels".
    curvature_rate: below which ρ_n = 3 / (n + 20), for "price" 2 / (n + 20), does not fall; with decay=0, ρ itself (1 − β₂ of IVON).
    curvature_every: steps between measurements at sampled labels, after twenty in a row; None is 1 for at most 1,000 parameters, else 10.
    initial_curvature: h₀ of s = N h + δ; None takes it from the first batch, at the mean.
    trust: no step moves a mean by more than `trust` standard deviations, nor a precision by more than that part; None is no limit.
    samples, antithetic: draws of the weights a step; in pairs m ± σ ε.
    seed: of the noise, a function of (seed, step, parameter) that is never stored; None takes one from torch's generator.
    noise: among several processes, "shared" is the same in all, "own" another in each, averaged with the gradients.

    Processes that torch.distributed joins are taken for one run on parts of the data, under DistributedDataParallel or with parameters
    that fully_shard made: curvatures are averaged over them, and a step is skipped in all or in none.
    """

    _inside: bool
    _pending: bool
    _evidence: Evidence
    _warned = False

    def __init__(
        self,
        params: Any,
        num_data: float,
        *,
        prior_precision: float = 1.0,
        prior_mean: float = 0.0,
        lr: float = 1.0,
        decay: float = 10.0,
        momentum: float = 0.9,
        metric: str = "auto",
        curvature: str = "auto",
        curvature_rate: float = 1e-3,
        curvature_every: int | None = None,
        initial_curvature: float | None = None,
        trust: float | None = 0.2,
        samples: int = 1,
        antithetic: bool = False,
        seed: int | None = None,
        noise: str = "shared",
    ) -> None:
        group = {name: value for name, value in locals().items() if name not in ("self", "params", "__class__")}
        check_seed(seed)
        check_samples(samples, antithetic)
        group |= {
            "seed": int(torch.randint(2**62, ()).item()) if seed is None else seed,
            "draws": 0,
            "turns": torch.zeros(()),
        }
        self._forget()
        super().__init__(params, group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters, with settings of their own where given; ValueError where one has no meaning."""
        check_group({**self.defaults, **param_group})
        given = param_group["params"]
        param_group["params"] = [given] if torch.is_tensor(given) else list(given)
        check_shared(
            {**self.defaults, **param_group}, (p[1] if isinstance(p, tuple) else p for p in param_group["params"])
        )
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the rule; returns the mean loss, averaged over draws (None without a closure).

        With a closure the weights are drawn here. Without, gradients must come from a block of `sampled()` since the last step.
        A loss, gradient or curvature that is not finite is warned of, and changes nothing but the noise of the next step.

        Raises RuntimeError where the closure left no gradient, or no block of `sampled()` did.
        """
        if self._inside:
            raise RuntimeError("step() was called inside sampled(), on drawn weights: leave the block first")
        if closure is None and not self._pending and all(group["lr"] == 0 for group in self.param_groups):
            self._begin(everywhere=True)  # what torch.distributed.checkpoint asks for, to load a state into
            return None
        try:
            with contextlib.ExitStack() as draw:
                loss = None if closure is None else self._draw(closure, draw)
                if closure is None and not (self._pending and self._has_gradient()):
                    raise RuntimeError(NO_DRAW)
                fault = self._evidence.fault(loss, [entry.parameter for _, entry in self._entries()])
                if fault is None:
                    take(self._by_group(), self._evidence)
            if fault is not None:
                warnings.warn(f"step skipped, q unchanged: {fault}; check this batch", stacklevel=3)
            for group in self.param_groups:
                group["draws"] += 1
        finally:
            self._forget()
        return loss

    @contextlib.contextmanager
    def sampled(self) -> Iterator[None]:
        """Weights drawn from q inside, the mean again outside, bit for bit, also after an exception.

        With gradients enabled the draw belongs to the next `step()`: call backward inside, as often as gradients are to be
        accumulated under one draw, and `step()` after the block. Under `torch.no_grad()` it is a draw for predictions, from torch's
        generator, of which steps know nothing. Parameters that no step has reached stay at their values.

        Raises RuntimeError inside another block, before any step where the draw is for predictions, and where gradients of
        another draw wait for `step()`.
        """
        if not torch.is_grad_enabled():
            if not any(entry.state for _, entry in self._entries()):
                raise RuntimeError(
                    "there is no posterior to draw from before the first step: take a step, or leave out sampled()"
                )
            self._warned = self._warned or warn_of_drift(self.curvature_drift())
            key = int(torch.randint(2**62, ()).item())
            with self._perturbed(key=key):
                yield
            return
        if self._pending and self._has_gradient():
            raise RuntimeError(TWO_DRAWS)
        if not self._inside:
            self._begin()
        with self._perturbed():
            yield
        self._pending = True

    def observe(self, distribution: Distribution, labels: Tensor | None = None) -> None:
        """In a block of `sampled()`, before backward: the distribution of the observed labels, and these, for the curvature.

        Each element of its `log_prob` is one datum. Several calls, each with a part of the batch, are averaged. `grad` is left
        alone, and the graph is kept. Without labels there is no curvature by the Hessian.
        """
        if not self._inside:
            raise RuntimeError("observe() was called outside sampled(): the curvature is that of drawn weights")
        loss = None if labels is None else -distribution.log_prob(labels).mean()
        self._observe(distribution, loss)

    def stddev(self, parameter: Tensor) -> Tensor:
        """σ = (N h + δ)^−½ of a parameter, in its shape; NaN where no step has reached it."""
        for group, entry in self._entries():
            if entry.parameter is parameter:
                with torch.no_grad():
                    found = Bucket(group, [entry]).scale()[0] if entry.state else None
                    return torch.full_like(parameter, torch.nan) if found is None else sharded_like(found, parameter)
        raise ValueError(
            "the tensor is no parameter of this optimizer that requires a gradient: pass one that it was made with"
        )

    def curvature_drift(self) -> float:
        """By what part standard deviations changed between the last two of the measurements 1, 2, 4, 8, …; infinite before two."""
        return drift(entry for _, entry in self._entries() if entry.state)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch; outside a block it also drops the draw that waits for `step()`."""
        super().zero_grad(set_to_none)
        if not self._inside:
            self._forget()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but means and curvatures keep their digits beside parameters of fewer."""
        super().load_state_dict(state_dict)
        saved = (index for group in state_dict["param_groups"] for index in group["params"])
        for index, parameter in zip(saved, (p for group in self.param_groups for p in group["params"]), strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                if torch.is_tensor(value):
                    self.state[parameter][name] = value.to(parameter.device, copy=True)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()

    def _observe(self, distribution: Distribution, loss: Tensor | None) -> None:
        """Adds what the distribution tells of every group whose curvature is due."""
        for group, entries in self._by_group():
            if entries and is_due(group):
                observe(group, entries, self._evidence, distribution, loss)
        self._evidence.observations += 1

    # -- draws ---------------------------------------------------------------------------------------------------

    def _forget(self) -> None:
        """No draw waits for a step."""
        self._inside, self._pending, self._evidence = False, False, Evidence()

    def _entries(self) -> Iterator[tuple[dict[str, Any], Entry]]:
        """Every parameter that is not frozen, with its group; places count the frozen ones too."""
        index = 0
        for group in self.param_groups:
            for place, parameter in enumerate(group["params"]):
                if parameter.requires_grad:
                    yield group, Entry(parameter, self.state[parameter], index, place)
                index += 1

    def _by_group(self) -> list[tuple[dict[str, Any], list[Entry]]]:
        return [(group, [entry for owner, entry in self._entries() if owner is group]) for group in self.param_groups]

    def _has_gradient(self) -> bool:
        return any(entry.parameter.grad is not None for _, entry in self._entries())

    @torch.no_grad()
    def _begin(self, everywhere: bool = False) -> None:
        """Before the draws of a step: states of parameters whose first curvature is given, or of all."""
        self._forget()
        for group, entries in self._by_group():
            if everywhere or group["initial_curvature"] is not None:
                begin(group, [entry for entry in entries if not entry.state], group["initial_curvature"] or 0.0)

    @contextlib.contextmanager
    def _perturbed(self, number: int = 0, sign: float = 1.0, key: int | None = None) -> Iterator[list[Bucket]]:
        """The weights at m ± σ ε, with ε from the step and `number`, or from `key`; yields what will be restored."""
        if self._inside:
            raise RuntimeError("sampled() was entered inside sampled() or a closure: one draw at a time")
        self._inside = True
        try:
            with perturbed(self._by_group(), number, sign, key) as drawn:
                yield drawn
        finally:
            self._inside = False

    def _draw(self, closure: Callable[[], Any], draw: contextlib.ExitStack) -> Tensor | float:
        """Runs the closure at every draw of the weights; the mean of its losses, which is not finite as soon as one is not.

        A single draw lasts until `draw` is left.
        """
        self._begin()
        samples, total = self.defaults["samples"], 0.0
        for sample in range(samples):
            number, sign = (sample // 2, 1.0 - 2.0 * (sample % 2)) if self.defaults["antithetic"] else (sample, 1.0)
            for _, entry in self._entries():
                entry.parameter.grad = None
            with contextlib.ExitStack() as own:
                drawn = (draw if samples == 1 else own).enter_context(self._perturbed(number, sign))
                with torch.enable_grad():
                    loss = mean_loss(closure(), self._observe)
            self._evidence.drawn = drawn if samples == 1 else []
            total = total + loss / samples
            if not math.isfinite(loss) and world_size() == 1:
                return total
            if not self._has_gradient():
                raise RuntimeError(NO_GRADIENT)
            if samples > 1:
                for group, entries in self._by_group():
                    collect(group, entries, self._evidence, noise_numbers(group, number), sign, 1 / samples)
        return total
