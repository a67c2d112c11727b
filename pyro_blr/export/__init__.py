"""A posterior as ArviZ's data structure, and what the model says at draws of it."""

from ._arviz import build as xarray_of
from ._fitted import Fitted
from ._groups import draws_of_q
from ._ratios import log_ratios
from ._runs import ModelRuns
from ._to_arviz import to_arviz

__all__ = ["Fitted", "ModelRuns", "draws_of_q", "log_ratios", "to_arviz", "xarray_of"]
