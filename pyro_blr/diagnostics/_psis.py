"""Pareto-smoothed importance sampling: how far q is from the posterior, by the weights of its own draws."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

__all__ = ["FEWEST_DRAWS", "GOOD", "POOR", "ParetoSmoothed", "pareto_smoothed"]

NEGLIGIBLE = 0.1  # sd: an error of every mean that needs no correction
MODEST = 0.3  # the same, where k̂ is large and that of every variance is not: a tail of the weights that holds little
FEW = 2.0  # the same where a fifth of the draws are effective

FEWEST_DRAWS = 100  # below, fewer than twenty weights in the tail that is fitted
GOOD, POOR = 0.5, 0.7  # Vehtari et al. 2024, section 3.2.4; Yao et al. 2018, section 3.1


@dataclass(frozen=True, repr=False, eq=False)
class ParetoSmoothed:
    """w_s ∝ p(z_s, x) / q(z_s) at draws z_s of q, the largest smoothed by a generalised Pareto law of shape k̂.

    k̂ < 0.5: q is close to the posterior.  k̂ < 0.7: close enough that weighted draws correct it (`mean`,
    `stddev`, `resample`) while many draws are effective.  Above, neither q nor weights can be trusted (Vehtari et al. 2024, Pareto smoothed
    importance sampling; Yao et al. 2018, Yes, but did it work?).  −∞: the largest weights are equal; where all
    are, q is the posterior.

    `log_ratios` are log p − log q as they came, `log_weights` smoothed and normalised, both (S,) in float64;
    `draws` maps each site to (S, *shape).  `ess` is 1 / Σ w².  `log_evidence` is the log mean of the smoothed
    weights, with its standard error, which holds where k̂ < 0.7.  Sites in `summed_out` (finite discrete ones)
    are summed out of p and left out of q, exactly.
    """

    khat: float
    log_ratios: Tensor
    log_weights: Tensor
    draws: Mapping[str, Tensor]
    elbo: float = math.nan
    elbo_se: float = 0.0
    elbo_kind: str = ""
    summed_out: tuple[str, ...] = ()
    note: str = ""
    weights: Tensor = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", self.log_weights.exp())

    @property
    def num_samples(self) -> int:
        return len(self.log_ratios)

    @property
    def ess(self) -> float:
        """Effective sample size of the weighted draws."""
        return float(1 / self.weights.square().sum())

    @property
    def most_error(self) -> float:
        """√(S / ESS − 1), an estimate of √Var_q(w): by the Cauchy-Schwarz inequality no mean is off by more
        standard deviations (of q), as far as the draws can tell.
        """
        return math.sqrt(max(self.num_samples / self.ess - 1, 0.0))

    @property
    def is_trusted(self) -> bool:
        """k̂ < 0.5; or below 0.7 with a fifth of the draws effective, since k̂ is itself an estimate; or weights so
        nearly equal that their tail does not matter.
        """
        of_many = self.khat < POOR and self.most_error < FEW
        return self.khat < GOOD or of_many or self.most_error < NEGLIGIBLE

    @property
    def log_evidence(self) -> float:
        """log (1/S) Σ_s w_s, an estimate of log p(x)."""
        body = int(self.log_ratios.masked_fill(~self.log_ratios.isfinite(), math.inf).argmin())  # is not smoothed
        return float(self.log_ratios[body] - self.log_weights[body]) - math.log(self.num_samples)

    @property
    def log_evidence_se(self) -> float:
        """√(Σ w² − 1/S), by the delta method."""
        return math.sqrt(max(1 / self.ess - 1 / self.num_samples, 0.0))

    def mean(self, site: str) -> Tensor:
        """Σ_s w_s z_s."""
        draws = self._draws_of(site)
        return torch.tensordot(self.weights.to(draws.device), draws, 1)

    def stddev(self, site: str) -> Tensor:
        """√ Σ_s w_s (z_s − mean)²."""
        draws = self._draws_of(site)
        return torch.tensordot(self.weights.to(draws.device), (draws - self.mean(site)).square(), 1).sqrt()

    def _draws_of(self, site: str) -> Tensor:
        if site not in self.draws:
            raise KeyError(f"found site {site!r}, expected a latent site of the model: {list(self.draws)}")
        if site in self.summed_out:
            raise ValueError(
                f"site {site!r}: found a discrete site that was summed out of the weights, expected one that was drawn with them; "
                "use posterior[site], or weigh by sum_out_discrete=False"
            )
        return self.draws[site].double()

    def khat_of_moments(self, most: int = 50) -> tuple[float, str]:
        """The largest k̂ of w (z − E z)² over scalars z, and whose it is: of those whose weighted variance the draws
        know least, `most` at most.  (−∞, "") where there is none.

        Above 0.7 the draws do not tell the variance of z, whatever the weights alone are like: it may come from
        where q hardly draws (Vehtari et al. 2024, section 3.2.5).
        """
        names, parts = [], []
        for name, draws in self.draws.items():
            if name not in self.summed_out and draws.is_floating_point():
                part = draws.double().reshape(len(draws), -1).cpu()
                parts.append((part - (self.weights.unsqueeze(-1) * part).sum(0)).square())
                index = np.ndindex(*draws.shape[1:])
                names += [f"{name}[{', '.join(map(str, i))}]" if i else name for i in index]
        if not parts:
            return -math.inf, ""
        squares = torch.cat(parts, -1)
        shares = self.weights.unsqueeze(-1) * squares
        noise = shares.square().sum(0) / shares.sum(0).square()
        found = [(-math.inf, "")]
        for place in noise.nan_to_num(0.0).topk(min(most, len(names))).indices.tolist():
            ratios = self.log_ratios + squares[:, place].log()
            if bool(ratios.isfinite().any()) and not bool(ratios.isnan().any()):
                found.append((pareto_smoothed(ratios)[1], names[place]))
        return max(found, key=lambda pair: -math.inf if math.isnan(pair[0]) else pair[0])

    def resample(self, num_samples: int | None = None) -> dict[str, Tensor]:
        """Site -> draws, each one of `draws` with probability w_s; as many as there are, unless told."""
        count = self.num_samples if num_samples is None else num_samples
        index = torch.multinomial(self.weights, count, replacement=True)
        return {n: v[index.to(v.device)] for n, v in self.draws.items() if n not in self.summed_out}

    def __repr__(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> list[str]:
        """What there is to say, in words."""
        kind = f" ({self.elbo_kind})" if self.elbo_kind else ""
        error = f" ± {self.elbo_se:.2g}" if self.elbo_se else ""
        words = _khat_in_words(self.khat, self.most_error)
        result = [f"Pareto k-hat {words}; {self.ess:.0f} of {self.num_samples} draws effective"]
        result.append(f"log evidence {self.log_evidence:.6g} ± {self.log_evidence_se:.2g}")
        result[-1] += "" if self.is_trusted else ", not to be trusted at this k-hat"
        if not math.isnan(self.elbo):
            result.append(
                f"bound {self.elbo:.6g}{error}{kind}; log evidence - bound = {self.log_evidence - self.elbo:.2g}"
            )
        if self.summed_out:
            result.append(f"summed out, exactly: {', '.join(self.summed_out)}")
        return [*result, self.note] if self.note else result


def _khat_in_words(khat: float, most_error: float) -> str:
    if khat == -math.inf:
        equal = "all weights are equal: q is the posterior" if most_error < 1e-3 else "the largest weights are equal"
        return f"-inf ({equal})"
    if math.isnan(khat):
        return "not found: too few different weights to fit a tail to"
    if khat < GOOD:
        return f"{khat:.2f} (below 0.5: q is close to the posterior, or wider)"
    if most_error < NEGLIGIBLE:
        return f"{khat:.2f} (of weights that are nearly equal: no mean is off by more than {most_error:.1g} sd)"
    if khat >= POOR and most_error < MODEST:
        return (
            f"{khat:.2f} (above 0.7, of weights that differ little: no mean seems off by more than {most_error:.1g} sd)"
        )
    if khat < POOR and most_error >= FEW:
        return f"{khat:.2f} (between 0.5 and 0.7, with few draws effective: do not trust q)"
    if khat < POOR:
        return f"{khat:.2f} (between 0.5 and 0.7: weighted draws are better than q)"
    return f"{khat:.2f} (above 0.7: do not trust q)"


def pareto_smoothed(log_ratios: Tensor, rounding: float = 0.0) -> tuple[Tensor, float]:
    """(smoothed normalised log weights (S,), k̂) by ArviZ, of either line.

    Where the largest ratios differ by no more than `rounding` there is no tail: nothing is smoothed, k̂ = −∞.
    k̂ is NaN where ArviZ fits none (too few different weights).
    """
    ratios = log_ratios.detach().double().cpu()
    bad = ~(ratios.isfinite() | (ratios == -math.inf))
    if bool(bad.any()) or not bool(ratios.isfinite().any()):
        found = "NaN or inf" if bool(bad.any()) else "-inf everywhere"
        raise ValueError(
            f"log p(z, x) - log q(z): found {found} at {int(bad.sum()) or len(ratios)} of {len(ratios)} draws, expected numbers. "
            "Check that the model's log density is finite at draws of q"
        )
    tail = ratios.topk(math.ceil(min(len(ratios) / 5, 3 * math.sqrt(len(ratios)))) + 1).values
    if float(tail[0] - tail[-1]) <= rounding:
        return ratios - ratios.logsumexp(0), -math.inf
    smoothed, khat = _through_arviz(ratios.numpy())
    return torch.from_numpy(np.array(smoothed, dtype=float)), float(khat) if khat < math.inf else math.nan


def _through_arviz(log_ratios: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    import arviz

    if "psislw" in vars(arviz):  # the 0.2x line
        smooth = vars(arviz)["psislw"]
        return smooth(log_ratios)
    from arviz_stats.base import array_stats

    return array_stats.psislw(-log_ratios)  # it takes log likelihoods, the ratios of leave-one-out being their inverse
