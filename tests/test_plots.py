"""Pictures of a posterior: what is drawn, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pyro_blr.plots import plot_elbo, plot_marginals

pyplot = pytest.importorskip("matplotlib.pyplot")


@pytest.fixture
def posterior() -> Any:
    def sample(shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
        return {"w": torch.randn(*shape, 3, 5), "z": torch.randint(0, 4, shape), "s": torch.rand(*shape)}

    yield SimpleNamespace(history=[-3.0, -2.0, -1.5], stop_reason="converged", sample=sample)
    pyplot.close("all")


def test_the_bound_against_steps(posterior: Any) -> None:
    line = plot_elbo(posterior).lines[0]
    assert list(line.get_xdata()) == [1, 2, 3] and list(line.get_ydata()) == [-3.0, -2.0, -1.5]
    ax = pyplot.figure().add_subplot()
    assert plot_elbo(posterior, ax) is ax


def test_every_site_has_its_axes_and_every_element_a_label(posterior: Any) -> None:
    w, z, s = plot_marginals(posterior)
    assert w.get_title() == "w (10 of 15 elements)"
    assert [text.get_text() for text in w.get_legend().get_texts()][:6] == [
        "w[0, 0]", "w[0, 1]", "w[0, 2]", "w[0, 3]", "w[0, 4]", "w[1, 0]"
    ]  # fmt: skip
    assert list(z.lines[0].get_xdata()) == [0, 1, 2, 3] and sum(z.lines[0].get_ydata()) == pytest.approx(1)
    assert s.get_title() == "s"
    w.figure.canvas.draw()


def test_refusals(posterior: Any) -> None:
    with pytest.raises(ValueError, match=r"expected one or more of the posterior's sites \['s', 'w', 'z'\]"):
        plot_marginals(posterior, ["v"])
    with pytest.raises(ValueError, match="axes: found 1, expected one for each of the 2 sites"):
        plot_marginals(posterior, ["s", "z"], pyplot.figure().add_subplot())
    posterior.history = []
    with pytest.raises(ValueError, match="no history of its ELBO"):
        plot_elbo(posterior)
