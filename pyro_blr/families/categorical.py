"""The Categorical distribution, over indices or one-hot vectors."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyro.distributions as distributions
import torch
from torch import Tensor

from ._base import ExponentialFamily, gradient_of
from ._registry import register_family

_ONE_HOT = (torch.distributions.OneHotCategorical, torch.distributions.Multinomial)


@register_family(distributions.Categorical, distributions.OneHotCategorical, distributions.Multinomial)
@dataclass(frozen=True)
class Categorical(ExponentialFamily):
    """Categorical(p) over K states: T(x) = (1[x = k])_{k<K−1}, λ_k = log p_k/p_{K−1},
    A(λ) = log(1 + Σ e^λ_k), μ = (p_0, …, p_{K−2}).

    λ -> μ holds to rounding; μ -> λ to ε/p_{K−1} + ε relative in e^λ, the last state's probability being
    a difference. Values are indices, or one-hot vectors with `one_hot`;
    a Multinomial of one trial is one-hot.
    """

    num_categories: int
    one_hot: bool = False

    @property
    def event_shape(self) -> torch.Size:
        return torch.Size([self.num_categories] if self.one_hot else [])

    @property
    def num_parameters(self) -> int:
        return self.num_categories - 1

    @property
    def is_discrete(self) -> bool:
        return True

    def _logits(self, natural: Tensor) -> Tensor:
        return self._by_state(natural).movedim(0, -1)

    def _by_state(self, natural: Tensor) -> Tensor:
        """λ and the last state's zero, (K, *batch): sums over few states of a long batch are faster so."""
        return torch.cat([natural.movedim(-1, 0), natural.new_zeros(1, *natural.shape[:-1])])

    def _probs(self, natural: Tensor) -> Tensor:
        return self._by_state(natural).softmax(0).movedim(0, -1)

    def sufficient_statistics(self, value: Tensor) -> Tensor:
        if self.one_hot:
            return value[..., :-1]
        states = torch.arange(self.num_parameters, device=value.device)
        return (value.unsqueeze(-1) == states).to(torch.get_default_dtype())

    def log_partition(self, natural: Tensor) -> Tensor:
        return self._by_state(natural).logsumexp(0)

    def to_expectation(self, natural: Tensor) -> Tensor:
        return self._probs(natural)[..., :-1]

    def to_natural(self, expectation: Tensor) -> Tensor:
        return expectation.log() - (-expectation.sum(-1, keepdim=True)).log1p()

    def contains(self, natural: Tensor) -> Tensor:
        return (natural * 0).sum(-1) == 0  # NaN where any is not finite

    def _bend(self, natural: Tensor, direction: Tensor) -> Tensor:
        return natural

    def moments(self, natural: Tensor) -> dict[str, Tensor]:
        return {"probs": self._probs(natural)}

    def message(self, natural: Tensor, gradients: Mapping[str, Tensor]) -> Tensor:
        """∇_{p_k} f − ∇_{p_{K−1}} f."""
        gradient = gradient_of(gradients, "probs", self._logits(natural))
        return gradient[..., :-1] - gradient[..., -1:]

    def to_distribution(self, natural: Tensor) -> Any:
        distribution = distributions.OneHotCategorical if self.one_hot else distributions.Categorical
        return distribution(logits=self._logits(natural), validate_args=False)

    def from_distribution(self, distribution: Any) -> Tensor:
        if self.of(distribution) is None:
            raise self._refuse(distribution)
        logits = distribution.logits
        return logits[..., :-1] - logits[..., -1:]

    @classmethod
    def of(cls, distribution: Any) -> "Categorical | None":
        one_hot = isinstance(distribution, _ONE_HOT)
        if getattr(distribution, "total_count", 1) != 1:
            return None
        return cls(distribution.logits.shape[-1], one_hot)

    def entropy(self, natural: Tensor) -> Tensor:
        """−Σ p log p."""
        log_probs = self._by_state(natural).log_softmax(0)
        return -(log_probs.exp() * log_probs).sum(0)

    def entropy_from(self, natural: Tensor, moments: Mapping[str, Tensor]) -> Tensor:
        """A(λ) − ⟨λ, μ⟩ with A(λ) = max(λ, 0) − log max p: one logarithm an element, where −Σ p log p takes K."""
        probs = moments["probs"]
        if self.num_categories == 1:
            return self.entropy(natural)
        log_partition = natural.amax(-1).clamp_min(0) - probs.amax(-1).log()
        return log_partition - (natural * probs[..., :-1]).sum(-1)

    def fisher(self, natural: Tensor) -> Tensor:
        """diag p − p pᵀ over the first K − 1 states."""
        probs = self.to_expectation(natural)
        return probs.diag_embed() - probs.unsqueeze(-1) * probs.unsqueeze(-2)

    def natural_gradient(self, natural: Tensor, gradient: Tensor) -> Tensor:
        """g_k / p_k + Σ g / p_{K−1}."""
        probs = self._probs(natural)
        return gradient / probs[..., :-1] + gradient.sum(-1, keepdim=True) / probs[..., -1:]
