"""What `explain` prints: one row a site, the reason and the way out, on lines that a terminal holds."""

from __future__ import annotations

import json
import textwrap

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_blr import BLRInference
from pyro_blr.blocks import Block, build_blocks
from pyro_blr.capture import capture
from pyro_blr.explain import Explanation
from pyro_blr.plans import Verdict
from pyro_blr.remedies import TABLE, remedy_for
from pyro_blr.running import generic_value, run_model
from pyro_blr.series import counted, in_series, shortened

PROVED = "exact (proved)"
REMEDY = remedy_for("Normal", "precision", "HalfCauchy", "")


def model() -> None:
    with pyro.plate("group", 3):
        pyro.sample("w", dist.Normal(torch.zeros(3, 2), 1.0).to_event(1))
    tau = pyro.sample("tau", dist.Gamma(1.0, 1.0))
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(b, tau.rsqrt()), obs=torch.tensor(0.5))


@pytest.fixture
def blocks() -> dict[str, Block]:
    trace = run_model(model, (), {}, generic_value)
    return build_blocks(capture(model, (), {}, trace))


def verdict(factor: str, site: str, how: str = PROVED, reason: str = "", remedy: str = "") -> Verdict:
    return Verdict(factor, site, how.startswith("exact"), how, reason, remedy, "loc")


def mixed(blocks: dict[str, Block]) -> Explanation:
    return Explanation(
        [
            verdict("w", "w"),
            verdict("y", "w", "Monte Carlo", "y: loc is not affine in w: exp (model.py:14)"),
            verdict("tau", "tau"),
            verdict("y", "tau", "Monte Carlo", "y: precision is not a power of tau: add (m.py:15)", REMEDY),
            verdict("b", "b"),
            verdict("y", "b"),
        ],
        blocks,
        bound_kind="estimate ± standard error",
        optimised=["encoder.weight", "encoder.bias"],
        ordinary={"h": "its distribution in the guide is no exponential family"},
        notes=["the model is traced at every step: `if` on z (model.py:12)"],
    )


def test_a_site_whose_factors_stand_alike_has_one_row(blocks: dict[str, Block]) -> None:
    told = Explanation(
        [verdict("w", "w"), verdict("tau", "tau"), verdict("y", "tau"), verdict("b", "b"), verdict("y", "b")],
        blocks,
        bound_kind="exact bound",
    )
    assert told.exact
    assert str(told) == textwrap.dedent(
        """\
        Every message is exact: 5 of 5.

        site | family                    | exact? | how            | why not, and what would make it so
        -----+---------------------------+--------+----------------+-------------------------------------
        w    | MultivariateNormal(2) × 3 | yes    | exact (proved) |
        tau  | Gamma                     | yes    | exact (proved) |
        b    | Normal                    | yes    | exact (proved) |

        Bound: exact bound"""
    )


def test_a_site_whose_factors_differ_has_a_row_for_each(blocks: dict[str, Block]) -> None:
    lines = str(mixed(blocks)).splitlines()
    assert lines[0] == "4 of 6 messages are exact."
    assert max(map(len, lines)) <= 116
    rows = [line for line in lines if " | " in line]
    starts = [line.split(" | ")[0].rstrip() for line in rows[1:]]
    assert [start for start in starts if start] == ["w", "  w", "  y", "tau", "  tau", "  y", "b", "h"]
    text = " ".join(" ".join(line.split(" | ")[-1] for line in rows).split())
    assert "y: loc is not affine in w: exp (model.py:14)" in text
    assert f"-> {REMEDY}" in text


def test_what_is_not_a_message_is_said_below(blocks: dict[str, Block]) -> None:
    text = str(mixed(blocks))
    assert "Bound: estimate ± standard error" in text
    assert "Learned by optim: encoder.weight; encoder.bias" in text
    assert "Note: the model is traced at every step: `if` on z (model.py:12)" in text
    assert "ordinary gradient" in text


def test_a_rewrite_is_spelled_out_once(blocks: dict[str, Block]) -> None:
    reasons = [verdict(factor, "tau", "Monte Carlo", f"{factor}: no", REMEDY) for factor in ("tau", "y", "z")]
    text = str(Explanation(reasons, blocks, bound_kind="exact bound"))
    assert text.count("-> Gamma on the precision") == 1 and text.count("-> as above") == 2


@pytest.mark.parametrize("width", [100, 120])
def test_long_names_wrap(blocks: dict[str, Block], width: int) -> None:
    told = Explanation(
        [
            verdict("y" * 90, "w", "exact (verified numerically at 12 points)", "because " * 40, "do " * 60),
            verdict("w", "w"),
        ],
        blocks,
        bound_kind="exact bound",
        width=width,
    )
    assert max(map(len, str(told).splitlines())) <= width


def test_a_joint_block_names_its_other_sites() -> None:
    def pair() -> None:
        pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    graph = capture(pair, (), {}, run_model(pair, (), {}, generic_value))
    blocks = build_blocks(graph, [("a", "b")])
    told = Explanation([verdict("a", "a"), verdict("b", "b")], blocks, bound_kind="exact bound")
    assert told.to_dict()["sites"]["a"]["family"] == "MultivariateNormal(3) with b"
    assert told.to_dict()["sites"]["b"]["block"] == "a+b"


def test_exact_needs_every_message_and_no_ordinary_gradient(blocks: dict[str, Block]) -> None:
    all_exact = [verdict("w", "w"), verdict("tau", "tau"), verdict("b", "b")]
    assert Explanation(all_exact, blocks, bound_kind="exact bound").exact
    assert not Explanation(all_exact, blocks, bound_kind="exact bound", ordinary={"h": "free"}).exact
    assert not mixed(blocks).exact


def test_to_dict_is_json(blocks: dict[str, Block]) -> None:
    told = mixed(blocks)
    assert json.loads(json.dumps(told.to_dict())) == told.to_dict()
    assert told.to_dict()["sites"]["tau"]["messages"][1]["remedy"] == REMEDY
    assert told.to_dict()["sites"]["w"]["batch_shape"] == [3]


def test_html_escapes(blocks: dict[str, Block]) -> None:
    said = verdict("y", "w", "Monte Carlo", "y: <lambda> is not affine & more")
    told = Explanation([said], blocks, bound_kind="exact bound")
    page = told._repr_html_()
    assert "&lt;lambda&gt; is not affine &amp; more" in page and "<lambda>" not in page
    assert page.count("<tr>") == 4


def test_iterates_over_verdicts_and_indexes_by_site(blocks: dict[str, Block]) -> None:
    told = mixed(blocks)
    assert list(told) == list(told.verdicts)
    assert [v.factor for v in told["tau"]] == ["tau", "y"]
    with pytest.raises(KeyError, match=r"'nu' is no latent site of the model; it has \['b', 'tau', 'w'\]"):
        told["nu"]


# What stands where | what we say. The beginning is enough.
REMEDIES = [
    ("Normal", "precision", "HalfCauchy", "", "Gamma on the precision instead of HalfCauchy on the scale"),
    ("Normal", "precision", "Gamma", "add", "the Gamma site alone as the precision"),
    ("Normal", "precision", "Gamma", "", "Gamma on the precision (scale = tau.rsqrt()), or InverseGamma"),
    ("Bernoulli", "probs", "Normal", "sigmoid", "Beta on probs instead of Normal on logits"),
    ("Bernoulli", "probs", "Beta", "mul", "the Beta site itself"),
    ("Poisson", "rate", "Normal", "exp", "Gamma on the rate instead of exp of a Normal"),
    ("Categorical", "probs", "Normal", "softmax", "Dirichlet on probs instead of softmax of Normal logits"),
    ("MultivariateNormal", "precision", "LKJCholesky", "", "Wishart on precision_matrix"),
    ("StudentT", "", "Normal", "", "the same StudentT in two steps"),
    ("Normal", "loc", "Normal", "mul", ""),
    ("Unheard", "of", "at", "all", ""),
]


@pytest.mark.parametrize(("factor", "argument", "prior", "operation", "said"), REMEDIES)
def test_remedies(factor: str, argument: str, prior: str, operation: str, said: str) -> None:
    found = remedy_for(factor, argument, prior, operation)
    assert found.startswith(said) and (found == "") == (said == "")


def test_every_remedy_can_be_reached() -> None:
    def asked(names: str) -> list[str]:
        return names.split() or ["anything"]

    for row in TABLE:
        answers = {
            remedy_for(factor, argument, prior, operation)
            for factor in asked(row.factor)
            for argument in asked(row.argument)
            for prior in asked(row.prior)
            for operation in asked(row.operation)
        }
        written = {row.write.format(prior=prior) for prior in asked(row.prior)}
        assert answers & written, f"an earlier row hides {row}"


# -- loops --------------------------------------------------------------------------------------------------------


def walk(steps: int, noise: float) -> None:
    precision = pyro.sample("precision", dist.Gamma(1.0, 1.0))
    state = pyro.sample("start", dist.Normal(0.0, 1.0))
    for t in range(steps):
        state = pyro.sample(f"state_{t}", dist.Normal(state, precision.rsqrt()))
        pyro.sample(f"y_{t}", dist.Normal(state, noise), obs=torch.tensor(0.5))


def apart(steps: int, odd: int = -1) -> None:
    for t in range(steps):
        x = pyro.sample(f"x_{t}", dist.Normal(0.0, 1.0))
        s = pyro.sample(f"s_{t}", dist.LogNormal(0.0, 1.0))
        pyro.sample(f"y_{t}", dist.Normal(x, s) if t != odd else dist.Normal(x * 2, 1.0), obs=torch.tensor(0.5))


def left_column(explanation: Explanation) -> list[str]:
    lines = str(explanation).split("-+-")[-1].split("\n\n")[0].splitlines()[1:]
    return [line.split(" | ")[0].rstrip() for line in lines if line.split(" | ")[0].strip()]


def test_statements_of_a_loop_share_rows() -> None:
    explanation = BLRInference(walk).explain(10, 1.0)
    assert left_column(explanation) == ["precision", "start", "state_0 … state_9"]
    text = " ".join(str(explanation).split())
    assert "MultivariateNormal(11) over" in text and "start, state_0 … state_9" in text
    each = explanation.to_dict()["sites"]
    assert len(each) == 12 and each["state_3"]["family"].count("state_") == 9
    assert "state_0 … state_9" in explanation._repr_html_()


def test_series_of_gaussians_say_which_share_one() -> None:
    explanation = BLRInference(apart).explain(5)
    assert left_column(explanation) == [
        *("x_0 … x_4", "  x_0 … x_4", "  y_0 … y_4"),
        *("s_0 … s_4", "  s_0 … s_4", "  y_0 … y_4"),
    ]
    text = " ".join(str(explanation).split())
    assert "(and 4 alike)" in text and "over x_0, s_0" in text and "over x_1" not in text


def test_the_statement_that_differs_has_rows_of_its_own() -> None:
    """Two left of it and three right of it: only what is three and more is a series."""
    rows = left_column(BLRInference(apart).explain(6, 2))
    assert [row for row in rows if row[:1] == "x"] == ["x_0", "x_1", "x_2", "x_3 … x_5"]
    assert [row for row in rows if row[:1] == "s"] == ["s_0", "s_1", "s_2", "s_3 … s_5"]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["a_1", "a_2", "a_3"], ["a_1 … a_3"]),
        (["a_1", "a_2"], ["a_1", "a_2"]),
        (["a_1", "a_2", "a_4", "a_5"], ["a_1", "a_2", "a_4", "a_5"]),
        (["x", "a_8", "a_9", "a_10", "b_0"], ["x", "a_8 … a_10", "b_0"]),
        (["z_0_0", "z_0_1", "z_0_2", "z_1_0"], ["z_0_0 … z_0_2", "z_1_0"]),
        (["z_0_1", "z_1_1", "z_2_1"], ["z_0_1 … z_2_1"]),
        (["z_0_0", "z_0_1", "z_2_0"], ["z_0_0", "z_0_1", "z_2_0"]),
    ],
)
def test_series(names: list[str], said: list[str]) -> None:
    assert in_series(names) == said
    assert shortened(f"over {', '.join(names)}: because") == f"over {', '.join(said)}: because"


def test_long_lists_are_counted() -> None:
    assert counted(["a", "b", "c", "d"]) == "a, b, c, d"
    assert counted(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"
    assert counted(["a", *(f"b{i}" for i in range(9)), "c"]) == "a, b0 … b8, c"
