"""`run` against Pyro's SVI, NumPyro's SVI and NUTS, and PyMC's ADVI, on real data with reference posteriors, in one process.

    pip install torch numpyro pymc pyro-ppl arviz safetensors    # an environment of its own: none of these is needed elsewhere
    OMP_NUM_THREADS=1 PYTHONPATH=tests python tests/benchmarks/peers.py --results peers.jsonl
    OMP_NUM_THREADS=1 PYTHONPATH=tests python tests/benchmarks/peers.py --table peers.jsonl

Every program has its defaults: Adam at 0.01 for SVI, adagrad_window for ADVI, and 10,000 steps for both, with a diagonal Gaussian
and a full one; NUTS has 1,000 steps of warm-up.  Errors are the largest |Δ mean| / sd and |Δ sd| / sd over a posterior's scalars, against
10,000 reference draws.  They are taken at checkpoints, whose cost is not counted; what a peer takes to compile its first step
stands by itself, but for NUTS.  Seconds are the processor's, so that other programs do not matter.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
os.environ.setdefault("PYTENSOR_FLAGS", "openmp=False,blas__ldflags=")
warnings.filterwarnings("ignore")

import jax  # noqa: E402
import numpy as np  # noqa: E402
import numpyro  # noqa: E402
import pymc as pm  # noqa: E402
import pyro  # noqa: E402
import torch  # noqa: E402
from numpyro.infer import autoguide as jax_guides  # noqa: E402
from pyro.infer import autoguide as pyro_guides  # noqa: E402
from torch.distributions import biject_to  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from peer_models import NUMPYRO, PYMC  # noqa: E402
from posteriors import CASES, Case, errors, reference_of  # noqa: E402
from side_by_side import argument_parser  # noqa: E402
from verdicts import fitted, of_case  # noqa: E402

STEPS = (500, 1000, 2500, 5000, 10_000)
CHAIN = (250, 1000, 4000)  # draws of NUTS after its warm-up
NUM_DRAWS = 10_000
Judge = Callable[[Mapping[str, Any]], tuple[float, float]]


@dataclass
class Fit:
    """One program on one posterior: (steps, processor seconds, error of mean, of sd) along its way."""

    program: str
    posterior: str
    seed: int
    bar: float
    compiling: float = 0.0
    path: list[tuple[int, float, float, float]] = field(default_factory=list)
    failed: str = ""

    @property
    def last(self) -> tuple[int, float, float, float]:
        return self.path[-1] if self.path else (0, 0.0, np.inf, np.inf)

    def seconds_to(self, mean: float, sd: float) -> float | None:
        """Until both errors are as small for the first time; None where they never are."""
        return next((s for _, s, m, d in self.path if m <= mean and d <= sd), None)


class Clock:
    """Processor seconds since it was made, without those spent in `stopped`."""

    def __init__(self) -> None:
        self.start, self.lost = time.process_time(), 0.0

    def read(self) -> float:
        return time.process_time() - self.start - self.lost

    def stopped(self, program: Callable[[], Any]) -> Any:
        start = time.process_time()
        try:
            return program()
        finally:
            self.lost += time.process_time() - start


def judge_of(case: Case) -> Judge:
    data, reference = reference_of(case)

    def judge(draws: Mapping[str, Any]) -> tuple[float, float]:
        tensors = {name: torch.as_tensor(np.array(value), dtype=torch.float64) for name, value in draws.items()}
        mean, sd = errors(case.scalars(tensors, data), reference)
        return (mean, sd) if np.isfinite(mean) and np.isfinite(sd) else (np.inf, np.inf)

    return judge


def arrays_of(case: Case) -> dict[str, Any]:
    return {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in reference_of(case)[0].items()}


# -- the programs ----------------------------------------------------------------------------------------------


def ours(case: Case, fit: Fit, judge: Judge, budget: float) -> None:
    problem, clock = of_case(case), Clock()
    posterior, _ = fitted(problem, fit.seed)
    seconds = clock.read()
    fit.path.append((posterior.num_steps, seconds, *judge(posterior.sample((NUM_DRAWS,)))))


def pyro_svi(guide_class: Any, case: Case, fit: Fit, judge: Judge, budget: float) -> None:
    pyro.clear_param_store()
    pyro.set_rng_seed(fit.seed)
    data = reference_of(case)[0]
    guide = guide_class(case.model, init_loc_fn=feasible)
    svi = pyro.infer.SVI(case.model, guide, pyro.optim.Adam({"lr": 0.01}), pyro.infer.Trace_ELBO())
    clock = Clock()
    for step in range(1, STEPS[-1] + 1):
        svi.step(data)
        if step == 1:
            fit.compiling = clock.read()
        if step in STEPS:
            fit.path.append((step, clock.read() - fit.compiling, *clock.stopped(lambda: judge(drawn_by(guide)))))
            if clock.read() > budget:
                return


def feasible(site: Any) -> torch.Tensor:
    """Pyro's `init_to_feasible`, which draws from priors to learn their shape: a flat one has no draws."""
    transform, shape = biject_to(site["fn"].support), site["fn"].shape()
    return transform(torch.zeros(transform.inverse_shape(shape)))


@torch.no_grad()
def drawn_by(guide: Any) -> dict[str, torch.Tensor]:
    """Draws of a Pyro autoguide, all at once."""
    sites = dict(guide.prototype_trace.iter_stochastic_nodes())
    if isinstance(guide, pyro_guides.AutoNormal):
        pairs = {name: guide._get_loc_and_scale(name) for name in sites}
        free = {n: loc + scale * torch.randn(NUM_DRAWS, *loc.shape) for n, (loc, scale) in pairs.items()}
        return {name: biject_to(sites[name]["fn"].support)(u) for name, u in free.items()}
    latent = guide.get_posterior().sample((NUM_DRAWS,))
    return {site["name"]: biject_to(site["fn"].support)(u) for site, u in guide._unpack_latent(latent)}


def numpyro_svi(guide_class: Any, case: Case, fit: Fit, judge: Judge, budget: float) -> None:
    data, clock = arrays_of(case), Clock()
    model = NUMPYRO[case.name]
    guide = guide_class(model)
    svi = numpyro.infer.SVI(model, guide, numpyro.optim.Adam(0.01), numpyro.infer.Trace_ELBO())
    state = svi.init(jax.random.PRNGKey(fit.seed), data)

    @jax.jit
    def steps(state: Any, number: Any) -> Any:
        return jax.lax.fori_loop(0, number, lambda _, s: svi.update(s, data)[0], state)

    state = jax.block_until_ready(steps(state, 1))
    fit.compiling, behind = clock.read(), 1
    for step in STEPS:
        state = jax.block_until_ready(steps(state, step - behind))
        behind, seconds = step, clock.read() - fit.compiling

        def found(state: Any = state) -> tuple[float, float]:
            shape = {"sample_shape": (NUM_DRAWS,)}
            return judge(guide.sample_posterior(jax.random.PRNGKey(7), svi.get_params(state), **shape))

        fit.path.append((step, seconds, *clock.stopped(found)))
        if seconds > budget:
            return


def nuts(case: Case, fit: Fit, judge: Judge, budget: float) -> None:
    data, clock = arrays_of(case), Clock()
    options = {"num_warmup": 1000, "num_samples": CHAIN[0], "progress_bar": False}
    mcmc = numpyro.infer.MCMC(numpyro.infer.NUTS(NUMPYRO[case.name]), **options)
    mcmc.warmup(jax.random.PRNGKey(fit.seed), data)
    draws: dict[str, list[Any]] = {}
    while sum(map(len, next(iter(draws.values()), []))) < CHAIN[-1]:
        mcmc.run(mcmc.post_warmup_state.rng_key, data)
        mcmc.post_warmup_state = mcmc.last_state
        for name, value in jax.block_until_ready(mcmc.get_samples()).items():
            draws.setdefault(name, []).append(np.asarray(value))
        count = sum(map(len, next(iter(draws.values()))))
        if count in CHAIN:
            whole = {name: np.concatenate(parts) for name, parts in draws.items()}
            fit.path.append((count, clock.read(), *clock.stopped(lambda whole=whole: judge(whole))))
        if clock.read() > budget:
            return


class Enough(Exception):
    """The budget is spent."""


def advi(method: str, case: Case, fit: Fit, judge: Judge, budget: float) -> None:
    data, clock = arrays_of(case), Clock()
    with pm.Model():
        PYMC[case.name](data)

        def watch(approximation: Any, losses: Any, step: int) -> None:
            if step == 1:
                fit.compiling = clock.read()
            if step in STEPS:

                def found() -> tuple[float, float]:
                    trace = approximation.sample(NUM_DRAWS // 4, return_inferencedata=False, random_seed=7)
                    return judge({name: trace[name] for name in trace.varnames})

                seconds = clock.read() - fit.compiling
                fit.path.append((step, seconds, *clock.stopped(found)))
                if seconds > budget:
                    raise Enough

        try:
            pm.fit(STEPS[-1], method=method, callbacks=[watch], progressbar=False, random_seed=fit.seed)
        except Enough:
            pass


PROGRAMS: dict[str, Callable[..., None]] = {
    "pyro_blr": ours,
    "NumPyro SVI, diagonal": lambda *a: numpyro_svi(jax_guides.AutoNormal, *a),
    "NumPyro SVI, full": lambda *a: numpyro_svi(jax_guides.AutoMultivariateNormal, *a),
    "NumPyro NUTS": nuts,
    "PyMC ADVI": lambda *a: advi("advi", *a),
    "PyMC ADVI, full rank": lambda *a: advi("fullrank_advi", *a),
    "Pyro SVI, diagonal": lambda *a: pyro_svi(pyro_guides.AutoNormal, *a),
    "Pyro SVI, full": lambda *a: pyro_svi(pyro_guides.AutoMultivariateNormal, *a),
}


def cases() -> Iterator[Case]:
    """The posteriors that NumPyro has: enumerated forms are the same ones."""
    for case in CASES:
        if case.name in NUMPYRO:
            yield case


def measure(case: Case, program: str, seed: int, budget: float) -> Fit:
    fit = Fit(program, case.name, seed, case.bar)
    try:
        PROGRAMS[program](case, fit, judge_of(case), budget)
    except Exception as error:  # the table says so
        fit.failed = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:120]
    return fit


# -- the table -------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """A program on a posterior, medians over seeds: errors at its end, seconds until both errors met the bar (infinite: never)."""

    mean: float
    sd: float
    to_bar: float
    spent: float
    compiling: float
    steps: int

    @staticmethod
    def of(fits: list[Fit]) -> Row | None:
        done = [fit for fit in fits if fit.path]
        if not done:
            return None
        steps, spent, mean, sd = (median(fit.last[i] for fit in done) for i in range(4))
        reached = median(np.inf if (t := fit.seconds_to(fit.bar, fit.bar)) is None else t for fit in done)
        return Row(mean, sd, reached, spent, median(fit.compiling for fit in done), int(steps))

    def cell(self) -> str:
        time = f"{self.to_bar:.2g}" if self.to_bar < np.inf else f"> {self.spent:.2g}"
        compiling = f" + {self.compiling:.1f}" if self.compiling > 0.1 else ""
        return f"{self.mean:.2f}, {self.sd:.2f}; {time}{compiling}"


def table(path: Path) -> None:
    """A row a posterior: errors at the end, seconds to the bar + those of compiling; then who was better, and by how much."""
    fits = [Fit(**json.loads(line)) for line in path.read_text().splitlines()]
    rows: dict[str, dict[str, Row]] = {}
    bars = {fit.posterior: fit.bar for fit in fits}
    for posterior in bars:
        for program in PROGRAMS:
            row = Row.of([fit for fit in fits if (fit.posterior, fit.program) == (posterior, program)])
            if row is not None:
                rows.setdefault(posterior, {})[program] = row
    names = [program for program in PROGRAMS if any(program in found for found in rows.values())]
    print("| posterior | bar | " + " | ".join(names) + " |\n|---|---|" + "---|" * len(names))
    for posterior, found in rows.items():
        cells = [found[name].cell() if name in found else "-" for name in names]
        print(f"| {posterior} | {bars[posterior]:.2f} | " + " | ".join(cells) + " |")
    for name in names[1:]:
        pairs = [(found["pyro_blr"], found[name]) for found in rows.values() if name in found]
        both = sum(mine.mean < their.mean and mine.sd < their.sd for mine, their in pairs)
        print(f"{name}: both errors of pyro_blr are smaller on {both} of {len(pairs)}", end="; ")
        met = [(mine, their) for mine, their in pairs if their.to_bar < np.inf]
        quicker = [
            f"{t.to_bar / m.spent:.2g} ({(t.to_bar + t.compiling) / m.spent:.2g} with compiling)" for m, t in met
        ]
        print(f"it met the bar on {len(met)}, in these multiples of pyro_blr's time: {', '.join(quicker) or '-'}")


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--only", default="", help="part of a posterior's name")
    parser.add_argument("--programs", default="", help="how a program's name begins")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--budget", type=float, default=120.0, help="processor seconds of one fit, roughly")
    parser.add_argument("--results", type=Path, default=Path("peers.jsonl"), help="where a line is added for every fit")
    parser.add_argument("--table", type=Path, help="print the table of these results, and run nothing")
    options = parser.parse_args()
    if options.table:
        table(options.table)
        return
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    numpyro.enable_x64()
    fitted(of_case(CASES[0]), 0)  # what is imported and built once
    known = options.results.read_text().splitlines() if options.results.exists() else []
    done = {(fit["program"], fit["posterior"], fit["seed"]) for fit in map(json.loads, known)}
    for program in [name for name in PROGRAMS if name.startswith(options.programs)]:
        for case in cases():
            if options.only not in case.name or ("ADVI" in program and case.name not in PYMC):
                continue
            for seed in range(options.seeds):
                if (program, case.name, seed) in done:
                    continue
                fit = measure(case, program, seed, options.budget)
                with options.results.open("a") as file:
                    file.write(json.dumps(asdict(fit)) + "\n")
                print(program, case.name, seed, f"compiling {fit.compiling:.1f}", fit.path[-1:], fit.failed, flush=True)


if __name__ == "__main__":
    main()
