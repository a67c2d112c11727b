"""`BLROptimizer` inside other people's loops: Lightning's, and that of the Hugging Face Trainer."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical
from torch.utils.data import DataLoader, TensorDataset

from pyro_blr.nn import BLROptimizer

# What these packages say about themselves and about a machine without a GPU is not ours.
pytestmark = pytest.mark.filterwarnings("ignore")

STEPS, ROWS = 6, 30


def data() -> tuple[Tensor, Tensor]:
    x = torch.randn(ROWS, 3)
    return x, (x[:, 0] > 0).long()


def imported(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, reason=f"{name} is not installed")


@pytest.mark.parametrize("curvature", ["labels", "price"])
def test_lightning_is_the_loop_by_hand(curvature: str, tmp_path: Path) -> None:
    """Lightning hands step() a closure, which is run on drawn weights; observe() in training_step tells the distribution."""
    lightning = imported("lightning")
    x, y = data()
    network = torch.nn.Linear(3, 2)
    start = {name: value.clone() for name, value in network.state_dict().items()}
    seen: list[Tensor] = []

    class Module(lightning.LightningModule):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def training_step(self, batch: Any, _: int) -> Tensor:
            seen.append(self.network.weight.detach().clone())
            distribution = Categorical(logits=self.network(batch[0]))
            if curvature == "labels":
                self.optimizers().optimizer.observe(distribution, batch[1])
            return -distribution.log_prob(batch[1]).mean()

        def configure_optimizers(self) -> BLROptimizer:
            return BLROptimizer(self.parameters(), num_data=ROWS, seed=0, curvature=curvature)

    trainer = lightning.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(Module(), DataLoader(TensorDataset(x, y), batch_size=10))
    found = {name: value.clone() for name, value in network.state_dict().items()}

    network.load_state_dict(start)
    optimizer = BLROptimizer(network.parameters(), num_data=ROWS, seed=0, curvature=curvature)
    by_hand: list[Tensor] = []
    for step in range(STEPS):
        part = slice(10 * (step % 3), 10 * (step % 3) + 10)
        optimizer.zero_grad()
        with optimizer.sampled():
            by_hand.append(network.weight.detach().clone())
            distribution = Categorical(logits=network(x[part]))
            if curvature == "labels":
                optimizer.observe(distribution, y[part])
            (-distribution.log_prob(y[part]).mean()).backward()
        optimizer.step()
    torch.testing.assert_close(torch.stack(seen), torch.stack(by_hand))
    torch.testing.assert_close(found, dict(network.state_dict()))
    assert (by_hand[2] - by_hand[1]).abs().max() > 0


def test_the_trainer_steps_on_drawn_weights(tmp_path: Path) -> None:
    """A Trainer whose training_step stands in sampled() takes the steps of the loop by hand."""
    transformers = imported("transformers")
    imported("accelerate")
    x, y = data()

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(3, 2)
            self.seen: list[Tensor] = []

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            self.seen.append(self.linear.weight.detach().clone())
            logits = self.linear(x)
            return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}

    class Trainer(transformers.Trainer):  # type: ignore[name-defined]
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            with optimizer.sampled():
                return super().training_step(*args, **kwargs)

    network = Network()
    start = {name: value.clone() for name, value in network.state_dict().items()}
    optimizer = BLROptimizer(network.parameters(), num_data=ROWS, seed=0)
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    settings = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=STEPS,
        per_device_train_batch_size=ROWS,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        max_grad_norm=0,
    )
    rows = [{"x": row, "labels": label} for row, label in zip(x, y, strict=True)]
    Trainer(model=network, args=settings, train_dataset=rows, optimizers=(optimizer, constant)).train()
    found, seen = network.linear.weight.detach().clone(), list(network.seen)

    network.load_state_dict(start)
    network.seen.clear()
    optimizer = BLROptimizer(network.parameters(), num_data=ROWS, seed=0)
    for _ in range(STEPS):
        with optimizer.sampled():
            network(x, y)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(torch.stack(seen), torch.stack(network.seen))
    torch.testing.assert_close(found, network.linear.weight.detach())
    assert (seen[2] - seen[1]).abs().max() > 0
