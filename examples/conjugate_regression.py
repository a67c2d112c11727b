"""How does the stopping distance of a car grow with its speed?  The exact evidence chooses the polynomial.

Conjugate and one block: a single step is Bayes' rule, and the ELBO is the log evidence itself.
Data: speed (mph) and stopping distance (ft) of 50 cars of the 1920s (Ezekiel 1930).
"""

import pyro
import pyro.distributions as dist
import torch

from pyro_blr import BLRInference

SPEED = [
    4, 4, 7, 7, 8, 9, 10, 10, 10, 11, 11, 12, 12, 12, 12, 13, 13, 13, 13, 14, 14, 14, 14, 15, 15,
    15, 16, 16, 17, 17, 17, 18, 18, 18, 18, 19, 19, 19, 20, 20, 20, 20, 20, 22, 23, 24, 24, 24, 24, 25,
]  # fmt: skip
DISTANCE = [
    2, 10, 4, 22, 16, 10, 18, 26, 34, 17, 28, 14, 20, 24, 28, 26, 34, 34, 46, 26, 36, 60, 80, 20, 26,
    54, 32, 40, 32, 40, 50, 42, 56, 76, 84, 36, 46, 68, 32, 48, 52, 56, 64, 66, 54, 70, 92, 93, 120, 85,
]  # fmt: skip


def model(powers, distance=None):
    """A polynomial through the origin (a car that stands needs no distance), with noise of 15 ft."""
    w = pyro.sample("w", dist.Normal(0.0, 30.0).expand([powers.shape[-1]]).to_event(1))
    with pyro.plate("cars", powers.shape[0]):
        pyro.sample("distance", dist.Normal(powers @ w, 15.0), obs=distance)


def main():
    torch.set_default_dtype(torch.float64)
    speed, distance = torch.tensor(SPEED) / 10.0, torch.tensor(DISTANCE, dtype=torch.float64)

    for degree in (1, 2, 3, 4):
        powers = speed[:, None] ** torch.arange(1, degree + 1)
        engine = BLRInference(model)
        posterior = engine.run(powers, distance, progress=False)
        if degree == 1:
            print(engine.explain(powers, distance))
        w = posterior["w"]
        terms = ", ".join(f"{m:.1f} ± {s:.1f}" for m, s in zip(w.mean, w.stddev, strict=True))
        print(f"degree {degree}: log evidence {posterior.elbo}, weights {terms}")


if __name__ == "__main__":
    main()
