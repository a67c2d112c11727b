"""log p(z, x) − log q(z) at draws of q: the importance weights that judge it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_blr.marginals import log_prob_of

from ._fitted import Fitted
from ._marginal import log_marginal
from ._runs import ModelRuns

__all__ = ["Ratios", "log_ratios"]

EQUAL = 1e-3  # nats: log weights within it are equal for any purpose


@dataclass(frozen=True)
class Ratios:
    """(S,) log p − log q in float64; differences below `rounding` say nothing."""

    values: Tensor
    rounding: float
    summed_out: tuple[str, ...] = ()
    note: str = ""


def log_ratios(
    posterior: Fitted,
    runs: ModelRuns,
    draws: Mapping[str, Tensor],
    *,
    joint: Tensor | None = None,
    sum_out_discrete: bool = True,
) -> Ratios:
    """The ratios at draws of all sites, (S, *shape); `joint` is log p(z, x) there, where it is known.

    Finite discrete sites beside continuous ones are summed out of p and left out of q: of a plate of N
    assignments each draw is improbable by itself, which says nothing about the sites that matter.
    """
    _refuse(posterior, runs)
    num = len(next(iter(draws.values())))
    discrete = [name for block in posterior.blocks.values() if block.is_discrete for name in block.site_names]
    summed_out: tuple[str, ...] = ()
    note = ""
    if discrete and len(discrete) < len(draws) and sum_out_discrete:
        log_p = log_marginal(runs, draws, num, discrete)
        if log_p is not None:
            summed_out, joint = tuple(discrete), log_p
        else:
            note = (
                f"the model cannot be run at all states of {', '.join(discrete)} at once, so the weights are of joint draws: "
                "many discrete elements make k-hat large, whatever the other sites are like"
            )
    if joint is None:
        joint = runs.run(draws, num).joint
    log_q = torch.zeros(num, dtype=torch.float64)
    for name, block in posterior.blocks.items():
        if not set(block.site_names) & set(summed_out):
            log_q = log_q + log_prob_of(block, posterior.natural[name], draws).double().cpu()
    if not bool(log_q.isfinite().all()):
        raise ValueError(
            "log q is infinite at draws of q itself: found a point estimate, expected a density at every site"
        )
    size = max(
        1.0, *(float(part[part.isfinite()].abs().max()) for part in (joint, log_q) if bool(part.isfinite().any()))
    )
    floats = [p.dtype for p in runs.first.log_probs.values() if p.is_floating_point()]
    epsilon = max((torch.finfo(dtype).eps for dtype in floats), default=torch.finfo(torch.float64).eps)
    return Ratios(joint.cpu() - log_q, min(max(EQUAL, 64 * epsilon * size), 100 * EQUAL), summed_out, note)


def _refuse(posterior: Fitted, runs: ModelRuns) -> None:
    subsampled = sorted({p.name for s in runs.statements.values() for p in s.plates if p.subsample_size != p.size})
    if subsampled:
        raise ValueError(
            f"the model sees a part of the data (plates {subsampled} are subsampled), and importance weights take all of them; "
            "pass model= and args= that do not subsample"
        )
    copies = sorted(statement.name for statement in runs.statements.values() if statement.is_several)
    if copies:
        raise ValueError(
            f"sites {copies} stand for several exchangeable copies each, at which the model has no joint density to compare; "
            "write one statement a copy to be told k-hat"
        )
    own = {site for block in posterior.blocks.values() for site in block.site_names}
    lacking, foreign = sorted(set(runs.names("latent")) - own), sorted(own - set(runs.names("latent")))
    if lacking or foreign:
        raise ValueError(
            f"importance weights take one density over the same sites: found model sites {lacking} that q lacks and sites of q "
            f"{foreign} that the model lacks; pass the model that was fitted, and arguments of the same structure"
        )
