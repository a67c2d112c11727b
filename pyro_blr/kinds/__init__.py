"""The structural judge: what an expression is to one latent, read off the operations that were recorded."""

from pyro_blr.kinds._judge import Judge, kind_of
from pyro_blr.kinds._values import Form, Kind, Sort

__all__ = ["Form", "Judge", "Kind", "Sort", "kind_of"]
