"""What the user says of one site, `infer={"blr": {...}}`, checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_blr.graph import Site

__all__ = ["copies_of", "options_of"]

_KNOWN = ("family", "block", "copies")
_OWN = ("within",)  # what a guide that was read says


def options_of(site: Site) -> Mapping[str, Any]:
    """The options of a site; raises ValueError for one that does not exist."""
    options = site.infer.get("blr", {})
    unknown = sorted(set(options) - {*_KNOWN, *_OWN})
    if unknown:
        raise ValueError(
            f"site {site.name!r}: found {unknown} in infer={{'blr': ...}}, expected some of {list(_KNOWN)}"
        )
    return options


def copies_of(site: Site) -> Tensor | None:
    """How many exchangeable copies each element stands for, positive, float64, (*batch); None where that is not said."""
    found = options_of(site).get("copies")
    if found is None:
        return None
    try:
        copies = torch.as_tensor(found, dtype=torch.float64, device=site.device).detach().expand(site.batch_shape)
    except (TypeError, ValueError, RuntimeError):
        what = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"type {type(found).__name__}"
        raise ValueError(
            f"site {site.name!r}: found copies of {what}, expected a positive number, or one for each element: "
            f"shape {tuple(site.batch_shape)}"
        ) from None
    if not bool(((copies > 0) & torch.isfinite(copies)).all()):
        raise ValueError(
            f"site {site.name!r}: found copies between {float(copies.min()):g} and {float(copies.max()):g}, expected positive numbers. "
            "Leave out elements that occur never"
        )
    return copies
