"""The floor of each reference posterior: the error of the best full-rank Gaussian in unconstrained space.

    python tests/benchmarks/floors.py

By brute force, and without this package: the Gaussian that minimises KL(q ‖ p) on fixed quasi-random draws, from the
mode, by L-BFGS. Its mean and sd of every scalar are compared with the reference in units of the reference's sd, and
so are those of draws weighted by p / q, which tell whether the model here is the program that made the reference.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import arviz as az
import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.poutine.subsample_messenger import _Subsample
from scipy.optimize import minimize
from torch import Tensor
from torch.distributions import biject_to

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from posteriors import CASES, Case, errors, reference_of  # noqa: E402

CHUNK = 256


def at_zero(site: dict) -> Tensor:
    """The point of a site's support whose unconstrained coordinates are 0; a density without draws has one too."""
    bijection = biject_to(site["fn"].support)
    return bijection(torch.zeros(bijection.inverse_shape(site["fn"].shape())))


class Target:
    """−log p of unconstrained vectors, and what they are in the model's own space."""

    def __init__(self, case: Case):
        self.case = case
        self.data, self.reference = reference_of(case)
        start = poutine.trace(InitMessenger(at_zero)(case.model)).get_trace(self.data)
        latents = [name for name in start.stochastic_nodes if not isinstance(start.nodes[name]["fn"], _Subsample)]
        self.transforms = {name: biject_to(start.nodes[name]["fn"].support) for name in latents}
        unconstrained = {name: self.transforms[name].inv(start.nodes[name]["value"]) for name in self.transforms}
        self.shapes = {name: value.shape for name, value in unconstrained.items()}
        self.start = torch.cat([value.reshape(-1) for value in unconstrained.values()])

    def unpack(self, u: Tensor) -> dict[str, Tensor]:
        """(…, D) as the unconstrained sites."""
        parts = u.split([shape.numel() for shape in self.shapes.values()], -1)
        return {
            name: part.reshape((*u.shape[:-1], *shape))
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def energy(self, u: Tensor) -> Tensor:
        parts, values, jacobian = self.unpack(u), {}, torch.zeros((), dtype=u.dtype)
        trace = poutine.trace(poutine.condition(self.case.model, data=values))
        for name, part in parts.items():
            values[name] = self.transforms[name](part)
            jacobian = jacobian + self.transforms[name].log_abs_det_jacobian(part, values[name]).sum()
        return -trace.get_trace(self.data).log_prob_sum() - jacobian

    def latents(self, u: Tensor) -> dict[str, Tensor]:
        return {name: self.transforms[name](part) for name, part in self.unpack(u).items()}


def mode(target: Target) -> Tensor:
    """The best of a few L-BFGS ascents from jittered starts."""
    gradient = torch.func.grad_and_value(target.energy)

    def objective(u: np.ndarray) -> tuple[float, np.ndarray]:
        slope, value = gradient(torch.as_tensor(u))
        return (float(value), slope.numpy()) if torch.isfinite(value) else (1e20, np.zeros_like(u))

    generator = np.random.default_rng(0)
    options = {"maxiter": 2000, "maxfun": 5000}
    found = []
    for spread in (0.0, 0.1, 0.5, 1.0):
        start = target.start.numpy() + spread * generator.normal(size=target.start.shape)
        found.append(minimize(objective, start, jac=True, method="L-BFGS-B", options=options))
    return newton(target, torch.as_tensor(min(found, key=lambda result: result.fun).x))


def curvature_root(target: Target, u: Tensor) -> Tensor:
    """A Cholesky factor of |∇²U|⁻¹."""
    hessian = torch.func.hessian(target.energy)(u)
    values, vectors = torch.linalg.eigh(0.5 * (hessian + hessian.mT))
    return torch.linalg.cholesky((vectors / values.abs().clamp_min(1e-13 * float(values.abs().max()))) @ vectors.mT)


def newton(target: Target, u: Tensor) -> Tensor:
    """Damped Newton steps, which long narrow valleys do not slow."""
    for _ in range(100):
        root, slope, height = curvature_root(target, u), torch.func.grad(target.energy)(u), target.energy(u)
        step = root @ (root.mT @ slope)
        rate = 1.0
        while rate > 1e-6 and not target.energy(u - rate * step) < height:
            rate /= 2
        if rate <= 1e-6 or float(slope @ step) < 1e-10:
            break
        u = u - rate * step
    return u


def best_gaussian(target: Target, num_draws: int) -> tuple[Tensor, Tensor]:
    """(m, L) that minimise E U(m + Lε) − log |L| on fixed draws, from the mode and its curvature."""
    centre = mode(target)
    dim = len(centre)
    root = curvature_root(target, centre)
    sobol = torch.quasirandom.SobolEngine(dim, scramble=True, seed=1).draw(num_draws // 2, dtype=torch.float64)
    noise = torch.special.ndtri(sobol.clamp(1e-10, 1 - 1e-10))
    noise = torch.cat([noise, -noise])
    rows, columns = torch.tril_indices(dim, dim)
    gradients = torch.func.vmap(torch.func.grad_and_value(target.energy))

    def objective(v: np.ndarray) -> tuple[float, np.ndarray]:
        parameters = torch.as_tensor(v)
        white = torch.zeros(dim, dim, dtype=torch.float64)
        white[rows, columns] = parameters[dim:]
        diagonal = white.diagonal().clone()
        white = white.tril(-1) + torch.diag(diagonal.exp())
        scaled = root @ white
        points = centre + (root @ parameters[:dim]) + noise @ scaled.mT
        pieces = [gradients(piece) for piece in points.split(CHUNK)]
        slopes, energies = torch.cat([p[0] for p in pieces]), torch.cat([p[1] for p in pieces])
        if not bool(torch.isfinite(energies).all() & torch.isfinite(slopes).all()):
            return 1e20, np.zeros_like(v)
        value = energies.mean() - diagonal.sum()
        for_mean = root.mT @ slopes.mean(0)
        for_white = root.mT @ (slopes.mT @ noise / len(noise))
        for_white = for_white - torch.diag(for_white.diagonal()) + torch.diag(for_white.diagonal() * diagonal.exp() - 1)
        return float(value), torch.cat([for_mean, for_white[rows, columns]]).numpy()

    start = np.zeros(dim + len(rows))
    options = {"maxiter": 300, "maxfun": 500, "ftol": 1e-13, "gtol": 1e-7}
    found = minimize(objective, start, jac=True, method="L-BFGS-B", options=options)
    parameters = torch.as_tensor(found.x)
    white = torch.zeros(dim, dim, dtype=torch.float64)
    white[rows, columns] = parameters[dim:]
    white = white.tril(-1) + torch.diag(white.diagonal().exp())
    return centre + root @ parameters[:dim], root @ white


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=2048)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    pyro.enable_validation(False)  # its checks branch on values, which vmap cannot
    pyro.set_rng_seed(0)
    print(f"{'posterior':34} {'mean':>7} {'sd':>7}   {'weighted mean':>13} {'sd':>7}   k-hat")
    for case in CASES:
        if options.only not in case.name or case.form == "enumerated":
            continue
        target = Target(case)
        centre, root = best_gaussian(target, options.draws)
        noise = torch.randn(20_000, len(centre))
        points = centre + noise @ root.mT
        energy = torch.func.vmap(target.energy, chunk_size=CHUNK)
        log_weights = -energy(points) + 0.5 * (noise**2).sum(-1)
        smooth, shape = az.psislw(log_weights.numpy())
        scalars = case.scalars(target.latents(points), target.data)
        plain = errors(scalars, target.reference)
        better = errors(scalars, target.reference, torch.as_tensor(np.exp(smooth)))
        print(
            f"{case.name:34} {plain[0]:7.3f} {plain[1]:7.3f}   {better[0]:13.3f} {better[1]:7.3f}   {float(shape):.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
