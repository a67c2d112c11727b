"""Two pictures of a posterior, in matplotlib: the bound as it rose, and each site's marginals.

More of them, and better, are ArviZ's: `posterior.to_arviz()`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["plot_elbo", "plot_marginals"]

NUM_DRAWS = 4000
MAX_ELEMENTS = 10


class Drawable(Protocol):
    """What a picture needs of a posterior."""

    @property
    def history(self) -> Sequence[float]: ...
    @property
    def stop_reason(self) -> str: ...
    def sample(self, shape: Any) -> Mapping[str, Tensor]: ...


def plot_elbo(posterior: Drawable, ax: Any = None) -> Any:
    """The ELBO of each step (higher is better) on `ax`, or on a new figure; returns the axes."""
    pyplot = _pyplot()
    history = list(posterior.history)
    if not history:
        raise ValueError("the posterior has no history of its ELBO; expected that of a run of at least one step")
    ax = pyplot.subplots(layout="constrained")[1] if ax is None else ax
    ax.plot(range(1, len(history) + 1), history, marker="." if len(history) < 30 else None)
    ax.set(xlabel="step", ylabel="ELBO (nats)")
    ax.set_title(posterior.stop_reason, fontsize="small", wrap=True)
    return ax


def plot_marginals(posterior: Drawable, sites: Sequence[str] | None = None, axes: Any = None) -> Any:
    """Histograms of draws, one axes a site (all, or `sites`), at most ten elements each; returns the axes.

    Draws come from torch's global generator.
    """
    pyplot = _pyplot()
    draws = posterior.sample((NUM_DRAWS,))
    names = list(draws) if sites is None else list(sites)
    unknown = sorted(set(names) - set(draws))
    if unknown or not names:
        raise ValueError(f"sites={sites!r}: expected one or more of the posterior's sites {sorted(draws)}")
    if axes is None:
        height = 2.2 * len(names)
        axes = pyplot.subplots(len(names), figsize=(6, height), squeeze=False, layout="constrained")[1][:, 0]
    axes = [axes] if hasattr(axes, "plot") else list(axes)
    if len(axes) != len(names):
        raise ValueError(f"axes: found {len(axes)}, expected one for each of the {len(names)} sites {names}")
    for ax, name in zip(axes, names, strict=True):
        _draw_site(ax, name, draws[name].cpu())
    return axes


def _draw_site(ax: Any, name: str, draws: Tensor) -> None:
    total = draws[0].numel()
    for label, values in _elements(name, draws):
        if values.is_floating_point():
            ax.hist(values.numpy(), bins=60, density=True, histtype="step", label=label)
        else:
            states, counts = values.unique(return_counts=True)
            ax.plot(states.numpy(), (counts / len(values)).numpy(), marker="o", linestyle=":", label=label)
    more = f" ({MAX_ELEMENTS} of {total} elements)" if total > MAX_ELEMENTS else ""
    ax.set(title=name + more, yticks=[])
    if total > 1:
        ax.legend(fontsize="x-small", ncols=2)


def _elements(name: str, draws: Tensor) -> Iterator[tuple[str, Tensor]]:
    """(name[index], draws) of the first elements."""
    shape = draws.shape[1:]
    flat = draws.reshape(len(draws), -1)
    for position in range(min(flat.shape[1], MAX_ELEMENTS)):
        index = torch.unravel_index(torch.tensor(position), shape) if shape else ()
        label = f"{name}[{', '.join(str(int(part)) for part in index)}]" if shape else name
        yield label, flat[:, position]


def _pyplot() -> Any:
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(
            "pictures need matplotlib and found none: pip install matplotlib, or 'pyro_blr[plots]'"
        ) from error
    return pyplot
