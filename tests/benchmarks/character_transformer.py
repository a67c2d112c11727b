"""A character-level transformer: validation loss and calibration after equal steps, AdamW against BLROptimizer.

    PYTHONPATH=tests python tests/benchmarks/character_transformer.py                # 0.1 million parameters
    PYTHONPATH=tests python tests/benchmarks/character_transformer.py --layers 6 --width 384 --heads 6 --context 256 --batch 64 \
        --steps 5000 --device cuda                                                   # 10 million

The last tenth of the text is for validation. AdamW has a warm-up and a cosine decay to zero, the rule its own rates.
"""

from __future__ import annotations

import argparse
import time

import torch
from oracles import shared_path
from torch import Tensor
from torch.distributions import Categorical

from pyro_blr.nn import BLROptimizer, classification_scores, predict


class Block(torch.nn.Module):
    """Causal attention and a perceptron, each on normalised inputs, added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.attention, self.out = torch.nn.Linear(width, 3 * width), torch.nn.Linear(width, width)
        self.perceptron = torch.nn.Sequential(
            torch.nn.Linear(width, 4 * width), torch.nn.GELU(), torch.nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        parts = self.attention(self.before(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = torch.nn.functional.scaled_dot_product_attention(*parts, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.perceptron(self.between(x))


class Transformer(torch.nn.Module):
    """Characters (batch, context) to logits of the next one."""

    def __init__(self, classes: int, settings: argparse.Namespace) -> None:
        super().__init__()
        width = settings.width
        self.characters = torch.nn.Embedding(classes, width)
        self.positions = torch.nn.Embedding(settings.context, width)
        self.blocks = torch.nn.Sequential(*(Block(width, settings.heads) for _ in range(settings.layers)))
        self.last, self.head = torch.nn.LayerNorm(width), torch.nn.Linear(width, classes)
        for embedding in (self.characters, self.positions):
            torch.nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, text: Tensor) -> Tensor:
        x = self.characters(text) + self.positions(torch.arange(text.shape[1], device=text.device))
        return self.head(self.last(self.blocks(x)))


def windows(text: Tensor, starts: Tensor, settings: argparse.Namespace) -> tuple[Tensor, Tensor]:
    rows = (starts[:, None] + torch.arange(settings.context + 1)).to(text.device)
    return text[rows[:, :-1]], text[rows[:, 1:]]


def report(name: str, logits: Tensor, labels: Tensor, seconds: float) -> None:
    found = classification_scores(logits, labels)
    print(
        f"{name:34} NLL {found.nll:.4f}  ECE {found.ece:.4f}  Brier {found.brier:.4f}  accuracy {found.accuracy:.4f}  {seconds:.0f} s",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in {
        "layers": 2,
        "width": 64,
        "heads": 4,
        "context": 64,
        "batch": 32,
        "steps": 2000,
        "draws": 8,
        "seed": 0,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--windows", type=int, default=200, help="of the validation text")
    parser.add_argument("--lr", type=float, default=3e-3, help="AdamW's, the largest")
    parser.add_argument("--decay", type=float, default=10.0)
    parser.add_argument("--prior-precision", type=float, default=1.0)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--curvature-every", type=int, default=None)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--methods", nargs="*", default=["AdamW", "BLROptimizer"])
    settings = parser.parse_args()
    with open(shared_path("data", "tinyshakespeare.txt")) as file:
        characters = file.read()
    alphabet = sorted(set(characters))
    text = torch.tensor([alphabet.index(c) for c in characters], device=settings.device)
    cut = int(0.9 * len(text))
    train, held = text[:cut], text[cut:]
    x_held, y_held = windows(
        held, torch.linspace(0, len(held) - settings.context - 1, settings.windows).long(), settings
    )
    print(settings, "torch", torch.__version__)
    for method in settings.methods:
        torch.manual_seed(settings.seed)
        network = Transformer(len(alphabet), settings).to(settings.device)
        print(f"{method}: {sum(parameter.numel() for parameter in network.parameters()):,} parameters")
        starts = torch.randint(
            cut - settings.context - 1,
            (settings.steps, settings.batch),
            generator=torch.Generator().manual_seed(settings.seed),
        )
        clock = time.process_time()
        if method == "AdamW":
            adamw = torch.optim.AdamW(network.parameters(), lr=settings.lr)
            warm = min(100, settings.steps // 10)
            rates = torch.optim.lr_scheduler.SequentialLR(
                adamw,
                [
                    torch.optim.lr_scheduler.LinearLR(adamw, 0.01, 1.0, warm),
                    torch.optim.lr_scheduler.CosineAnnealingLR(adamw, settings.steps - warm),
                ],
                [warm],
            )
            for rows in starts:
                x, y = windows(train, rows, settings)
                adamw.zero_grad()
                torch.nn.functional.cross_entropy(network(x).flatten(0, 1), y.flatten()).backward()
                adamw.step()
                rates.step()
        else:
            optimizer = BLROptimizer(
                network.parameters(),
                num_data=len(train) / settings.temperature,
                decay=settings.decay,
                prior_precision=settings.prior_precision / settings.temperature,
                curvature_every=settings.curvature_every,
            )
            for rows in starts:
                x, y = windows(train, rows, settings)
                optimizer.step(lambda x=x, y=y, network=network: (Categorical(logits=network(x)), y))
        seconds = time.process_time() - clock
        with torch.no_grad():
            parts = [network(part) for part in x_held.split(100)]
        report(
            f"{method}, the weights" if method == "AdamW" else f"{method}, the mean",
            torch.cat(parts)[None],
            y_held,
            seconds,
        )
        if method != "AdamW":
            draws = predict(optimizer, network, x_held, num_samples=settings.draws, batch_size=100)
            report(f"{method}, {settings.draws} draws", draws, y_held, seconds)


if __name__ == "__main__":
    main()
