"""`BLROptimizer` where loops are unlike: checkpoints, few digits, mixed dtypes, tensors larger than a block of noise."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributions import Normal

from pyro_blr.nn import BLROptimizer
from pyro_blr.nn._noise import block_elements, normal_like, normal_part


def network(width: int, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(3, width), torch.nn.Tanh(), torch.nn.Linear(width, 1)).to(dtype)


def train(net: torch.nn.Module, optimizer: BLROptimizer, steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    dtype = next(net.parameters()).dtype
    for _ in range(steps):
        x = torch.randn(16, 3, generator=generator).to(dtype)
        optimizer.step(lambda x=x: (Normal(net(x), 0.5, validate_args=False), x.sum(1, keepdim=True)))


def everything(net: torch.nn.Module, optimizer: BLROptimizer) -> list[Tensor]:
    found = [parameter.detach() for parameter in net.parameters()]
    for parameter in net.parameters():
        found += [value for value in optimizer.state[parameter].values() if torch.is_tensor(value)]
    return found


@pytest.mark.parametrize("width", [4, 300])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_distributed_checkpoint_resumes_bit_for_bit(width: int, dtype: torch.dtype, tmp_path: Path) -> None:
    """In a small group, whose mean moves in one matrix, and in a large one."""
    net = network(width, dtype)
    optimizer = BLROptimizer(net.parameters(), 160)
    train(net, optimizer, 12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this is one process
        model_state, optimizer_state = get_state_dict(net, optimizer)
        checkpoint.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=tmp_path)
        train(net, optimizer, 5, seed=1)
        other = network(width, dtype)
        resumed = BLROptimizer(other.parameters(), 160)
        model_state, optimizer_state = get_state_dict(other, resumed)
        saved = {"model": model_state, "optimizer": optimizer_state}
        checkpoint.load(saved, checkpoint_id=tmp_path)
        set_state_dict(other, resumed, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
    train(other, resumed, 5, seed=1)
    pairs = zip(everything(net, optimizer), everything(other, resumed), strict=True)
    assert all(torch.equal(one, two) for one, two in pairs)


def test_a_state_dict_is_not_changed_by_later_steps_of_a_copy() -> None:
    net = network(4)
    optimizer = BLROptimizer(net.parameters(), 160, seed=0)
    train(net, optimizer, 5)
    copied, state = copy.deepcopy(net), copy.deepcopy(optimizer.state_dict())
    resumed = BLROptimizer(copied.parameters(), 160, seed=1)
    resumed.load_state_dict(state)
    train(copied, resumed, 3)
    train(net, optimizer, 3)
    pairs = zip(everything(net, optimizer), everything(copied, resumed), strict=True)
    assert all(torch.equal(one, two) for one, two in pairs)


def test_a_mean_beside_bfloat16_weights_does_not_freeze() -> None:
    """One weight at 256, where bfloat16's neighbours are 2 apart; steps are of a fiftieth, and the posterior's mean is 251."""
    w = torch.nn.Parameter(torch.full((8,), 256.0, dtype=torch.bfloat16))
    optimizer = BLROptimizer([w], 100, prior_precision=1e-6, trust=0.2, metric="diagonal", seed=0)
    for _ in range(600):
        optimizer.step(lambda: (Normal(w.float(), 1.0), torch.full((8,), 251.0)))
    mean = optimizer.state[w]["mean"]
    assert mean.dtype == torch.float32 and w.dtype == torch.bfloat16
    # weights drawn are rounded to 2 neighbours: the gradient is at one of them, off by 1 at the most
    assert ((mean - 251).abs() < 1.0).all()
    assert torch.equal(mean.bfloat16(), w.detach())


def test_float16_under_autocast_is_scaled_and_unscaled() -> None:
    runs = []
    for scale in (1.0, 2.0**12):
        torch.manual_seed(0)
        net = network(4, torch.float32)
        optimizer = BLROptimizer(net.parameters(), 160, seed=0, curvature="price", lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        generator = torch.Generator().manual_seed(0)
        for _ in range(8):
            x = torch.randn(16, 3, generator=generator).float()
            optimizer.zero_grad()
            with optimizer.sampled(), torch.autocast("cpu", dtype=torch.float16):
                loss = (net(x).float() - x.sum(1, keepdim=True)).square().mean()
                scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        assert all(parameter.dtype == torch.float32 for parameter in net.parameters())
        assert all(optimizer.state[parameter]["step"] == 8 for parameter in net.parameters())
        runs.append([parameter.detach() for parameter in net.parameters()])
    for plain, scaled in zip(*runs, strict=True):
        # float16 keeps 11 bits of each gradient; the eight steps are of a tenth and bounded by trust
        torch.testing.assert_close(plain, scaled, rtol=0, atol=8 * 2.0**-10)


@pytest.mark.parametrize("observed", [True, False])
def test_one_group_holds_several_dtypes(observed: bool) -> None:
    dtypes = (torch.float64, torch.float32, torch.bfloat16)
    weights = [torch.nn.Parameter(torch.zeros(5, dtype=dtype)) for dtype in dtypes]
    optimizer = BLROptimizer(weights, 50, seed=0)

    def closure() -> object:
        distribution = Normal(torch.cat([weight.double() for weight in weights]), 1.0)
        if observed:
            return distribution, torch.ones(15)
        loss = -distribution.log_prob(torch.ones(15)).mean()
        loss.backward()
        return loss

    for _ in range(200):
        optimizer.step(closure)
    for weight, dtype in zip(weights, dtypes, strict=True):
        assert weight.dtype == dtype
        assert optimizer.state[weight]["mean"].dtype == torch.promote_types(dtype, torch.float32)
        # of each weight 50 / 15 data at 1 and a prior at 0, both of variance one: E w = 50 / 65 and sd = (15 / 65)^½; means are averages
        assert (optimizer.state[weight]["mean"].double() - 50 / 65).abs().max() < 4 * (15 / 65) ** 0.5


def test_a_curvature_that_overflows_is_said_and_changes_nothing() -> None:
    w = torch.nn.Parameter(torch.zeros(3))
    optimizer = BLROptimizer([w], 10, seed=0, curvature="labels", metric="diagonal")
    optimizer.step(lambda: (Normal(w, 1.0), torch.ones(3)))
    before = [w.detach().clone(), optimizer.state[w]["curvature"].clone()]
    with pytest.warns(UserWarning, match="step skipped, q unchanged: a curvature of the loss has an infinity"):
        optimizer.step(lambda: (Normal((w - w.detach()) * 1e160, 1.0), torch.full((3,), 1e-150)))
    assert torch.equal(w, before[0]) and torch.equal(optimizer.state[w]["curvature"], before[1])


def test_parts_of_noise_are_parts_of_the_whole() -> None:
    size = block_elements(torch.device("cpu"))
    template = torch.empty(2 * size + 777, dtype=torch.float32)
    noise = normal_like(template, 5)
    count = template.numel()
    for start, stop in ((0, 10), (size - 3, size + 3), (5, 2 * size + 100), (2 * size, count), (count - 1, count)):
        assert torch.equal(normal_part(template, 5, start, stop, count), noise[start:stop])


@pytest.mark.parametrize("curvature", ["price", "labels"])
def test_tensors_in_blocks_take_the_steps_of_whole_ones(curvature: str) -> None:
    """A weight in two blocks of noise, and the same weight stored by columns, which cannot be cut."""
    rows, columns = 300, 700
    assert block_elements(torch.device("cpu")) < rows * columns
    runs = []
    for by_columns in (False, True):
        generator = torch.Generator().manual_seed(0)
        value = torch.randn(rows, columns, generator=generator) / columns**0.5
        weight = torch.nn.Parameter(value.T.contiguous().T if by_columns else value)
        assert weight.is_contiguous() is not by_columns
        optimizer = BLROptimizer([weight], 100, seed=0, curvature=curvature)
        for _ in range(5):
            x = torch.randn(8, columns, generator=generator)
            optimizer.step(lambda x=x, weight=weight: (Normal((x @ weight.T).mean(1), 1.0), torch.ones(8)))
        runs.append([weight.detach(), optimizer.stddev(weight)])
    for cut, uncut in zip(*runs, strict=True):
        torch.testing.assert_close(cut, uncut, rtol=1e-9, atol=1e-12)
