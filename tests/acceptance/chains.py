"""Chains: the hidden Markov models of the example, capture and recapture, series."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoNormal
from pyro.optim import Adam
from torch import Tensor

from acceptance.scripts import Script, program

HIDDEN, TONES = 4, 12  # published: 16 hidden states, 51 tones of Bach's chorales, which are not bundled


def sequences() -> tuple[Tensor, Tensor]:
    """Twelve sequences of up to 20 chords from a chain of four states, and their lengths."""
    stay = 0.7 * torch.eye(HIDDEN) + 0.3 / HIDDEN
    tones = dist.Beta(0.3, 0.9).sample((HIDDEN, TONES))
    lengths = torch.randint(8, 21, (12,))
    x, chords = torch.zeros(12, dtype=torch.long), []
    for _ in range(20):
        x = dist.Categorical(stay[x]).sample()
        chords.append(dist.Bernoulli(tones[x]).sample())
    return torch.stack(chords, 1), lengths


def tables(*shapes: tuple[int, ...]) -> list[Tensor]:
    """Transitions of as many chains as there are shapes but one, and the probabilities of tones of the last shape."""
    *chains, shape = shapes
    names = ["probs_x"] if len(chains) == 1 else ["probs_w", "probs_x"]
    stay = [0.9 * torch.eye(size) + 0.1 for (size,) in chains]
    found = [pyro.sample(n, dist.Dirichlet(prior).to_event(1)) for n, prior in zip(names, stay, strict=True)]
    return [*found, pyro.sample("probs_y", dist.Beta(0.1, 0.9).expand(shape).to_event(len(shape)))]


SUMMED = {"enumerate": "parallel"}


def model_0(sequences: Tensor, lengths: Tensor, batch_size: int | None = None) -> None:
    probs_x, probs_y = tables((HIDDEN,), (HIDDEN, TONES))
    tones = pyro.plate("tones", TONES, dim=-1)
    for i in pyro.plate("sequences", len(sequences), batch_size):
        sequence, x = sequences[i, : lengths[i]], 0
        for t in pyro.markov(range(int(lengths[i]))):
            x = pyro.sample(f"x_{i}_{t}", dist.Categorical(probs_x[x]), infer=SUMMED)
            with tones:
                pyro.sample(f"y_{i}_{t}", dist.Bernoulli(probs_y[x.squeeze(-1)]), obs=sequence[t])


def model_1(sequences: Tensor, lengths: Tensor, batch_size: int | None = None) -> None:
    probs_x, probs_y = tables((HIDDEN,), (HIDDEN, TONES))
    tones = pyro.plate("tones", TONES, dim=-1)
    with pyro.plate("sequences", len(sequences), batch_size, dim=-2) as batch:
        lengths, x = lengths[batch], 0
        for t in pyro.markov(range(int(lengths.max()))):
            with poutine.mask(mask=(t < lengths).unsqueeze(-1)):
                x = pyro.sample(f"x_{t}", dist.Categorical(probs_x[x]), infer=SUMMED)
                with tones:
                    pyro.sample(f"y_{t}", dist.Bernoulli(probs_y[x.squeeze(-1)]), obs=sequences[batch, t])


def model_2(sequences: Tensor, lengths: Tensor, batch_size: int | None = None) -> None:
    probs_x, probs_y = tables((HIDDEN,), (HIDDEN, 2, TONES))
    tones_plate = pyro.plate("tones", TONES, dim=-1)
    with pyro.plate("sequences", len(sequences), batch_size, dim=-2) as batch:
        lengths, x, y = lengths[batch], 0, 0
        for t in pyro.markov(range(int(lengths.max()))):
            with poutine.mask(mask=(t < lengths).unsqueeze(-1)):
                x = pyro.sample(f"x_{t}", dist.Categorical(probs_x[x]), infer=SUMMED)
                with tones_plate as tones:
                    law = dist.Bernoulli(probs_y[x, y, tones])
                    y = pyro.sample(f"y_{t}", law, obs=sequences[batch, t]).long()


def model_3(sequences: Tensor, lengths: Tensor, batch_size: int | None = None) -> None:
    half = int(HIDDEN**0.5)
    probs_w, probs_x, probs_y = tables((half,), (half,), (half, half, TONES))
    tones_plate = pyro.plate("tones", TONES, dim=-1)
    with pyro.plate("sequences", len(sequences), batch_size, dim=-2) as batch:
        lengths, w, x = lengths[batch], 0, 0
        for t in pyro.markov(range(int(lengths.max()))):
            with poutine.mask(mask=(t < lengths).unsqueeze(-1)):
                w = pyro.sample(f"w_{t}", dist.Categorical(probs_w[w]), infer=SUMMED)
                x = pyro.sample(f"x_{t}", dist.Categorical(probs_x[x]), infer=SUMMED)
                with tones_plate as tones:
                    pyro.sample(f"y_{t}", dist.Bernoulli(probs_y[w, x, tones]), obs=sequences[batch, t])


def hidden_markov(model: Callable, nesting: int) -> Callable[[], Script]:
    """MAP Baum-Welch on minibatches of 8 sequences."""

    def build() -> Script:
        data = sequences()
        guide = AutoDelta(poutine.block(model, expose_fn=lambda message: message["name"].startswith("probs_")))
        loss = TraceEnum_ELBO(max_plate_nesting=nesting)
        return Script(model, guide, data, Adam({"lr": 0.05}), loss, steps=50, batches=lambda _: (*data, 8))

    return build


for number, (each, nesting) in enumerate(((model_0, 1), (model_1, 2), (model_2, 2), (model_3, 2))):
    title = f"hidden Markov model {number}"
    program(title, "examples/hmm.py", "AutoDelta, minibatches", points=True, draws=1)(hidden_markov(each, nesting))


HISTORIES = """0000001 39, 0000010 23, 0000011 23, 0000100 16, 0000110 9, 0000111 16, 0001000 16, 0001001 2, 0001011 1, 0001100 11,
0001110 7, 0001111 8, 0010000 29, 0010110 1, 0011000 12, 0011100 6, 0011110 2, 0011111 2, 0100000 29, 0110000 11, 0110110 1,
0111000 2, 0111100 3, 0111110 1, 0111111 2, 1000000 9, 1010000 2, 1100000 6, 1101110 1, 1111000 2, 1111100 1, 1111110 1"""
MALES = 140


def dippers() -> tuple[Tensor, Tensor]:
    """Who was seen in which year (Lebreton and others 1992), and sexes, which are drawn: one half each."""
    counts = [entry.split() for entry in HISTORIES.replace("\n", " ").split(",")]
    rows = [[float(bit) for bit in history] for history, count in counts for _ in range(int(count))]
    seen = torch.tensor(rows)
    return seen, (torch.rand(len(seen)) < 0.5).float()


def unit(name: str) -> Tensor:
    return pyro.sample(name, dist.Uniform(0.0, 1.0))


def logit(p: Tensor) -> Tensor:
    return torch.log(p) - torch.log1p(-p)


def survival(effects: Callable) -> Callable:
    """Cormack, Jolly and Seber: `effects(sex)` samples globals and returns the probability of surviving the step to each time."""

    def model(seen: Tensor, sex: Tensor) -> None:
        size, times = seen.shape
        survives = effects(sex)
        rho = unit("rho")
        animals = pyro.plate("animals", size, dim=-1)
        z, known = torch.ones(size), torch.zeros(size).bool()
        for t in pyro.markov(range(times)):
            phi = survives(t)
            with animals, poutine.mask(mask=known):
                alive = known.float() * phi * z + (1 - known.float())
                z = pyro.sample(f"z_{t}", dist.Bernoulli(alive), infer=SUMMED)
                pyro.sample(f"y_{t}", dist.Bernoulli(rho * z), obs=seen[:, t])
            known = known | seen[:, t].bool()

    return model


def constant(sex: Tensor) -> Callable:
    phi = unit("phi")
    return lambda t: phi


def by_year(sex: Tensor) -> Callable:
    return lambda t: unit(f"phi_{t}") if t > 0 else 1.0


def random_years(sex: Tensor) -> Callable:
    mean = logit(unit("phi_mean"))
    sigma = pyro.sample("phi_sigma", dist.Uniform(0.0, 10.0))

    def survives(t: int) -> Tensor:
        return torch.sigmoid(pyro.sample(f"phi_logit_{t}", dist.Normal(mean, sigma)) if t > 0 else torch.tensor(0.0))

    return survives


def by_sex(sex: Tensor) -> Callable:
    male, female = unit("phi_male"), unit("phi_female")
    return lambda t: sex * male + (1.0 - sex) * female


def by_sex_and_year(sex: Tensor) -> Callable:
    beta = sex * pyro.sample("phi_beta", dist.Normal(0.0, 10.0))
    return lambda t: torch.sigmoid(beta + (pyro.sample(f"phi_gamma_{t}", dist.Normal(0.0, 10.0)) if t > 0 else 0.0))


def recapture(effects: Callable) -> Callable[[], Script]:
    def build() -> Script:
        model = survival(effects)
        guide = AutoDiagonalNormal(
            poutine.block(model, expose_fn=lambda message: message["name"][:3] in ("phi", "rho"))
        )
        loss = TraceEnum_ELBO(max_plate_nesting=1, num_particles=20, vectorize_particles=True)
        return Script(model, guide, dippers(), Adam({"lr": 0.002}), loss, steps=400)

    return build


for each in (constant, by_year, random_years, by_sex, by_sex_and_year):
    title = f"recapture, {each.__name__.replace('_', ' ')}"
    program(title, "examples/capture_recapture/cjs.py", "AutoDiagonalNormal, states summed out")(recapture(each))


@program("level with noise", "examples of GaussianHMM", "AutoNormal")
def gaussian_hmm() -> Script:
    """A local level, its states integrated by GaussianHMM. SVI's settings are ours."""
    level = 0.3 * torch.randn(100).cumsum(0)
    data = (level + 0.5 * torch.randn(100)).unsqueeze(-1)

    def model(data: Tensor) -> None:
        drift = pyro.sample("drift", dist.LogNormal(-1.0, 1.0))
        noise = pyro.sample("noise", dist.LogNormal(-1.0, 1.0))
        one = torch.eye(1)
        start = dist.MultivariateNormal(torch.zeros(1), 100.0 * one)
        moves = dist.MultivariateNormal(torch.zeros(1), drift.square() * one)
        seen = dist.MultivariateNormal(torch.zeros(1), noise.square() * one)
        pyro.sample("obs", dist.GaussianHMM(start, one, moves, one, seen, duration=100), obs=data)

    return Script(model, AutoNormal(model), (data,), Adam({"lr": 0.01}), steps=1000)
