"""One step of an optimizer on transformer-shaped parameters: AdamW (foreach, fused), BLROptimizer, and ivon-opt where it is installed.

    python tests/benchmarks/optimizer_step.py --elements 1e7 --device cpu
    python tests/benchmarks/optimizer_step.py --elements 1.2e8 --device cuda

A step is the draw of the weights and the update; gradients are given. Programs run in turn, in one process; times are medians, of
the processor on a CPU, of events on a GPU. Memory is the peak beside parameter and gradient, in bytes a parameter, each program in
a process of its own.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch

from pyro_blr.nn import BLROptimizer

try:
    import ivon
except ImportError:
    ivon = None


def parameters(elements: float, device: str) -> list[torch.nn.Parameter]:
    """Blocks of a transformer of width 384 up to 3·10⁷ numbers, of 1,024 above, with gradients."""
    torch.manual_seed(0)
    width = 384 if elements < 3e7 else 1024
    shapes = [
        (3 * width, width),
        (3 * width,),
        (width, width),
        (width,),
        (4 * width, width),
        (4 * width,),
        (width, 4 * width),
    ]
    shapes += [(width,)] * 5
    found: list[torch.nn.Parameter] = []
    while sum(parameter.numel() for parameter in found) < elements:
        found += [torch.nn.Parameter(torch.randn(shape, device=device) * 0.02) for shape in shapes]
    for parameter in found:
        parameter.grad = torch.randn_like(parameter) * 0.01
    return found


def adamw(found: list[torch.nn.Parameter], **options: bool) -> Callable[[], object]:
    return torch.optim.AdamW(found, lr=1e-5, **options).step


def blr(found: list[torch.nn.Parameter]) -> Callable[[], object]:
    """Price's curvature, as ivon-opt has it."""
    optimizer = BLROptimizer(found, 1e6, prior_precision=100.0, curvature="price", initial_curvature=0.1, seed=0)
    gradients = [parameter.grad for parameter in found]

    def closure() -> float:
        for parameter, gradient in zip(found, gradients, strict=True):
            parameter.grad = gradient
        return 0.0

    return lambda: optimizer.step(closure)


def ivon_opt(found: list[torch.nn.Parameter]) -> Callable[[], object]:
    optimizer = ivon.IVON(found, lr=0.1, ess=1e6, hess_init=0.1, weight_decay=1e-4)
    gradients = [parameter.grad for parameter in found]

    def step() -> None:
        with optimizer.sampled_params(train=True):
            for parameter, gradient in zip(found, gradients, strict=True):
                parameter.grad = gradient
        optimizer.step()

    return step


PROGRAMS: dict[str, Callable[[list[torch.nn.Parameter]], Callable[[], object]]] = {
    "AdamW, foreach": lambda found: adamw(found, foreach=True),
    "AdamW, fused": lambda found: adamw(found, fused=True),
    "BLROptimizer": blr,
    **({"ivon-opt": ivon_opt} if ivon is not None else {}),
}


def seconds(step: Callable[[], object], device: str) -> float:
    if device == "cpu":
        start = time.process_time()
        step()
        return time.process_time() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    step()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1e3


def peak(device: str) -> int:
    """Bytes in use at the most so far."""
    if device == "cpu":
        with open(
            "/proc/self/status"
        ) as status:  # of Linux; getrusage's figure would be the parent's, if that is larger
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    return torch.cuda.max_memory_allocated()


def memory(name: str, elements: float, device: str) -> None:
    found = parameters(elements, device)
    before = peak(device)
    step = PROGRAMS[name](found)
    for _ in range(3):
        step()
    print((peak(device) - before) / sum(parameter.numel() for parameter in found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--elements", type=float, default=1e7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--memory", choices=list(PROGRAMS))
    asked = parser.parse_args()
    if asked.memory:
        memory(asked.memory, asked.elements, asked.device)
        return
    found = parameters(asked.elements, asked.device)
    count = sum(parameter.numel() for parameter in found)
    del found
    print(f"{count} parameters, torch {torch.__version__}, {torch.get_num_threads()} threads, {asked.device}")
    steps = {name: make(parameters(asked.elements, asked.device)) for name, make in PROGRAMS.items()}
    for _ in range(50):
        steps["BLROptimizer"]()  # past its first comparisons of gradients, which are at every step
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for _ in range(asked.rounds):
        for name, step in steps.items():
            taken[name].append(seconds(step, asked.device))
    own = taken["BLROptimizer"]
    for name, times in taken.items():
        ratios = sorted(other / mine for other, mine in zip(times, own, strict=True))
        command = [
            sys.executable,
            __file__,
            "--memory",
            name,
            "--elements",
            str(asked.elements),
            "--device",
            asked.device,
        ]
        extra = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        print(
            f"{name:15} {1e3 * statistics.median(times):8.2f} ms, {statistics.median(ratios):5.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) "
            f"of BLROptimizer's, {extra:.1f} bytes a parameter at the peak"
        )


if __name__ == "__main__":
    main()
