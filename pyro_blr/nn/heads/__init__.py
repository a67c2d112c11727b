"""Last layers with a posterior in closed form, or by natural gradients."""

from pyro_blr.nn.heads.gaussian import GaussianHead

__all__ = ["GaussianHead"]
