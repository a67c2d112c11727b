"""What `posterior.psis()` and `posterior.summary()` return: q judged by the model at draws of q itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pyro_blr.diagnostics import (
    FEWEST_DRAWS,
    GOOD,
    NEGLIGIBLE,
    POOR,
    Facts,
    LinearResponse,
    ParetoSmoothed,
    Restart,
    Summary,
    pareto_smoothed,
    warnings_about,
)
from pyro_blr.export import Fitted, ModelRuns, draws_of_q, log_ratios, xarray_of

__all__ = ["psis", "summary"]

MOVED = 0.3  # sd of a mean, or log ratio of sds


class Judged(Fitted, Protocol):
    """What a report needs of a posterior."""

    elbo_se: float
    elbo_kind: str
    restarts: Sequence[Restart]

    def __getitem__(self, name: str) -> Any: ...
    def linear_response(self) -> LinearResponse: ...
    def other_optima(self) -> Sequence[Restart]: ...


def psis(
    posterior: Judged,
    num_samples: int = 2000,
    *,
    sum_out_discrete: bool = True,
    model: Callable | None = None,
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> ParetoSmoothed:
    """Pareto-smoothed importance weights w ∝ p(z, x) / q(z) at `num_samples` draws of q, and their k̂.

    Draws come from torch's generator.  `model`, `args` and `kwargs` are those of the fit unless given.  Finite
    discrete sites beside continuous ones are summed out, exactly, where the model runs at all their states at
    once; `sum_out_discrete=False` weighs joint draws instead.
    """
    _check(num_samples)
    with torch.no_grad():
        return _weighed(posterior, posterior.sample((num_samples,)), sum_out_discrete, model, args, kwargs)


def _check(num_samples: int) -> None:
    if isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < FEWEST_DRAWS:
        raise ValueError(
            f"num_samples: found {num_samples!r}, expected an integer of at least {FEWEST_DRAWS}: k-hat is fitted to the "
            "largest weights"
        )


def _weighed(
    posterior: Judged,
    draws: Mapping[str, Tensor],
    sum_out_discrete: bool,
    model: Callable | None,
    args: Sequence[Any] | None,
    kwargs: Mapping[str, Any] | None,
) -> ParetoSmoothed:
    model = posterior.model if model is None else model
    if model is None:
        raise ValueError(
            "the posterior has no model (one read from a file has none), so log p(z, x) is not known; "
            "pass model=, args= and kwargs="
        )
    called = tuple(posterior.args if args is None else args), dict(posterior.kwargs if kwargs is None else kwargs)
    ratios = log_ratios(posterior, ModelRuns(model, *called), draws, sum_out_discrete=sum_out_discrete)
    weights, khat = pareto_smoothed(ratios.values, ratios.rounding)
    return ParetoSmoothed(
        khat,
        ratios.values,
        weights,
        draws,
        elbo=posterior.elbo,
        elbo_se=posterior.elbo_se or 0.0,
        elbo_kind=posterior.elbo_kind,
        summed_out=ratios.summed_out,
        note=ratios.note,
    )


def summary(
    posterior: Judged,
    num_samples: int = 2000,
    *,
    sites: Sequence[str] | None = None,
    model: Callable | None = None,
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> Summary:
    """A row a scalar, and beneath the table whether q should be trusted, and if not, what to do.

    `mean` and `sd` are q's own, exactly; the interval is `az.summary`'s of `num_samples` draws, and named as
    there.  `sd_lr` is the linear-response standard deviation, where q factorises (`posterior.linear_response`);
    `mean_is` and `sd_is` weigh the draws (`posterior.psis`), where 0.5 ≤ k̂ < 0.7 or they differ much from q.
    `sites` narrows the table, not the diagnosis.
    """
    _check(num_samples)
    names = [site for block in posterior.blocks.values() for site in block.site_names]
    heavy = (-math.inf, "")
    with torch.no_grad():
        draws = posterior.sample((num_samples,))
        weighed, unavailable, shifted = None, "", ""
        try:
            weighed = _weighed(posterior, draws, True, model, args, kwargs)
        except ValueError as error:
            unavailable = str(error)
        table, sizes = _table(posterior, draws, names)
    if weighed is not None:
        table, shifted, heavy = _beside(table, names, weighed)
    response, notes = _response(posterior)
    if response is not None and not response.is_saddle:
        table.insert(2, "sd_lr", np.concatenate([_flat(response.stddev(name)) for name in names]))
        notes.append("sd_lr: standard deviations with what q's factors say of each other (linear response)")
    facts = Facts(
        posterior.converged,
        posterior.stop_reason,
        posterior.elbo,
        posterior.elbo_se or 0.0,
        weighed.khat if weighed is not None else float("nan"),
        weighed.most_error if weighed is not None else float("inf"),
        shifted,
        heavy,
        unavailable,
        [name if not block.elements else f"the elements of {name}" for name, block in posterior.blocks.items()],
        [*posterior.restarts, *posterior.other_optima()],
        response is not None and response.is_saddle,
    )
    table, sizes = _narrowed(table, sizes, sites)
    return Summary(table, sizes, _ending(posterior), _bound(posterior), warnings_about(facts), weighed, notes)


def _narrowed(
    table: Any, sizes: list[tuple[str, int]], sites: Sequence[str] | str | None
) -> tuple[Any, list[tuple[str, int]]]:
    """The rows of some sites, in their order."""
    if sites is None:
        return table, sizes
    wanted = [sites] if isinstance(sites, str) else list(sites)
    starts = dict(zip((name for name, _ in sizes), np.cumsum([0, *(size for _, size in sizes)]), strict=False))
    length = dict(sizes)
    unknown = [name for name in wanted if name not in length]
    if unknown:
        raise ValueError(f"sites: found {unknown}, expected latent sites of the model: {list(length)}")
    rows = [row for name in wanted for row in range(starts[name], starts[name] + length[name])]
    return table.iloc[rows], [(name, length[name]) for name in wanted]


def _beside(table: Any, names: Sequence[str], weighed: ParetoSmoothed) -> tuple[Any, str, tuple[float, str]]:
    """The table, with weighted moments where they are better than q's; what they move most; the largest k̂ of a variance."""
    heavy = weighed.khat_of_moments() if weighed.most_error >= NEGLIGIBLE else (-math.inf, "")
    if not weighed.is_trusted:
        return table, "", heavy
    corrected = {"mean_is": _column(names, weighed, weighed.mean), "sd_is": _column(names, weighed, weighed.stddev)}
    shifted = _shifted(table, corrected, weighed.ess)
    is_better = weighed.khat >= GOOD or heavy[0] >= POOR or shifted
    return table.assign(**corrected) if is_better else table, shifted, heavy


def _shifted(table: Any, corrected: Mapping[str, np.ndarray], ess: float) -> str:
    """The scalar that weights move most, in words, where they move one by more than `MOVED` and their own noise."""
    mean, sd = table["mean"].to_numpy(), table["sd"].to_numpy()
    with np.errstate(all="ignore"):
        ratio = corrected["sd_is"] / sd
        beyond = np.abs(corrected["mean_is"] - mean) / sd - 3 * ratio / np.sqrt(ess)
        spread = np.abs(np.log(ratio)) - 3 / np.sqrt(2 * ess)
    worst = np.nan_to_num(np.maximum(beyond, spread), nan=0.0, posinf=0.0)
    place = int(worst.argmax()) if len(worst) else 0
    if not len(worst) or worst[place] < MOVED:
        return ""
    after = f"{corrected['mean_is'][place]:.3g} ± {corrected['sd_is'][place]:.2g}"
    return f"{table.index[place]} is {mean[place]:.3g} ± {sd[place]:.2g} in q and {after} by weights"


def _response(posterior: Judged) -> tuple[LinearResponse | None, list[str]]:
    """What q's factors say of each other, or why that is not known; neither where q is one factor."""
    if sum(block.full_shape.numel() for block in posterior.blocks.values()) < 2:
        return None, []
    try:
        return posterior.linear_response(), []
    except ValueError as error:
        return None, [f"No linear response: {error}"]


def _table(posterior: Judged, draws: Mapping[str, Tensor], names: Sequence[str]) -> tuple[Any, list[tuple[str, int]]]:
    """ArviZ's summary of the draws, with the moments of q in place of theirs."""
    import arviz
    import pandas

    found = draws_of_q(posterior, draws)
    data = xarray_of({"posterior": {name: found[name] for name in names}})
    said = arviz.summary(data, kind="stats", fmt="xarray", round_to="none")
    axis = said["metric"] if "metric" in said.dims else said["summary"]  # of the 0.2x line; from 1.0 on
    columns = [str(label) for label in axis.values]
    parts, labels, sizes = [], [], []
    for name, variable in zip(names, said.data_vars.values(), strict=True):
        values = variable.transpose(axis.name, ...).values.reshape(len(columns), -1)
        parts.append(values.T)
        labels += _labels(name, found[name].values.shape[2:])
        sizes.append((name, values.shape[1]))
    table = pandas.DataFrame(np.concatenate(parts), index=labels, columns=columns)
    table["mean"] = np.concatenate([_flat(posterior[name].mean) for name in names])
    table["sd"] = np.concatenate([_flat(posterior[name].stddev) for name in names])
    return table, sizes


def _labels(name: str, shape: Sequence[int]) -> list[str]:
    """`w`, or `w[0, 2]` in the order of its elements, as ArviZ writes them."""
    return [f"{name}[{', '.join(map(str, index))}]" if shape else name for index in np.ndindex(*shape)]


def _flat(value: Tensor) -> np.ndarray:
    return value.detach().double().cpu().numpy().reshape(-1)


def _column(names: Sequence[str], weighed: ParetoSmoothed, moment: Callable[[str], Tensor]) -> np.ndarray:
    """NaN for sites that the weights do not speak of."""
    parts = [
        np.full(weighed.draws[name][0].numel(), np.nan) if name in weighed.summed_out else _flat(moment(name))
        for name in names
    ]
    return np.concatenate(parts)


def _ending(posterior: Judged) -> str:
    state = "converged" if posterior.converged else "not converged"
    return f"{state} after {posterior.num_steps} steps" + (
        f": {posterior.stop_reason}" if posterior.stop_reason else ""
    )


def _bound(posterior: Judged) -> str:
    error = f" ± {posterior.elbo_se:.2g}" if posterior.elbo_se else ""
    return f"bound {posterior.elbo:.6g}{error}" + (f" ({posterior.elbo_kind})" if posterior.elbo_kind else "")
