"""Programs with many unknowns or with networks: factors, a variational autoencoder, a deep exponential family, processes."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.contrib import gp
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal
from pyro.optim import AdagradRMSProp, Adam
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributions import constraints

from acceptance.scripts import Script, program

positive = constraints.positive


def digits(count: int) -> Tensor:
    """Pictures of 8 × 8 pixels from 0 to 16."""
    return torch.as_tensor(load_digits().data[:count], dtype=torch.get_default_dtype())


@program("variational autoencoder", "examples/vae/vae.py", "Normal by a network", draws=30, alone=False)
def autoencoder() -> Script:
    """On 512 digits, 64 pixels, 10 latents, 64 hidden units; published: MNIST, 50 and 400. Minibatches of 256, 50 passes."""
    data, latents, hidden = digits(512) / 16, 10, 64

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.loc, self.log_scale = (
                nn.Linear(64, hidden),
                nn.Linear(hidden, latents),
                nn.Linear(hidden, latents),
            )

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = nn.functional.softplus(self.first(x))
            return self.loc(h), self.log_scale(h).exp()

    encoder = Encoder()
    decoder = nn.Sequential(nn.Linear(latents, hidden), nn.Softplus(), nn.Linear(hidden, 64), nn.Sigmoid())

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample(
                "latent", dist.Normal(torch.zeros(len(x), latents), torch.ones(len(x), latents)).to_event(1)
            )
            pyro.sample("obs", dist.Bernoulli(decoder(z), validate_args=False).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("latent", dist.Normal(*encoder(x)).to_event(1))

    halves = data[:256], data[256:]
    return Script(
        model, guide, (data,), Adam({"lr": 1e-3}), Trace_ELBO(), steps=100, batches=lambda n: (halves[n % 2],)
    )


@program("sparse gamma deep exponential family", "examples/sparse_gamma_def.py", "Gammas", draws=50)
def sparse_gamma() -> Script:
    """On 100 digits, layers of 20, 10 and 5; published: 320 faces of 4,096 pixels, layers of 100, 40 and 15."""
    data, top, middle, bottom, pixels = digits(100), 20, 10, 5, 64
    weights = {"top": top * middle, "mid": middle * bottom, "bottom": bottom * pixels}
    widths = {"top": top, "mid": middle, "bottom": bottom}
    softplus = nn.functional.softplus

    def model(x: Tensor) -> None:
        w = {}
        for layer, size in weights.items():
            with pyro.plate(f"w_{layer}_plate", size):
                w[layer] = pyro.sample(f"w_{layer}", dist.Gamma(0.1, 0.3))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z_top", dist.Gamma(0.1, 0.1).expand([top]).to_event(1))
            mean = torch.matmul(z, w["top"].reshape(top, middle))
            z = pyro.sample("z_mid", dist.Gamma(0.1, 0.1 / mean).to_event(1))
            mean = torch.matmul(z, w["mid"].reshape(middle, bottom))
            z = pyro.sample("z_bottom", dist.Gamma(0.1, 0.1 / mean).to_event(1))
            mean = torch.matmul(z, w["bottom"].reshape(bottom, pixels))
            pyro.sample("obs", dist.Poisson(mean).to_event(1), obs=x)

    def start(shape: tuple[int, ...], mean: float) -> Tensor:
        return mean + 0.1 * torch.randn(shape)

    def gamma(kind: str, layer: str, shape: tuple[int, ...]) -> dist.Gamma:
        alpha = softplus(pyro.param(f"alpha_{kind}_q_{layer}", lambda: start(shape, 0.5)))
        mean = softplus(pyro.param(f"mean_{kind}_q_{layer}", lambda: start(shape, 0.0)))
        return dist.Gamma(alpha, alpha / mean)

    def guide(x: Tensor) -> None:
        for layer, size in weights.items():
            with pyro.plate(f"w_{layer}_plate", size):
                pyro.sample(f"w_{layer}", gamma("w", layer, (size,)))
        with pyro.plate("data", len(x)):
            for layer, width in widths.items():
                pyro.sample(f"z_{layer}", gamma("z", layer, (len(x), width)).to_event(1))

    def clip() -> None:
        for kind in "wz":
            for layer in weights:
                pyro.param(f"alpha_{kind}_q_{layer}").data.clamp_(min=-2.5)
                pyro.param(f"mean_{kind}_q_{layer}").data.clamp_(min=-4.5)

    optim = AdagradRMSProp({"eta": 4.5, "t": 0.1})
    return Script(model, guide, (data,), optim, TraceMeanField_ELBO(), steps=1500, after=clip)


@program("principal components", "Bayesian PCA; settings ours", "AutoNormal")
def principal_components() -> Script:
    data = digits(200)
    data = (data - data.mean(0)) / 4

    def model(x: Tensor) -> None:
        n, d = x.shape
        with pyro.plate("columns", d, dim=-1), pyro.plate("factors", 4, dim=-2):
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
        tau = pyro.sample("tau", dist.Gamma(1.0, 1.0))
        with pyro.plate("rows", n):
            z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ w, tau.rsqrt()).to_event(1), obs=x)

    return Script(model, AutoNormal(model, init_scale=0.1), (data,), Adam({"lr": 0.01}), steps=2000)


@program("mixed effects", "crossed random effects; settings ours", "AutoNormal")
def mixed_effects() -> Script:
    subjects, items = torch.arange(400) % 20, torch.arange(400) // 20 % 10
    x = torch.randn(400)
    y = 1.0 + 0.5 * x + torch.randn(20)[subjects] + 0.5 * torch.randn(10)[items] + 0.7 * torch.randn(400)

    def model(x: Tensor, y: Tensor) -> None:
        intercept = pyro.sample("intercept", dist.Normal(0.0, 10.0))
        slope = pyro.sample("slope", dist.Normal(0.0, 10.0))
        sigma = pyro.sample("sigma", dist.HalfCauchy(1.0))
        tau_subject = pyro.sample("tau_subject", dist.HalfCauchy(1.0))
        tau_item = pyro.sample("tau_item", dist.HalfCauchy(1.0))
        with pyro.plate("subjects", 20):
            u = pyro.sample("u", dist.Normal(0.0, tau_subject))
        with pyro.plate("items", 10):
            v = pyro.sample("v", dist.Normal(0.0, tau_item))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(intercept + slope * x + u[subjects] + v[items], sigma), obs=y)

    return Script(model, AutoNormal(model), (x, y), Adam({"lr": 0.01}), steps=2000)


@program("Gaussian process", "gp.ipynb", "empty: parameters of the kernel", points=True, draws=1)
def gaussian_process() -> Script:
    x = torch.rand(20) * 5
    y = 0.5 * (3 * x).sin() + 0.2 * torch.randn(20)
    kernel = gp.kernels.RBF(input_dim=1, variance=torch.tensor(5.0), lengthscale=torch.tensor(10.0))
    regression = gp.models.GPRegression(x, y, kernel, noise=torch.tensor(1.0))
    return Script(regression.model, regression.guide, (), Adam({"lr": 0.005}), TraceMeanField_ELBO(), steps=2500)


@program("Gaussian process, priors", "gp.ipynb", "points", points=True, draws=1)
def gaussian_process_priors() -> Script:
    x = torch.rand(20) * 5
    y = 0.5 * (3 * x).sin() + 0.2 * torch.randn(20)
    kernel = gp.kernels.RBF(input_dim=1, variance=torch.tensor(5.0), lengthscale=torch.tensor(10.0))
    regression = gp.models.GPRegression(x, y, kernel, noise=torch.tensor(1.0))
    regression.kernel.lengthscale = pyro.nn.PyroSample(dist.LogNormal(0.0, 1.0))
    regression.kernel.variance = pyro.nn.PyroSample(dist.LogNormal(0.0, 1.0))
    return Script(regression.model, regression.guide, (), Adam({"lr": 0.005}), TraceMeanField_ELBO(), steps=2500)


@program(
    "sparse regression by a kernel",
    "examples/sparse_regression.py",
    "AutoDelta",
    points=True,
    draws=1,
    worse="0.06 nats, which float32 hides from Newton's method",
)
def sparse_regression() -> Script:
    """MAP of hyperparameters on 60 rows and 12 columns; published: 750 and 100."""
    n, p = 60, 12
    x = torch.randn(n, p)
    y = x[:, :3] @ torch.tensor([1.0, -0.8, 0.6]) + 0.7 * x[:, 0] * x[:, 1] + 0.05 * torch.randn(n)
    y = (y - y.mean()) / y.std()

    def kernel(a: Tensor, b: Tensor, eta1: Tensor, eta2: Tensor) -> Tensor:
        dot = a @ b.mT
        k1 = 0.5 * eta2.square() * (1.0 + dot).square()
        k2 = -0.5 * eta2.square() * (a.square() @ b.square().mT)
        k3 = (eta1.square() - eta2.square()) * dot
        return k1 + k2 + k3 + 1.0 - 0.5 * eta2.square()

    def model(x: Tensor, y: Tensor) -> None:
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        eta1 = pyro.sample("eta1", dist.HalfCauchy(sigma * (3 / n**0.5) / (p - 3)))
        msq = pyro.sample("msq", dist.InverseGamma(3.0, 1.0))
        xisq = pyro.sample("xisq", dist.InverseGamma(3.0, 1.0))
        lam = pyro.sample("lambda", dist.HalfCauchy(torch.ones(p)).to_event(1))
        kappa = msq.sqrt() * lam / (msq + (eta1 * lam).square()).sqrt()
        k = kernel(kappa * x, kappa * x, eta1, eta1.square() * xisq.sqrt() / msq)
        k = k + (sigma**2 + 1e-4) * torch.eye(n)
        pyro.sample("Y", dist.MultivariateNormal(torch.zeros(n), covariance_matrix=k), obs=y)

    return Script(model, AutoDelta(model), (x, y), Adam({"lr": 0.03}), steps=1000)
