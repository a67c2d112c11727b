"""`BLROptimizer` in two processes joined by gloo: DistributedDataParallel and fully_shard against one process that sees both parts."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed
from torch.distributions import Normal
from torch.nn.parallel import DistributedDataParallel

from pyro_blr.nn import BLROptimizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not distributed.is_gloo_available(), reason="torch was built without gloo"),
]

STEPS = 25
SETTINGS: dict[str, dict[str, Any]] = {
    "hessian, joint": {},
    "labels": {"curvature": "labels", "metric": "diagonal"},
    "examples": {"curvature": "examples", "metric": "diagonal"},
    "price": {"curvature": "price", "metric": "diagonal"},
    "pairs": {"curvature": "price", "metric": "diagonal", "samples": 2, "antithetic": True},
}


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))


def halves() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(16, 3, generator=generator)
    y = x.sum(1, keepdim=True).sin() + 0.1 * torch.randn(16, 1, generator=generator)
    return list(zip(x.chunk(2), y.chunk(2), strict=True))


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def states(net: torch.nn.Module, optimizer: BLROptimizer) -> list[Tensor]:
    found = []
    for parameter in net.parameters():
        found.append(whole(parameter))
        found += [whole(value) for value in optimizer.state[parameter].values() if torch.is_tensor(value)]
    return found


def trained_alone(settings: dict[str, Any]) -> list[Tensor]:
    """One process that sees both halves under every draw, one after the other."""
    net = network()
    optimizer = BLROptimizer(net.parameters(), 16, seed=0, **settings)
    for _ in range(STEPS):
        if settings.get("samples", 1) > 1:

            def closure() -> Tensor:
                loss = sum(-Normal(net(x), 0.3).log_prob(y).mean() / 2 for x, y in halves())
                loss.backward()
                return loss

            optimizer.step(closure)
            continue
        optimizer.zero_grad()
        with optimizer.sampled():
            for x, y in halves():
                distribution = Normal(net(x), 0.3)
                if settings.get("curvature") != "price":
                    optimizer.observe(distribution, y)
                (-distribution.log_prob(y).mean() / 2).backward()
        optimizer.step()
    return states(net, optimizer)


# -- what each process runs -----------------------------------------------------------------------------------------


def train(net: Callable[[Tensor], Tensor], optimizer: BLROptimizer, steps: int = STEPS) -> None:
    x, y = halves()[distributed.get_rank()]
    for _ in range(steps):
        optimizer.step(lambda: (Normal(net(x), 0.3), y))


def data_parallel(settings: dict[str, Any]) -> list[Tensor]:
    net = network()
    wrapped = DistributedDataParallel(net)
    optimizer = BLROptimizer(wrapped.parameters(), 16, seed=0, **settings)
    train(wrapped, optimizer)
    return states(net, optimizer)


def own_noise() -> dict[str, Any]:
    net = network()
    wrapped = DistributedDataParallel(net)
    optimizer = BLROptimizer(wrapped.parameters(), 16, seed=0, noise="own")
    train(wrapped, optimizer)
    with optimizer.sampled():
        drawn = net[0].weight.detach().clone()
    found = {"drawn": drawn, "states": states(net, optimizer)}
    refused = BLROptimizer(wrapped.parameters(), 16, seed=0, noise="own", curvature="price")
    with pytest.raises(RuntimeError, match="noise='own' with Price's curvature"):
        train(wrapped, refused, 1)
    return found


def nan_in_one() -> tuple[bool, list[str]]:
    """Whether a step on data that are NaN in the second process alone left the state of both as it was, and what was said."""
    net = network()
    wrapped = DistributedDataParallel(net)
    optimizer = BLROptimizer(wrapped.parameters(), 16, seed=0)
    train(wrapped, optimizer, 3)
    before = states(net, optimizer)
    x, y = halves()[distributed.get_rank()]
    if distributed.get_rank() == 1:
        x = x * torch.nan
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        optimizer.step(lambda: (Normal(wrapped(x), 0.3, validate_args=False), y))
    after = states(net, optimizer)
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), [str(w.message) for w in said]


def sharded(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """fully_shard: the end of a run, and that of one saved half-way by torch.distributed.checkpoint and resumed in a new network."""
    from torch.distributed.checkpoint import load, save
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    net = fully_shard(network(), mesh=mesh)
    optimizer = BLROptimizer(net.parameters(), 16, seed=0, **settings)
    train(net, optimizer, STEPS - 10)
    model_state, optimizer_state = get_state_dict(net, optimizer)
    save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    train(net, optimizer, 10)

    other = fully_shard(network(), mesh=mesh)
    resumed = BLROptimizer(other.parameters(), 16, seed=3, **settings)
    model_state, optimizer_state = get_state_dict(other, resumed)
    saved = {"model": model_state, "optimizer": optimizer_state}
    load(saved, checkpoint_id=folder)
    set_state_dict(other, resumed, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
    train(other, resumed, 10)
    with pytest.raises(ValueError, match="curvature='labels' on sharded parameters; expected curvature='price'"):
        BLROptimizer(net.parameters(), 16, seed=0, curvature="labels")
    return {
        "states": states(net, optimizer),
        "resumed": states(other, resumed),
        "stddev": [whole(optimizer.stddev(parameter)) for parameter in net.parameters()],
    }


def work(process: int, folder: str) -> None:
    os.environ.update(RANK=str(process), WORLD_SIZE="2")
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=process, world_size=2)
    try:
        found: dict[str, Any] = {name: data_parallel(settings) for name, settings in SETTINGS.items()}
        found["own"] = own_noise()
        found["nan"] = nan_in_one()
        for name in ("price", "pairs"):
            found[f"sharded {name}"] = sharded(SETTINGS[name], Path(folder) / name)
        torch.save(found, f"{folder}/{process}.pt")
    finally:
        with contextlib.suppress(Exception):
            distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the two processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{process}.pt", weights_only=False) for process in range(2)]


def close(first: list[Tensor], second: list[Tensor]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", list(SETTINGS))
def test_two_data_parallel_processes_are_one(name: str, ranks: list[dict[str, Any]]) -> None:
    """Means, momenta, curvatures and the joint matrix, at the labels that one process draws for both halves in turn."""
    assert all(torch.equal(a, b) for a, b in zip(ranks[0][name], ranks[1][name], strict=True))
    close(ranks[0][name], trained_alone(SETTINGS[name]))


@pytest.mark.parametrize("name", ["price", "pairs"])
def test_shards_are_the_whole(name: str, ranks: list[dict[str, Any]]) -> None:
    """fully_shard gives what DistributedDataParallel gives, also when saved and resumed in between."""
    for found in ranks:
        close(found[f"sharded {name}"]["states"], ranks[0][name])
        assert all(
            torch.equal(a, b)
            for a, b in zip(found[f"sharded {name}"]["states"], found[f"sharded {name}"]["resumed"], strict=True)
        )
    shapes = [parameter.shape for parameter in network().parameters()]
    assert [sd.shape for sd in ranks[0][f"sharded {name}"]["stddev"]] == shapes


def test_noise_of_ones_own_leaves_one_posterior(ranks: list[dict[str, Any]]) -> None:
    first, second = (found["own"] for found in ranks)
    assert all(torch.equal(a, b) for a, b in zip(first["states"], second["states"], strict=True))
    assert not torch.equal(first["drawn"], second["drawn"])


def test_a_loss_that_is_nan_in_one_process_skips_the_step_in_all(ranks: list[dict[str, Any]]) -> None:
    for kept, said in (found["nan"] for found in ranks):
        assert kept
        assert any("step skipped" in message for message in said)
