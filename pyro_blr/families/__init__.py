"""Minimal exponential families in packed natural parameters."""

from ._base import ExponentialFamily
from ._pattern import Pattern
from ._pushforward import pushforward_family
from ._registry import family_of, register_family
from .bernoulli import Bernoulli
from .beta import Beta
from .categorical import Categorical
from .diagonal_normal import DiagonalNormal
from .dirichlet import Dirichlet
from .gamma import Gamma
from .inverse_gamma import InverseGamma
from .log_normal import LogNormal
from .multivariate_normal import MultivariateNormal
from .normal import Normal
from .sparse_normal import GaussianField, SparseNormal
from .transformed_normal import TransformedNormal
from .wishart import Wishart

__all__ = [
    "Bernoulli",
    "Beta",
    "Categorical",
    "DiagonalNormal",
    "Dirichlet",
    "ExponentialFamily",
    "Gamma",
    "GaussianField",
    "InverseGamma",
    "LogNormal",
    "MultivariateNormal",
    "Normal",
    "Pattern",
    "SparseNormal",
    "TransformedNormal",
    "Wishart",
    "family_of",
    "pushforward_family",
    "register_family",
]
