"""Predictions over draws of the weights, and their scores against hand calculations."""

from __future__ import annotations

import builtins
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Normal

from pyro_blr.nn import (
    BLROptimizer,
    classification_scores,
    out_of_distribution_auroc,
    predict,
    predictive_log_probs,
    regression_scores,
)

# A posterior to draw from is all that is needed here; 30 steps make one.
pytestmark = pytest.mark.filterwarnings("ignore:the curvature has not converged")


@pytest.fixture
def torchmetrics() -> Any:
    return pytest.importorskip("torchmetrics", reason="torchmetrics is an extra: pip install 'pyro_blr[evaluation]'")


def trained(*layers: torch.nn.Module) -> tuple[torch.nn.Sequential, BLROptimizer, Tensor]:
    x = torch.randn(60, 3)
    labels = (x[:, 0] > 0).long()
    module = torch.nn.Sequential(*layers)
    optimizer = BLROptimizer(module.parameters(), num_data=60, seed=0)
    for _ in range(30):
        optimizer.step(lambda: (Categorical(logits=module(x)), labels))
    return module, optimizer, x


# -- predictions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draws_at_once", [1, 40])
@pytest.mark.parametrize("batch_size", [None, 7])
def test_a_linear_map_predicts_its_own_gaussian(draws_at_once: int, batch_size: int | None) -> None:
    """w'x + b with independent Gaussian weights has mean m'x + m_b and variance σ²'x² + σ_b²: within five standard errors."""
    module, optimizer, x = trained(torch.nn.Linear(3, 2))
    count = 1000
    draws = predict(optimizer, module, x[:10], num_samples=count, batch_size=batch_size, draws_at_once=draws_at_once)
    assert draws.shape == (count, 10, 2) and not draws.requires_grad
    weight, bias = (optimizer.stddev(parameter).square() for parameter in (module[0].weight, module[0].bias))
    mean, variance = module(x[:10]).detach(), x[:10].square() @ weight.T + bias
    assert ((draws.mean(0) - mean).abs() < 5 * (variance / count).sqrt()).all()
    assert ((draws.var(0) / variance - 1).abs() < 5 * math.sqrt(2 / count)).all()


def test_one_draw_predicts_all_batches() -> None:
    """A constant input gives the same output in every batch of one draw, and another in the next draw."""
    module, optimizer, _ = trained(torch.nn.Linear(3, 2))
    draws = predict(optimizer, module, torch.ones(9, 3), num_samples=4, batch_size=2)
    assert (draws - draws[:, :1]).abs().max() < 1e-12
    assert (draws[1:] - draws[:-1]).abs().min() > 1e-6


def test_draws_at_once_are_the_draws_one_by_one() -> None:
    module, optimizer, x = trained(
        torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5), torch.nn.Tanh(), torch.nn.Linear(5, 2)
    )
    module.eval()
    before = [parameter.clone() for parameter in module.parameters()]
    found = []
    for at_once in (1, 3):
        torch.manual_seed(1)
        found.append(predict(optimizer, module, x, num_samples=7, draws_at_once=at_once, batch_size=25))
    torch.testing.assert_close(found[0], found[1])
    assert all(torch.equal(old, new) for old, new in zip(before, module.parameters(), strict=True))


def test_a_function_of_several_tensors() -> None:
    module, optimizer, x = trained(torch.nn.Linear(3, 2))
    draws = predict(optimizer, lambda a, b: module(a + b)[:, 0], x, x, num_samples=5, batch_size=50)
    assert draws.shape == (5, 60)


def test_what_cannot_be_predicted_is_said() -> None:
    module, optimizer, x = trained(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    with pytest.raises(RuntimeError, match=r"leave out draws_at_once, or call module.eval\(\)"):
        predict(optimizer, module, x, draws_at_once=4)
    with pytest.raises(ValueError, match="needs the module itself"):
        predict(optimizer, lambda x: module(x), x, draws_at_once=4)
    for name in ("num_samples", "draws_at_once", "batch_size"):
        with pytest.raises(ValueError, match=f"{name} is 0"):
            predict(optimizer, module, x, **{name: 0})


# -- classification -------------------------------------------------------------------------------------------

# Two draws over three classes at four data; probabilities of the mixture, by hand: the averages of each pair of rows.
DRAWS = [
    [[0.8, 0.1, 0.1], [0.2, 0.6, 0.2], [0.3, 0.3, 0.4], [0.9, 0.05, 0.05]],
    [[0.6, 0.3, 0.1], [0.4, 0.4, 0.2], [0.1, 0.1, 0.8], [0.5, 0.25, 0.25]],
]
MIXTURE = [[0.7, 0.2, 0.1], [0.3, 0.5, 0.2], [0.2, 0.2, 0.6], [0.7, 0.15, 0.15]]
LABELS = [0, 1, 0, 1]


def logits_of(probabilities: Any) -> Tensor:
    return torch.tensor(probabilities).log() + 3.0  # a constant does not matter


def test_probabilities_are_averaged() -> None:
    torch.testing.assert_close(predictive_log_probs(logits_of(DRAWS)).exp(), torch.tensor(MIXTURE))


def test_classification_by_hand(torchmetrics: Any) -> None:
    """Confidences 0.7, 0.5, 0.6, 0.7, right, right, wrong, wrong: in ten bins (0.4, 0.5], (0.5, 0.6], (0.6, 0.7] the
    gaps are |1 − 0.5|, |0 − 0.6| and |½ − 0.7|, of one, one and two data."""
    scores = classification_scores(logits_of(DRAWS) + 0.0, torch.tensor(LABELS), bins=10)
    assert scores.nll == pytest.approx(-(math.log(0.7) + math.log(0.5) + math.log(0.2) + math.log(0.15)) / 4)
    squares = [0.09 + 0.04 + 0.01, 0.09 + 0.25 + 0.04, 0.64 + 0.04 + 0.36, 0.49 + 0.7225 + 0.0225]
    assert scores.brier == pytest.approx(sum(squares) / 4)
    assert scores.accuracy == 0.5
    assert scores.ece == pytest.approx((0.5 + 0.6 + 2 * 0.2) / 4)
    assert scores.mce == pytest.approx(0.6)


def test_calibration_errors_are_those_of_their_definition(torchmetrics: Any) -> None:
    """(draws, batch, time, classes), as of a language model, binned by a loop."""
    logits, labels = 2 * torch.randn(3, 20, 10, 4), torch.randint(4, (20, 10))
    probs = logits.softmax(-1).mean(0).reshape(-1, 4)
    confidence, chosen = probs.max(-1)
    right = (chosen == labels.flatten()).double()
    gaps = []
    for low in torch.arange(15) / 15:
        member = (low < confidence) & (confidence <= low + 1 / 15)
        if member.any():
            gaps.append((member.double().mean(), (right[member].mean() - confidence[member].mean()).abs()))
    scores = classification_scores(logits, labels)
    assert scores.ece == pytest.approx(float(sum(share * gap for share, gap in gaps)))
    assert scores.mce == pytest.approx(float(max(gap for _, gap in gaps)))


def test_certain_predictions_are_probabilities(torchmetrics: Any) -> None:
    """Logits of ±10⁴ in float32: probabilities of 0 and 1, not taken for logits again."""
    logits = 1e4 * torch.nn.functional.one_hot(torch.tensor([0, 1, 1]), 3).float()[None]
    scores = classification_scores(logits.expand(7, 3, 3), torch.tensor([0, 1, 1]))
    assert (scores.nll, scores.brier, scores.ece, scores.mce) == pytest.approx((0, 0, 0, 0), abs=1e-9)


def test_foreign_data_are_told_by_entropy(torchmetrics: Any) -> None:
    """The area is the part of pairs that entropy orders rightly, ties by half."""
    inside, outside = 3 * torch.randn(2, 12, 5), torch.randn(2, 9, 5)
    outside[:, 0] = inside[:, 0]

    def entropy(logits: Tensor) -> Tensor:
        return Categorical(probs=logits.softmax(-1).mean(0)).entropy()

    pairs = [(float(a), float(b)) for a, b in itertools.product(entropy(inside), entropy(outside))]
    area = sum(0.5 if abs(a - b) < 1e-12 else float(b > a) for a, b in pairs) / len(pairs)
    assert out_of_distribution_auroc(inside, outside) == pytest.approx(area)
    assert out_of_distribution_auroc(outside, inside) == pytest.approx(1 - area)


def test_entropies_of_many_classes_are_not_squashed(torchmetrics: Any) -> None:
    """Near log 50,000 = 10.8 a sigmoid in float32 is 1 for all."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(1, 6, 50_000, generator=generator, dtype=torch.float32)
    assert out_of_distribution_auroc(0.02 * base, 0.01 * base) == 1.0


def test_shapes_that_do_not_fit_are_said() -> None:
    with pytest.raises(ValueError, match=r"of one network pass logits\[None\]"):
        classification_scores(torch.zeros(4, 3), torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"batch shape \(5,\) and targets \(5,\)"):
        regression_scores(Normal(torch.zeros(5), 1.0), torch.zeros(5))


def test_without_torchmetrics_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def absent(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("torchmetrics"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    for call in (
        lambda: classification_scores(torch.zeros(1, 2, 3), torch.zeros(2, dtype=torch.long)),
        lambda: out_of_distribution_auroc(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3)),
    ):
        with pytest.raises(ImportError, match=r"pyro_blr\[evaluation\]"):
            call()


# -- regression -----------------------------------------------------------------------------------------------


def test_regression_by_hand() -> None:
    """Draws N(0, 1) and N(2, 1) at y = 1, and N(1, 1) and N(3, 1) at y = 0: densities φ(1), φ(1) and φ(1), φ(3)."""
    scores = regression_scores(Normal(torch.tensor([[0.0, 1.0], [2.0, 3.0]]), 1.0), torch.tensor([1.0, 0.0]))
    density = [math.exp(-0.5 * z**2) / math.sqrt(2 * math.pi) for z in (1, 3)]
    assert scores.log_likelihood == pytest.approx((math.log(density[0]) + math.log((density[0] + density[1]) / 2)) / 2)
    assert scores.rmse == pytest.approx(math.sqrt((0 + 4) / 2))


def test_the_mixture_is_wider_than_its_parts() -> None:
    """Infinitely many draws of N(θ, 1), θ ~ N(0, 1), are N(0, 2); the log-likelihood's error is of order 1 / √S."""
    targets, draws = torch.linspace(-2, 2, 9), torch.randn(200_000, 1)
    scores = regression_scores(Normal(draws.expand(-1, 9), 1.0), targets)
    assert scores.log_likelihood == pytest.approx(Normal(0.0, math.sqrt(2)).log_prob(targets).mean().item(), abs=0.01)
