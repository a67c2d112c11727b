"""What is the Python manual about?  Latent Dirichlet allocation over the help pages that come with Python.

Two Dirichlets looked up by a page's number and by a word's topic; every message is exact.
Data: `help()`'s topics in the standard library, one document each.  Model: Blei, Ng and Jordan 2003.
"""

import re
from collections import Counter
from pydoc_data.topics import topics

import pyro
import pyro.distributions as dist
import torch

from pyro_blr import BLRInference

NUM_TOPICS, NUM_PAGES, NUM_WORDS = 5, 30, 150


def load():
    """The longest pages as (page of each word, word of each word), and the words: frequent, on few pages."""
    pages = sorted(topics.values(), key=len)[-NUM_PAGES:]
    documents = [re.findall(r"[a-z]{4,}", page.lower())[:600] for page in pages]
    spread = Counter(word for document in documents for word in set(document))
    telling = {word for word in spread if 2 <= spread[word] <= NUM_PAGES // 2}
    counts = Counter(word for document in documents for word in document if word in telling)
    words = [word for word, _ in counts.most_common(NUM_WORDS)]
    index = {word: i for i, word in enumerate(words)}
    pairs = [(d, index[word]) for d, document in enumerate(documents) for word in document if word in index]
    page, word = torch.tensor(pairs).T
    return page, word, words


def model(page, word):
    """A word of page d has a topic drawn from theta[d]; the word itself is drawn from phi[topic]."""
    with pyro.plate("topics", NUM_TOPICS):
        phi = pyro.sample("phi", dist.Dirichlet(torch.full((NUM_WORDS,), 0.1)))
    with pyro.plate("pages", NUM_PAGES):
        theta = pyro.sample("theta", dist.Dirichlet(torch.full((NUM_TOPICS,), 0.3)))
    with pyro.plate("words", len(word)):
        topic = pyro.sample("topic", dist.Categorical(theta[page]), infer={"enumerate": "parallel"})
        pyro.sample("word", dist.Categorical(phi[topic]), obs=word)


def main():
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(0)
    page, word, words = load()

    engine = BLRInference(model)
    posterior = engine.run(page, word, progress=False)
    print(engine.explain(page, word))
    print(f"ELBO of {len(word)} words: {posterior.elbo}")
    for k, row in enumerate(posterior["phi"].mean):
        print(f"topic {k}:", ", ".join(words[i] for i in row.topk(8).indices))


if __name__ == "__main__":
    main()
