"""E_q[log f], one template a likelihood family, as a function of the expectations of the arguments."""

from ._base import Likelihood
from ._expectations import Constant, Expectation, Linear, Matrix, Positive, Probability, Simplex, Vector
from ._registry import likelihood_of, register_likelihood
from ._select import select
from ._terms import Lookup, Product, Square, Term, contract, sum_terms
from ._weighted import WeightedSums, counts_at
from .bernoulli import Bernoulli
from .beta import Beta
from .binomial import Binomial
from .categorical import Categorical
from .dirichlet import Dirichlet
from .exponential import Exponential
from .gamma import Gamma
from .geometric import Geometric
from .improper_uniform import ImproperUniform
from .inverse_gamma import InverseGamma
from .log_normal import LogNormal
from .multinomial import Multinomial
from .multivariate_normal import MultivariateNormal
from .negative_binomial import NegativeBinomial
from .normal import Normal
from .one_hot_categorical import OneHotCategorical
from .poisson import Poisson
from .uniform import Uniform
from .wishart import Wishart

__all__ = [
    "Bernoulli",
    "Beta",
    "Binomial",
    "Categorical",
    "Constant",
    "Dirichlet",
    "Expectation",
    "Exponential",
    "Gamma",
    "Geometric",
    "ImproperUniform",
    "InverseGamma",
    "Likelihood",
    "Linear",
    "LogNormal",
    "Lookup",
    "Matrix",
    "Multinomial",
    "MultivariateNormal",
    "NegativeBinomial",
    "Normal",
    "OneHotCategorical",
    "Poisson",
    "Positive",
    "Probability",
    "Product",
    "Simplex",
    "Square",
    "Term",
    "Uniform",
    "Vector",
    "WeightedSums",
    "Wishart",
    "contract",
    "counts_at",
    "likelihood_of",
    "register_likelihood",
    "select",
    "sum_terms",
]
