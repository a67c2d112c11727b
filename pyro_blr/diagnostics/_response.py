"""Linear response: covariances from how the optimum of the bound moves when the model is tilted.

Where log p gains t g(z), the optimal E_q[h] moves by Cov_LR(g, h) t (Giordano, Broderick and Jordan 2018,
Covariances, robustness and variational Bayes, theorem 1).  At λ = ∇_μ E_q[log p] that is

    Cov_LR(g, h) = ∇_μ gᵀ (F⁻¹ − ∇²_μ E_q[log p])⁻¹ ∇_μ h

with F = Cov_q(T), the same in any coordinates.  What g and h hold beyond the span of T keeps the covariance
that q gives it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_blr.ascent import Ascent
from pyro_blr.beliefs import Beliefs
from pyro_blr.blocks import Block, is_gaussian
from pyro_blr.draws import Draws
from pyro_blr.families import SparseNormal
from pyro_blr.marginals import bijection_of, marginal
from pyro_blr.program import Program

from ._coordinates import Coordinates, coordinates_of

__all__ = ["LinearResponse", "linear_response"]

MOST = 2000  # parameters of q: the response solves a dense system of that size
MOST_DIFFERENCES = 400  # where the Hessian is made of differences of gradients
NUM_DRAWS = 1024
WORK = 2 * 10**10
CHUNK = 64  # rows of a Jacobian at once
FLAT = 1e-9  # an eigenvalue of the bound's negative Hessian, relative to q's own, that is none
NOISE = 0.1  # the same, where the Hessian is an average over draws


@dataclass(frozen=True, repr=False, eq=False)
class LinearResponse:
    """Covariances of the sites' values that q's factors leave out, by linear response.

    `is_saddle`: the bound has a direction that gains where it ended, and there are no covariances.
    """

    is_saddle: bool
    inverse: Tensor
    jacobians: Mapping[str, Tensor]
    variances: Mapping[str, Tensor]
    blocks: Mapping[str, Block]

    def stddev(self, site: str) -> Tensor:
        """The standard deviation of every element of a site, of the site's shape."""
        rows = self._rows(site)
        gained = ((rows @ self.inverse) * rows).sum(-1) - rows.square().sum(-1)
        return (self.variances[site] + gained.reshape(self.variances[site].shape)).sqrt()

    def covariance(self, sites: Sequence[str]) -> Tensor:
        """The covariance matrix of several sites, flattened and in this order."""
        names = [sites] if isinstance(sites, str) else list(sites)
        rows = torch.cat([self._rows(name) for name in names])
        for name in names:
            self._refuse_dependent(name)
        left = torch.cat([self.variances[name].flatten() for name in names]) - rows.square().sum(-1)
        return rows @ self.inverse @ rows.mT + torch.diag(left)

    def _rows(self, site: str) -> Tensor:
        if self.is_saddle:
            raise ValueError(
                "the bound is not at a maximum, where alone it has a linear response; start elsewhere (init)"
            )
        if site not in self.jacobians:
            raise KeyError(f"found site {site!r}, expected one of {list(self.jacobians)}")
        return self.jacobians[site]

    def _refuse_dependent(self, site: str) -> None:
        block = self.blocks[site]
        is_real = is_gaussian(block.family) and bijection_of(next(s for s in block.sites if s.name == site))[0] is None
        if block.num_directions > 1 and not is_real:
            raise ValueError(
                f"site {site!r}: its elements depend on each other in q as {type(block.family).__name__}, of which only the "
                "variances are known in closed form; use stddev"
            )


def linear_response(program: Program, naturals: Mapping[str, Tensor]) -> LinearResponse:
    """The response at the present λ, which is taken to be an optimum; raises where it cannot be found, and says why."""
    if sum(block.batch_shape.numel() for block in program.blocks.values()) < 2:
        raise ValueError(
            "q is one factor, which leaves no covariance out; use posterior[name] and posterior.joint(names)"
        )
    sparse = [name for name, block in program.blocks.items() if isinstance(block.family, SparseNormal)]
    if sparse:
        raise ValueError(
            f"{' and '.join(sparse)}: a sparse Gaussian's response is not solved for; it holds the correlations inside it"
        )
    parts = {name: coordinates_of(block, naturals[name]) for name, block in program.blocks.items()}
    total = sum(c.natural.shape[:-1].numel() * c.size for c in parts.values())
    _refuse(program, total)
    objective = _objective(program, parts)
    checked = all(block.dtype == torch.float64 for block in program.blocks.values())
    gradient, hessian = _derivatives(objective, total, program.messages.device, checked)
    for start, coordinates, piece in _pieces(parts, gradient):
        batch, size = piece.shape[:-1].numel(), piece.shape[-1]
        index = start + torch.arange(batch * size, device=hessian.device).reshape(batch, size)
        rows, columns = index.unsqueeze(-1), index.unsqueeze(-2)
        own = coordinates.own(hessian[rows, columns].reshape(*piece.shape, size), piece)
        hessian[rows, columns] = own.reshape(batch, size, size)
    lack = torch.eye(total, dtype=hessian.dtype, device=hessian.device) - 0.5 * (hessian + hessian.mT)
    inverse = _inverse(lack, FLAT if program.is_deterministic else NOISE)
    jacobians, variances, blocks = _sites(parts, total)
    return LinearResponse(inverse is None, lack if inverse is None else inverse, jacobians, variances, blocks)


def _inverse(lack: Tensor, noise: float) -> Tensor | None:
    """The inverse of a positive definite matrix; None where an eigenvalue is below zero beyond the noise."""
    factor, failed = torch.linalg.cholesky_ex(lack)
    if not int(failed) and float(factor.diagonal().min()) > math.sqrt(FLAT):
        return torch.cholesky_inverse(factor)
    lowest = float(torch.linalg.eigvalsh(lack).min())
    if lowest <= -noise:
        return None
    raise ValueError(
        f"the bound is flat in some direction (curvature {lowest:.1g} of q's own): that direction is not identified, or known "
        "from draws only. Fix or tie what the data do not tell apart"
    )


def _refuse(program: Program, total: int) -> None:
    if program.is_subsampled:
        raise ValueError("the model sees a part of the data (subsampled plates), whose curvature is not the bound's")
    copies = [name for name, block in program.blocks.items() if block.copies is not None]
    if copies:
        raise ValueError(f"sites {copies} stand for several exchangeable copies each, which no single tilt moves")
    if total > MOST:
        raise ValueError(f"q has {total} parameters, more than the {MOST} that are solved for at once")
    for name, plan in program.messages.plans.items():
        if plan.deterministic:
            continue
        if plan.replayed:
            raise ValueError(
                f"factor {name!r} is only known from runs of the model, which are not differentiated twice"
            )
        rough = [b for b in plan.sampled if not is_gaussian(program.blocks[b].family)]
        if rough:
            raise ValueError(
                f"factor {name!r} is averaged over draws of {', '.join(rough)}, which is not Gaussian: no second derivative"
            )
    drawn = [name for name, plan in program.messages.plans.items() if not plan.deterministic]
    if drawn and program.messages.elements(drawn) * NUM_DRAWS * total > WORK:
        raise ValueError("the factors that are averaged over draws are too many to be differentiated twice")


def _pieces(own: Mapping[str, Coordinates], flat: Tensor) -> list[tuple[int, Coordinates, Tensor]]:
    """(start, coordinates, its part of a flat vector, (*batch, k)) of every block."""
    result, start = [], 0
    for coordinates in own.values():
        batch = coordinates.natural.shape[:-1]
        stop = start + batch.numel() * coordinates.size
        result.append((start, coordinates, flat[start:stop].reshape(*batch, coordinates.size)))
        start = stop
    return result


def _objective(program: Program, own: Mapping[str, Coordinates]) -> Callable[[Tensor], Tensor]:
    """ξ ↦ Σ_f s_f E_q[log f], on draws that stay fixed where it takes any."""
    draws = None if program.is_deterministic else Draws(0, NUM_DRAWS)

    def objective(xi: Tensor) -> Tensor:
        beliefs = Beliefs(program.blocks, {name: c.natural for name, c in own.items()})
        for name, (_, coordinates, piece) in zip(own, _pieces(own, xi), strict=True):
            beliefs.set_moments(name, coordinates.moments(piece))
        return Ascent(program, beliefs).expected_log_joint(draws)

    return objective


def _derivatives(
    objective: Callable[[Tensor], Tensor], size: int, device: torch.device, checked: bool
) -> tuple[Tensor, Tensor]:
    """(∇, ∇²) at 0: by automatic differentiation, checked along one line (where rounding leaves something to
    check by); by differences of ∇ where that fails.
    """

    def slope(xi: Tensor, create_graph: bool = False) -> tuple[Tensor, Tensor]:
        leaf = xi.detach().requires_grad_()
        with torch.enable_grad():
            return leaf, torch.autograd.grad(objective(leaf), leaf, create_graph=create_graph)[0]

    origin = torch.zeros(size, dtype=torch.float64, device=device)
    line = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)
    step = 1e-4 / max(1.0, float(line.norm()))
    along = (slope(origin + step * line)[1] - slope(origin - step * line)[1]) / (2 * step)
    try:
        leaf, gradient = slope(origin, create_graph=True)
        hessian = _jacobian(gradient, leaf)
        if not checked or torch.allclose(hessian @ line, along, rtol=1e-3, atol=1e-3 * float(along.norm()) + 1e-6):
            return gradient.detach(), hessian
    except RuntimeError:  # some operation has no second derivative
        pass
    if size > MOST_DIFFERENCES:
        raise ValueError(
            f"a factor has no second derivative in closed form, and q has {size} parameters, more than {MOST_DIFFERENCES}"
        )
    basis = 1e-4 * torch.eye(size, dtype=torch.float64, device=device)
    columns = [(slope(e)[1] - slope(-e)[1]) / 2e-4 for e in basis]
    return slope(origin)[1].detach(), torch.stack(columns).mT.detach().clone()


def _jacobian(values: Tensor, leaf: Tensor) -> Tensor:
    """(n, numel of leaf) derivatives of each of n values."""
    if not values.requires_grad:
        return torch.zeros(len(values), leaf.numel(), dtype=leaf.dtype, device=leaf.device)
    basis = torch.eye(len(values), dtype=values.dtype, device=values.device)

    def product(rows: Tensor, batched: bool) -> Tensor:
        (found,) = torch.autograd.grad(
            values, leaf, rows, retain_graph=True, is_grads_batched=batched, allow_unused=True, materialize_grads=True
        )
        return found.reshape(*rows.shape[:-1], -1)

    try:
        return torch.cat([product(rows, True) for rows in basis.split(CHUNK)]).detach()
    except RuntimeError:  # an operation that cannot be batched
        return torch.stack([product(row, False) for row in basis]).detach()


def _sites(own: Mapping[str, Coordinates], total: int) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Block]]:
    """Site -> ∇_ξ of its elements' means (n, total), and their variances under q."""
    jacobians, variances, blocks = {}, {}, {}
    zero = torch.zeros(total, dtype=torch.float64, device=next(iter(own.values())).natural.device)
    for start, coordinates, piece in _pieces(own, zero):
        leaf = piece.detach().requires_grad_()
        for site in coordinates.block.site_names:
            with torch.enable_grad():
                law = marginal(coordinates.block, site, coordinates.at(leaf))
                mean = law.mean.double()
                rows = _jacobian(mean.flatten(), leaf)
            wide = torch.zeros(len(rows), total, dtype=rows.dtype, device=rows.device)
            wide[:, start : start + leaf.numel()] = rows
            jacobians[site], variances[site] = wide, law.variance.detach().double()
            blocks[site] = coordinates.block
    return jacobians, variances, blocks
