"""`BLROptimizer`: posteriors of small models against their optimum, the published recursion, and what may go wrong in a loop."""

from __future__ import annotations

import copy
import io
import math
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from oracles import arrays
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Normal, Poisson

from pyro_blr.nn import BLROptimizer

Bound = Callable[[Tensor, Tensor], Tensor]


# -- posteriors at default settings ---------------------------------------------------------------------------


def mean_field_optimum(bound: Bound, mean: Tensor, sd: float | Tensor) -> tuple[Tensor, Tensor, float]:
    """Mean and sd of the best factorised Gaussian, by L-BFGS on a deterministic bound."""
    mean, log_sd = mean.clone().requires_grad_(), torch.as_tensor(sd).expand_as(mean).log().requires_grad_()
    search = torch.optim.LBFGS(
        [mean, log_sd], max_iter=2000, tolerance_grad=1e-8, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        search.zero_grad()
        loss = -bound(mean, log_sd.exp())
        loss.backward()
        return loss

    search.step(closure)
    best = bound(mean, log_sd.exp()).item()
    return mean.detach(), log_sd.exp().detach(), best


def kl_to_standard(mean: Tensor, sd: Tensor) -> Tensor:
    return 0.5 * (mean.square() + sd.square() - 1 - 2 * sd.log()).sum()


def logistic() -> tuple[Tensor, Tensor, Bound]:
    """UCI breast cancer with an intercept, w ~ N(0, 1); E log p by 64 Gauss-Hermite points of each row's predictor."""
    data = arrays("breast_cancer.npz")
    x, y = torch.tensor(data["x"]), torch.tensor(data["y"], dtype=torch.float64)
    x = torch.cat([torch.ones(len(x), 1), x], 1)
    nodes, weights = np.polynomial.hermite_e.hermegauss(64)
    points, masses = torch.tensor(nodes), torch.tensor(weights / weights.sum())

    def bound(mean: Tensor, sd: Tensor) -> Tensor:
        logits = (x @ mean)[:, None] + (x.square() @ sd.square()).sqrt()[:, None] * points
        signs = 2 * y[:, None] - 1
        return (torch.nn.functional.logsigmoid(signs * logits) @ masses).sum() - kl_to_standard(mean, sd)

    return x, y, bound


def poisson() -> tuple[Tensor, Tensor, Bound]:
    """Counts of rate exp(x w), w ~ N(0, 1); E exp(x w) = exp(x m + x² σ² / 2)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([torch.ones(400, 1), torch.randn(400, 5, generator=generator)], 1)
    w = torch.tensor([0.5, 0.4, -0.3, 0.2, 0.0, -0.5])
    y = torch.poisson((x @ w).exp(), generator=generator)

    def bound(mean: Tensor, sd: Tensor) -> Tensor:
        eta = x @ mean
        rate = (eta + 0.5 * x.square() @ sd.square()).exp()
        return (y * eta - rate - torch.lgamma(y + 1)).sum() - kl_to_standard(mean, sd)

    return x, y, bound


def minibatches(count: int, size: int, steps: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1)
    taken = 0
    while True:
        for batch in torch.randperm(count, generator=generator).split(size):
            if taken == steps:
                return
            taken += 1
            yield batch


GLM = {
    "logistic": (logistic, lambda logits: Bernoulli(logits=logits)),
    "poisson": (poisson, lambda log_rate: Poisson(log_rate.exp())),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(GLM))
def test_defaults_reach_the_mean_field_optimum(name: str) -> None:
    """Batch 32, 2,000 steps: sds within 10 % each and 3 % in the median, the bound within half a nat."""
    model, likelihood = GLM[name]
    x, y, bound = model()
    _, sd, best = mean_field_optimum(bound, torch.zeros(x.shape[1]), 0.3)
    w = torch.nn.Parameter(torch.zeros(x.shape[1]))
    optimizer = BLROptimizer([w], len(x), seed=0)
    for batch in minibatches(len(x), 32, 2000):
        optimizer.step(lambda batch=batch: (likelihood(x[batch] @ w), y[batch]))
    found = optimizer.stddev(w)
    errors = (found / sd - 1).abs()
    assert errors.max() < 0.10 and errors.median() < 0.03
    assert best - 0.5 < bound(w.detach(), found).item() <= best + 1e-6
    assert optimizer.curvature_drift() < 0.1


def tanh_units(hidden: int, count: int, noise: float, seed: int) -> tuple[Tensor, Tensor, Bound]:
    """2-hidden-1 tanh units and data of such a network; w ~ N(0, 1), of each layer the weights, then the biases.

    Units are independent under a factorised Gaussian and their inputs Gaussian: E f and Var f by 24 Gauss-Hermite points a unit.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 2, generator=generator)
    sizes = [2 * hidden, hidden, hidden, 1]
    w, b, v, c = torch.randn(sum(sizes), generator=generator).split(sizes)
    y = (x @ w.view(hidden, 2).T + b).tanh() @ v + c + noise * torch.randn(count, generator=generator)
    nodes, weights = np.polynomial.hermite_e.hermegauss(24)
    points, masses = torch.tensor(nodes), torch.tensor(weights / weights.sum())

    def bound(mean: Tensor, sd: Tensor) -> Tensor:
        (w, b, v, c), (w2, b2, v2, c2) = mean.split(sizes), sd.square().split(sizes)
        location, variance = x @ w.view(hidden, 2).T + b, x.square() @ w2.view(hidden, 2).T + b2
        unit = (location[..., None] + variance.sqrt()[..., None] * points).tanh()
        first, second = unit @ masses, unit.square() @ masses
        spread = c2 + second @ (v.square() + v2) - first.square() @ v.square()
        gap = (y - first @ v - c).square() + spread
        return (-0.5 * gap / noise**2 - math.log(noise * math.sqrt(2 * math.pi))).sum() - kl_to_standard(mean, sd)

    return x, y[:, None], bound


@pytest.mark.slow
def test_defaults_reach_the_optimum_of_two_layers() -> None:
    """From a random start, against L-BFGS from where the run ended: sds within 10 % each and 3 % in the median, half a nat."""
    x, y, bound = tanh_units(5, 400, 0.3, seed=0)
    torch.manual_seed(1)
    net = torch.nn.Sequential(torch.nn.Linear(2, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))
    optimizer = BLROptimizer(net.parameters(), len(x), seed=1)
    for batch in minibatches(len(x), 32, 2000):
        optimizer.step(lambda batch=batch: (Normal(net(x[batch]), 0.3), y[batch]))
    mean = torch.nn.utils.parameters_to_vector(net.parameters()).detach()
    found = torch.cat([optimizer.stddev(parameter).flatten() for parameter in net.parameters()])
    _, sd, best = mean_field_optimum(bound, mean, found)
    errors = (found / sd - 1).abs()
    assert errors.max() < 0.10 and errors.median() < 0.03
    assert best - 0.5 < bound(mean, found).item() <= best + 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("curvature", ["examples", "price"])
def test_every_curvature_agrees_on_a_logistic_regression(curvature: str) -> None:
    """The Gauss-Newton curvature is the Hessian here. Price's, by pairs, has noise left: about N / (B · steps) of a variance's square."""
    x, y, bound = logistic()
    _, sd, best = mean_field_optimum(bound, torch.zeros(x.shape[1]), 0.3)
    w = torch.nn.Parameter(torch.zeros(x.shape[1]))
    paired = {"samples": 2, "antithetic": True} if curvature == "price" else {}
    optimizer = BLROptimizer([w], len(x), seed=0, curvature=curvature, **paired)
    for batch in minibatches(len(x), 32, 2000):
        optimizer.step(lambda batch=batch: (Bernoulli(logits=x[batch] @ w), y[batch]))
    errors = (optimizer.stddev(w) / sd - 1).abs()
    assert errors.median() < (0.03 if curvature == "examples" else 0.05)
    assert best - bound(w.detach(), optimizer.stddev(w)).item() < 0.5


# -- the published recursion --------------------------------------------------------------------------------------


def test_constant_steps_and_prices_curvature_are_ivon() -> None:
    """Shen et al. 2024, Algorithm 1, from its equations, on a network with the noise that the optimizer drew."""
    torch.manual_seed(0)
    x, y = torch.randn(64, 3), torch.randn(64, 1)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    data, prior, alpha, beta1, beta2, h0 = 640, 6.4, 0.05, 0.9, 0.99, 0.5
    settings = {"lr": alpha, "decay": 0, "momentum": beta1, "curvature_rate": 1 - beta2, "initial_curvature": h0}
    optimizer = BLROptimizer(net.parameters(), data, prior_precision=prior, curvature="price", trust=None, **settings)
    parameters = list(net.parameters())
    delta = prior / data
    m = [p.detach().clone() for p in parameters]
    h, g = [torch.full_like(p, h0) for p in m], [torch.zeros_like(p) for p in m]
    drawn: list[Tensor] = []
    pooled: list[Tensor] = []

    def closure() -> Tensor:
        drawn[:] = [p.detach().clone() for p in parameters]
        loss = (net(x) - y).square().mean()
        loss.backward()
        return loss

    for t in range(1, 201):
        optimizer.step(closure)
        noise = [(theta - mean) * (data * (hi + delta)) ** 0.5 for theta, mean, hi in zip(drawn, m, h, strict=True)]
        pooled.append(torch.cat([e.flatten() for e in noise]))
        leaves = [theta.requires_grad_() for theta in [d.clone() for d in drawn]]
        w1, b1, w2, b2 = leaves
        gradients = torch.autograd.grad(((x @ w1.T + b1).tanh() @ w2.T + b2 - y).square().mean(), leaves)
        for i, gradient in enumerate(gradients):
            variance = 1 / (data * (h[i] + delta))
            h_hat = gradient * (drawn[i] - m[i]) / variance
            g[i] = beta1 * g[i] + (1 - beta1) * gradient
            h[i] = beta2 * h[i] + (1 - beta2) * h_hat + 0.5 * (1 - beta2) ** 2 * (h[i] - h_hat) ** 2 / (h[i] + delta)
            m[i] = m[i] - alpha * (g[i] / (1 - beta1**t) + delta * m[i]) / (h[i] + delta)
    z = torch.cat(pooled)
    assert abs(z.mean()) < 4.5 / len(z) ** 0.5 and abs(z.var() - 1) < 4.5 * (2 / len(z)) ** 0.5
    for i, parameter in enumerate(parameters):
        torch.testing.assert_close(parameter.detach(), m[i], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(optimizer.stddev(parameter), (data * (h[i] + delta)) ** -0.5, rtol=1e-6, atol=0)


def regression(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[torch.nn.Module, Tensor, Tensor]:
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).to(dtype)
    return net, torch.randn(16, 3, dtype=dtype), torch.randn(16, 1, dtype=dtype)


def closure_of(net: torch.nn.Module, x: Tensor, y: Tensor, observed: bool) -> Callable[[], object]:
    """Closures of both kinds, of the same loss."""

    def closure() -> object:
        distribution = Normal(net(x), 1.0, validate_args=False)
        if observed:
            return distribution, y
        loss = -distribution.log_prob(y).mean()
        loss.backward()
        return loss

    return closure


def snapshot(net: torch.nn.Module, optimizer: BLROptimizer) -> list[Tensor]:
    """The parameters and every tensor of their state, copied."""
    tensors = []
    for parameter in net.parameters():
        state = optimizer.state[parameter]
        tensors += [parameter.detach().clone(), *(v.clone() for v in state.values() if torch.is_tensor(v))]
        tensors += [torch.tensor([state.get("step", 0), state.get("measurements", 0)])]
    return tensors


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.slow
def test_digits_are_no_worse_than_adamws_at_equal_steps() -> None:
    """64-50-10 ReLU units, 1,200 digits, 25 passes; q of num_data ten times the data, which N(0, 1/10) priors need here."""
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y, test_x, test_y = x[order[:1200]], y[order[:1200]], x[order[1200:]], y[order[1200:]]

    def network() -> torch.nn.Module:
        torch.manual_seed(0)
        layers = torch.nn.Linear(64, 50), torch.nn.ReLU(), torch.nn.Linear(50, 10)
        return torch.nn.Sequential(*layers).float()

    def scores(probabilities: Tensor) -> tuple[float, float]:
        nll = torch.nn.functional.nll_loss(probabilities.log(), test_y).item()
        return nll, (probabilities.argmax(1) == test_y).double().mean().item()

    plain, bayesian = network(), network()
    adamw = torch.optim.AdamW(plain.parameters(), lr=1e-3)
    optimizer = BLROptimizer(bayesian.parameters(), 10 * len(x), prior_precision=10.0, seed=0)
    for batch in minibatches(len(x), 32, 25 * 38):
        adamw.zero_grad()
        torch.nn.functional.cross_entropy(plain(x[batch]), y[batch]).backward()
        adamw.step()
        optimizer.step(lambda batch=batch: (Categorical(logits=bayesian(x[batch])), y[batch]))
    sampled = torch.zeros(len(test_x), 10)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for _ in range(32):
            with optimizer.sampled():
                sampled += bayesian(test_x).softmax(1) / 32
        (nll, accuracy), (adamw_nll, adamw_accuracy) = scores(sampled), scores(plain(test_x).softmax(1))
    assert nll <= adamw_nll and accuracy >= adamw_accuracy


# -- loops -------------------------------------------------------------------------------------------------------


def test_draws_have_the_mean_and_scale_of_q() -> None:
    w = torch.nn.Parameter(torch.linspace(-1, 1, 4))
    optimizer = BLROptimizer([w], 10, initial_curvature=0.3, prior_precision=2.0)
    optimizer.step(lambda: (Normal(w, 1.0), torch.zeros(4)))
    draws = []
    with torch.no_grad(), pytest.warns(UserWarning, match="curvature has not converged"):
        for _ in range(4000):
            with optimizer.sampled():
                draws.append(w.clone())
    z = (torch.stack(draws) - w.detach()) / optimizer.stddev(w)
    assert (z.mean(0).abs() < 4.5 / 4000**0.5).all()
    assert ((z.var(0) - 1).abs() < 4.5 * (2 / 4000) ** 0.5).all()


@pytest.mark.parametrize("observed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_blocks_and_closures_take_the_same_steps(observed: bool, dtype: torch.dtype) -> None:
    runs = []
    for manual in (True, False):
        net, x, y = regression(dtype=dtype)
        optimizer = BLROptimizer(net.parameters(), 16, seed=3)
        for _ in range(30):
            if not manual:
                optimizer.step(closure_of(net, x, y, observed))
                continue
            optimizer.zero_grad()
            with optimizer.sampled():
                distribution = Normal(net(x), 1.0)
                if observed:
                    optimizer.observe(distribution, y)
                (-distribution.log_prob(y).mean()).backward()
            optimizer.step()
        runs.append(snapshot(net, optimizer))
        assert optimizer.state[net[0].weight]["mean"].dtype == torch.promote_types(dtype, torch.float32)
        assert net[0].weight.dtype == dtype
    if dtype is torch.bfloat16 or observed:
        assert same(*runs)
    for one, two in zip(
        *runs, strict=True
    ):  # a closure's weights are at hand when Price's estimate is made, a block's noise is drawn again
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)


def test_gradients_accumulate_under_one_draw() -> None:
    """Two halves of a batch are the batch."""
    runs = []
    for parts in (1, 2):
        net, x, y = regression()
        optimizer = BLROptimizer(net.parameters(), 16, seed=3, curvature="price")
        for _ in range(10):
            optimizer.zero_grad()
            with optimizer.sampled():
                for part_x, part_y in zip(x.chunk(parts), y.chunk(parts), strict=True):
                    (-Normal(net(part_x), 1.0).log_prob(part_y).mean() / parts).backward()
            optimizer.step()
        runs.append(snapshot(net, optimizer))
    for one, two in zip(*runs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)


def test_pairs_are_antithetic_and_averaged() -> None:
    """On a quadratic loss ½ c w² a pair's average gradient is that at the mean, and Price's estimate c ε², whatever the mean."""
    c = torch.tensor([2.0, 5.0])
    w = torch.nn.Parameter(torch.tensor([3.0, -1.0]))
    optimizer = BLROptimizer(
        [w],
        100,
        samples=2,
        antithetic=True,
        initial_curvature=1.0,
        momentum=0.0,
        decay=0,
        lr=0.1,
        prior_precision=0.0,
        trust=None,
    )
    drawn = []

    def closure() -> Tensor:
        drawn.append(w.detach().clone())
        loss = 0.5 * (c * w.square()).sum()
        loss.backward()
        return loss

    before = w.detach().clone()
    optimizer.step(closure)
    torch.testing.assert_close((drawn[0] + drawn[1]) / 2, before)
    epsilon = (drawn[0] - before) * 10  # σ = 100^-½
    rate = optimizer.param_groups[0]["curvature_rate"]
    gap = c * epsilon.square() - 1
    h = 1 + rate * gap + 0.5 * (rate * gap) ** 2
    torch.testing.assert_close(optimizer.stddev(w), (100 * h) ** -0.5)
    torch.testing.assert_close(w.detach(), before - 0.1 * c * before / h)


@pytest.mark.parametrize("observed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_run_resumes_bit_for_bit(observed: bool, dtype: torch.dtype) -> None:
    net, x, y = regression(dtype=dtype)
    optimizer = BLROptimizer(net.parameters(), 16)
    for _ in range(7):
        optimizer.step(closure_of(net, x, y, observed))
    file = io.BytesIO()
    torch.save([net.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    for _ in range(5):
        optimizer.step(closure_of(net, x, y, observed))
    other, _, _ = regression(seed=9, dtype=dtype)
    resumed = BLROptimizer(other.parameters(), 16)
    weights, state = torch.load(file, weights_only=True)
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    for _ in range(5):
        resumed.step(closure_of(other, x, y, observed))
    assert same(snapshot(net, optimizer), snapshot(other, resumed))


def test_an_exception_leaves_everything_as_it_was() -> None:
    net, x, y = regression()
    optimizer = BLROptimizer(net.parameters(), 16)
    optimizer.step(closure_of(net, x, y, True))
    before, state = snapshot(net, optimizer), torch.get_rng_state()

    def failing() -> object:
        assert not torch.equal(net[0].weight, before[0])
        raise KeyError("in the model")

    with pytest.raises(KeyError):
        optimizer.step(failing)
    with pytest.raises(KeyError), optimizer.sampled():
        failing()
    assert same(before, snapshot(net, optimizer)) and torch.equal(torch.get_rng_state(), state)
    expected = copy.deepcopy(net)
    reference = BLROptimizer(expected.parameters(), 16)
    reference.load_state_dict(optimizer.state_dict())
    optimizer.step(closure_of(net, x, y, True))
    reference.step(closure_of(expected, x, y, True))
    assert same(snapshot(net, optimizer), snapshot(expected, reference))


@pytest.mark.parametrize("observed", [True, False])
def test_a_loss_that_is_nan_changes_nothing_and_is_said(observed: bool) -> None:
    net, x, y = regression()
    optimizer = BLROptimizer(net.parameters(), 16)
    optimizer.step(closure_of(net, x, y, observed))
    before = snapshot(net, optimizer)
    with pytest.warns(UserWarning, match="step skipped, q unchanged: the loss is nan"):
        optimizer.step(closure_of(net, x * torch.nan, y, observed))
    optimizer.zero_grad()
    with optimizer.sampled():
        closure_of(net, x * torch.nan, y, False)()
    with pytest.warns(UserWarning, match="gradient of the loss has an infinity or NaN"):
        optimizer.step()
    assert same(before, snapshot(net, optimizer))


def test_layouts_frozen_tied_and_unused_parameters_and_later_groups() -> None:
    runs = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        net = torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(16, 16)
        )
        net.append(torch.nn.Linear(16, 16))
        net[4].weight = net[3].weight
        net[3].bias.requires_grad_(False)
        net.register_parameter("unused", torch.nn.Parameter(torch.ones(2)))
        net = net.to(memory_format=layout)
        frozen, x = net[3].bias.detach().clone(), torch.randn(8, 3, 4, 4)
        optimizer = BLROptimizer([p for p in net.parameters() if p is not net[4].bias], 8, seed=0)
        for step in range(6):
            if step == 3:
                optimizer.add_param_group({"params": [net[4].bias], "prior_precision": 4.0})
            optimizer.step(lambda net=net, x=x: (Normal(net(x), 1.0), torch.ones(8, 16)))
        assert torch.equal(net[3].bias, frozen) and torch.equal(net.unused, torch.ones(2))
        assert optimizer.stddev(net.unused).isnan().all()
        assert [optimizer.state[p]["step"] for p in (net[0].weight, net[4].bias)] == [6, 3]
        assert net[0].weight.is_contiguous(memory_format=layout)
        runs.append([p.detach() for p in net.parameters()])
    for contiguous, other in zip(*runs, strict=True):
        torch.testing.assert_close(contiguous, other, rtol=1e-9, atol=1e-11)


def test_a_grad_scaler_skips_overflows_and_scales_nothing_else() -> None:
    runs = []
    for scaled in (True, False):
        net, x, y = regression(dtype=torch.float32)
        optimizer = BLROptimizer(net.parameters(), 16, seed=0, curvature="price")
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
        for step in range(6):
            optimizer.zero_grad()
            with optimizer.sampled():
                loss = (net(x) - y).square().mean() * (torch.inf if scaled and step == 2 else 1.0)
                scaler.scale(loss).backward()
            if scaled or step != 2:
                scaler.step(optimizer)
            scaler.update()
        runs.append([optimizer.state[p] for p in net.parameters()])
    for with_scaler, plain in zip(*runs, strict=True):
        assert with_scaler["step"] == plain["step"] == 5
        torch.testing.assert_close(with_scaler["mean"], plain["mean"], rtol=1e-5, atol=1e-6)


def test_predictions_are_seeded_by_torch_and_leave_the_run_alone() -> None:
    net, x, y = regression()
    optimizer = BLROptimizer(net.parameters(), 16, seed=0)
    for _ in range(4):
        optimizer.step(closure_of(net, x, y, True))
    before, seen = snapshot(net, optimizer), []
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            with optimizer.sampled():
                seen.append(net(x))
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])
    assert same(before, snapshot(net, optimizer))


# -- refusals ----------------------------------------------------------------------------------------------------

SETTINGS = [
    ({"num_data": 0}, "num_data is 0; expected .* above zero"),
    ({"num_data": -3}, "num_data is -3"),
    ({"prior_precision": -1.0}, "prior_precision is -1.0; expected .* zero or more"),
    ({"momentum": 1.0}, "momentum is 1.0"),
    ({"curvature": "newton"}, "curvature is .newton.; expected one of 'auto'"),
    ({"curvature_every": 0}, "curvature_every is 0"),
    ({"samples": 3, "antithetic": True}, "samples is 3; expected .* even"),
    ({"initial_curvature": 0, "prior_precision": 0}, "both 0"),
]


@pytest.mark.parametrize(("settings", "message"), SETTINGS)
def test_settings_without_a_meaning_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BLROptimizer([torch.nn.Parameter(torch.zeros(2))], **{"num_data": 10, **settings})


def test_a_bad_group_is_not_added() -> None:
    optimizer = BLROptimizer([torch.nn.Parameter(torch.zeros(2))], 10)
    with pytest.raises(ValueError, match="prior_precision is -1"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2))], "prior_precision": -1})
    assert len(optimizer.param_groups) == 1


def test_loops_without_a_meaning_are_refused() -> None:
    net, x, y = regression()
    optimizer = BLROptimizer(net.parameters(), 16)
    with pytest.raises(RuntimeError, match="no posterior to draw from before the first step"), torch.no_grad():
        with optimizer.sampled():
            pass
    with pytest.raises(RuntimeError, match="the closure left no gradient; expected"):
        optimizer.step(lambda: torch.tensor(1.0))
    with pytest.raises(RuntimeError, match="the closure left no gradient; expected"):
        optimizer.step(lambda: None)
    closure_of(net, x, y, False)()
    with pytest.raises(RuntimeError, match="no gradient at drawn weights; expected"):
        optimizer.step()
    optimizer.zero_grad()
    with optimizer.sampled():
        closure_of(net, x, y, False)()
    with pytest.raises(RuntimeError, match="gradients of another draw wait for step"), optimizer.sampled():
        pass
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="one draw at a time"), optimizer.sampled(), optimizer.sampled():
        pass
    with pytest.raises(RuntimeError, match="outside sampled"):
        optimizer.observe(Normal(net(x), 1.0))
    with pytest.raises(RuntimeError, match="saw no distribution; expected"):
        BLROptimizer(net.parameters(), 16, curvature="labels").step(closure_of(net, x, y, False))


def test_several_processes_need_a_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="seed is None among several processes"):
        BLROptimizer([torch.nn.Parameter(torch.zeros(2))], 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_is_twelve_bytes_a_parameter(dtype: torch.dtype) -> None:
    net, x, y = regression(dtype=dtype)
    optimizer = BLROptimizer(net.parameters(), 16, metric="diagonal")
    optimizer.step(closure_of(net, x, y, True))
    held = [v for p in net.parameters() for v in optimizer.state[p].values() if torch.is_tensor(v)]
    assert sum(v.numel() * v.element_size() for v in held) == 12 * sum(p.numel() for p in net.parameters())


def test_a_prior_for_each_parameter_is_a_group_for_each() -> None:
    """Numbers and tensors by parameter, against groups of one parameter and one parameter for each row."""
    x, y = torch.randn(40, 3), torch.randn(40, 2)

    def fitted(parameters: list[Tensor], groups: list[dict]) -> list[Tensor]:
        optimizer = BLROptimizer(groups, num_data=40, seed=0, initial_curvature=1.0, curvature="price")
        for _ in range(5):
            with optimizer.sampled():
                rows = torch.stack(parameters[:-1]) if len(parameters) > 2 else parameters[0]
                (0.5 * (x @ rows.T + parameters[-1] - y).square().sum() / 40).backward()
            optimizer.step()
            optimizer.zero_grad()
        return [torch.cat([p.detach().reshape(-1) for p in parameters[:-1]]), parameters[-1].detach()]

    def noise(template: Tensor, key: int) -> Tensor:  # the same for a matrix as for its rows
        return torch.full_like(template, 0.5)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("pyro_blr.nn._buckets.normal_like", noise)
        matrix, bias = torch.ones(2, 3, requires_grad=True), torch.ones(2, requires_grad=True)
        precisions, means = [torch.tensor([[1.0], [7.0]]), 3.0], [torch.tensor([[0.5], [-0.5]]), 2.0]
        together = fitted(
            [matrix, bias], [{"params": [matrix, bias], "prior_precision": precisions, "prior_mean": means}]
        )
        rows, own = [torch.ones(3, requires_grad=True) for _ in range(2)], torch.ones(2, requires_grad=True)
        groups = [
            {"params": [rows[0]], "prior_precision": 1.0, "prior_mean": 0.5},
            {"params": [rows[1]], "prior_precision": 7.0, "prior_mean": -0.5},
            {"params": [own], "prior_precision": 3.0, "prior_mean": 2.0},
        ]
        apart = fitted([*rows, own], groups)
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other)


def test_a_negative_prior_precision_in_a_list_is_refused() -> None:
    with pytest.raises(ValueError, match="prior_precision is -1"):
        BLROptimizer([{"params": [torch.zeros(1, requires_grad=True)], "prior_precision": [-1.0]}], num_data=1)


def test_draws_inside_one_region_of_autocast_are_not_the_weights_of_before() -> None:
    """autocast keeps what it has cast until its region ends, also where the weight was written into since."""
    layer, x = torch.nn.Linear(3, 1).float(), torch.randn(5, 3, dtype=torch.float32)
    optimizer = BLROptimizer(layer.parameters(), num_data=5, initial_curvature=1e-3, seed=0)
    with torch.autocast("cpu", torch.bfloat16):
        at_mean = layer(x)
        with optimizer.sampled():
            assert not torch.equal(layer(x), at_mean)
        assert torch.equal(layer(x), at_mean)
