"""Bayesian neural networks: the rule as a torch optimizer, modules as sites of Pyro models, last layers, and what they predict."""

from pyro_blr.nn._priors import Prior
from pyro_blr.nn.evaluation import (
    ClassificationScores,
    RegressionScores,
    classification_scores,
    out_of_distribution_auroc,
    predictive_log_probs,
    regression_scores,
)
from pyro_blr.nn.heads import (
    BernoulliHead,
    CategoricalHead,
    GaussianHead,
    HeadPrediction,
    OneVsEachHead,
    PretrainedHead,
    bayesian_head,
)
from pyro_blr.nn.modules import BayesianModule, bayesian
from pyro_blr.nn.optimizer import BLROptimizer
from pyro_blr.nn.predictions import predict

__all__ = [
    "BLROptimizer",
    "BayesianModule",
    "BernoulliHead",
    "CategoricalHead",
    "ClassificationScores",
    "GaussianHead",
    "HeadPrediction",
    "OneVsEachHead",
    "PretrainedHead",
    "Prior",
    "RegressionScores",
    "bayesian",
    "bayesian_head",
    "classification_scores",
    "out_of_distribution_auroc",
    "predict",
    "predictive_log_probs",
    "regression_scores",
]
