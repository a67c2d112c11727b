"""One step of a model with networks on its way: what it would change, at one draw of the weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_blr.nn._given import Spread, prior_law
from pyro_blr.nn._others import Others, Outcome
from pyro_blr.nn._pass import Pass
from pyro_blr.nn._weights import Weights

__all__ = ["Attempt"]


class Attempt:
    """One step on its way: nothing outside is changed until `commit`."""

    def __init__(self, fit: Any, weights: Weights, others: Others | None, args: tuple, kwargs: Mapping[str, Any]):
        self.fit, self.weights, self.others, self.args, self.kwargs = fit, weights, others, args, kwargs
        self.had_begun = weights.has_begun
        self.of_weights = weights.bound() if self.had_begun else math.nan
        self.log_likelihood = math.nan
        self.outcome: Outcome | None = None
        self.found: Pass | None = None

    def closure(self) -> Tensor:
        """Minus the log joint given θ over N, at drawn weights and sites, after its backward pass."""
        found, log_probs, total = self._run()
        count = self.weights.group["num_data"]
        params = list(found.params.values())
        pyro.infer.util.zero_grads(params)
        loss = -total / count
        labels = found.labels(log_probs, count)
        if labels is not None:
            self.weights.optimizer._observe(labels, loss)  # type: ignore[arg-type]
        loss.backward()
        for leaf in params:
            if leaf.grad is not None:
                leaf.grad.mul_(count)  # optim takes the gradient of the loss itself
        if self.others is not None and self.had_begun:
            self.outcome = self.others.stepped(found, self._spreads, self.args, self.kwargs)
        return loss.detach()

    def look(self) -> None:
        """The same without a backward pass."""
        found, _, _ = self._run()
        if self.others is not None:
            self.outcome = self.others.stepped(found, self._spreads, self.args, self.kwargs)

    def _run(self) -> tuple[Pass, dict[str, Tensor], Tensor]:
        found = Pass(self.others.choose() if self.others is not None else lambda *_: None)
        with found:
            self.fit.model(*self.args, **self.kwargs)
        log_probs = found.log_probs()
        priors = self._prior_terms(found)
        total = torch.stack([x.to(torch.promote_types(x.dtype, torch.float32)) for x in log_probs.values()]).sum()
        self.log_likelihood = float(total.detach()) + sum(float(x.detach()) for x in priors.values())
        if not math.isfinite(self.log_likelihood):
            wrong = [name for name, x in {**log_probs, **priors}.items() if not math.isfinite(x.detach())]
            raise ValueError(
                f"site {' and '.join(map(repr, wrong))}: found a log probability that is not finite at drawn weights, expected numbers; "
                "nothing was changed. Check the data, or begin with smaller weights"
            )
        self.found = found
        return found, log_probs, sum((x for x in priors.values() if x.requires_grad), total)

    def _prior_terms(self, found: Pass) -> dict[str, Tensor]:
        """E_q log p(θ) of priors that are tensors, at the values these have in this run."""
        self._spreads: dict[str, dict[str, Spread]] = self.weights.spreads(found.networks)
        terms = {}
        for name, announced in found.networks.items():
            for assigned in announced.assigned:
                if not assigned.prior.is_number:
                    spread = self._spreads[name][assigned.key]
                    law = prior_law(assigned, spread)
                    terms[f"{name}[{assigned.key}]"] = 0.5 * spread.count * law.log_prob(spread.values)
                    if self.others is None:
                        mean, precision = (torch.as_tensor(x) for x in (assigned.prior.mean, assigned.prior.precision))
                        self.weights.set_prior(name, assigned, precision, mean)
        return terms

    def commit(self) -> None:
        """λ of the other sites, and the parameters."""
        assert self.found is not None
        if self.others is not None and self.outcome is not None:
            self.others.naturals, self.others.count = self.outcome.naturals, self.others.count + 1
            self.fit.set_priors(self.weights, self.found, self.outcome.priors)
        self.fit.move_parameters(self.found.params)

    def bound(self) -> float:
        """The ELBO before the step; of the first one, with the weights' Gaussian after it."""
        of_weights = self.of_weights if self.had_begun else self.weights.bound()
        return of_weights + (self.outcome.bound if self.outcome is not None else self.log_likelihood)
