"""`to_arviz`: a posterior, or several restarts of one model as chains, in ArviZ's structure."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._arviz import Variable, build
from ._fitted import Fitted
from ._groups import Groups, model_groups, posterior_groups, weight_groups
from ._runs import ModelRuns

__all__ = ["to_arviz"]


def to_arviz(
    posterior: Fitted | Sequence[Fitted],
    num_samples: int = 1000,
    *,
    posterior_predictive: bool = True,
    log_likelihood: bool = True,
    prior: bool = False,
    coords: Mapping[str, Sequence] | None = None,
    dims: Mapping[str, Sequence[str | None]] | None = None,
    model: Callable | None = None,
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    parallel: bool = True,
) -> Any:
    """`num_samples` independent draws of q, and what the model says at them, in ArviZ's structure.

    That is its `InferenceData` in ArviZ 0.2x, xarray's `DataTree` from 1.0 on.  Groups:

    - `posterior`: the sites, and `pyro.deterministic` statements.  After chain and draw come the plates, by
      name, with the indices of their elements, then `{site}_dim_{k}`; `dims` and `coords` override.  Batch
      axes of size 1 that only pad are left out; a slash in a name becomes a dot.
    - `posterior_predictive`: the observed statements drawn anew, each given what was drawn before it.
    - `log_likelihood`, `log_prior`: one value for each element of a statement's batch, scaled neither by
      plates nor by `poutine.scale`.  Elements masked at every draw are left out of `log_likelihood`, which
      then has one axis `{site}_observed` with the places of the others; elsewhere masked is 0.
      `pyro.factor` is in neither.
    - `prior`, `prior_predictive`: as many draws of the model, if `prior=True`.
    - `observed_data` (NaN where masked); `constant_data`, the other arrays among the model's arguments.
    - `sample_stats`: `lp`, the joint log density scaled as in the ELBO, and `lq`, log q; mean(lp - lq)
      estimates the ELBO, and `az.loo_approximate_posterior` asks for both.  `log_ratio`, log p - log q with
      finite discrete sites summed out, and `log_weight`, the same Pareto-smoothed and normalised.
    - `variational`: `elbo_trace`, `elbo`, its kind and error, `num_steps`, `converged`, `stop_reason`; from the
      weights `khat`, `log_evidence` and its error, `importance_ess`, and `khat_note`, why they are NaN.

    Several posteriors (independent restarts) are chains; draws of one q are one chain, never split.  The
    model runs as it is given, on `model`, `args` and `kwargs` or else on those of the fit: a subsampled
    plate keeps one set of indices, drawn once.  All draws are one run where the model vectorises, which is
    compared with single runs; else, or with `parallel=False`, they are one run each.
    """
    posteriors = list(posterior) if isinstance(posterior, Sequence) else [posterior]
    _check(posteriors, num_samples)
    chains: list[Groups] = []
    subsamples: dict[str, Tensor] = {}  # shared, so that chains speak of the same elements
    wanted = {"log_likelihood": log_likelihood, "predictive": posterior_predictive, "prior": prior}
    for one in posteriors:
        arguments = tuple(one.args if args is None else args), dict(one.kwargs if kwargs is None else kwargs)
        chains.append(_chain(one, num_samples, model or one.model, arguments, subsamples, parallel, wanted))
    return build(_as_chains(chains), coords, dims)


def _chain(
    posterior: Fitted,
    num: int,
    model: Callable | None,
    arguments: tuple[tuple, dict[str, Any]],
    subsamples: dict[str, Tensor],
    parallel: bool,
    wanted: Mapping[str, bool],
) -> Groups:
    """The groups of one posterior."""
    with torch.no_grad():
        draws = posterior.sample((num,))
        groups = posterior_groups(posterior, draws)
        if model is None:
            warnings.warn(
                "the posterior has no model (one read from a file has none): all that needs it is left out; "
                "pass model=, args= and kwargs=",
                stacklevel=3,
            )
            return groups
        runs = ModelRuns(model, *arguments, subsamples=subsamples, parallel=parallel)
        of_model = model_groups(runs, draws, num, **wanted)
        joint = torch.from_numpy(of_model["sample_stats"]["lp"].values[0])
        for found in (of_model, weight_groups(posterior, runs, draws, joint)):
            for group, variables in found.items():
                groups.setdefault(group, {}).update(variables)
    return groups


def _check(posteriors: Sequence[Fitted], num_samples: int) -> None:
    if isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < 1:
        raise ValueError(f"num_samples={num_samples!r}: expected the number of draws, an integer of at least 1")
    if not posteriors:
        raise ValueError("to_arviz was given an empty list: expected a posterior, or several as chains")
    sites = [sorted(site for block in one.blocks.values() for site in block.site_names) for one in posteriors]
    for number, names in enumerate(sites):
        if names != sites[0]:
            raise ValueError(
                f"posterior {number} has the sites {names}, posterior 0 has {sites[0]}: chains are restarts "
                "of one model. Export different models one by one, and compare them with az.compare"
            )


def _as_chains(chains: Sequence[Groups]) -> Groups:
    """Variables with a chain axis joined along it; the others are data, the same for all."""
    return {
        group: {name: _join(group, name, [chain[group][name] for chain in chains]) for name in variables}
        for group, variables in chains[0].items()
    }


def _join(group: str, name: str, parts: Sequence[Variable]) -> Variable:
    first = parts[0]
    if "chain" not in first.sample:
        return first
    arrays = [part.values for part in parts]
    if "step" in first.sample:  # traces end when their run did
        longest = max(array.shape[1] for array in arrays)
        arrays = [np.pad(a, ((0, 0), (0, longest - a.shape[1])), constant_values=np.nan) for a in arrays]
    if len({array.shape[1:] for array in arrays}) > 1:
        raise ValueError(
            f"{group}[{name!r}] has shapes {[array.shape[1:] for array in arrays]} in the chains; "
            "expected one: chains are restarts of one model on the same arguments"
        )
    return Variable(np.concatenate(arrays), first.names, first.labels, first.beside, first.sample)
