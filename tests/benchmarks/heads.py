"""Heads: sds on digits against the whole Gauss-Newton matrix, laplace-torch's last layer beside them, and a head of a vocabulary.

python tests/benchmarks/heads.py digits
python tests/benchmarks/heads.py laplace                       # needs laplace-torch
python tests/benchmarks/heads.py vocabulary                    # 32,000 × 4,096 on the GPU, or what --classes and --features say
python tests/benchmarks/heads.py vocabulary --device cpu --classes 8000 --features 1024
"""

from __future__ import annotations

import time
from typing import Any

import torch
from side_by_side import argument_parser, heading
from sklearn.datasets import load_digits
from torch import Tensor
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn.functional import cross_entropy

from pyro_blr.nn import CategoricalHead

CLASSES, FITTED = 10, 1200
# (features, prior precision)
CASES = (("pixels", 1.0), ("standardised", 10.0), ("network", 10.0))


def digits(kind: str) -> tuple[Tensor, Tensor]:
    """1,797 rows of pixels / 16, these standardised, or the 32 hidden units of a network trained on the fitted ones."""
    images, labels = (torch.as_tensor(value) for value in load_digits(return_X_y=True))
    images = images / 16
    if kind == "standardised":
        images = (images - images.mean(0)) / (images.std(0) + 1e-3)
    if kind == "network":
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32), torch.nn.ReLU())
        last = torch.nn.Linear(32, CLASSES)
        adamw = torch.optim.AdamW([*net.parameters(), *last.parameters()], lr=1e-3)
        for _ in range(30):
            for part in torch.randperm(FITTED).split(32):
                adamw.zero_grad()
                cross_entropy(last(net(images[part])), labels[part]).backward()
                adamw.step()
        images = net(images).detach()
    return images, labels


def whole_gauss_newton(head: CategoricalHead, features: Tensor, new: Tensor) -> Tensor:
    """Covariances of the logits of `new`, (n, C, C), by the whole matrix at the head's mean, inverted."""
    rows, more = (torch.nn.functional.pad(x, (0, 1), value=1.0) for x in (features, new))
    p = (rows @ head.mean.T).softmax(-1)
    hessian = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    size, width = CLASSES * rows.shape[1], rows.shape[1]
    precision = torch.einsum("nab,nij->aibj", hessian, rows[:, :, None] * rows[:, None]).reshape(size, size)
    covariance = torch.linalg.inv(precision + head.prior_precision * torch.eye(size)).reshape(
        CLASSES, width, CLASSES, width
    )
    return torch.einsum("ni,aibj,nj->nab", more, covariance, more)


def sds(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Of logits, and of logits minus their average."""
    centre = torch.eye(CLASSES) - 1 / CLASSES
    return tuple(c.diagonal(dim1=1, dim2=2).sqrt() for c in (covariance, centre @ covariance @ centre))  # type: ignore[return-value]


def logit_covariance(head: CategoricalHead, new: Tensor) -> Tensor:
    """Cov(f, f_c) for every class c, by the head's own closed form."""
    rows, gaussian = head._rows(new, head.mean.dtype), head._gaussian()
    return torch.stack([gaussian.contrast(rows, row.expand(len(rows), -1))[0] for row in torch.eye(CLASSES)], 1)


def fitted(kind: str, delta: float, covariance: str, draws: int = 0) -> tuple[CategoricalHead, float]:
    features, labels = digits(kind)
    head = CategoricalHead(features.shape[1], CLASSES, covariance=covariance, prior_precision=delta, num_draws=draws)
    start = time.process_time()
    head.observe(features[:FITTED], labels[:FITTED])
    return head, time.process_time() - start


def on_digits(options: Any) -> None:
    print("features | δ | covariance | logits | minus their average | test NLL | seconds to fit")
    for kind, delta in CASES:
        features, labels = digits(kind)
        new = features[FITTED:]
        for covariance in ("full", "kronecker", "eigenbasis"):
            head, seconds = fitted(kind, delta, covariance)
            expected, found = sds(whole_gauss_newton(head, features[:FITTED], new)), sds(logit_covariance(head, new))
            ratios = [f"{(a / b).median():.3f}" for a, b in zip(found, expected, strict=True)]
            torch.manual_seed(0)
            chosen = head.predict(new, 256).probabilities[torch.arange(len(new)), labels[FITTED:]]
            print(
                f"{kind} | {delta:g} | {covariance} | {' | '.join(ratios)} | {-chosen.log().mean():.3f} | {seconds:.1f}",
                flush=True,
            )


def beside_laplace(options: Any) -> None:
    from laplace import Laplace

    print("features | method | logits | minus their average | seconds (this mean given)")
    for kind, delta in CASES:
        features, labels = digits(kind)
        new = features[FITTED:]
        head, _ = fitted(kind, delta, "full")
        layer = torch.nn.Linear(features.shape[1], CLASSES)
        layer.weight.data, layer.bias.data = head.weight.clone(), head.mean[:, -1].clone()
        data = torch.utils.data.TensorDataset(features[:FITTED], labels[:FITTED])
        expected = sds(whole_gauss_newton(head, features[:FITTED], new))
        for structure in ("full", "kron", "diag"):
            start = time.process_time()
            model = torch.nn.Sequential(torch.nn.Identity(), layer)
            laplace = Laplace(
                model,
                "classification",
                subset_of_weights="last_layer",
                hessian_structure=structure,
                prior_precision=delta,
            )
            laplace.fit(torch.utils.data.DataLoader(data, batch_size=256))
            covariance = laplace._glm_predictive_distribution(new)[1].detach()
            seconds = time.process_time() - start
            ratios = [f"{(a / b).median():.3f}" for a, b in zip(sds(covariance), expected, strict=True)]
            print(f"{kind} | laplace-torch, {structure} | {' | '.join(ratios)} | {seconds:.2f}", flush=True)


def of_a_vocabulary(options: Any) -> None:
    """One refresh, the basis included, and the predictive variance of every logit, in bytes and seconds."""
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch.manual_seed(0)
    features = torch.randn(2 * options.rows, options.features, device=device)
    labels = torch.randint(options.classes, (2 * options.rows,), device=device)
    head_bytes = 4 * options.classes * options.features
    print("covariance | step | seconds | peak of tensors, heads | peak reserved for them, heads")
    for covariance in options.covariance:
        head = CategoricalHead(
            options.features,
            options.classes,
            False,
            covariance=covariance,
            num_draws=options.draws,
            dtype=torch.float32,
        ).to(device)
        steps = {
            "first refresh, with a basis": lambda head=head: head.refresh(
                features[: options.rows], labels[: options.rows], 1e6
            ),
            "refresh": lambda head=head: head.refresh(features[options.rows :], labels[options.rows :], 1e6),
            "variance of every logit": lambda head=head: head.logit_variance(features[: options.rows]),
        }
        for name, step in steps.items():
            if name == "refresh":
                head.steps.fill_(65)  # a step that keeps its basis
            print(f"{covariance} | {name} | {' | '.join(measured(step, head, device, head_bytes))}", flush=True)


def measured(step: Any, head: CategoricalHead, device: torch.device, unit: int) -> tuple[str, str, str]:
    """Seconds; peak of live tensors, counted at every operation on the CPU, by the allocator on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        return f"{seconds:.2f}", f"{peak / unit:.2f}", f"{reserved / unit:.2f}"
    tracker = MemTracker()
    tracker.track_external(*head.buffers())
    start = time.process_time()
    with tracker:
        step()
    seconds = time.process_time() - start
    return f"{seconds:.2f}", f"{tracker.get_tracker_snapshot('peak')[device]['Total'] / unit:.2f}", ""


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("what", choices=("digits", "laplace", "vocabulary"))
    parser.add_argument("--classes", type=int, default=32_000)
    parser.add_argument("--features", type=int, default=4_096)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--draws", type=int, default=2)
    parser.add_argument("--covariance", nargs="+", default=["kronecker", "eigenbasis"])
    parser.add_argument("--device")
    options = parser.parse_args()
    heading(f"heads: {options.what}")
    torch.set_default_dtype(torch.float32 if options.what == "vocabulary" else torch.float64)
    {"digits": on_digits, "laplace": beside_laplace, "vocabulary": of_a_vocabulary}[options.what](options)


if __name__ == "__main__":
    main()
