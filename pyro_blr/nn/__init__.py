"""Bayesian neural networks: the rule as a torch optimizer."""

from pyro_blr.nn.optimizer import BLROptimizer

__all__ = ["BLROptimizer"]
