"""`GaussianHead` against closed forms written out over (weights, data) at once, and against its own predictions one by one."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Distribution, Gamma, MultivariateNormal, Wishart

from pyro_blr.nn import GaussianHead

COVARIANCE = torch.tensor([[0.5, 0.2], [0.2, 0.4]], dtype=torch.float64)
NOISES = {
    "variance": 0.3,
    "variances": torch.tensor([0.3, 2.0], dtype=torch.float64),
    "covariance": COVARIANCE,
    "gamma": Gamma(2.0, 1.5),
    "gammas": Gamma(torch.tensor([2.0, 3.0]), torch.tensor([1.5, 0.5])),
    "wishart": Wishart(torch.tensor(4.0, dtype=torch.float64), COVARIANCE),
}
every_noise = pytest.mark.parametrize("name", NOISES)


def data(count: int = 40, width: int = 5) -> tuple[Tensor, Tensor]:
    features = torch.randn(count, width)
    weights = torch.randn(width, 2)
    return features, features @ weights + 1.5 + torch.randn(count, 2) @ torch.tensor([[0.6, 0.2], [0.0, 0.5]])


def head_of(name: str, **options: object) -> GaussianHead:
    return GaussianHead(5, 2, prior_precision=0.7, noise=NOISES[name], **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["variance", "variances", "covariance"])
def test_known_noise_is_one_gaussian_of_weights_and_data(name: str) -> None:
    """vec W and vec Y are jointly Normal; conditioned by dense linear algebra on covariances, not on precisions."""
    features, targets = data()
    new = torch.randn(3, 5)
    start = torch.randn(2, 6)
    head = head_of(name, prior_mean=start)
    for part in (slice(0, 7), slice(7, 40)):
        head.observe(features[part], targets[part])

    noise = torch.as_tensor(NOISES[name])
    noise = noise if noise.dim() == 2 else torch.diag(noise.expand(2))
    rows, more = (torch.cat([x, torch.ones(len(x), 1)], 1) for x in (features, new))
    # vec is row-major over (class, ...): cov of W is noise ⊗ I/δ.
    weights = torch.kron(noise, torch.eye(6) / 0.7)
    design, design_new = torch.kron(torch.eye(2), rows), torch.kron(torch.eye(2), more)
    total = design @ weights @ design.T + torch.kron(noise, torch.eye(40))
    gain = weights @ design.T @ torch.linalg.inv(total)
    mean = start.reshape(-1) + gain @ (targets.T.reshape(-1) - design @ start.reshape(-1))
    covariance = weights - gain @ design @ weights
    prediction = head.predict(new)

    torch.testing.assert_close(head.mean.reshape(-1), mean, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(head.stddev.reshape(-1), covariance.diagonal().sqrt(), rtol=1e-10, atol=1e-10)
    expected = design_new @ covariance @ design_new.T + torch.kron(noise, torch.eye(3))
    torch.testing.assert_close(prediction.mean, (design_new @ mean).reshape(2, 3).T, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(prediction.variance, expected.diagonal().reshape(2, 3).T, rtol=1e-10, atol=1e-10)
    if name == "covariance":
        blocks = expected.reshape(2, 3, 2, 3).diagonal(dim1=1, dim2=3).permute(2, 0, 1)
        torch.testing.assert_close(prediction.covariance_matrix, blocks, rtol=1e-10, atol=1e-10)
    marginal = MultivariateNormal(design @ start.reshape(-1), total)
    assert head.log_evidence() == pytest.approx(marginal.log_prob(targets.T.reshape(-1)).item(), abs=1e-8)


def test_inferred_noise_is_the_textbook_s_normal_gamma() -> None:
    """Murphy 2012, eqs. 7.69-7.75, by inverses rather than factors, each output by itself."""
    features, targets = data()
    new = torch.randn(4, 5)
    head = head_of("gammas")
    head.observe(features, targets)
    rows, more = (torch.cat([x, torch.ones(len(x), 1)], 1) for x in (features, new))
    covariance = torch.linalg.inv(0.7 * torch.eye(6) + rows.T @ rows)
    prediction = head.predict(new).base_dist
    for output, (a, b) in enumerate([(2.0, 1.5), (3.0, 0.5)]):
        mean = covariance @ rows.T @ targets[:, output]
        a, b = a + 20, b + 0.5 * ((targets[:, output] - rows @ mean).square().sum() + 0.7 * mean.square().sum())
        torch.testing.assert_close(head.mean[output], mean, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(
            head.stddev[output], (b / (a - 1) * covariance.diagonal()).sqrt(), rtol=1e-10, atol=1e-10
        )
        scale = (b / a * (1 + (more @ covariance * more).sum(1))).sqrt()
        torch.testing.assert_close(prediction.loc[:, output], more @ mean, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(prediction.scale[:, output], scale, rtol=1e-10, atol=1e-10)
        assert prediction.df[0, output] == pytest.approx(2 * a)


@every_noise
def test_evidence_is_the_product_of_predictions_one_by_one(name: str) -> None:
    """log p(y₁ … y_n) = Σ log p(y_i | y_<i): evidence, predictive density and update check one another."""
    features, targets = data(12)
    head, total = head_of(name), 0.0
    for row, target in zip(features, targets, strict=True):
        total += head.predict(row).log_prob(target).item()
        head.observe(row, target)
    assert head.log_evidence() == pytest.approx(total, abs=1e-9)


def test_a_wishart_on_one_output_is_a_gamma() -> None:
    """Wishart(ν, w) is Gamma(ν/2, 1/(2w))."""
    features, targets = data()
    wishart = GaussianHead(5, 1, noise=Wishart(torch.tensor(3.0), torch.tensor([[0.25]])))
    gamma = GaussianHead(5, 1, noise=Gamma(1.5, 2.0))
    for head in (wishart, gamma):
        head.observe(features, targets[:, 0])
    new = torch.randn(3, 5)
    torch.testing.assert_close(
        wishart.predict(new).log_prob(targets[:3, :1]), gamma.predict(new).log_prob(targets[:3, :1])
    )
    assert wishart.log_evidence() == pytest.approx(gamma.log_evidence(), abs=1e-9)


@every_noise
def test_what_is_forgotten_was_never_there(name: str) -> None:
    features, targets = data()
    head, never = head_of(name), head_of(name)
    head.observe(features, targets)
    head.forget(features[10:25], targets[10:25])
    never.observe(torch.cat([features[:10], features[25:]]), torch.cat([targets[:10], targets[25:]]))
    new = torch.randn(3, 5)
    torch.testing.assert_close(head.mean, never.mean, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(head.predict(new).variance, never.predict(new).variance, rtol=1e-10, atol=1e-10)
    assert head.log_evidence() == pytest.approx(never.log_evidence(), abs=1e-9)


def test_forgetting_what_was_not_observed_is_refused_and_changes_nothing() -> None:
    features, targets = data()
    head = head_of("gamma")
    head.observe(features[:20], targets[:20])
    before = copy.deepcopy(head.state_dict())
    for x, y, message in (
        (features, targets, "20 more data were forgotten"),
        (10 * features[:5], targets[:5], "not positive definite"),
        (features[:5], 100 * targets[:5], "residuals are negative"),
    ):
        with pytest.raises(ValueError, match=message):
            head.forget(x, y)
        assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_in_float64_whatever_the_features_are(dtype: torch.dtype) -> None:
    """1e5 rows of float32 or bfloat16, in batches, against the same numbers in float64 at once."""
    features = (torch.randn(100_000, 5) + 3).to(dtype)
    targets = (features.double().sum(1) + 0.01 * torch.randn(100_000)).to(dtype)
    head = GaussianHead(5, 1, noise=1e-4, prior_precision=1e-3)
    for part in range(0, 100_000, 8192):
        head.observe(features[part : part + 8192], targets[part : part + 8192])
    rows = torch.cat([features.double(), torch.ones(100_000, 1)], 1)
    precision = 1e-3 * torch.eye(6) + rows.T @ rows
    torch.testing.assert_close(
        head.mean[0], torch.linalg.solve(precision, rows.T @ targets.double()), rtol=1e-10, atol=1e-10
    )
    assert head(features[:2]).dtype == dtype


def test_the_posterior_of_the_function_has_no_noise() -> None:
    features, targets = data()
    head = head_of("variances")
    head.observe(features, targets)
    observed, function = head.predict(features), head.predict(features, observed=False)
    noise = torch.as_tensor(NOISES["variances"])
    torch.testing.assert_close(observed.variance - noise, function.variance, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(function.mean, head(features), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(4, 3), (), (2, 1, 5)])
def test_any_batch_shape(shape: tuple[int, ...]) -> None:
    features, targets = torch.randn(*shape, 5), torch.randn(*shape, 2)
    head, flat = head_of("wishart"), head_of("wishart")
    head.observe(features, targets)
    flat.observe(features.reshape(-1, 5), targets.reshape(-1, 2))
    torch.testing.assert_close(head.mean, flat.mean)
    prediction = head.predict(features)
    assert prediction.batch_shape == shape and prediction.event_shape == (2,)
    assert head(features).shape == (*shape, 2)


def test_state_survives_saving_casting_and_copying() -> None:
    """Statistics keep float64 under `.half()`, where a `Linear`'s weights would not; the dict is all there is."""
    features, targets = data()
    head = head_of("gamma")
    head.observe(features[:20], targets[:20])
    file = io.BytesIO()
    torch.save(head.state_dict(), file)
    file.seek(0)
    other = head_of("gamma")
    other.predict(features)  # a cached posterior must not outlive what is loaded
    other.load_state_dict(torch.load(file))
    half = torch.nn.Sequential(copy.deepcopy(head)).half()[0]
    for each in (head, other, half):
        each.observe(features[20:], targets[20:])
    assert half.gram.dtype == torch.float64
    assert torch.equal(head.mean, other.mean) and torch.equal(head.mean, half.mean)


def test_without_data_the_prediction_is_the_prior_s() -> None:
    head = GaussianHead(3, 1, bias=False, prior_precision=2.0, noise=0.5)
    row = torch.tensor([1.0, 2.0, 2.0])
    prediction = head.predict(row)
    assert prediction.mean.item() == 0 and prediction.variance.item() == pytest.approx(0.5 * (1 + 9 / 2))
    assert head.log_evidence() == pytest.approx(0, abs=1e-12) and head.bias is None
    assert math.isinf(GaussianHead(3, 1).stddev[0, 0])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"prior_precision": 0.0}, "prior_precision is 0.0"),
        ({"noise": -1.0}, "noise is -1.0"),
        ({"noise": torch.ones(3)}, "noise is"),
        ({"noise": torch.tensor([[1.0, 2.0], [2.0, 1.0]])}, "noise is"),
        ({"noise": torch.distributions.Normal(0.0, 1.0)}, "Wishart for all"),
        ({"prior_mean": torch.zeros(2, 5)}, r"prior_mean has shape \(2, 5\); expected \(2, 6\)"),
    ],
)
def test_settings_without_meaning_are_refused(options: dict[str, float | Tensor | Distribution], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GaussianHead(5, 2, **options)  # type: ignore[arg-type]


def test_bad_data_are_refused_and_change_nothing() -> None:
    head = head_of("gamma")
    features, targets = data()
    broken = features.clone()
    broken[3, 1] = math.nan
    for x, y, message in (
        (broken, targets, "row 3 of the features"),
        (features, broken[:, :2], "row 3 of the targets"),
        (features[:, :4], targets, r"expected \(..., 5\)"),
        (features, targets[:, 0], r"targets have shape \(40,\); expected \(40, 2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            head.observe(x, y)
    assert head.count == 0 and not head.gram.any()
    head.observe(features[:0], targets[:0])
    assert head.count == 0


@pytest.mark.gpu
@every_noise
def test_cuda_agrees_with_the_cpu(name: str) -> None:
    features, targets = data()
    cpu, cuda = head_of(name), head_of(name).cuda()
    for head, device in ((cpu, "cpu"), (cuda, "cuda")):
        head.observe(features.to(device), targets.to(device))
        head.forget(features[:5].to(device), targets[:5].to(device))
    torch.testing.assert_close(cuda.mean.cpu(), cpu.mean, rtol=1e-9, atol=1e-9)
    assert cuda.log_evidence() == pytest.approx(cpu.log_evidence(), abs=1e-8)
    torch.testing.assert_close(
        cuda.predict(features.cuda()).variance.cpu(), cpu.predict(features).variance, rtol=1e-9, atol=0
    )
