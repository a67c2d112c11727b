"""Last layers with a posterior in closed form, or by natural gradients."""

from pyro_blr.nn.heads._polya_gamma import PolyaGammaHead
from pyro_blr.nn.heads._predictions import HeadPrediction
from pyro_blr.nn.heads.bernoulli import BernoulliHead
from pyro_blr.nn.heads.categorical import CategoricalHead
from pyro_blr.nn.heads.gaussian import GaussianHead
from pyro_blr.nn.heads.one_vs_each import OneVsEachHead
from pyro_blr.nn.heads.pretrained import PretrainedHead, bayesian_head

__all__ = [
    "BernoulliHead",
    "CategoricalHead",
    "GaussianHead",
    "HeadPrediction",
    "OneVsEachHead",
    "PolyaGammaHead",
    "PretrainedHead",
    "bayesian_head",
]
