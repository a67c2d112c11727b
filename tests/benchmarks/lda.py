"""Latent Dirichlet allocation: seconds until scikit-learn's final bound is reached from its own start.

    python tests/benchmarks/lda.py
    python tests/benchmarks/lda.py --documents 500 --words 500

A seeded corpus of counts.  Both start at the same Dirichlets over words, drawn as scikit-learn draws them, and
have the same priors.  scikit-learn runs in one process, its default (`n_jobs=None`).  `run` is timed from its
call to the first sweep whose bound is scikit-learn's last: preparing the model and the rounds in which local blocks
begin again (`renewal.py`) are in it.  The seconds of the processor are given beside those of the clock, for a machine that
does other work too.  From some starts `run` ends in a lower local optimum, and then no ratio is given.
"""

from __future__ import annotations

import time

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from scipy.special import digamma, gammaln, logsumexp
from side_by_side import argument_parser, duration, heading, intervals, seconds, stamped
from sklearn.decomposition import LatentDirichletAllocation

from pyro_blr import BLRInference
from pyro_blr.ascent import Ascent

PRIOR = 0.1  # concentration of both Dirichlets


def corpus(documents: int, words: int, topics: int) -> np.ndarray:
    """Counts (documents, words) of some hundred words a document."""
    generator = np.random.default_rng(0)
    phi = generator.dirichlet(0.05 * np.ones(words), topics)
    theta = generator.dirichlet(0.2 * np.ones(topics), documents)
    return np.stack([generator.multinomial(generator.poisson(100), row @ phi) for row in theta])


def model(document: torch.Tensor, word: torch.Tensor, count: torch.Tensor, sizes: tuple[int, int, int]) -> None:
    documents, words, topics = sizes
    with pyro.plate("topics", topics):
        phi = pyro.sample("phi", dist.Dirichlet(torch.full((words,), PRIOR)))
    with pyro.plate("documents", documents):
        theta = pyro.sample("theta", dist.Dirichlet(torch.full((topics,), PRIOR)))
    with pyro.plate("pairs", len(document)), poutine.scale(scale=count):
        z = pyro.sample("z", dist.Categorical(theta[document]), infer={"blr": {"copies": count}})
        pyro.sample("word", dist.Categorical(phi[z]), obs=word)


def expected_logs(concentration: np.ndarray) -> np.ndarray:
    """E log of a Dirichlet."""
    return digamma(concentration) - digamma(concentration.sum(-1, keepdims=True))


def bound(counts: np.ndarray, theta: np.ndarray, phi: np.ndarray) -> float:
    """Σ c log Σ_k exp(E log theta_k + E log phi_k) − KL − KL: the ELBO with every z at its optimum."""
    document, word = counts.nonzero()
    log_theta, log_phi = expected_logs(theta), expected_logs(phi)
    total = counts[document, word] @ logsumexp(log_theta[document] + log_phi.T[word], axis=-1)
    for a, log in ((theta, log_theta), (phi, log_phi)):
        size = a.shape[-1]
        normaliser = (gammaln(a).sum(-1) - gammaln(a.sum(-1))) - (size * gammaln(PRIOR) - gammaln(size * PRIOR))
        total += (normaliser - ((a - PRIOR) * log).sum(-1)).sum()
    return float(total)


def fit_sklearn(counts: np.ndarray, topics: int, iterations: int, seed: int) -> tuple[LatentDirichletAllocation, float]:
    """A batch fit, seeded, and its seconds."""
    fit = LatentDirichletAllocation(
        topics,
        doc_topic_prior=PRIOR,
        topic_word_prior=PRIOR,
        learning_method="batch",
        max_iter=iterations,
        random_state=seed,
    )
    return fit, seconds(lambda: fit.fit(counts.astype(float)))


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--documents", type=int, default=2000)
    parser.add_argument("--words", type=int, default=2000)
    parser.add_argument("--topics", type=int, default=10)
    parser.add_argument("--iterations", type=int, default=10, help="of scikit-learn; 10 is its default")
    parser.add_argument("--seed", type=int, default=0, help="of the start")
    parser.add_argument("--sweeps", type=int, default=300, help="at most")
    options = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    sizes = (options.documents, options.words, options.topics)
    counts = corpus(*sizes)
    document, word = (torch.as_tensor(index) for index in counts.nonzero())
    heading(
        f"LDA, {sizes[0]} documents, {sizes[1]} words, {sizes[2]} topics, {len(word)} pairs, {counts.sum()} words in all"
    )

    started = time.process_time()
    fit, theirs = fit_sklearn(counts, options.topics, options.iterations, options.seed)
    their_work = time.process_time() - started
    target = bound(counts, fit._unnormalized_transform(counts.astype(float)), fit.components_)
    print(
        f"scikit-learn: {duration(theirs)}, {options.iterations} iterations of {duration(theirs / options.iterations)}, bound {target:.1f}"
    )

    first = np.random.RandomState(options.seed).gamma(
        100.0, 0.01, (options.topics, options.words)
    )  # as scikit-learn draws it
    engine = BLRInference(model, init={"phi": dist.Dirichlet(torch.as_tensor(first))}, blocks="sites")
    start, started = time.perf_counter(), time.process_time()
    with stamped(Ascent, "bound_before") as stamps, stamped(Ascent, "bound_before", time.process_time) as processor:
        posterior = engine.run(
            document,
            word,
            torch.as_tensor(counts)[document, word].double(),
            sizes,
            max_steps=options.sweeps,
            progress=False,
        )
    ran = time.perf_counter() - start
    lasts = intervals(stamps[: posterior.num_steps])
    print(
        f"run: {duration(ran)}, {duration(stamps[0] - start)} until the first of {posterior.num_steps} sweeps of "
        f"{duration(sum(lasts) / max(len(lasts), 1))}, bound {posterior.elbo:.1f}; {posterior.stop_reason}"
    )
    reached = next((i for i, value in enumerate(posterior.history) if value >= target), None)
    if reached is None:
        print(
            f"run against scikit-learn, seed {options.seed}: its local optimum lies below scikit-learn's bound; no ratio"
        )
        return
    whole, work = stamps[reached] - start, processor[reached] - started
    print(
        f"run against scikit-learn, seed {options.seed}: bound reached in sweep {reached + 1}, after {duration(whole)}: "
        f"ratio {whole / theirs:.3g}, of processor seconds {work / their_work:.3g}; wanted: at most 1"
    )


if __name__ == "__main__":
    main()
