"""HeatView: a heat map of two axes of a Result; the other axes are averaged or scrubbed through. See `HeatMap`, `HeadGrid`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ipywidgets as W
import numpy as np

from lab.errors import UsageError
from lab.result import Result
from lab.view.averages import mean_all
from lab.view.choices import chosen, index_of
from lab.view.live import LiveView
from lab.view.selection import NAMES, Selection
from lab.view.specs import FigureSpec, _extent, figure_spec, label, text

MOST = 256  # cells along each side; a larger FigureWidget heat map is slow
NOTHING = "–"
EVERYWHERE, HERE = "all slices", "this slice"


class HeatView(LiveView):
    """Rows and columns of a Result as a heat map; every further axis has a control.

    result   items and seeds (and the axes named in `averaged`) are averaged first
    limits   ends of the colour scale; None: those of all slices together, so that slices can be compared
    """

    def __init__(
        self, result: Result, y: str, x: str, *, averaged: tuple[str, ...], limits: tuple[float, float] | None,
        diverging: bool | None, selection: Selection | None, theme: str,
    ) -> None:  # fmt: skip
        super().__init__(selection, theme)
        result = mean_all(result, averaged)
        _check(result, y, x)
        self.whole, self.y, self.x = result, y, x
        self._limits, self._diverging = limits, diverging
        self.following = False  # whether the slices are moving because the selection has moved
        self.slices = {a: self._slice_control(a) for a in result.axes if a not in (y, x)}
        if self.slices and limits is None:
            self.control("colours", W.Dropdown(options=[EVERYWHERE, HERE], description="Colours"))
        self.pickers = {a: self._picker(a) for a in (y, x)}
        self.selection.observe(self._moved, list(NAMES))

    # ---- what is shown --------------------------------------------------------------------------------------------

    def result(self) -> Result:
        """The slice that is shown, axes (y, x)."""
        at = {a: w.value for a, w in self.slices.items()}
        part = self.whole.select(**at) if at else self.whole
        order = (self.y, self.x)
        if part.axes == order:
            return part
        turned = {n: None if (v := getattr(part, n)) is None else v.T for n in ("values", "low", "high")}
        return replace(part, axes=order, **turned)

    def spec(self) -> FigureSpec:
        """The heat map: its scale holds for all slices unless the reader asks for this one's."""
        part = self.result()
        middle = part.baseline or 0.0
        own = self.controls.get("colours") is not None and self.controls["colours"].value == HERE
        values = (part if own else self.whole).values.astype(float)
        values = np.where(np.isfinite(values), values, np.nan)
        diverging = bool((values < middle).any()) if self._diverging is None else self._diverging
        limits = self._limits or _extent(values, middle, diverging)
        title = f"{part.name or 'Heat map'}: {part.unit}"
        return figure_spec(part, kind="heat", title=title, limits=limits, diverging=diverging)

    # ---- selecting ------------------------------------------------------------------------------------------------

    def place(self, row: int, col: int) -> dict[str, Any]:
        """Axis -> coordinate of a cell, the sliced axes included."""
        sliced = {a: w.value for a, w in self.slices.items()}
        return {**sliced, self.y: self.whole.coords[self.y][row], self.x: self.whole.coords[self.x][col]}

    def clicked(self, trace: int, point: Any) -> None:
        """Select what the cell stands for."""
        row, col = point
        self.selection.set(**chosen(self.place(int(row), int(col))))

    def outlines(self) -> list[dict[str, Any]]:
        """A frame round the selected cell, or its whole row or column where only one of them is selected."""
        row, col = (index_of(a, self.whole.coords[a], self.selection) for a in (self.y, self.x))
        if row is None and col is None:
            return []
        n_rows, n_cols = (len(self.whole.coords[a]) for a in (self.y, self.x))
        return [cell_outline(row, col, n_rows, n_cols)]

    def extras(self) -> list[W.Widget]:
        """Play for axes of numbers, and the pickers that select a cell without a mouse."""
        return [*(self._play(a) for a in self._numbered()), *self.pickers.values()]

    def _moved(self, change: Any) -> None:
        """Follow the selection with slices and pickers."""

        self.following = True
        self.guarded(self._follow)
        self.following = False

    def _follow(self) -> None:
        for axis, slicer in self.slices.items():
            at = index_of(axis, self.whole.coords[axis], self.selection)
            if at is not None:
                slicer.value = self.whole.coords[axis][at]
        for axis, picker in self.pickers.items():
            picker.value = index_of(axis, self.whole.coords[axis], self.selection)

    def _slice_control(self, axis: str) -> Any:
        coords = self.whole.coords[axis]
        options = [(text(c), c) for c in coords]
        numbers = not any(isinstance(c, str) for c in coords)
        make = W.SelectionSlider if numbers else W.Dropdown
        at = index_of(axis, coords, self.selection) or 0
        return self.control(axis, make(options=options, value=coords[at], description=label(axis)))

    def _picker(self, axis: str) -> Any:
        coords = self.whole.coords[axis]
        options = [(NOTHING, None), *((text(c), i) for i, c in enumerate(coords))]
        at = index_of(axis, coords, self.selection)
        picker = W.Dropdown(
            options=options, value=at, description=label(axis), layout=W.Layout(width="220px")
        )
        picker.add_class(f"vl-pick-{axis.replace(' ', '-')}")

        def pick(change: Any) -> None:
            if change["new"] is not None:
                self.guarded(lambda: self.selection.set(**chosen({axis: coords[change["new"]]})))

        picker.observe(pick, "value")
        return picker

    def _numbered(self) -> list[str]:
        return [a for a, w in self.slices.items() if isinstance(w, W.SelectionSlider)]

    def _play(self, axis: str) -> W.Widget:
        """A button that walks a slider along."""
        play = W.Play(min=0, max=len(self.whole.coords[axis]) - 1, interval=250)
        W.jslink((play, "value"), (self.slices[axis], "index"))
        return play


def cell_outline(row: int | None, col: int | None, n_rows: int, n_cols: int) -> dict[str, Any]:
    """A rectangle round a cell, a row (no col) or a column (no row)."""
    x = (-0.5, n_cols - 0.5) if col is None else (col - 0.5, col + 0.5)
    y = (-0.5, n_rows - 0.5) if row is None else (row - 0.5, row + 0.5)
    return {
        "type": "rect", "x0": x[0], "x1": x[1], "y0": y[0], "y1": y[1], "line": {"color": "#d55e00", "width": 3},
    }  # fmt: skip


def _check(result: Result, y: str, x: str) -> None:
    if y not in result.axes or x not in result.axes or x == y:
        raise UsageError(f"the heat map needs the axes {y!r} and {x!r}; the result has {result.axes}")
    rows, cols = len(result.coords[y]), len(result.coords[x])
    if max(rows, cols) > MOST or not rows or not cols:
        raise UsageError(
            f"{rows} x {cols} cells for a figure that shows 1 to {MOST} along each side; average or select a part first"
        )
