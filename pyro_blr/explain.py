"""Site | family | exact? | how | why not, and what would make it so: verdicts, for a person to read."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pyro_blr.blocks import Block
from pyro_blr.plans import Verdict
from pyro_blr.series import FEWEST, alike, counted, shift, shortened, span, told_once, without_numbers

__all__ = ["Explanation"]

HEADINGS = ("site", "family", "exact?", "how", "why not, and what would make it so")
MIN_WIDTHS = (4, 6, 6, 14, 36)
MAX_WIDTHS = (24, 28, 6, 24, 200)
SEPARATOR = " | "


class _Row(NamedTuple):
    site: str
    family: str
    exact: str
    how: str
    why: str


class _Entry(NamedTuple):
    """What is said of a site: its rows, each with a rewrite, and the sites that share its Gaussian."""

    name: str
    block: tuple[str, ...]
    lines: list[tuple[_Row, str]]


@dataclass(frozen=True)
class Explanation:
    """How every message of a model is computed, and why not exactly where it is not.

    One row for a site whose factors all stand alike; otherwise one for the site and one below it for each
    factor.  Statements of a loop of which the same is said share their rows; `to_dict` has each by itself.
    `optimised` names the parameters that `optim` learns; `ordinary` says, for each guide site without a
    natural gradient, why; `notes` are sentences about the model as a whole.  Iterating gives the verdicts.
    """

    verdicts: Sequence[Verdict]
    blocks: Mapping[str, Block]
    bound_kind: str
    optimised: Sequence[str] = ()
    ordinary: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
    width: int = 116

    @property
    def exact(self) -> bool:
        """Whether every message of every site is exact."""
        return not self.ordinary and all(verdict.exact for verdict in self.verdicts)

    def __iter__(self) -> Iterator[Verdict]:
        return iter(self.verdicts)

    def __len__(self) -> int:
        return len(self.verdicts)

    def __getitem__(self, site: str) -> tuple[Verdict, ...]:
        """The verdicts of one site."""
        found = tuple(verdict for verdict in self.verdicts if verdict.site == site)
        if not found and site not in self._sites():
            raise KeyError(f"{site!r} is no latent site of the model; it has {sorted(self._sites())}")
        return found

    def __str__(self) -> str:
        sections = [self._summary(), *self._table()]
        sections.append("")
        for title, lines in self._remarks():
            sections += textwrap.wrap(
                f"{title}: {'; '.join(lines)}",
                self.width,
                subsequent_indent="  ",
                break_on_hyphens=False,
            )
        return "\n".join(sections)

    def __repr__(self) -> str:
        return str(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain strings, numbers, lists and dicts, as JSON has them."""
        sites = {}
        for name, block in self._sites().items():
            verdicts = self[name]
            sites[name] = {
                "family": _family(block) + _with([site for site in block.site_names if site != name]),
                "block": block.name,
                "batch_shape": list(block.full_shape),
                "exact": all(verdict.exact for verdict in verdicts),
                "messages": [
                    {
                        "factor": verdict.factor,
                        "argument": verdict.argument,
                        "exact": verdict.exact,
                        "how": verdict.how,
                        "reason": verdict.reason,
                        "remedy": verdict.remedy,
                    }
                    for verdict in verdicts
                ],
            }
        return {
            "exact": self.exact,
            "bound": self.bound_kind,
            "sites": sites,
            "optimised": list(self.optimised),
            "ordinary": dict(self.ordinary),
            "notes": list(self.notes),
        }

    def _repr_html_(self) -> str:
        rows = []
        for row in self._rows():
            style = ' style="padding-left: 2em"' if row.site.startswith(" ") else ""
            cells = [f"<td{style}>{html.escape(row.site.strip())}</td>"]
            cells += [f"<td>{_lines_to_html(cell)}</td>" for cell in row[1:]]
            rows.append(f"<tr>{''.join(cells)}</tr>")
        head = "".join(f"<th>{html.escape(heading)}</th>" for heading in HEADINGS)
        remarks = "".join(
            f"<p><b>{html.escape(title)}</b>: {html.escape('; '.join(lines))}</p>" for title, lines in self._remarks()
        )
        return (
            f"<div><p>{html.escape(self._summary())}</p><table><thead><tr>{head}</tr></thead>"
            f"<tbody>{''.join(rows)}</tbody></table>{remarks}</div>"
        )

    def _sites(self) -> dict[str, Block]:
        return {name: block for block in self.blocks.values() for name in block.site_names}

    def _summary(self) -> str:
        exact, total = sum(verdict.exact for verdict in self.verdicts), len(self.verdicts)
        if self.exact:
            return f"Every message is exact: {total} of {total}."
        return f"{exact} of {total} messages {'is' if exact == 1 else 'are'} exact."

    def _rows(self) -> Iterator[_Row]:
        """The table; a rewrite is spelled out where it is first said."""
        said: set[str] = set()
        for row, remedy in self._cells():
            arrow = ["-> as above" if remedy in said else f"-> {remedy}"] if remedy else []
            said.add(remedy)
            yield row._replace(why="\n".join([*([row.why] if row.why else []), *arrow]))

    def _cells(self) -> Iterator[tuple[_Row, str]]:
        for group in _grouped(list(self._entries())):
            first, last = group[0], group[-1]
            joint = _joint(first, last)
            for (row, remedy), (end, _) in zip(first.lines, last.lines, strict=True):
                margin = "  " if row.site.startswith(" ") else ""
                family = row.family + (joint if row.family else "")
                yield row._replace(site=margin + span(row.site.strip(), end.site.strip()), family=family), remedy

    def _entries(self) -> Iterator[_Entry]:
        for name, block in self._sites().items():
            verdicts, family = self[name], _family(block)
            together = tuple(block.site_names) if len(block.site_names) > 1 else ()
            if len({_said(verdict) for verdict in verdicts}) == 1:
                one = verdicts[0]
                yield _Entry(
                    name, together, [(_Row(name, family, _yes_or_no(verdicts), one.how, one.reason), one.remedy)]
                )
                continue
            lines = [(_Row(name, family, _yes_or_no(verdicts), "by factor:" if verdicts else "", ""), "")]
            for one in verdicts:
                lines += [(_Row(f"  {one.factor}", "", _yes_or_no([one]), one.how, one.reason), one.remedy)]
            yield _Entry(name, together, lines)
        for name, reason in self.ordinary.items():
            yield _Entry(name, (), [(_Row(name, "", "no", "ordinary gradient", reason), "")])

    def _table(self) -> list[str]:
        rows = list(self._rows())
        if not rows:
            return []
        widths = _widths(rows, self.width)
        lines = ["", *_layout(HEADINGS, widths), "-+-".join("-" * width for width in widths)]
        for row in rows:
            lines += _layout(row, widths)
        return lines

    def _remarks(self) -> Iterator[tuple[str, Sequence[str]]]:
        yield "Bound", [self.bound_kind]
        if self.optimised:
            yield "Learned by optim", self.optimised
        for note in told_once(self.notes):
            yield "Note", [shortened(note)]


def _family(block: Block) -> str:
    """`Gamma`, `MultivariateNormal(3)`, `Dirichlet(4) × 8` over a plate."""
    event = " x ".join(str(size) for size in block.family.event_shape)
    text = type(block.family).__name__ + (f"({event})" if event else "")
    text += "".join(f" × {size}" for size in block.full_shape)
    return text + (", in copies" if block.copies is not None else "")


def _with(others: Sequence[str]) -> str:
    return f" with {', '.join(others)}" if others else ""


def _joint(first: _Entry, last: _Entry) -> str:
    """Which sites share the Gaussian of a site, or of all the sites of a series, or the Gaussian of each of them."""
    if first is not last and first.block == last.block:
        return f" over {counted(first.block)}" if first.block else ""
    pairs = zip(first.block, last.block, strict=True)
    others = [span(one, other) for one, other in pairs if one != first.name]
    return f" with {counted(others)}" if others else ""


def _grouped(entries: Sequence[_Entry]) -> list[list[_Entry]]:
    """Statements of a loop of which the same is said, together; by the first of each group."""
    groups: list[list[_Entry]] = []
    latest: dict[str, list[_Entry]] = {}
    for entry in entries:
        pattern = without_numbers(entry.name)
        group = latest.get(pattern)
        if group is None or not _continues(group, entry):
            group = latest[pattern] = []
            groups.append(group)
        group.append(entry)
    apart = [[group] if len(group) >= FEWEST else [[entry] for entry in group] for group in groups]
    places = {entry.name: index for index, entry in enumerate(entries)}
    return sorted((group for some in apart for group in some), key=lambda group: places[group[0].name])


def _continues(group: Sequence[_Entry], entry: _Entry) -> bool:
    first, by = group[0], len(group)
    if shift(first.name, entry.name) != by or shift(group[-1].name, entry.name) != 1:
        return False
    moved = alike(",".join(first.block), ",".join(entry.block), by)
    if not (moved or first.block == entry.block) or len(first.lines) != len(entry.lines):
        return False
    pairs = zip(first.lines, entry.lines, strict=True)
    return all(alike("\n".join([*a, remedy]), "\n".join([*b, other]), by) for (a, remedy), (b, other) in pairs)


def _yes_or_no(verdicts: Sequence[Verdict]) -> str:
    if all(verdict.exact for verdict in verdicts):
        return "yes"
    return "partly" if any(verdict.exact for verdict in verdicts) else "no"


def _said(verdict: Verdict) -> tuple[bool, str, str, str]:
    return verdict.exact, verdict.how, verdict.reason, verdict.remedy


def _lines_to_html(cell: str) -> str:
    return "<br>".join(html.escape(line) for line in cell.splitlines())


def _widths(rows: Sequence[_Row], total: int) -> list[int]:
    """Each column as wide as what it holds, within bounds; the last takes what is left of the line."""
    widths = []
    for column in range(4):
        longest = max(len(line) for row in (HEADINGS, *rows) for line in row[column].split("\n"))
        widths.append(min(max(longest, MIN_WIDTHS[column]), MAX_WIDTHS[column]))
    longest = max(len(line) for row in (HEADINGS, *rows) for line in row[4].split("\n"))
    available = total - 4 * len(SEPARATOR)
    while available - sum(widths) < MIN_WIDTHS[4] and any(map(int.__gt__, widths, MIN_WIDTHS)):
        widths[max(range(4), key=lambda column: widths[column] - MIN_WIDTHS[column])] -= 1
    left = available - sum(widths)
    return [*widths, max(min(longest, left), MIN_WIDTHS[4])]


def _layout(cells: Sequence[str], widths: Sequence[int]) -> list[str]:
    """One row of the table, on as many lines as its tallest cell."""
    columns = [_wrap(cell, width) for cell, width in zip(cells, widths, strict=True)]
    height = max(len(column) for column in columns)
    lines = []
    for index in range(height):
        parts = [column[index] if index < len(column) else "" for column in columns]
        padded = (part.ljust(width) for part, width in zip(parts, widths, strict=True))
        lines.append(SEPARATOR.join(padded).rstrip())
    return lines


def _wrap(cell: str, width: int) -> list[str]:
    wrapped = []
    for line in cell.split("\n"):
        margin = " " * (len(line) - len(line.lstrip()))
        hanging = margin + ("   " if line.startswith("-> ") else "")
        wrapped += textwrap.wrap(line, width, subsequent_indent=hanging, break_on_hyphens=False) or [""]
    return wrapped
