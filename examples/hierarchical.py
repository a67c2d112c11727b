"""How do young rats grow?  A line for every rat, the lines themselves drawn from a population of lines.

Conjugate throughout: Normal lines and population means, Gamma precisions.  `Predictive` then draws a new rat.
Data: weights (g) of 30 rats on days 8, 15, 22, 29 and 36 (Gelfand, Hills, Racine-Poon and Smith 1990).
"""

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Predictive

from pyro_blr import BLRInference

DAYS = [8.0, 15.0, 22.0, 29.0, 36.0]
WEIGHTS = """
151 199 246 283 320  145 199 249 293 354  147 214 263 312 328  155 200 237 272 297  135 188 230 280 323
159 210 252 298 331  141 189 231 275 305  159 201 248 297 338  177 236 285 350 376  134 182 220 260 296
160 208 261 313 352  143 188 220 273 314  154 200 244 289 325  171 221 270 326 358  163 216 242 281 312
160 207 248 288 324  142 187 234 280 316  156 203 243 283 317  157 212 259 307 336  152 203 246 286 321
154 205 253 298 334  139 190 225 267 302  146 191 229 272 302  157 211 250 285 323  132 185 237 286 331
160 207 257 303 345  169 216 261 295 333  157 205 248 289 316  137 180 219 258 291  153 200 244 286 324
"""


def model(days, weights=None, num_rats=30):
    """weight = level + growth * day + noise, level and growth of each rat around those of the population."""
    level_mean = pyro.sample("level_mean", dist.Normal(200.0, 100.0))
    growth_mean = pyro.sample("growth_mean", dist.Normal(0.0, 10.0))
    level_precision = pyro.sample("level_precision", dist.Gamma(1.0, 100.0))
    growth_precision = pyro.sample("growth_precision", dist.Gamma(1.0, 1.0))
    noise_precision = pyro.sample("noise_precision", dist.Gamma(1.0, 10.0))
    with pyro.plate("rats", num_rats, dim=-2):
        level = pyro.sample("level", dist.Normal(level_mean, level_precision.rsqrt()))
        growth = pyro.sample("growth", dist.Normal(growth_mean, growth_precision.rsqrt()))
        with pyro.plate("days", len(days), dim=-1):
            pyro.sample("weight", dist.Normal(level + growth * days, noise_precision.rsqrt()), obs=weights)


def main():
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(0)
    days = torch.tensor(DAYS) - 22.0
    weights = torch.tensor([float(weight) for weight in WEIGHTS.split()]).reshape(30, 5)

    engine = BLRInference(model)
    posterior = engine.run(days, weights, progress=False)
    print(engine.explain(days, weights))
    print(f"ELBO: {posterior.elbo}")
    for name in ("level_mean", "growth_mean", "level_precision", "growth_precision", "noise_precision"):
        print(f"{name:>17}: {posterior[name].mean.item():.4g} ± {posterior[name].stddev.item():.2g}")

    predicted = Predictive(model, guide=engine.guide, num_samples=1000)(days)["weight"]
    low, high = predicted.flatten(1).quantile(torch.tensor([0.025, 0.975]), 0)
    inside = ((low < weights.flatten()) & (weights.flatten() < high)).double().mean()
    print(f"{100 * inside.item():.0f} % of the weights lie in their 95 % predictive interval")


if __name__ == "__main__":
    main()
