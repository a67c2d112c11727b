"""Processor time of a step on a network of 64 tensors in a Pyro model, beside a plain AdamW loop and Pyro's SVI.

    python tests/benchmarks/network_in_pyro.py [--width 128] [--batch 256] [--steps 40] [--device cpu]

Each way takes `steps` steps in turn, five times over, in one process; medians are printed, and their ratios to AdamW's. On a GPU the
clock is read instead, after it has come to rest.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

from pyro_blr import BLRInference
from pyro_blr.nn import BLROptimizer, bayesian

LAYERS, CLASSES = 32, 10


def network(width: int) -> nn.Module:
    """32 linear layers: 64 tensors."""
    sizes = [width] * LAYERS + [CLASSES]
    layers = [[nn.Linear(a, b), nn.ReLU()] for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(*itertools.chain(*layers))[:-1]


def ways(width: int, batch: int, device: str) -> dict[str, Callable[[], object]]:
    """Name -> one step."""
    x = torch.randn(batch, width, device=device)
    y = torch.randint(CLASSES, (batch,), device=device)
    size = 50 * batch

    plain = network(width).to(device)
    adamw = torch.optim.AdamW(plain.parameters(), lr=1e-3)

    def adamw_step() -> None:
        adamw.zero_grad()
        nn.functional.cross_entropy(plain(x), y).backward()
        adamw.step()

    looped = network(width).to(device)
    rule = BLROptimizer(looped.parameters(), num_data=size, prior_precision=100.0)

    def model_of(module: nn.Module) -> Callable:
        site = bayesian(module, prior=100.0)

        def model(x: Tensor, y: Tensor) -> None:
            logits = site(x)
            with pyro.plate("data", size, subsample_size=batch, subsample=torch.arange(batch, device=device)):
                pyro.sample("y", dist.Categorical(logits=logits), obs=y)

        return model

    engine = BLRInference(model_of(network(width).to(device)))
    model = model_of(network(width).to(device))
    svi = SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    return {
        "AdamW loop": adamw_step,
        "BLROptimizer loop": lambda: rule.step(lambda: (torch.distributions.Categorical(logits=looped(x)), y)),
        "BLRInference": lambda: engine.step(x, y),
        "SVI, AutoNormal": lambda: svi.step(x, y),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    pyro.enable_validation(False)
    found = ways(options.width, options.batch, options.device)

    def now() -> float:
        if options.device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    times: dict[str, list[float]] = {name: [] for name in found}
    for step in found.values():
        for _ in range(25):  # the rule measures its curvature at each of the first 20 steps
            step()
    for _ in range(5):
        for name, step in found.items():
            start = now()
            for _ in range(options.steps):
                step()
            times[name].append((now() - start) / options.steps)
    base = statistics.median(times["AdamW loop"])
    print(f"{options.device}, 64 tensors, width {options.width}, batch {options.batch}")
    for name, each in times.items():
        middle = statistics.median(each)
        print(f"{name:18} {1e3 * middle:8.2f} ms  {middle / base:5.2f} x")


if __name__ == "__main__":
    main()
