"""The Bayesian learning rule for Pyro: natural-gradient variational inference, exact where the model is conjugate."""

from pyro_blr.checks import ImproperPosteriorError
from pyro_blr.explain import Explanation
from pyro_blr.export import to_arviz
from pyro_blr.guides import AutoExponentialFamily
from pyro_blr.inference import BLRInference
from pyro_blr.posterior import Posterior

__all__ = ["AutoExponentialFamily", "BLRInference", "Explanation", "ImproperPosteriorError", "Posterior", "to_arviz"]
