"""Categorical weights that are products of powers of Beta sites (broken sticks, genotypes), against counts and coordinate ascent."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.special import digamma

from pyro_blr import BLRInference

VERIFIED = "exact (verified numerically"
CONCENTRATION = 2.5
ASSIGNED = torch.tensor([0, 0, 1, 2, 4, 4, 1, 0, 3])


def padded(beta: Tensor) -> Tensor:
    """Pyro's own way to write them."""
    rest = (1 - beta).cumprod(-1)
    return F.pad(beta, (0, 1), value=1) * F.pad(rest, (1, 0), value=1)


def joined(beta: Tensor) -> Tensor:
    one = torch.ones_like(beta[..., :1])
    return torch.cat([beta, one], -1) * torch.cat([one, (1 - beta).cumprod(-1)], -1)


def by_logs(beta: Tensor) -> Tensor:
    rest = F.pad(torch.log1p(-beta).cumsum(-1), (1, 0))
    return (rest + F.pad(beta.log(), (0, 1))).exp()


def one_by_one(beta: Tensor) -> Tensor:
    weights, rest = [], torch.ones_like(beta[0])
    for stick in beta.unbind():
        weights.append(rest * stick)
        rest = rest * (1 - stick)
    return torch.stack([*weights, rest])


def sticks(weights: Callable[[Tensor], Tensor], count: int, assigned: Tensor, concentration: float) -> None:
    with pyro.plate("sticks", count):
        beta = pyro.sample("beta", dist.Beta(1.0, concentration))
    with pyro.plate("data", len(assigned)):
        pyro.sample("z", dist.Categorical(weights(beta)), obs=assigned)


def how(model: Callable, *args: object) -> str:
    (verdict,) = [v for v in BLRInference(model).explain(*args)["beta"] if v.factor == "z"]
    return verdict.how


def log_beta(a: Tensor, b: Tensor) -> Tensor:
    return torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)


@pytest.mark.parametrize("weights", [padded, joined, by_logs, one_by_one])
def test_counts_of_sticks(weights: Callable[[Tensor], Tensor]) -> None:
    """Given assignments stick k is Beta(1 + n_k, α + Σ_{j>k} n_j), and the evidence a product of Beta functions."""
    assert how(sticks, weights, 4, ASSIGNED, CONCENTRATION).startswith(VERIFIED)
    engine = BLRInference(sticks)
    posterior = engine.run(weights, 4, ASSIGNED, CONCENTRATION, progress=False)
    counts = torch.bincount(ASSIGNED, minlength=5).double()
    a, b = 1 + counts[:-1], CONCENTRATION + counts.flip(0).cumsum(0).flip(0)[1:]
    torch.testing.assert_close(posterior.natural["beta"], torch.stack([a - 1, b - 1], -1), rtol=1e-12, atol=1e-12)
    prior = log_beta(torch.tensor(1.0), torch.tensor(CONCENTRATION))
    assert posterior.elbo == pytest.approx(float((log_beta(a, b) - prior).sum()), rel=1e-12)
    assert posterior.elbo_kind == "exact evidence" and len(posterior.history) == 1


def test_genotypes() -> None:
    """Hardy and Weinberg's p², 2 p (1 − p), (1 − p)²: coefficients, and powers of two."""

    def genotypes(seen: Tensor) -> None:
        p = pyro.sample("beta", dist.Beta(2.0, 3.0))
        probs = torch.stack([p**2, 2 * p * (1 - p), (1 - p) ** 2], -1)
        with pyro.plate("people", len(seen)):
            pyro.sample("z", dist.Categorical(probs), obs=seen)

    seen = torch.tensor([0, 1, 1, 2, 2, 2, 1])
    assert how(genotypes, seen).startswith(VERIFIED)
    posterior = BLRInference(genotypes).run(seen, progress=False)
    a, b = torch.tensor(2.0 + 2 + 3), torch.tensor(3.0 + 3 + 6)
    torch.testing.assert_close(posterior.natural["beta"].reshape(-1), torch.stack([a, b]) - 1, rtol=1e-12, atol=0)
    evidence = log_beta(a, b) - log_beta(torch.tensor(2.0), torch.tensor(3.0)) + 3 * torch.tensor(2.0).log()
    assert posterior.elbo == pytest.approx(float(evidence), rel=1e-12)


def test_a_mixture_of_a_dirichlet_process() -> None:
    """Coordinate ascent as Blei and Jordan (2006, section 3) write it, components known: the same optimum and bound."""
    centres = torch.tensor([-4.0, 0.0, 4.0, 8.0])
    x = torch.tensor([-4.2, -3.9, 0.1, 4.4, 3.8, 4.1, 1.9, 7.0])

    def mixture(x: Tensor) -> None:
        with pyro.plate("sticks", 3):
            beta = pyro.sample("beta", dist.Beta(1.0, CONCENTRATION))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(padded(beta)))
            pyro.sample("x", dist.Normal(centres[z], 1.0), obs=x)

    posterior = BLRInference(mixture).run(x, progress=False, tol=1e-12)
    log_likelihood = dist.Normal(centres, 1.0).log_prob(x[:, None])
    a, b = torch.ones(3), torch.full((3,), CONCENTRATION)
    for _ in range(500):
        log, rest = digamma(a) - digamma(a + b), digamma(b) - digamma(a + b)
        log_weights = F.pad(log, (0, 1)) + F.pad(rest.cumsum(0), (1, 0))
        phi = (log_weights + log_likelihood).softmax(-1)
        counts = phi.sum(0)
        a, b = 1 + counts[:-1], CONCENTRATION + counts.flip(0).cumsum(0).flip(0)[1:]
    torch.testing.assert_close(posterior.natural["beta"], torch.stack([a - 1, b - 1], -1), rtol=1e-6, atol=1e-6)
    log, rest = digamma(a) - digamma(a + b), digamma(b) - digamma(a + b)
    log_weights = F.pad(log, (0, 1)) + F.pad(rest.cumsum(0), (1, 0))
    evidence = (log_weights + log_likelihood).logsumexp(-1).sum()  # of x and z, phi at its optimum
    prior = dist.Beta(1.0, CONCENTRATION)
    divergence = torch.distributions.kl_divergence(torch.distributions.Beta(a, b), prior).sum()
    assert posterior.elbo == pytest.approx(float(evidence - divergence), abs=1e-6)


@pytest.mark.parametrize(
    "weights",
    [
        lambda beta: beta * F.pad((1 - beta).cumprod(-1), (1, -1), value=1),  # what is left of the stick is nobody's
        lambda beta: (
            torch.stack([beta[0], (1 - beta[0]) * 0.5 + 0.1 * beta[0]]) / (1 + 0.1 * beta[0] - 0.5 * (1 - beta[0]))
        ),
        lambda beta: torch.stack([0.5 * beta.mean(), 1 - 0.5 * beta.mean()]),
    ],
)
def test_other_weights_are_not_exact(weights: Callable[[Tensor], Tensor]) -> None:
    """Categorical normalises what it is given; an offset is no product of powers."""
    assert not how(sticks, weights, 4, ASSIGNED % 2, CONCENTRATION).startswith("exact")


def test_strict_wants_a_proof() -> None:
    with pytest.raises(ValueError, match="strict=True"):
        BLRInference(sticks, strict=True).step(padded, 4, ASSIGNED, CONCENTRATION)
