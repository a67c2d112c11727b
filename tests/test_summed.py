"""Finite sites that a guide leaves to its loss are summed out, and the others take natural gradients: against brute force."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam
from torch import Tensor

from pyro_blr import BLRInference
from pyro_blr.summed import SummedOut, marginal_of

SUMMED = {"enumerate": "parallel"}
SEEN = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
KNOWN = torch.tensor([[True, True, True], [True, False, True]])


def chains() -> None:
    """Two chains of three states, of which one is masked; log-odds of staying, and of what is seen."""
    stay, right = (pyro.sample(name, dist.Normal(0.5, 1.0)) for name in ("stay", "right"))
    with pyro.plate("chains", 2):
        z: Any = torch.zeros(2)
        for t in pyro.markov(range(3)):
            with poutine.mask(mask=KNOWN[:, t]):
                z = pyro.sample(f"z_{t}", dist.Bernoulli(logits=(2 * z - 1) * stay), infer=SUMMED)
                pyro.sample(f"x_{t}", dist.Bernoulli(logits=(2 * z - 1) * right), obs=SEEN[:, t])


def log_marginal(stay: Tensor, right: Tensor) -> Tensor:
    """log Σ_z over all eight assignments of each chain, without Pyro; the same with grids of both."""
    log = torch.nn.functional.logsigmoid
    total: Any = 0.0
    for chain in range(2):
        terms = []
        for states in itertools.product((0.0, 1.0), repeat=3):
            before, term = 0.0, torch.zeros_like(stay + right)
            for t, z in enumerate(states):
                logit = (2 * before - 1) * stay
                term = term + log(logit if z else -logit)  # a masked state is summed over all the same
                seen = (2 * z - 1) * right * (1 if SEEN[chain, t] else -1)
                term = term + (log(seen) if KNOWN[chain, t] else 0.0)
                before = z
            terms.append(term)
        total = total + torch.logsumexp(torch.stack(terms), 0)
    return total


def loss_of() -> TraceEnum_ELBO:
    return TraceEnum_ELBO(max_plate_nesting=1)


def guide_of(model: Callable) -> AutoNormal:
    return AutoNormal(poutine.block(model, expose=["stay", "right"]))


def test_the_sum_is_that_over_all_assignments() -> None:
    summed = SummedOut(chains, ["z_0", "z_1", "z_2"], 1)
    for seed in range(4):
        pyro.set_rng_seed(seed)
        trace = poutine.trace(summed).get_trace()
        assert set(trace.stochastic_nodes) - {"chains"} == {"stay", "right"}
        trace.compute_log_prob()
        expected = log_marginal(trace.nodes["stay"]["value"], trace.nodes["right"]["value"])
        torch.testing.assert_close(trace.nodes["_summed_out"]["log_prob"].sum(), expected)


def test_it_is_the_bound_of_the_loss_at_every_draw() -> None:
    pyro.set_rng_seed(0)
    guide = guide_of(chains)
    guide()
    summed = marginal_of(chains, guide, loss_of(), (), {})
    assert isinstance(summed, SummedOut)
    for seed in range(3):
        found = []
        for loss, model in ((Trace_ELBO(), summed), (loss_of(), chains)):
            pyro.set_rng_seed(seed)
            found.append(loss.loss(model, guide))
        np.testing.assert_allclose(*found, rtol=1e-10)


def test_it_ends_at_the_best_product_of_normals() -> None:
    """Against L-BFGS on the bound by Gauss-Hermite quadrature of the brute-force sum."""
    nodes, weights = map(torch.as_tensor, np.polynomial.hermite_e.hermegauss(40))
    weights = weights / weights.sum()

    def bound(place: Tensor) -> Tensor:
        mean, sd = place[:2], place[2:].exp()
        stay, right = mean[0] + sd[0] * nodes[:, None], mean[1] + sd[1] * nodes[None, :]
        height = log_marginal(stay, right) - 0.5 * ((stay - 0.5) ** 2 + (right - 0.5) ** 2)
        return (
            (weights[:, None] * weights[None, :] * height).sum() + place[2:].sum() + 1.0
        )  # ½ log 2πe − ½ log 2π, twice

    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    guide = guide_of(chains)
    engine = BLRInference(chains, guide, Adam({"lr": 0.01}), loss_of())
    posterior = engine.run(progress=False)
    assert posterior.converged and engine._ordinary is None
    ends = [(guide.locs, guide.scales)[i // 2].__getattr__(n) for i, n in enumerate(("stay", "right") * 2)]
    found = torch.stack([end.detach() if i < 2 else end.detach().log() for i, end in enumerate(ends)])
    place = found.clone().requires_grad_()
    optimiser = torch.optim.LBFGS([place], max_iter=200, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = -bound(place)
        loss.backward()
        return loss

    optimiser.step(closure)
    np.testing.assert_allclose(found, place.detach(), atol=0.01)
    np.testing.assert_allclose(posterior.elbo, float(bound(place.detach())), atol=2e-3 + 4 * posterior.elbo_se)
    assert "z_0 … z_2: summed out of the model" in " ".join(str(engine.explain()).split())


def scaled() -> None:
    with poutine.scale(scale=2.0):
        chains()


def test_what_counts_more_than_once_is_left_to_the_loss() -> None:
    pyro.clear_param_store()
    engine = BLRInference(scaled, guide_of(scaled), Adam({"lr": 0.01}), loss_of())
    engine.step()
    assert engine._ordinary is not None and "counts 2.0 times" in str(engine.explain().to_dict()["ordinary"])


@pytest.mark.parametrize("loss", [Trace_ELBO(), None])
def test_other_losses_sum_over_nothing(loss: Any) -> None:
    pyro.clear_param_store()
    assert marginal_of(chains, guide_of(chains), loss, (), {}) is chains
