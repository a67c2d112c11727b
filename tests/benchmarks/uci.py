"""UCI regression, 20 splits: one hidden layer of 50 ReLU units, precisions of noise and weights inferred.

    PYTHONPATH=tests python tests/benchmarks/uci.py concrete energy yacht wine

A split's network is a slice of stacked parameters, so that all 20 train together: the rule is elementwise, and a mean over 20 networks of
n data each is the loss of 20 n. Inputs are whitened by the training rows. No setting is a data set's own; `--validate` leaves the test rows
out and tests on a tenth of the training rows instead, to choose settings by.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from oracles import arrays
from torch import Tensor
from torch.distributions import Normal, StudentT

from pyro_blr.nn import BLROptimizer, predict, regression_scores

HIDDEN, DRAWS = 50, 200
# Of the Gamma priors: of the precision of standardised noise, and of each layer's weights.
NOISE_SHAPE, NOISE_RATE, WEIGHT_SHAPE, WEIGHT_RATE = 1.0, 0.1, 1.0, 1.0


@dataclass(frozen=True)
class Splits:
    """Standardised training and test rows, (splits, n, d) and (splits, n); `scale` is that of the targets, (splits,)."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    scale: Tensor


def load(name: str, count: int = 20, validate: bool = False) -> Splits:
    """Whitened by the principal components of the training rows; none is magnified above 32."""
    data = arrays(f"uci/{name}.npz")
    tests = np.unpackbits(data["is_test"], axis=1)[:count, : int(data["n"])].astype(bool)
    found: list[tuple[np.ndarray, ...]] = []
    for test in tests:
        train = ~test
        if validate:
            test = np.zeros_like(train)
            test[np.random.default_rng(0).permutation(np.flatnonzero(train))[: train.sum() // 10]] = True
            train &= ~test
        x, y = data["x"][train], data["y"][train]
        centre, spread = x.mean(0), np.where(x.std(0) > 0, x.std(0), 1.0)
        z = (x - centre) / spread
        values, vectors = np.linalg.eigh(z.T @ z / len(z))
        turn = vectors / np.sqrt(np.maximum(values, 1e-3))
        scaled = [(rows - centre) / spread @ turn for rows in (x, data["x"][test])]
        level, scale = y.mean(), y.std()
        found.append((scaled[0], (y - level) / scale, scaled[1], (data["y"][test] - level) / scale, scale))
    return Splits(*(torch.tensor(np.stack(each), dtype=torch.float32) for each in zip(*found, strict=True)))


class Networks(torch.nn.Module):
    """One hidden layer of ReLU units for each split: (splits, n, inputs) to (splits, n)."""

    def __init__(self, splits: int, inputs: int) -> None:
        super().__init__()

        def start(*shape: int, inputs: int) -> torch.nn.Parameter:
            return torch.nn.Parameter((2 * torch.rand(splits, *shape) - 1) / math.sqrt(inputs))

        self.first, self.shift = start(inputs, HIDDEN, inputs=inputs), start(1, HIDDEN, inputs=inputs)
        self.second, self.level = start(HIDDEN, 1, inputs=HIDDEN), start(1, 1, inputs=HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return (torch.relu(x @ self.first + self.shift) @ self.second + self.level)[..., 0]


def batches(splits: Splits, size: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows without replacement until all were seen, of every split the same numbers."""
    rows = splits.x.shape[1]
    order = torch.randperm(rows)
    for _ in range(steps):
        if len(order) < size:
            order = torch.randperm(rows)
        yield splits.x[:, order[:size]], splits.y[:, order[:size]]
        order = order[size:]


def report(
    method: str, name: str, splits: Splits, draws: Tensor, freedom: float, variance: Tensor, seconds: float
) -> None:
    """Prints test log-likelihood and RMSE, in the units of the targets: mean over splits ± standard error.

    draws: (S, splits, n); noise Student-t of `freedom`, of squared scale (S or 1, splits).
    """
    scale = variance.sqrt()[..., None].expand(draws.shape)
    each = [
        regression_scores(
            StudentT(freedom, draws[:, k], scale[:, k]) if freedom < math.inf else Normal(draws[:, k], scale[:, k]), y
        )
        for k, y in enumerate(splits.y_test)
    ]
    likelihood = torch.tensor([found.log_likelihood for found in each]) - splits.scale.log()
    error = torch.tensor([found.rmse for found in each]) * splits.scale
    parts = [f"{v.mean():8.3f} ± {v.std() / math.sqrt(len(v)):.3f}" for v in (likelihood, error)]
    print(f"{name:10} {method:28} {parts[0]}  {parts[1]}  {seconds:7.0f} s", flush=True)


def rule(splits: Splits, steps: int, batch: int, decay: float, fit: float) -> tuple[Tensor, float, Tensor]:
    """Draws (S, splits, n), degrees of freedom and squared scale of the noise by BLROptimizer.

        q(τ) = Gamma(a + N/2, b + ½ N r̄²),     q(δ_l) = Gamma(a + |l|/2, b + ½ Σ_l (m² + σ²)),

    with r̄² the average of squared residuals of networks drawn from q; the weights then see E τ and E δ_l. During the part `fit` of
    the steps the noise is held at a tenth of the targets' spread and δ at 1: begun with more noise, units are pruned that the fit needs.
    """
    count, rows, inputs = splits.x.shape
    networks = Networks(count, inputs)
    parameters = list(networks.parameters())
    precisions = [torch.ones(count, 1, 1) for _ in parameters]
    optimizer = BLROptimizer(
        [{"params": parameters, "prior_precision": precisions}], num_data=count * rows, decay=decay
    )
    squares, residuals = torch.full((count,), 0.01), torch.zeros(count)
    shape = NOISE_SHAPE + rows / 2

    def rate() -> Tensor:
        return NOISE_RATE + rows / 2 * squares

    for step, (x, y) in enumerate(batches(splits, batch, steps)):

        def closure(x: Tensor = x, y: Tensor = y) -> tuple[Normal, Tensor]:
            mean = networks(x)
            residuals.copy_((mean.detach() - y).square().mean(1))
            return Normal(mean, (rate() / shape).sqrt()[:, None]), y

        optimizer.step(closure)
        if step < fit * steps:
            continue
        squares.lerp_(residuals, max(2 / (step - fit * steps + 20), 2 * batch / rows / 20))
        if step % 10 == 0:
            for parameter, precision in zip(parameters, precisions, strict=True):
                second = parameter.detach().square() + optimizer.stddev(parameter).square()
                size = parameter[0].numel()
                precision.copy_((WEIGHT_SHAPE + size / 2) / (WEIGHT_RATE + 0.5 * second.sum((1, 2), keepdim=True)))
    return predict(optimizer, networks, splits.x_test, num_samples=DRAWS), 2 * shape, rate()[None] / shape


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=["concrete", "energy", "yacht", "wine"])
    parser.add_argument("--steps", type=int, default=5_000)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--decay", type=float, default=10.0)
    parser.add_argument("--fit", type=float, default=0.1)
    parser.add_argument("--splits", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--validate", action="store_true")
    settings = parser.parse_args()
    print(settings, "torch", torch.__version__)
    for name in settings.names:
        splits = load(name, settings.splits, settings.validate)
        torch.manual_seed(settings.seed)
        start = time.process_time()
        found = rule(splits, settings.steps, settings.batch, settings.decay, settings.fit)
        report("BLROptimizer", name, splits, *found, time.process_time() - start)


if __name__ == "__main__":
    main()
