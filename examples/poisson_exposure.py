"""Which pumps fail too often?  Counts over unequal times, the rates drawn from a population of rates.

`rate * time` is a multiple of a Gamma site, so Poisson stays conjugate; `rate + background` would not be.
Data: failures of ten pumps of a power plant in thousands of hours (Gaver and O'Muircheartaigh 1987).
"""

import pyro
import pyro.distributions as dist
import torch

from pyro_blr import BLRInference

HOURS = [94.3, 15.7, 62.9, 126.0, 5.24, 31.4, 1.05, 1.05, 2.1, 10.5]
FAILURES = [5.0, 1.0, 5.0, 14.0, 3.0, 19.0, 1.0, 1.0, 4.0, 22.0]


def model(hours, failures=None):
    """failures ~ Poisson(rate * hours), rate ~ Gamma(1.802, beta): Gelfand and Smith 1990, section 4."""
    beta = pyro.sample("beta", dist.Gamma(0.01, 1.0))
    with pyro.plate("pumps", len(hours)):
        rate = pyro.sample("rate", dist.Gamma(1.802, beta))
        pyro.sample("failures", dist.Poisson(rate * hours), obs=failures)


def main():
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(0)
    hours, failures = torch.tensor(HOURS), torch.tensor(FAILURES)

    engine = BLRInference(model)
    posterior = engine.run(hours, failures, progress=False)
    print(engine.explain(hours, failures))
    print(f"ELBO: {posterior.elbo}")

    rate = posterior["rate"]
    print("pump  failures / 1000 h   raw")
    for i, (mean, sd, raw) in enumerate(zip(rate.mean, rate.stddev, failures / hours, strict=True)):
        print(f"{i + 1:>4}  {mean:8.3f} ± {sd:5.3f}  {raw:6.3f}")


if __name__ == "__main__":
    main()
