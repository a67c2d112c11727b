"""ArviZ's groups of one posterior, as named arrays: draws of q, and what the model says at them."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_blr.diagnostics import FEWEST_DRAWS, ParetoSmoothed, pareto_smoothed
from pyro_blr.graph import Plate

from ._arviz import Variable
from ._fitted import Fitted
from ._ratios import log_ratios
from ._runs import ModelRuns

__all__ = ["Groups", "draws_of_q", "model_groups", "posterior_groups", "weight_groups"]

Groups = dict[str, dict[str, Variable]]


def draws_of_q(posterior: Fitted, draws: Mapping[str, Tensor]) -> dict[str, Variable]:
    """Draws of all sites, (S, *shape), with their plates named."""
    variables = {}
    for block in posterior.blocks.values():
        for site in block.sites:
            names, kept = _axes(site.plates, len(site.batch_shape), tuple(draws[site.name].shape[1:]))
            variables[site.name] = _variable(draws[site.name], names, kept, _labels(site.plates, {}))
    return variables


def posterior_groups(posterior: Fitted, draws: Mapping[str, Tensor]) -> Groups:
    """What q says by itself: draws of its sites, their log density, and how it was fitted."""
    return {
        "posterior": draws_of_q(posterior, draws),
        "sample_stats": {"lq": Variable(_array(posterior.log_prob(draws))[None])},
        "variational": _fit(posterior),
    }


def weight_groups(posterior: Fitted, runs: ModelRuns, draws: Mapping[str, Tensor], joint: Tensor) -> Groups:
    """The importance weights of the draws and what they say of q; NaN, and why, where there are none."""
    num = len(joint)
    ratios, weights, reason = joint.new_full((num,), torch.nan), joint.new_full((num,), torch.nan), ""
    said = dict.fromkeys(("khat", "log_evidence", "log_evidence_se", "importance_ess"), float("nan"))
    try:
        found = log_ratios(posterior, runs, draws, joint=joint)
        ratios, reason = found.values, found.note
        if num >= FEWEST_DRAWS:
            weights, khat = pareto_smoothed(ratios, found.rounding)
            result = ParetoSmoothed(khat, ratios, weights, draws)
            numbers = khat, result.log_evidence, result.log_evidence_se, result.ess
            said = dict(zip(said, numbers, strict=True))
        else:
            reason = f"k-hat takes at least {FEWEST_DRAWS} draws"
    except ValueError as error:
        reason = str(error)
    return {
        "sample_stats": {"log_ratio": Variable(_array(ratios)[None]), "log_weight": Variable(_array(weights)[None])},
        "variational": {
            name: Variable(np.array([value]), sample=("chain",))
            for name, value in {**said, "khat_note": reason}.items()
        },
    }


def model_groups(
    runs: ModelRuns,
    draws: Mapping[str, Tensor],
    num: int,
    *,
    log_likelihood: bool,
    predictive: bool,
    prior: bool,
) -> Groups:
    """What the model says at draws of its latents."""
    latent, observed, derived = (runs.names(kind) for kind in ("latent", "observed", "derived"))
    _check_sites(draws, latent)
    record = runs.run(draws, num, derived, [*latent, *(observed if log_likelihood else ())])
    groups: Groups = {
        "posterior": {name: _laid_out(runs, name, record.values[name]) for name in derived},
        "log_prior": {name: _log_prior(runs, name, record.log_probs[name]) for name in latent},
        "sample_stats": {"lp": Variable(_array(record.joint)[None])},
        "observed_data": {name: _observed(runs, name) for name in observed},
        "constant_data": dict(_constants(runs)),
    }
    if log_likelihood:
        groups["log_likelihood"] = {name: _log_likelihood(runs, name, record.log_probs[name]) for name in observed}
    if predictive and observed:
        generated = runs.run(draws, num, observed, generate=True)
        groups["posterior_predictive"] = {name: _laid_out(runs, name, generated.values[name]) for name in observed}
    if prior:
        drawn = runs.run({}, num, [*latent, *derived, *observed], generate=True)
        groups["prior"] = {name: _laid_out(runs, name, drawn.values[name]) for name in [*latent, *derived]}
        groups["prior_predictive"] = {name: _laid_out(runs, name, drawn.values[name]) for name in observed}
    return groups


def _check_sites(draws: Mapping[str, Tensor], latent: Sequence[str]) -> None:
    foreign = sorted(set(draws) - set(latent))
    if foreign:
        raise ValueError(
            f"the posterior has sites {foreign}, which the model does not have; it has "
            f"{sorted(latent)}. Export with the model that was fitted, and arguments of the same structure"
        )
    lacking = sorted(set(latent) - set(draws))
    if lacking:
        warnings.warn(
            f"the posterior has no sites {lacking} of the model: they are drawn from their distributions in "
            "the model, and log_likelihood is conditional on these draws",
            stacklevel=4,
        )


def _axes(
    plates: Sequence[Plate], batch_rank: int, shape: tuple[int, ...]
) -> tuple[tuple[str | None, ...], tuple[int, ...]]:
    """(names, sizes) of the axes of one value: plates by name, None elsewhere.

    A batch axis of size 1 that no plate owns, right of one that a plate owns, only pads: it is left out.
    """
    by_dim = {plate.dim: plate.name for plate in plates}
    names, sizes = [], []
    for axis, size in enumerate(shape):
        dim = axis - batch_rank
        name = by_dim.get(dim) if dim < 0 else None
        pads = name is None and dim < 0 and size == 1 and any(other < dim for other in by_dim)
        if not pads:
            names.append(name)
            sizes.append(size)
    return tuple(names), tuple(sizes)


def _labels(plates: Sequence[Plate], subsamples: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """The coordinates of plates: the indices of their elements in this run."""
    labels = {}
    for plate in plates:
        if plate.name in subsamples and plate.subsample_size != plate.size:
            labels[plate.name] = _array(torch.as_tensor(subsamples[plate.name]))
        else:
            labels[plate.name] = np.arange(plate.size)
    return labels


def _variable(
    value: Tensor, names: tuple[str | None, ...], sizes: tuple[int, ...], labels: Mapping[str, np.ndarray]
) -> Variable:
    """A variable of (draws, *shape), as the draws of one chain."""
    fitting = {
        name: labels[name] for name, size in zip(names, sizes, strict=True) if name and len(labels[name]) == size
    }
    return Variable(_array(value).reshape(1, value.shape[0], *sizes), names, fitting)


def _laid_out(runs: ModelRuns, name: str, value: Tensor, batch_only: bool = False) -> Variable:
    statement = runs.statements[name]
    shape = statement.batch_shape if batch_only else statement.shape
    names, sizes = _axes(statement.plates, len(statement.batch_shape), tuple(shape))
    return _variable(value, names, sizes, _labels(statement.plates, runs.subsamples))


def _log_prior(runs: ModelRuns, name: str, log_prob: Tensor) -> Variable:
    return _laid_out(runs, name, torch.where(log_prob.isnan(), 0.0, log_prob), batch_only=True)


def _log_likelihood(runs: ModelRuns, name: str, log_prob: Tensor) -> Variable:
    """One value for each element: what is masked at every draw is left out, what is at some draws is 0."""
    counts = ~log_prob.isnan().reshape(len(log_prob), -1).all(0)
    log_prob = torch.where(log_prob.isnan(), 0.0, log_prob)
    variable = _laid_out(runs, name, log_prob, batch_only=True)
    if bool(counts.all()):
        return variable
    kept = counts.nonzero()[:, 0].numpy()
    places = np.unravel_index(kept, variable.values.shape[2:])
    beside = {
        axis: variable.labels.get(axis, np.arange(size))[place]
        for axis, size, place in zip(variable.names, variable.values.shape[2:], places, strict=True)
        if axis is not None
    }
    beside = beside or {"position": kept}
    axis = f"{name}_observed"
    return Variable(variable.values.reshape(1, len(log_prob), -1)[..., kept], (axis,), {axis: kept}, beside)


def _observed(runs: ModelRuns, name: str) -> Variable:
    """The data, with NaN where they are masked."""
    statement, value = runs.statements[name], runs.first.values[name]
    masked = runs.first.log_probs[name].isnan()
    if bool(masked.any()):
        masked = masked.reshape((*masked.shape, *[1] * (value.dim() - masked.dim())))
        value = torch.where(masked, torch.nan, value.to(torch.promote_types(value.dtype, torch.get_default_dtype())))
    variable = _laid_out(runs, name, value.expand(statement.shape)[None])
    return Variable(variable.values[0, 0], variable.names, variable.labels, sample=())


def _constants(runs: ModelRuns) -> Iterator[tuple[str, Variable]]:
    """The arrays among the model's arguments that are not observed data, by the arguments' names."""
    target = getattr(runs.model, "forward", runs.model) if isinstance(runs.model, torch.nn.Module) else runs.model
    try:
        bound = inspect.signature(target).bind(*runs.args, **runs.kwargs).arguments
    except (TypeError, ValueError):  # a callable without a readable signature
        bound = {"args": tuple(runs.args), **runs.kwargs}
    data = [runs.first.values[name] for name in runs.names("observed")]
    for name, value in _arrays("", bound):
        if not any(_is_same(value, item) for item in data):
            yield name, Variable(_array(value), sample=())


def _arrays(prefix: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield prefix, value
    elif isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        yield prefix, torch.as_tensor(value)
    elif isinstance(value, (dict, list, tuple)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _arrays(f"{prefix}_{key}" if prefix else str(key), item)


def _is_same(value: Tensor, data: Tensor) -> bool:
    if value.shape != data.shape or value.device != data.device:
        return False
    return value is data or bool(((value == data) | (value != value) & (data != data)).all())


def _fit(posterior: Fitted) -> dict[str, Variable]:
    scalars = {
        "elbo": float(posterior.elbo),
        "elbo_se": float(getattr(posterior, "elbo_se", None) or 0.0),
        "elbo_kind": str(getattr(posterior, "elbo_kind", "")),
        "num_steps": int(posterior.num_steps),
        "converged": bool(posterior.converged),
        "stop_reason": str(posterior.stop_reason),
    }
    variables = {name: Variable(np.array([value]), sample=("chain",)) for name, value in scalars.items()}
    trace = np.array([list(posterior.history)], dtype=float)
    return {"elbo_trace": Variable(trace, sample=("chain", "step")), **variables}


def _array(value: Tensor) -> np.ndarray:
    value = value.detach().cpu()
    if value.dtype in (torch.bfloat16, torch.float16):  # NumPy has no bfloat16, netCDF neither
        value = value.float()
    return value.resolve_conj().numpy()
