"""Amortised guides: natural gradients of a network's outputs, pulled back through it, beside the ordinary gradient.

q(z_i) = N(loc(x_i), scale(x_i)) with a network for both; Adam steps on its weights from one draw a datum. What differs is the
cotangent that the network gets:

    ordinary   g, the gradient of the ELBO in (loc, log scale)
    outputs    F⁻¹ g, F the Fisher matrix of q in (loc, log scale)
    natural    the same in λ: the gradient in μ = (E z, E z²) pulled back as a cotangent on λ
    weights    (Jᵀ F J + damping)⁻¹ Jᵀ g in place of Adam's step, by conjugate gradients: the natural gradient of the weights themselves

`linear`: z ~ N(0, 1)³, x ~ N(W z, 1) in ten dimensions, 500 data; the best affine encoder with independent elements is known in
closed form, and the gap to its ELBO is printed, nats a datum. `digits`: a variational autoencoder on scikit-learn's digits, Bernoulli
pixels, ten latents, 100 hidden units, minibatches of 128; the ELBO of 297 digits that were left out is printed, nats a digit. The
decoder takes Adam's steps.

    OMP_NUM_THREADS=1 python tests/benchmarks/amortised.py
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp

KINDS = ("ordinary", "outputs", "natural", "weights")


class Pulled(torch.autograd.Function):
    """The identity, with another cotangent on (loc, log scale)."""

    @staticmethod
    def forward(ctx: Any, kind: str, loc: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
        ctx.kind = kind
        ctx.save_for_backward(loc, log_scale)
        return loc.clone(), log_scale.clone()

    @staticmethod
    def backward(ctx: Any, g_loc: Tensor, g_log: Tensor) -> tuple[None, Tensor, Tensor]:
        loc, log_scale = ctx.saved_tensors
        variance = (2 * log_scale).exp()
        step_loc, step_log = variance * g_loc, g_log / 2  # F = diag(1 / variance, 2)
        if ctx.kind == "outputs":
            return None, step_loc, step_log
        first = step_loc / variance - 2 * loc / variance * step_log  # of λ = (loc / variance, −1 / 2 variance)
        second = step_log / variance
        return None, first / variance, second / variance - 2 * loc / variance * first


def encoded(kind: str, network: Callable, x: Tensor) -> tuple[Tensor, Tensor]:
    loc, log_scale = network(x).chunk(2, -1)
    return Pulled.apply(kind, loc, log_scale) if kind in ("outputs", "natural") else (loc, log_scale)


def elbo(kind: str, network: Callable, likelihood: Callable, x: Tensor) -> Tensor:
    """One draw for each datum, (len(x))."""
    loc, log_scale = encoded(kind, network, x)
    z = loc + log_scale.exp() * torch.randn_like(loc)
    return likelihood(z, x) - (0.5 * (loc**2 + (2 * log_scale).exp() - 1) - log_scale).sum(-1)


def weight_step(network: nn.Module, x: Tensor, rate: float, damping: float = 0.1, iterations: int = 10) -> None:
    """w + ρ (Jᵀ F J / n + damping)⁻¹ Jᵀ g / n, at most 0.05 nats a datum long; the gradients of −ELBO / n are in `.grad`."""
    weights = {name: w.detach() for name, w in network.named_parameters()}
    residual = {name: -w.grad for name, w in network.named_parameters()}
    outputs, pull = vjp(lambda w: functional_call(network, w, (x,)), weights)
    log_scale = outputs.chunk(2, -1)[1]
    fisher = torch.cat([(-2 * log_scale).exp(), torch.full_like(log_scale, 2.0)], -1)

    def product(d: dict[str, Tensor]) -> dict[str, Tensor]:
        tangent = jvp(lambda w: functional_call(network, w, (x,)), (weights,), (d,))[1]
        pulled = pull(fisher * tangent / len(x))[0]
        return {name: pulled[name] + damping * d[name] for name in d}

    def dot(a: dict[str, Tensor], b: dict[str, Tensor]) -> Tensor:
        return torch.stack([(a[name] * b[name]).sum() for name in a]).sum()

    gradient, found = residual, {name: torch.zeros_like(w) for name, w in weights.items()}
    direction, size = residual, dot(residual, residual)
    for _ in range(iterations):
        image = product(direction)
        length = size / dot(direction, image)
        found = {name: found[name] + length * direction[name] for name in found}
        residual = {name: residual[name] - length * image[name] for name in found}
        size, before = dot(residual, residual), size
        direction = {name: residual[name] + size / before * direction[name] for name in found}
    nats = 0.5 * float(dot(found, gradient))
    rate = min(rate, (0.05 / max(nats, 1e-12)) ** 0.5)
    with torch.no_grad():
        for name, w in network.named_parameters():
            w += rate * found[name]


def moved(kind: str, loss: Tensor, network: nn.Module, optim: Any, x: Tensor, rate: float) -> None:
    for group in optim.param_groups:
        for w in group["params"]:
            w.grad = None
    for w in network.parameters():
        w.grad = None
    loss.backward()
    if kind == "weights":
        weight_step(network, x, rate)
    optim.step()


def linear(kind: str, rate: float, seed: int) -> list[float]:
    """The gap to the best encoder after 100, 300, 1000 and 3000 steps."""
    torch.set_default_dtype(torch.float64)
    world = torch.Generator().manual_seed(100)
    weights = torch.randn(10, 3, generator=world) * torch.tensor([2.0, 1.0, 0.5])
    x = torch.randn(500, 3, generator=world) @ weights.T + torch.randn(500, 10, generator=world)
    precision = torch.eye(3) + weights.T @ weights
    evidence = torch.distributions.MultivariateNormal(torch.zeros(10), weights @ weights.T + torch.eye(10)).log_prob(x)
    best = evidence.mean() - 0.5 * (precision.diagonal().log().sum() - torch.logdet(precision))
    constant = -5 * torch.log(torch.tensor(2 * torch.pi))
    torch.manual_seed(seed)
    network = nn.Linear(10, 6)
    with torch.no_grad():
        network.weight[3:] *= 0.1
    optim = torch.optim.Adam([torch.zeros(1)] if kind == "weights" else network.parameters(), lr=rate)

    def likelihood(z: Tensor, x: Tensor) -> Tensor:
        return constant - 0.5 * (x - z @ weights.T).square().sum(-1)

    @torch.no_grad()
    def gap() -> float:
        loc, log_scale = encoded("ordinary", network, x)
        variance = (2 * log_scale).exp()
        average = likelihood(loc, x) - 0.5 * variance @ weights.square().sum(0)
        return float((average - (0.5 * (loc**2 + variance - 1) - log_scale).sum(-1)).mean() - best)

    found = []
    for step in range(1, 3001):
        moved(kind, -elbo(kind, network, likelihood, x).mean(), network, optim, x, rate)
        if step in (100, 300, 1000, 3000):
            found.append(gap())
    return found


def digits(kind: str, rate: float, seed: int) -> list[float]:
    """The ELBO of digits that were left out after 10, 30 and 100 passes."""
    torch.set_default_dtype(torch.float32)
    x = torch.tensor(load_digits().data / 16.0, dtype=torch.float32)
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    train, test = x[:1500], x[1500:]
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(64, 100), nn.Softplus(), nn.Linear(100, 20))
    decoder = nn.Sequential(nn.Linear(10, 100), nn.Softplus(), nn.Linear(100, 64))
    optim = torch.optim.Adam([*decoder.parameters(), *(() if kind == "weights" else network.parameters())], lr=0.003)
    if kind != "weights":
        optim.param_groups[0]["lr"] = rate

    def likelihood(z: Tensor, x: Tensor) -> Tensor:
        return -nn.functional.binary_cross_entropy_with_logits(decoder(z), x, reduction="none").sum(-1)

    found = []
    for epoch in range(1, 101):
        for batch in torch.randperm(len(train)).split(128):
            rows = train[batch]
            moved(kind, -elbo(kind, network, likelihood, rows).mean(), network, optim, rows, rate)
        if epoch in (10, 30, 100):
            with torch.no_grad():
                found.append(float(sum(elbo("ordinary", network, likelihood, test).mean() for _ in range(20)) / 20))
    return found


RATES = {
    "linear": dict.fromkeys(KINDS, (0.003, 0.01, 0.03)) | {"weights": (0.3,)},
    "digits": dict.fromkeys(KINDS, (0.001, 0.003, 0.01)) | {"weights": (0.1,)},
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    options = parser.parse_args()
    for name, task in (("linear", linear), ("digits", digits)):
        for kind in options.kinds:
            for rate in RATES[name][kind]:
                start = time.process_time()
                rows = list(zip(*(task(kind, rate, seed) for seed in range(options.seeds)), strict=True))
                spent = (time.process_time() - start) / options.seeds
                text = "  ".join(f"{statistics.median(row):9.3f} ({min(row):.3f} to {max(row):.3f})" for row in rows)
                print(f"{name} {kind:9s} {rate:5.3f}: {text}   {spent:.1f} s", flush=True)


if __name__ == "__main__":
    main()
