"""`BernoulliHead` and `OneVsEachHead`: the optimum of the bound by another search, evidence by quadrature, streams."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pyro_blr.nn import BernoulliHead, OneVsEachHead
from pyro_blr.nn.heads import PolyaGammaHead
from pyro_blr.nn.heads._predictions import binary_prediction


def binary(count: int = 60, width: int = 3) -> tuple[Tensor, Tensor]:
    features = torch.randn(count, width)
    return features, torch.bernoulli(torch.sigmoid(2 * features[:, 0] - features[:, 1] + 0.5))


def classes(count: int = 60, width: int = 3, number: int = 4) -> tuple[Tensor, Tensor]:
    features = torch.randn(count, width)
    return features, torch.distributions.Categorical(logits=features @ torch.randn(width, number)).sample()


def cases() -> list[tuple[PolyaGammaHead, Tensor, Tensor]]:
    return [
        (BernoulliHead(3, 1, prior_precision=0.5), *binary()),
        (BernoulliHead(3, 2, prior_mean=torch.randn(2, 4)), binary()[0], torch.bernoulli(torch.full((60, 2), 0.3))),
        (OneVsEachHead(3, 4, prior_precision=0.5, prior_mean=torch.randn(4, 4)), *classes()),
    ]


every_head = pytest.mark.parametrize("case", range(3), ids=["bernoulli", "multi-label", "one-vs-each"])


def comparisons(head: PolyaGammaHead, features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """a of every comparison aᵀw of all weights, and its sign, written out one by one."""
    rows = torch.cat([features, torch.ones(len(features), 1)], 1)
    unit, design, sign = torch.eye(head.out_features), [], []
    for row, target in zip(rows, targets.reshape(len(rows), -1), strict=True):
        if isinstance(head, OneVsEachHead):
            own = int(target)
            picks = [unit[own] - unit[other] for other in range(head.out_features) if other != own]
            sign += [1.0] * len(picks)
        else:
            picks = list(unit)
            sign += (2 * target - 1).tolist()
        design += [torch.kron(pick, row) for pick in picks]
    return torch.stack(design), torch.tensor(sign)


def pseudo_evidence(head: PolyaGammaHead, a: Tensor, s: Tensor, xi: Tensor) -> Tensor:
    """The bound from its definition: log ∫ p(w) Π (quadratic bounds of the σ's) dw."""
    total, theta = a.shape[1], torch.tanh(xi / 2) / (2 * xi)
    delta, start = head.prior_precision, head.prior_mean.reshape(-1)
    precision = delta * torch.eye(total) + a.T @ (theta[:, None] * a)
    right = delta * start + 0.5 * a.T @ s
    constant = (logsigmoid(xi) - xi / 2 + theta * xi.square() / 2).sum()
    quadratic = right @ torch.linalg.solve(precision, right) - delta * start @ start
    return constant + 0.5 * (total * math.log(delta) - precision.logdet() + quadratic)


@every_head
def test_the_bound_is_its_definition_and_coordinate_ascent_ends_at_its_maximum(case: int) -> None:
    """L-BFGS over log ξ of the definition finds nothing higher, and the same ξ."""
    head, features, targets = cases()[case]
    local = head.observe(features, targets, tol=1e-9)
    written = comparisons(head, features, targets)
    log_local = local.reshape(-1).log().clone().requires_grad_()
    assert pseudo_evidence(head, *written, local.reshape(-1)).item() == pytest.approx(head.log_evidence(), abs=1e-9)

    log_local.data += 0.3 * torch.randn_like(log_local)
    search = torch.optim.LBFGS(
        [log_local], max_iter=200, tolerance_grad=1e-9, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        search.zero_grad()
        loss = -pseudo_evidence(head, *written, log_local.exp())
        loss.backward()
        return loss

    search.step(closure)
    best = pseudo_evidence(head, *written, log_local.exp()).item()
    assert best == pytest.approx(head.log_evidence(), abs=1e-7)
    torch.testing.assert_close(log_local.exp().detach(), local.reshape(-1), rtol=1e-3, atol=1e-3)


@every_head
def test_the_bound_never_falls(case: int) -> None:
    head, features, targets = cases()[case]
    with pytest.warns(UserWarning, match="coordinate ascent stopped after 1 sweeps"):
        local = head.observe(features, targets, max_sweeps=1)
    bounds = [head.log_evidence()]
    for _ in range(20):
        for part in (slice(0, 13), slice(13, 60)):
            local[part] = head.refine(features[part], targets[part], local[part])
            bounds.append(head.log_evidence())
    assert all(later >= before - 1e-10 for before, later in zip(bounds, bounds[1:], strict=False))


def grid_evidence(features: Tensor, targets: Tensor) -> tuple[float, Tensor, Tensor]:
    """log evidence, posterior mean and sd of a logistic regression with two weights, by the trapezium rule on a grid."""
    axis = torch.linspace(-12, 12, 801)
    w = torch.cartesian_prod(axis, axis)
    log_joint = -0.5 * w.square().sum(1) - math.log(2 * math.pi)
    for row, target in zip(features, targets, strict=True):
        log_joint += logsigmoid((2 * target - 1) * (w @ row))
    mass = torch.softmax(log_joint, 0)
    mean = mass @ w
    return (log_joint.logsumexp(0) + 2 * math.log(24 / 800)).item(), mean, (mass @ (w - mean).square()).sqrt()


def test_the_bound_is_below_the_evidence_and_close() -> None:
    features, targets = binary(30, 2)
    head = BernoulliHead(2, bias=False)
    head.observe(features, targets)
    evidence, mean, sd = grid_evidence(features, targets)
    assert evidence - 0.5 < head.log_evidence() < evidence
    torch.testing.assert_close(head.mean[0], mean, rtol=0, atol=0.1 * sd.max().item())
    ratio = head.stddev[0] / sd  # the bound's price on few data
    assert (ratio > 0.7).all() and (ratio < 1.0).all()


def test_one_vs_each_of_two_classes_is_the_logistic_regression_of_their_difference() -> None:
    """w₁ − w₀ of two N(0, 1/δ) is N(0, 2/δ)."""
    features, targets = binary()
    pair, single = OneVsEachHead(3, 2, prior_precision=1.0), BernoulliHead(3, prior_precision=0.5)
    pair.observe(features, targets.long(), tol=1e-10)
    single.observe(features, targets, tol=1e-10)
    assert pair.log_evidence() == pytest.approx(single.log_evidence(), abs=1e-8)
    torch.testing.assert_close(pair.mean[1] - pair.mean[0], single.mean[0], rtol=1e-5, atol=1e-5)
    covariance = pair._logits(pair._rows(features))[1]
    between = covariance[:, 0, 0] + covariance[:, 1, 1] - 2 * covariance[:, 0, 1]
    torch.testing.assert_close(between, single.predict(features).logit_variance[:, 0], rtol=1e-5, atol=1e-8)


@every_head
def test_batches_refined_come_to_the_optimum_of_all_data(case: int) -> None:
    head, features, targets = cases()[case]
    whole, parts = copy.deepcopy(head), [slice(0, 20), slice(20, 45), slice(45, 60)]
    whole.observe(features, targets, tol=1e-10)
    local = [head.observe(features[part], targets[part]) for part in parts]
    for _ in range(60):
        local = [head.refine(features[part], targets[part], each) for part, each in zip(parts, local, strict=True)]
    assert head.log_evidence() == pytest.approx(whole.log_evidence(), abs=1e-6)
    torch.testing.assert_close(head.mean, whole.mean, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(head.stddev, whole.stddev, rtol=1e-3, atol=1e-4)


@every_head
def test_what_is_forgotten_was_never_there(case: int) -> None:
    head, features, targets = cases()[case]
    first = head.observe(features[:30], targets[:30])
    before = copy.deepcopy(head)
    local = head.observe(features[30:], targets[30:])
    with pytest.raises(ValueError, match="not positive definite"):
        head.forget(9 * features[30:], targets[30:], local)
    head.forget(features[30:], targets[30:], local)
    torch.testing.assert_close(head.mean, before.mean, rtol=1e-10, atol=1e-10)
    assert head.log_evidence() == pytest.approx(before.log_evidence(), abs=1e-9)
    head.forget(features[:30], targets[:30], first)
    assert head.log_evidence() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("sd", [1e-6, 0.5, 1.99, 2.01, 30.0, 1e4])
def test_binary_predictions_are_the_integrals(sd: float) -> None:
    """Integrals by Gauss-Legendre on short panels; what lies above the last one is σ = 1."""
    mean = torch.tensor([-35.0, -3.0, 0.0, 0.7])
    found = binary_prediction(mean, torch.full_like(mean, sd**2))
    nodes, weights = np.polynomial.legendre.leggauss(20)
    low, high = -45.0, 45.0
    edges = np.arange(low, high, 0.5 * min(1, sd))[-200_000:] if sd >= 0.5 else None
    for i, m in enumerate(mean.tolist()):
        if edges is None:
            x = m + sd * (np.linspace(-9, 9, 361)[:, None] + 0.025 * (nodes + 1)).ravel()
            w = np.tile(weights * 0.025 * sd, 361)
        else:
            step = 0.5 * min(1, sd)
            x, w = (edges[:, None] + step / 2 * (nodes + 1)).ravel(), np.tile(weights * step / 2, len(edges))
        density = w * np.exp(-0.5 * ((x - m) / sd) ** 2) / (sd * math.sqrt(2 * math.pi))
        sigmoid = 1 / (1 + np.exp(-x))
        above = 0.5 * math.erfc((high - m) / sd / math.sqrt(2)) if edges is not None else 0.0
        assert found.probabilities[i].item() == pytest.approx(density @ sigmoid + above, abs=1e-9)
        entropy = -(sigmoid * -np.logaddexp(0, -x) + (1 - sigmoid) * -np.logaddexp(0, x))
        inside = (found.entropy - found.mutual_information)[i].item()
        assert inside == pytest.approx(density @ entropy, abs=1e-9)


def test_class_predictions_are_averages_over_weights() -> None:
    """Against softmax at weights drawn from q, in standard errors; the closed form within 0.02 of them."""
    features, targets = classes()
    head = OneVsEachHead(3, 4)
    head.observe(features, targets)
    covariance = torch.linalg.inv(head.precision[0] + torch.eye(16))
    weights = (
        torch.distributions.MultivariateNormal(head.mean.reshape(-1), covariance).sample((20_000,)).reshape(-1, 4, 4)
    )
    rows = torch.cat([features, torch.ones(60, 1)], 1)
    logits = torch.einsum("sci,ni->snc", weights, rows)
    each = logits.softmax(-1)
    error = each.std(0) / math.sqrt(20_000)
    sampled, closed = head.predict(features, num_samples=20_000), head.predict(features, num_samples=0)
    assert ((sampled.probabilities - each.mean(0)).abs() < 6 * error + 1e-6).all()
    assert (closed.probabilities - each.mean(0)).abs().max() < 0.02
    torch.testing.assert_close(sampled.logit_variance, logits.var(0), rtol=0.06, atol=0)
    inside = torch.special.entr(each).sum(-1)
    information = torch.special.entr(each.mean(0)).sum(-1) - inside.mean(0)
    assert ((sampled.mutual_information - information).abs() < 8 * inside.std(0) / math.sqrt(20_000)).all()
    assert (closed.mutual_information - information).abs().mean() < 0.02
    assert head.sample_logits(features[:5].reshape(5, 1, 3), 3).shape == (3, 5, 1, 4)


def test_bad_targets_are_refused() -> None:
    features, targets = classes()
    head = OneVsEachHead(3, 3)
    for wrong, message in (
        (targets, "targets go from 0 to 3; expected class numbers from 0 to 2"),
        (targets.double(), "targets are torch.float64"),
        (targets[:5], r"targets have shape \(5,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            head.observe(features, wrong)
    with pytest.raises(ValueError, match="targets go from 0 to 2; expected zeros and ones"):
        BernoulliHead(3).observe(features, targets.clamp_max(2).double())
    with pytest.raises(ValueError, match="two classes or more"):
        OneVsEachHead(3, 1)


@pytest.mark.gpu
@every_head
def test_cuda_agrees_with_the_cpu(case: int) -> None:
    cpu, features, targets = cases()[case]
    cuda = copy.deepcopy(cpu).cuda()
    for head, device in ((cpu, "cpu"), (cuda, "cuda")):
        local = head.observe(features.to(device), targets.to(device))
        head.refine(features.to(device), targets.to(device), local)
    torch.testing.assert_close(cuda.mean.cpu(), cpu.mean, rtol=1e-8, atol=1e-8)
    found, expected = (head.predict(x) for head, x in ((cuda, features.cuda()), (cpu, features)))  # type: ignore[operator]
    torch.testing.assert_close(found.logit_variance.cpu(), expected.logit_variance, rtol=1e-8, atol=0)
