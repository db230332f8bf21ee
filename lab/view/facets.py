"""Facets: a Result with many axes as several that can each be drawn, and a grid of small line figures on one page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lab.errors import UsageError
from lab.result import Result
from lab.view.specs import FigureSpec, figure_spec, text

MOST = 24  # pictures made of one Result
# axes that are split off first; what is left is drawn
ORDER = ("metric", "task", "pathway", "token", "head", "layer", "first", "key_frame")


def facets(result: Result) -> list[Result]:
    """The Result with items averaged, cut along as many axes as leave two that a figure can show; at most `MOST` parts."""
    parts, axes = [result.mean("item") if "item" in result.axes else result], list(result.axes)
    axes = [a for a in axes if a != "item"]
    while len(axes) > 2 or "metric" in axes:
        axis = next((a for a in ORDER if a in axes), axes[0])
        parts = [p.select(**{axis: c}) for p in parts for c in p.coords[axis]]
        axes.remove(axis)
    return parts[:MOST]


@dataclass(frozen=True, eq=False)
class Panel:
    """A grid of line figures: one row a group of curves, one column a label.

    cells    [row][column]; the cells of a row have the same curves and the same scale
    rows, columns   their headings
    """

    title: str
    unit: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: tuple[tuple[FigureSpec, ...], ...]
    caption: str = ""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return len(self.rows), len(self.columns)


def panel(
    result: Result,
    groups: Mapping[str, Sequence[str]],
    *,
    column: str = "task",
    title: str = "",
    note: str = "",
) -> Panel:
    """The grid of a Result with axes (column, pathway, x): a row for each group of pathways that the Result has.

    note  a sentence more below the grid
    Raises UsageError if an axis is missing or no pathway of any group is there.
    """
    missing = [a for a in (column, "pathway") if a not in result.axes]
    if missing or len(result.axes) != 3:
        raise UsageError(
            f"a panel needs the axes {column}, pathway and one more, the result has {result.axes}"
        )
    have = result.coords["pathway"]
    rows = {name: [p for p in ways if p in have] for name, ways in groups.items()}
    rows = {name: ways for name, ways in rows.items() if ways}
    if not rows:
        raise UsageError(f"none of the pathways {', '.join(have)} belongs to the panel")
    labels = result.coords[column]
    cells = [[figure_spec(result.select(**{column: c, "pathway": ways}), title="", caption="") for c in labels] for ways in rows.values()]  # fmt: skip
    return Panel(
        title or result.name, result.unit, tuple(rows), tuple(_heading(result, c) for c in labels),
        tuple(tuple(_one_scale(row)) for row in cells), f"{_caption(result)} {note}".strip(),
    )  # fmt: skip


def labelled(result: Result, label: str) -> Result:
    """The Result with `notes[label]` for every item: where there is none, all items have one label."""
    given = result.notes.get(label)
    if isinstance(given, dict):
        return result
    return replace(
        result, notes={**result.notes, label: {str(c): "all items" for c in result.coords["item"]}}
    )


def _one_scale(row: Sequence[FigureSpec]) -> list[FigureSpec]:
    ends = [a for s in row for a in (s.values, s.low, s.high) if a is not None]
    known = np.concatenate([a[np.isfinite(a)].ravel() for a in ends] + [np.zeros(1)])
    lo, hi = float(known.min()), float(known.max())
    room = 0.05 * (hi - lo) or 1.0
    return [replace(s, limits=(lo - room, hi + room)) for s in row]


def _heading(result: Result, label: Any) -> str:
    n = (result.notes.get("n") or {}).get("item")
    count = n.get(text(label)) if isinstance(n, dict) else None
    return text(label).replace("_", " ") + (f" (n = {count})" if count is not None else "")


def _caption(result: Result) -> str:
    split = {"correct": "items answered right in the clean run", "wrong": "items answered wrong"}.get(
        result.notes.get("split", ""), "all items"
    )
    window = result.notes.get("window")
    cut = f"each pathway cut in {window} layers round each layer; " if window else ""
    return f"Mean over {split}; {cut}bands: 95 % bootstrap intervals, videos resampled."
