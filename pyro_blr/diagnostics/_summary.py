"""The table of a posterior, one row a scalar, with what there is to say about the fit beneath it."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ._psis import ParetoSmoothed

__all__ = ["Summary"]

SHOWN = 10  # rows of one site that are printed


@dataclass(frozen=True, repr=False, eq=False)
class Summary:
    """`table` is a pandas DataFrame, a row a scalar; `sizes` says how many rows each site has, in order.

    `warnings` are sentences, none where there is no reason to doubt; `psis` is None where there are no weights,
    `khat` NaN then.
    """

    table: Any
    sizes: Sequence[tuple[str, int]]
    how_it_ended: str
    bound: str
    warnings: Sequence[str]
    psis: ParetoSmoothed | None = None
    notes: Sequence[str] = ()
    width: int = 116

    @property
    def khat(self) -> float:
        return self.psis.khat if self.psis is not None else float("nan")

    def __str__(self) -> str:
        rows = [["", *self.table.columns]]
        position = 0
        for site, size in self.sizes:
            part = self.table.iloc[position : position + min(size, SHOWN)]
            rows += [
                [str(label), *(f"{value:.4g}" for value in row)]
                for label, row in zip(part.index, part.values, strict=True)
            ]
            if size > SHOWN:
                rows.append([f"... {size - SHOWN} more of {site}", *[""] * len(self.table.columns)])
            position += size
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            "  ".join(
                [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
            ).rstrip()
            for row in rows
        ]
        return "\n".join([*lines, "", *self._said()])

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        said = "".join(f"<p>{html.escape(line)}</p>" for line in self._sentences())
        return f"<div>{self.table.to_html(float_format=lambda value: f'{value:.4g}', max_rows=60)}{said}</div>"

    def _sentences(self) -> list[str]:
        lines = [self.how_it_ended, *(self.psis.lines() if self.psis is not None else [self.bound])]
        return [*lines, *self.notes, *(f"WARNING: {warning}." for warning in self.warnings)]

    def _said(self) -> list[str]:
        return [
            line
            for sentence in self._sentences()
            for line in textwrap.wrap(sentence, self.width, subsequent_indent="  ", break_on_hyphens=False)
        ]
