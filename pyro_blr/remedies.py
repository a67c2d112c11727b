"""What would make a factor conjugate: rewrites of a model, from what stands in the way."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["remedy_for"]

# Groups of names that several rows share.
SPREAD = "scale precision variance covariance_matrix precision_matrix scale_tril"
GAUSSIAN = "Normal LogNormal MultivariateNormal"
COUNTS = "Poisson Exponential"
TRIALS = "Bernoulli Binomial Geometric NegativeBinomial"
STATES = "Categorical OneHotCategorical Multinomial"
POSITIVE = "HalfNormal HalfCauchy Gamma InverseGamma Exponential LogNormal Chi2 Pareto Weibull"
REAL = "Normal MultivariateNormal StudentT Cauchy Laplace Uniform"
LOGARITHMIC = "exp expm1 softplus"
SQUASHING = "sigmoid expit softmax log_softmax softplus exp logsigmoid erf"
SUMS = "add sub rsub sum cumsum clamp clamp_min maximum relu"
PRODUCTS = "mul matmul mm mv bmm dot einsum div linear"
HALF_CAUCHY = (
    "Gamma on the precision instead of HalfCauchy on the scale (tau ~ Gamma, scale = tau.rsqrt()); or "
    "the same HalfCauchy(s) in two steps: a ~ InverseGamma(1/2, 1/s**2), v ~ InverseGamma(1/2, 1/a), "
    "scale = v.sqrt()"
)


class Row(NamedTuple):
    """Where it stands (names, any of which fits; "" fits everything) and what to write there instead."""

    write: str
    factor: str = ""
    argument: str = ""
    prior: str = ""
    operation: str = ""


# The first row that fits is the answer; {prior} is filled in.
TABLE = (
    # The same distribution, written so that it is conjugate.
    Row(
        factor="StudentT",
        write="the same StudentT in two steps: g ~ Gamma(df/2, df/2) for each observation, then Normal with "
        "scale (tau * g).rsqrt()",
    ),
    Row(
        factor="Cauchy",
        write="the same Cauchy in two steps: g ~ Gamma(1/2, 1/2) for each observation, then Normal with "
        "scale (tau * g).rsqrt()",
    ),
    Row(
        factor="GammaPoisson",
        write="the same in two steps: g ~ Gamma(concentration, rate) for each observation, then Poisson(g)",
    ),
    Row(
        factor="BetaBinomial",
        write="the same in two steps: p ~ Beta for each observation, then Binomial(total_count, p)",
    ),
    Row(
        factor="DirichletMultinomial",
        write="the same in two steps: p ~ Dirichlet for each observation, then Multinomial(total_count, p)",
    ),
    Row(
        factor="MixtureOfDiagNormals MixtureOfDiagNormalsSharedCovariance MixtureSameFamily",
        write="the component as a site of its own: z ~ Categorical(weights), then the component's "
        "distribution at parameters[z]",
    ),
    Row(
        factor="ZeroInflatedDistribution ZeroInflatedNegativeBinomial ZeroInflatedPoisson",
        write="whether a count is a structural zero as a Bernoulli site of its own, masking the counts' own likelihood",
    ),
    Row(
        factor="HalfCauchy",
        argument="scale",
        write="the same HalfCauchy(s) on the squared value: a ~ InverseGamma(1/2, 1/s**2), v ~ "
        "InverseGamma(1/2, 1/a), value = v.sqrt()",
    ),
    # Priors that are no exponential family with closed forms.
    Row(
        factor="HalfCauchy",
        prior="HalfCauchy",
        write=HALF_CAUCHY,
    ),
    Row(
        factor="HalfNormal",
        prior="HalfNormal",
        write="Gamma on the precision instead of HalfNormal on the scale",
    ),
    Row(
        factor="Uniform",
        prior="Uniform",
        write="Normal instead of Uniform where a location is meant, Beta(1, 1) on (0, 1), Gamma on the "
        "precision for a scale",
    ),
    Row(
        factor="LKJ LKJCholesky",
        write="Wishart on precision_matrix instead of LKJCholesky and separate scales",
    ),
    Row(
        factor="Laplace",
        argument="loc scale value",
        write="Normal instead of Laplace; or, for heavy tails, Normal with scale (tau * g).rsqrt(), g ~ "
        "Gamma(df/2, df/2) (a StudentT)",
    ),
    # Scales, precisions and covariances of Gaussians.
    Row(
        factor=GAUSSIAN,
        argument=SPREAD,
        prior="LKJ LKJCholesky",
        write="Wishart on precision_matrix instead of LKJCholesky and separate scales",
    ),
    Row(
        factor="MultivariateNormal",
        argument=SPREAD,
        prior="Wishart",
        write="the Wishart site as precision_matrix itself, times a constant matrix at most",
    ),
    Row(
        factor="MultivariateNormal",
        argument=SPREAD,
        prior="InverseWishart",
        write="Wishart on precision_matrix instead of a prior on the covariance",
    ),
    Row(
        factor="MultivariateNormal",
        argument=SPREAD,
        write="Wishart on precision_matrix, or one Gamma times a constant precision_matrix",
    ),
    Row(
        factor=GAUSSIAN,
        argument=SPREAD,
        prior="HalfCauchy",
        write=HALF_CAUCHY,
    ),
    Row(
        factor=GAUSSIAN,
        argument=SPREAD,
        prior="Chi2 Gamma",
        operation=SUMS,
        write="the Gamma site alone as the precision (scale = tau.rsqrt()): a constant or another site "
        "added to it breaks the form",
    ),
    Row(
        factor=GAUSSIAN,
        argument=SPREAD,
        prior="InverseGamma",
        operation=SUMS,
        write="the InverseGamma site alone as the variance (scale = v.sqrt()): a constant or another site "
        "added to it breaks the form",
    ),
    Row(
        factor=GAUSSIAN,
        argument=SPREAD,
        prior="Chi2 Exponential Gamma",
        write="Gamma on the precision (scale = tau.rsqrt()), or InverseGamma on the variance (scale = "
        "v.sqrt()), instead of {prior} on the scale",
    ),
    Row(
        factor=GAUSSIAN,
        argument=SPREAD,
        prior="InverseGamma",
        write="InverseGamma on the variance (scale = v.sqrt()), or Gamma on the precision (scale = tau.rsqrt())",
    ),
    Row(
        factor=GAUSSIAN,
        argument=SPREAD,
        prior=REAL,
        write="Gamma on the precision (scale = tau.rsqrt()) instead of a scale made from a {prior} site",
    ),
    Row(
        factor=GAUSSIAN,
        argument=SPREAD,
        write="Gamma on the precision (scale = tau.rsqrt()) instead of {prior} on the scale",
    ),
    # Locations of Gaussians.
    Row(
        factor=GAUSSIAN,
        argument="loc value",
        prior="Uniform",
        write="Normal on loc instead of Uniform",
    ),
    Row(
        factor="Normal",
        argument="loc",
        prior="Normal",
        operation=LOGARITHMIC,
        write="LogNormal(loc, scale) with loc affine in the site, instead of Normal around its exponential",
    ),
    Row(
        factor=GAUSSIAN,
        argument="loc",
        prior="LogNormal",
        write="Normal on loc, entering affinely, instead of LogNormal",
    ),
    Row(
        factor=GAUSSIAN,
        argument="loc value",
        prior=POSITIVE,
        write="Normal on loc instead of {prior}: only a Gaussian site has closed forms there",
    ),
    # Rates and concentrations.
    Row(
        factor=f"{COUNTS} Gamma InverseGamma",
        argument="rate",
        prior="Chi2 Exponential Gamma InverseGamma",
        operation=SUMS,
        write="one count for each rate (their sum is then observed through a latent split), or a single "
        "Gamma as the rate: sums are not conjugate",
    ),
    Row(
        factor=COUNTS,
        argument="rate",
        prior="Normal",
        write="Gamma on the rate instead of exp of a Normal",
    ),
    Row(
        factor=COUNTS,
        argument="rate",
        prior="InverseGamma",
        write="Gamma on the rate instead of InverseGamma",
    ),
    Row(
        factor=COUNTS,
        argument="rate",
        write="Gamma on the rate instead of {prior}",
    ),
    Row(
        factor="Gamma InverseGamma",
        argument="rate scale",
        write="Gamma on the rate instead of {prior}",
    ),
    Row(
        factor="Gamma InverseGamma",
        argument="concentration",
        write="a fixed concentration, with Gamma on the rate: a concentration has no conjugate prior here",
    ),
    Row(
        factor="Beta Dirichlet",
        argument="concentration concentration0 concentration1",
        write="fixed concentrations: they have no conjugate prior here",
    ),
    # Probabilities.
    Row(
        factor=TRIALS,
        argument="logits probs",
        prior="Beta Uniform",
        operation=f"{PRODUCTS} {SUMS}",
        write="the Beta site itself, or 1 - it, as probs: a multiple of it or a sum is not conjugate",
    ),
    Row(
        factor=TRIALS,
        argument="logits probs",
        prior=f"{REAL} {POSITIVE}",
        write="Beta on probs instead of {prior} on logits",
    ),
    Row(
        factor=TRIALS,
        argument="logits probs",
        operation=SQUASHING,
        write="Beta on probs instead of a transformed {prior}",
    ),
    Row(
        factor=STATES,
        argument="logits probs",
        prior="Dirichlet",
        operation=f"{PRODUCTS} {SUMS}",
        write="the Dirichlet site itself as probs: weighting it or adding to it is not conjugate",
    ),
    Row(
        factor=STATES,
        argument="logits probs",
        write="Dirichlet on probs instead of softmax of {prior} logits",
    ),
)


def remedy_for(factor_family: str, argument: str, site_family: str, operation: str) -> str:
    """The rewrite that would make (factor, argument, site) exact, or "" where we know none.

    `factor_family` and `site_family` are the distributions' class names as the model wrote them, `argument`
    the factor's argument (canonical, or the constructor's name), `operation` the first operation that broke
    the conjugate form; "" where unknown.
    """
    for row in TABLE:
        asked = (
            (row.factor, factor_family),
            (row.argument, argument),
            (row.prior, site_family),
            (row.operation, operation),
        )
        if all(not names or name in names.split() for names, name in asked):
            return row.write.format(prior=site_family)
    return ""
