"""`BLRInference` on a model with networks: their weights by the rule in place, everything else by its own messages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import pyro
import torch
from pyro.optim.pytorch_optimizers import Adam  # type: ignore[attr-defined]
from torch import Tensor

from pyro_blr.blocks import Block
from pyro_blr.explain import Explanation
from pyro_blr.gradients import GuideFit, OrdinaryGradients
from pyro_blr.interrupts import undone_by, uninterrupted
from pyro_blr.nn._attempt import Attempt
from pyro_blr.nn._monitor import SETTLED
from pyro_blr.nn._others import Others
from pyro_blr.nn._pass import Pass
from pyro_blr.nn._weights import Weights
from pyro_blr.plans import PROVED, Verdict
from pyro_blr.posterior import Posterior
from pyro_blr.running import isolated_random_state

__all__ = ["NetworkFit"]


CURVATURES = {
    "auto": "chosen at the first step",
    "labels": "Gauss-Newton at sampled labels",
    "examples": "Gauss-Newton by examples",
    "hessian": "the Hessian's, by random vectors",
    "price": "Price's theorem",
}


class NetworkFit(OrdinaryGradients):
    """One step of the rule for a model with networks, q(θ) q(z) with θ the weights and z all other sites:

        θ: `BLROptimizer`'s step at one draw of θ and z, the minibatch's log likelihood scaled as plates say; one backward.
        z: messages given the same draw of θ, of which the prior of θ is averaged over q(θ) (`Others`).

    What requires a gradient and is not random, `pyro.param`s and parameters that are not exposed, goes to `optim`. A step that fails
    changes nothing.
    """

    has_run = True

    def __init__(self, model: Any, guide: Any, optim: Any, loss: Any, **options: Any):
        self.model, self.guide, self.optim, self.loss, self.options = model, guide, optim, loss, options
        self.history: list[float] = []
        self._fit: GuideFit | None = None
        self._cut = None
        self._weights: Weights | None = None
        self._others: Others | None = None
        self._call: tuple[tuple, Mapping[str, Any]] = ((), {})
        self._ended_with: dict[str, Any] = {}

    # -- steps -----------------------------------------------------------------------------------------------------

    def step(self, *args: Any, **kwargs: Any) -> float:
        with undone_by(partial(pyro.util.set_rng_state, pyro.util.get_rng_state())) as pending:
            weights, others = self._begun(args, kwargs)
            self._reload()
            attempt = Attempt(self, weights, others, args, kwargs)
            weights.optimizer.step(attempt.closure)
            pending.clear()
            with uninterrupted():
                attempt.commit()
                self._call, self._ended_with = (args, kwargs), {}
                self.history.append(attempt.bound())
        return -self.history[-1]

    def _begun(self, args: tuple, kwargs: Mapping[str, Any]) -> tuple[Weights, Others | None]:
        if self._weights is None:
            found = Pass(lambda *_: None)
            with isolated_random_state(0), found, torch.enable_grad():
                self.model(*args, **kwargs)
            log_probs = found.log_probs()
            settings: dict[str, Any] = {}
            for announced in found.networks.values():
                settings |= announced.network.settings
            weights = Weights(found.networks, found.num_data(log_probs), settings)
            others = Others(self.model, self.guide, self.options) if found.latents() else None
            if others is not None:
                with isolated_random_state(0):
                    spreads = weights.spreads(found.networks)
                    others.understand(found, spreads, args, kwargs)
                    self.set_priors(weights, found, others.priors(spreads))
            self._weights, self._others = weights, others
            self._show()
        return self._weights, self._others

    def set_priors(self, weights: Weights, found: Pass, priors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """E δ and m₀ of priors that other sites make, where the rule for the weights reads them."""
        for name, announced in found.networks.items():
            for assigned in announced.assigned:
                if f"{name}[{assigned.key}]" in priors:
                    weights.set_prior(name, assigned, *priors[f"{name}[{assigned.key}]"])

    def move_parameters(self, params: Mapping[str, Tensor]) -> None:
        """A step of `optim` on what has a gradient."""
        moved = [leaf for leaf in params.values() if leaf.grad is not None]
        if moved:
            self.optim = Adam({"lr": 0.01}) if self.optim is None else self.optim
            self.optim(moved)
            pyro.infer.util.zero_grads(moved)

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> float:
        """Minus the ELBO at one draw; changes nothing."""
        with isolated_random_state():
            weights, others = self._begun(args, kwargs)
            if not weights.has_begun:
                raise RuntimeError("the weights have no posterior before the first step: call step, then evaluate_loss")
            with torch.no_grad(), weights.drawn():
                attempt = Attempt(self, weights, others, args, kwargs)
                attempt.look()
            return -attempt.bound()

    # -- what it is at ---------------------------------------------------------------------------------------------

    def _show(self) -> None:
        """The engine's guide samples the present q."""
        assert self._weights is not None
        blocks = {**self._weights.blocks(), **(self._others.blocks if self._others is not None else {})}
        self._live = _Live(self._weights, self._others)
        self.guide.blocks, self.guide.naturals = blocks, self._live

    def _reload(self) -> None:
        """Takes λ that somebody else put into the guide."""
        loaded = self.guide.naturals
        if loaded is self._live or self._weights is None:
            return
        if not self._weights.has_begun:
            raise RuntimeError("the guide was loaded before its model's networks had a step: take one, then load")
        for name in self._weights.networks:
            self._weights.adopt(name, loaded[name])
        if self._others is not None:
            self._others.naturals = {name: loaded[name] for name in self._others.naturals}
        self.guide.naturals = self._live

    def _ended(self, args: tuple, kwargs: Mapping[str, Any], converged: bool, reason: str, elbo: float) -> Any:
        self._ended_with = {"converged": converged, "stop_reason": reason, "elbo": elbo}
        self._cut = None
        return self.posterior()

    def posterior(self) -> Any:
        if not self.history:
            raise RuntimeError("there is no posterior yet: call step or run first")
        args, kwargs = self._call
        outcome = {"elbo": self.history[-1], **self._ended_with, "elbo_kind": self.elbo_kind, "history": self.history}
        naturals = dict(self._live)
        return Posterior(
            self.guide.blocks,
            naturals,
            model=self.model,
            args=args,
            kwargs=kwargs,
            num_steps=len(self.history),
            **outcome,
        )

    def explain(self, *args: Any, **kwargs: Any) -> Explanation:
        with isolated_random_state(0):
            weights, others = self._begun(args, kwargs)
            found = Pass(others.choose() if others is not None else lambda *_: None)
            with found:
                self.model(*args, **kwargs)
            log_probs = found.log_probs()
            verdicts, notes = [], []
            for name, announced in found.networks.items():
                verdicts.append(Verdict(name, name, True, PROVED))
                curvature = CURVATURES[weights.group["curvature"]]
                seen = [one for one, value in log_probs.items() if value.requires_grad]
                verdicts += [
                    Verdict(one, name, False, "Monte Carlo", f"one draw of the weights a step; curvature: {curvature}")
                    for one in seen
                ]
                count, size = len(announced.network.exposed.parameters), announced.network.exposed.size
                notes.append(f"{name}: {count} parameters, {size} elements, moved in place by BLROptimizer")
            if weights.has_begun and (drift := weights.optimizer.curvature_drift()) > SETTLED:
                notes.append(
                    f"standard deviations of weights changed by {drift:.0%} since half as many measurements: take more steps"
                )
            blocks: dict[str, Block] = weights.blocks()
            if others is not None:
                program = others.understand(found, weights.spreads(found.networks), args, kwargs)
                verdicts += others.verdicts(program)
                blocks |= program.blocks
                notes += program.notes()
                averaged = others.averaged(program)
                if averaged:
                    sites = [site for name in averaged for site in program.blocks[name].site_names]
                    notes.append(
                        f"{', '.join(sites)}: from second moments of the weights under q, at full steps; what a network computed is "
                        "taken at its draw, and averages out over steps"
                    )
        return Explanation(verdicts, blocks, self.elbo_kind, sorted(found.params), {}, notes)


class _Live(Mapping[str, Tensor]):
    """Block -> λ as it is when it is asked for."""

    def __init__(self, weights: Weights, others: Others | None):
        self.weights, self.others = weights, others

    def __getitem__(self, name: str) -> Tensor:
        if name in self.weights.networks:
            return self.weights.natural(name)
        if self.others is None:
            raise KeyError(name)
        return self.others.naturals[name]

    def __iter__(self) -> Iterator[str]:
        yield from self.weights.networks
        yield from self.others.naturals if self.others is not None else ()

    def __len__(self) -> int:
        return sum(1 for _ in self)
