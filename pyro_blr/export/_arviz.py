"""Groups of named arrays in ArviZ's structure: its `InferenceData`, or xarray's `DataTree` from 1.0 on."""

from __future__ import annotations

import datetime
import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

__all__ = ["Variable", "build"]

BATCH_ONLY = ("log_likelihood", "log_prior")


@dataclass(frozen=True)
class Variable:
    """An array of shape (*sample, *rest).

    `names` are those of the axes in `rest` (None: `{variable}_dim_{k}`), `labels` the coordinates of named
    axes; `beside` holds further integer coordinates of the last axis.
    """

    values: np.ndarray
    names: tuple[str | None, ...] = ()
    labels: Mapping[str, np.ndarray] = field(default_factory=dict)
    beside: Mapping[str, np.ndarray] = field(default_factory=dict)
    sample: tuple[str, ...] = ("chain", "draw")


def build(
    groups: Mapping[str, Mapping[str, Variable]],
    coords: Mapping[str, Sequence] | None = None,
    dims: Mapping[str, Sequence[str | None]] | None = None,
) -> Any:
    """The groups in the installed ArviZ's structure; `coords` and `dims` override labels and names."""
    try:
        import arviz
        import xarray
    except ImportError as error:
        raise ImportError("to_arviz needs ArviZ and found none: pip install arviz") from error

    known = {name for variables in groups.values() for name in variables}
    unknown = sorted(set(dims or {}) - known)
    if unknown:
        raise ValueError(f"dims names {unknown}: expected variables of the export, which are {sorted(known)}")
    attributes = _attributes()
    datasets = {}
    for group, variables in groups.items():
        if variables:
            reserved = frozenset({*map(_storable, variables), "chain", "draw", "sample", "step"})
            layout = _Layout(group, reserved, coords or {}, dims or {})
            for name, variable in variables.items():
                layout.add(name, variable)
            datasets[group] = xarray.Dataset(layout.arrays, coords=layout.labels, attrs=attributes)
    # Not hasattr: from 1.0 on the module answers to the name, with a warning.
    if "InferenceData" in vars(arviz):
        inference_data: Any = arviz.InferenceData
        return inference_data(attrs=attributes, **datasets)
    tree = xarray.DataTree.from_dict(datasets)
    tree.attrs = attributes
    return tree


@dataclass
class _Layout:
    """One group being laid out: axes of one name have equal labels."""

    group: str
    reserved: frozenset[str]
    coords: Mapping[str, Sequence]
    dims: Mapping[str, Sequence[str | None]]
    arrays: dict[str, tuple] = field(default_factory=dict)
    labels: dict[str, tuple[str, np.ndarray]] = field(default_factory=dict)

    def add(self, name: str, variable: Variable) -> None:
        stored = _storable(name)
        sample, rest = np.split(np.array(variable.values.shape, int), [len(variable.sample)])
        axes = [
            self._axis(axis, axis, np.arange(size) + (axis == "step"), stored)
            for axis, size in zip(variable.sample, sample, strict=True)
        ]
        unnamed = 0
        for axis, label in zip(self._names(name, variable), _own_labels(variable, rest), strict=True):
            fallback = f"{stored}_dim_{unnamed}"
            chosen = self._axis(axis or fallback, fallback, label, name)
            unnamed += chosen == fallback
            axes.append(chosen)
        self.arrays[stored] = (axes, variable.values)
        for other, label in variable.beside.items():
            self.labels[f"{stored}_{other}"] = (axes[-1], self._chosen(other, label, name))

    def _names(self, name: str, variable: Variable) -> list[str | None]:
        rest = variable.values.shape[len(variable.sample) :]
        rank = len(rest)
        names = [*variable.names, *[None] * rank][:rank]
        given = list(self.dims.get(name, ()))
        if len(given) > rank and self.group not in BATCH_ONLY:
            raise ValueError(
                f"dims[{name!r}] = {given} names {len(given)} axes; expected at most {rank}: in "
                f"{self.group} the variable has shape {rest}, chains and draws apart"
            )
        if variable.beside:  # the elements that a mask left over: no longer the axes that dims speaks of
            return names
        given = [*given, *names[len(given) :]][:rank]
        return [own if other is None else other for own, other in zip(names, given, strict=True)]

    def _axis(self, axis: str, fallback: str, label: np.ndarray, name: str) -> str:
        """The name under which an axis is entered: its own, unless a variable or other labels have that."""
        axis = _storable(axis)
        if axis in self.reserved and axis != fallback:
            axis = f"{axis}_dim"
        label = self._chosen(axis, label, name)
        known = self.labels.get(axis)
        if known is not None and not np.array_equal(known[1], label):
            axis, label = fallback, np.arange(len(label))
        self.labels[axis] = (axis, label)
        return axis

    def _chosen(self, axis: str, label: np.ndarray, name: str) -> np.ndarray:
        """The user's labels of an axis, at the elements that are there."""
        if axis not in self.coords:
            return label
        given = np.asarray(self.coords[axis])
        if len(given) == len(label):
            return given
        if len(label) and label.dtype.kind in "iu" and label.max() < len(given):
            return given[label]
        raise ValueError(
            f"coords[{axis!r}] has {len(given)} labels; expected {len(label)}, the length of that axis of "
            f"{name!r} in {self.group}"
        )


def _own_labels(variable: Variable, sizes: np.ndarray) -> list[np.ndarray]:
    names = [*variable.names, *[None] * len(sizes)][: len(sizes)]
    return [variable.labels.get(name or "", np.arange(size)) for name, size in zip(names, sizes, strict=True)]


def _storable(name: str) -> str:
    """Names as netCDF and trees can hold them: a slash would begin a group."""
    return name.replace("/", ".")


def _attributes() -> dict[str, str]:
    attributes = {
        "created_at": datetime.datetime.now(datetime.timezone.utc).isoformat(),
        "creation_library": "pyro_blr",
        "creation_library_language": "Python",
        "inference_library": "pyro_blr",
    }
    try:
        version = importlib.metadata.version("pyro_blr")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        return attributes
    return {**attributes, "creation_library_version": version, "inference_library_version": version}
