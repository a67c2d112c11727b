"""`CategoricalHead`: against the Hessian by automatic differentiation, its own stationarity, and the full covariance on digits."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from pyro_blr.nn import CategoricalHead
from pyro_blr.nn.heads._eigenbasis import EigenGaussian
from pyro_blr.nn.heads._laplacian import product_weights

COVARIANCES = ("full", "kronecker", "eigenbasis")
every_covariance = pytest.mark.parametrize("covariance", COVARIANCES)


def data(count: int = 80, width: int = 3, classes: int = 4) -> tuple[Tensor, Tensor]:
    features = torch.randn(count, width) @ torch.diag(torch.linspace(0.5, 2, width))
    return features, torch.distributions.Categorical(logits=features @ torch.randn(width, classes)).sample()


def with_ones(features: Tensor) -> Tensor:
    return torch.cat([features, torch.ones(len(features), 1)], 1)


# -- structures ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spread", [0.1, 3.0, 30.0])
def test_product_weights_have_the_degrees(spread: float) -> None:
    """Degrees of random sums of diag(p) − p pᵀ, from even to nearly one class against another."""
    p = (spread * torch.randn(3, 6, 20)).softmax(1)
    degrees = (p * (1 - p)).sum(0)
    weights = product_weights(degrees)
    assert (weights >= 0).all()
    torch.testing.assert_close(weights * (1 - weights / weights.sum(0)), degrees, rtol=1e-9, atol=1e-14)


def test_one_softmax_s_product_weights_are_its_probabilities() -> None:
    p = torch.tensor([[0.7, 0.5, 0.96, 0.25], [0.2, 0.5, 0.03, 0.25], [0.1, 0.0, 0.01, 0.5]])
    torch.testing.assert_close(product_weights(p * (1 - p))[:, [0, 2, 3]], p[:, [0, 2, 3]], rtol=1e-7, atol=1e-9)
    assert product_weights(torch.zeros(3, 2)).max() < 1e-300


@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("block", [1 << 21, 12])
def test_directions_are_one_dense_gaussian(factored: bool, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every operation against the precision written out as Σ_j Λ_j ⊗ u_j u_jᵀ, in one block of directions or several."""
    monkeypatch.setattr("pyro_blr.nn.heads._eigenbasis.BLOCK_NUMBERS", block)
    classes, width, delta = 4, 7, 0.3
    basis = torch.linalg.qr(torch.randn(width, width)).Q
    p = torch.randn(5, classes, width).softmax(1)
    degrees = (p * (1 - p)).sum(0)
    spectrum = torch.rand(1, width)
    factors = (degrees[:, :1], spectrum) if factored else (degrees, torch.ones(1, 1))
    gaussian = EigenGaussian(basis, factors, delta)
    dense = torch.zeros(classes, width, classes, width)
    for j in range(width):
        d = product_weights((degrees[:, :1] * spectrum if factored else degrees)[:, j])
        precision = torch.diag(d) - torch.outer(d, d) / d.sum() + delta * torch.eye(classes)
        dense += torch.einsum("ab,i,k->aibk", precision, basis[:, j], basis[:, j])
    dense = dense.reshape(classes * width, -1)
    covariance = torch.linalg.inv(dense)
    rows, weights = torch.randn(6, width), torch.randn(6, classes)
    other = torch.randn(classes, width)
    logits = torch.einsum("ni,aibk,nk->nab", rows, covariance.reshape(classes, width, classes, width), rows)

    torch.testing.assert_close(gaussian.times(other).reshape(-1), dense @ other.reshape(-1))
    torch.testing.assert_close(gaussian.solve(other).reshape(-1), covariance @ other.reshape(-1))
    torch.testing.assert_close(gaussian.stddev().reshape(-1), covariance.diagonal().sqrt())
    torch.testing.assert_close(gaussian.variance(rows), logits.diagonal(dim1=1, dim2=2))
    shared, total = gaussian.contrast(rows, weights)
    torch.testing.assert_close(shared, torch.einsum("nab,nb->na", logits, weights))
    torch.testing.assert_close(total, torch.einsum("na,nab,nb->n", weights, logits, weights))
    draws = gaussian.draw(rows, 40_000)
    found = torch.einsum("sna,snb->nab", draws, draws) / len(draws)
    error = (torch.einsum("naa,nbb->nab", logits, logits) + logits.square()).div(len(draws)).sqrt()
    assert ((found - logits).abs() < 6 * error).all()
    mean, residual, start = torch.randn(classes, width), torch.randn(6, classes), torch.randn(classes, width)
    expected = mean + 0.7 * (covariance @ (residual.T @ rows - delta * (mean - start)).reshape(-1)).reshape(
        classes, width
    )
    gaussian.shift(mean, residual, rows, start, 0.7)
    torch.testing.assert_close(mean, expected)


@every_covariance
def test_what_all_logits_share_keeps_its_prior(covariance: str) -> None:
    """No data tell of the average of all logits: its variance is φᵀφ / (C δ) whatever was observed."""
    features, targets = data()
    head = CategoricalHead(3, 4, covariance=covariance, prior_precision=0.4)
    head.observe(features, targets)
    rows = with_ones(features)
    share = head._gaussian().contrast(rows, torch.full((80, 4), 0.25))[1]
    torch.testing.assert_close(share, rows.square().sum(1) / (4 * 0.4))


# -- posteriors ------------------------------------------------------------------------------------------------


def test_at_the_mean_it_is_laplace_s_approximation() -> None:
    """Mode by L-BFGS and the Hessian of the log joint by automatic differentiation."""
    features, targets = data()
    start = torch.randn(4, 4)
    head = CategoricalHead(3, 4, prior_precision=0.4, prior_mean=start, num_draws=0)
    head.observe(features, targets, tol=1e-12)
    rows = with_ones(features)

    def loss(weights: Tensor) -> Tensor:
        return cross_entropy(rows @ weights.T, targets, reduction="sum") + 0.2 * (weights - start).square().sum()

    weights = torch.zeros(4, 4, requires_grad=True)
    search = torch.optim.LBFGS([weights], max_iter=300, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        search.zero_grad()
        value = loss(weights)
        value.backward()
        return value

    search.step(closure)
    hessian = torch.func.hessian(loss)(weights.detach()).reshape(16, 16)
    torch.testing.assert_close(head.mean, weights.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(head.stddev.reshape(-1), torch.linalg.inv(hessian).diagonal().sqrt(), rtol=1e-4, atol=0)


def test_with_draws_it_is_stationary() -> None:
    """At q, averages over 20,000 fresh weights: gradient zero to what 128 draws a row leave, precision the expected Hessian."""
    features, targets = data()
    head = CategoricalHead(3, 4, prior_precision=0.4, num_draws=128)
    head.observe(features, targets, tol=1e-8)
    rows = with_ones(features)
    precision = head.sum_precision + 0.4 * torch.eye(16)
    weights = torch.distributions.MultivariateNormal(head.mean.reshape(-1), precision_matrix=precision).sample(
        (20_000,)
    )
    p = (rows @ weights.reshape(-1, 4, 4).mT).softmax(-1)
    gradient = (one_hot(targets, 4) - p.mean(0)).T @ rows - 0.4 * head.mean
    away = torch.linalg.solve(precision, gradient.reshape(-1)) @ gradient.reshape(-1)
    # In posterior standard deviations of all sixteen weights together, of which these averages miss (16 / 20,000)^½ = 0.03.
    assert away.sqrt() < 0.1
    curvature = torch.diag_embed(p.mean(0)) - torch.einsum("sna,snb->nab", p, p) / len(p)
    expected = torch.einsum("nab,ni,nj->aibj", curvature, rows, rows).reshape(16, 16) + 0.4 * torch.eye(16)
    ratio = torch.linalg.eigvals(torch.linalg.solve(expected, precision)).real
    assert (ratio - 1).abs().max() < 0.1


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = datasets.load_digits(return_X_y=True)
    return torch.tensor(images) / 16, torch.tensor(labels)


@pytest.mark.parametrize("covariance", ["kronecker", "eigenbasis"])
def test_sds_of_logits_on_digits_are_those_of_the_whole_gauss_newton_matrix(
    covariance: str, digits: tuple[Tensor, Tensor]
) -> None:
    """650 weights: Σ (diag(p) − p pᵀ) ⊗ φ φᵀ + δ I at the head's own mean, inverted whole; median ratio within a tenth."""
    images, labels = digits
    head = CategoricalHead(64, 10, covariance=covariance, num_draws=0)
    head.observe(images[:1200], labels[:1200], tol=0.1)
    rows, new = with_ones(images[:1200]), with_ones(images[1200:])
    p = (rows @ head.mean.T).softmax(-1)
    curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    precision = torch.einsum("nab,nij->aibj", curvature, rows[:, :, None] * rows[:, None]).reshape(650, 650)
    whole = torch.linalg.inv(precision + torch.eye(650)).reshape(10, 65, 10, 65)
    expected = torch.stack([(new @ whole[c, :, c] * new).sum(1) for c in range(10)], 1).sqrt()
    ratio = (head.logit_variance(images[1200:]).sqrt() / expected).median().item()
    assert 0.9 < ratio < 1.1
    error = (head(images[1200:]).argmax(1) != labels[1200:]).double().mean()
    assert error < 0.1


# -- streams ---------------------------------------------------------------------------------------------------


@every_covariance
def test_minibatches_come_to_what_all_data_say(covariance: str) -> None:
    features, targets = data(400)
    whole, head = (CategoricalHead(3, 4, covariance=covariance, prior_precision=1.0) for _ in range(2))
    whole.observe(features, targets)
    for _ in range(25):
        for part in torch.randperm(400).split(50):
            loss = head.refresh(features[part], targets[part], 400)
    assert loss < 1.3
    ratio = head.logit_variance(features).sqrt() / whole.logit_variance(features).sqrt()
    assert ratio.median().item() == pytest.approx(1, abs=0.05)
    away = (head(features) - whole(features)) / whole.logit_variance(features).sqrt()
    # minibatches leave √(½ ρ (N/B − 1)) = 0.19 sds at ρ = 0.01 where q's precision is the gradients' noise; structured ones are not quite
    assert away.square().mean().sqrt() < 0.4


@every_covariance
def test_old_statistics_fade_when_features_change(covariance: str) -> None:
    """After the features have been doubled and turned for long enough, as if they had always been so."""
    features, targets = data(400)
    head, fresh = (CategoricalHead(3, 4, covariance=covariance) for _ in range(2))
    turned = 2 * features @ torch.linalg.qr(torch.randn(3, 3)).Q
    for x, each, steps in ((features, head, 50), (turned, head, 120), (turned, fresh, 120)):
        for _ in range(steps):
            part = torch.randint(400, (100,))
            each.refresh(x[part], targets[part], 400, rate=0.05)
    ratio = head.logit_variance(turned).sqrt() / fresh.logit_variance(turned).sqrt()
    assert ratio.median().item() == pytest.approx(1, abs=0.1)


@every_covariance
def test_forgetting_comes_close_to_never_having_seen(covariance: str) -> None:
    """The distance to the fit without these data, in sds of logits, and that of log sds: one step, exact to second order if Λ is."""
    features, targets = data(200)
    head, never = (CategoricalHead(3, 4, covariance=covariance, num_draws=0) for _ in range(2))
    head.observe(features, targets)
    never.observe(features[:170], targets[:170])
    sd = never.logit_variance(features).sqrt()

    def distances() -> tuple[float, float]:
        gap, spread = (head(features) - never(features)) / sd, (head.logit_variance(features).sqrt() / sd).log()
        return float((gap - gap.mean(1, keepdim=True)).square().mean().sqrt()), float(spread.square().mean().sqrt())

    before = distances()
    head.forget(features[170:], targets[170:])
    after = distances()
    assert after[0] < (0.3 if covariance == "full" else 0.6) * before[0] and after[1] < 0.6 * before[1]


def test_the_full_precision_is_added_and_subtracted_exactly() -> None:
    """At a mean that does not move, subtraction undoes addition to rounding."""
    features, targets = data()
    head = CategoricalHead(3, 4, num_draws=0)
    head.observe(features, targets, tol=1e-14)
    before = head.sum_precision.clone()
    p = (with_ones(features) @ head.mean.T).softmax(-1)
    head.forget(features[60:], targets[60:])
    curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    rows = with_ones(features)
    kept = torch.einsum("nab,ni,nj->aibj", curvature[:60], rows[:60], rows[:60]).reshape(16, 16)
    torch.testing.assert_close(head.sum_precision, kept, rtol=1e-5, atol=1e-5)
    assert not torch.equal(before, head.sum_precision)


def test_two_batches_are_nearly_one() -> None:
    """Streaming variational Bayes: the second batch's optimum given the first one's Gaussian."""
    features, targets = data(300)
    head, whole = (CategoricalHead(3, 4) for _ in range(2))
    for part in (slice(0, 200), slice(200, 300)):
        head.observe(features[part], targets[part])
    whole.observe(features, targets)
    sd = whole.logit_variance(features).sqrt()
    assert ((head(features) - whole(features)) / sd).square().mean().sqrt() < 0.25
    assert (head.logit_variance(features).sqrt() / sd).median().item() == pytest.approx(1, abs=0.05)


# -- predictions and settings ----------------------------------------------------------------------------------


@every_covariance
def test_predictions_sampled_and_in_closed_form(covariance: str) -> None:
    features, targets = data()
    head = CategoricalHead(3, 4, covariance=covariance)
    head.observe(features, targets)
    sampled, closed = head.predict(features, 4000), head.predict(features, 0)
    draws = head.sample_logits(features, 4000)
    error = draws.softmax(-1).std(0) / math.sqrt(4000)
    assert ((sampled.probabilities - draws.softmax(-1).mean(0)).abs() < 8 * error).all()
    assert (closed.probabilities - sampled.probabilities).abs().max() < 0.04
    assert (closed.mutual_information - sampled.mutual_information).abs().mean() < 0.05
    torch.testing.assert_close(sampled.logit_variance, head.logit_variance(features))
    tokens = head.predict(features.reshape(8, 10, 3), 8)
    assert tokens.probabilities.shape == (8, 10, 4) and tokens.entropy.shape == (8, 10)


def test_state_is_in_the_dict_and_keeps_its_digits() -> None:
    features, targets = data()
    head = CategoricalHead(3, 4, covariance="eigenbasis")
    head.refresh(features, targets, 80)
    other = CategoricalHead(3, 4, covariance="eigenbasis")
    other.load_state_dict(copy.deepcopy(head.state_dict()))
    half = torch.nn.Sequential(copy.deepcopy(head)).half()[0]
    for each in (head, other, half):
        torch.manual_seed(1)
        each.refresh(features, targets, 80)
    assert torch.equal(head.mean, other.mean) and torch.equal(head.mean, half.mean)
    assert torch.equal(head.logit_variance(features), other.logit_variance(features))


def test_float32_agrees_with_float64() -> None:
    features, targets = data(500, 20, 30)
    variances = []
    for dtype in (torch.float32, torch.float64):
        head = CategoricalHead(20, 30, covariance="eigenbasis", dtype=dtype, num_draws=0)
        for _ in range(5):
            head.refresh(features.to(dtype), targets, 500)
        variances.append(head.logit_variance(features).double())
    torch.testing.assert_close(variances[0], variances[1], rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"covariance": "diagonal"}, "covariance is 'diagonal'; expected one of 'full'"),
        ({"num_draws": 3}, "num_draws is 3"),
        ({"prior_precision": -1.0}, "prior_precision is -1.0"),
        ({"prior_mean": torch.zeros(4, 3)}, r"expected \(4, 4\)"),
    ],
)
def test_settings_without_meaning_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CategoricalHead(3, 4, **options)  # type: ignore[arg-type]


def test_what_cannot_be_is_refused() -> None:
    features, targets = data()
    head = CategoricalHead(3, 4)
    head.observe(features, targets)
    before = copy.deepcopy(head.state_dict())
    with pytest.raises(ValueError, match="not positive definite"):
        head.forget(3 * features, targets)
    with pytest.raises(ValueError, match="no rows"):
        head.refresh(features[:0], targets[:0], 80)
    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())
    with pytest.warns(UserWarning, match="stopped after 1 sweeps"):
        CategoricalHead(3, 4).observe(features, targets, max_sweeps=1)


@pytest.mark.gpu
@every_covariance
def test_cuda_agrees_with_the_cpu(covariance: str) -> None:
    features, targets = data(300)
    heads = [CategoricalHead(3, 4, covariance=covariance, num_draws=0).to(device) for device in ("cpu", "cuda")]
    for head in heads:
        device = head.mean.device
        head.observe(features.to(device), targets.to(device))
        head.refresh(features.to(device), targets.to(device), 300)
        head.forget(features[:50].to(device), targets[:50].to(device))
        assert head.predict(features.to(device), 8).probabilities.device == device
    cpu, cuda = heads
    torch.testing.assert_close(cuda.mean.cpu(), cpu.mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        cuda.logit_variance(features.cuda()).cpu(), cpu.logit_variance(features), rtol=1e-5, atol=0
    )
