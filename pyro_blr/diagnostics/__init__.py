"""Whether a posterior should be trusted, and what to do where it should not: functions of plain values."""

from ._advice import Facts, Restart, rivals_among, warnings_about
from ._psis import FEWEST_DRAWS, GOOD, NEGLIGIBLE, POOR, ParetoSmoothed, pareto_smoothed
from ._response import LinearResponse, linear_response
from ._summary import Summary

__all__ = [
    "FEWEST_DRAWS",
    "GOOD",
    "NEGLIGIBLE",
    "POOR",
    "Facts",
    "LinearResponse",
    "ParetoSmoothed",
    "Restart",
    "Summary",
    "linear_response",
    "pareto_smoothed",
    "rivals_among",
    "warnings_about",
]
