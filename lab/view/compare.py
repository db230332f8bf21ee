"""compare(a, b): two Results (or views) of one kind as A, B and A - B, on one scale centred on 0, with what differs in
their recipes."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ipywidgets as W
import numpy as np

from lab.errors import UsageError
from lab.result import Result
from lab.view.averages import mean_all
from lab.view.choices import chosen, index_of
from lab.view.heat_view import MOST, cell_outline
from lab.view.live import LiveView
from lab.view.pictures import write_picture
from lab.view.plotly_out import Figure
from lab.view.selection import Selection
from lab.view.side_by_side import row_matplotlib, row_plotly
from lab.view.specs import AVERAGED, FigureSpec, figure_spec, kind_of
from lab.view.view import View

SHARED, OWN = "one for all", "own for A − B"
ABSENT = "(not there)"


def compare(
    a: Result | View, b: Result | View, *, names: tuple[str, str] = ("A", "B"), selection: Selection | None = None,
    theme: str = "auto",
) -> Comparison:  # fmt: skip
    """A, B and A - B of two Results with the same axes, coordinates and unit; of views, what they show.

    Raises UsageError where they do not fit, saying in what.
    """
    given = [v.result() if isinstance(v, View) else v for v in (a, b)]
    linked = selection or next((v.selection for v in (a, b) if isinstance(v, View)), None)
    return Comparison(given[0], given[1], names=names, selection=linked, theme=theme)


class Comparison(LiveView):
    """Three panels whose zoom and selection are linked; the button swaps A and B. Made by `compare`."""

    css = "vl-compare"

    def __init__(
        self, a: Result, b: Result, *, names: tuple[str, str], selection: Selection | None, theme: str
    ) -> None:
        super().__init__(selection, theme)
        _check(a, b)
        self.a, self.b, self.names = a, b, names
        self.scale = self.control("scale", W.Dropdown(options=[SHARED, OWN], description="Scale"))
        self.swapped = self.control("swapped", W.ToggleButton(False, description="Swap A and B"))
        self.scale.add_class("vl-scale")
        self.swapped.add_class("vl-swap")
        self._recipes = W.HTML()

    # ---- numbers --------------------------------------------------------------------------------------------------

    def sides(self) -> tuple[tuple[str, Result], tuple[str, Result]]:
        """(name, Result) of left and right, as swapped."""
        pair = ((self.names[0], self.a), (self.names[1], self.b))
        return (pair[1], pair[0]) if self.swapped.value else pair

    def difference(self) -> Result:
        """Left minus right. Items and seeds are paired: an interval is one of the difference."""
        (name_a, a), (name_b, b) = self.sides()
        values = a.values.astype(float) - b.values.astype(float)
        return replace(a, values=values, low=None, high=None, baseline=0.0, name=f"{name_a} - {name_b}", recipe={})  # fmt: skip

    def result(self) -> Result:
        """All three, axis run in front; recipe: those of both."""
        (name_a, a), (name_b, b) = self.sides()
        parts = [mean_all(r) for r in (a, b, self.difference())]
        bounded = all(p.low is not None for p in parts)
        low, high = (np.stack([getattr(p, n) for p in parts]) if bounded else None for n in ("low", "high"))
        axes = ("run", *parts[0].axes)
        coords = {"run": [name_a, name_b, f"{name_a} - {name_b}"], **parts[0].coords}
        return Result(
            np.stack([p.values for p in parts]), axes, coords, a.unit, {"a": a.recipe, "b": b.recipe},
            f"{a.name or 'comparison'}", low=low, high=high, baseline=0.0, notes={"n": parts[0].notes.get("n", {})},
        )  # fmt: skip

    def differences(self) -> list[tuple[str, Any, Any]]:
        """(where, in A, in B) for everything in which the two recipes differ."""
        left, right = (_flat(r.recipe) for _, r in self.sides())
        places = [p for p in {**left, **right} if left.get(p, ABSENT) != right.get(p, ABSENT)]
        return [(p, left.get(p, ABSENT), right.get(p, ABSENT)) for p in places]

    # ---- figures --------------------------------------------------------------------------------------------------

    def specs(self) -> list[FigureSpec]:
        """A, B and A - B; heat maps and heights on one scale centred on 0 unless the difference has its own."""
        (name_a, a), (name_b, b) = self.sides()
        parts = [mean_all(r) for r in (a, b, self.difference())]
        kind = "lines" if kind_of(parts[0]) == "lines" else "heat"
        specs = [
            figure_spec(replace(r, baseline=0.0), kind=kind, title=name)
            for r, name in zip(parts, (name_a, name_b, f"{name_a} − {name_b}"), strict=True)
        ]
        halves = [_half(s) for s in specs]
        if self.scale.value == SHARED:
            halves = [max(halves)] * 3
        else:
            halves[:2] = [max(halves[:2])] * 2
        return [
            replace(s, limits=(-h, h), diverging=True, reference=0.0)
            for s, h in zip(specs, halves, strict=True)
        ]

    def picture(self) -> Figure:
        """The three panels."""
        return row_plotly(self.specs(), self._title())

    def alt(self) -> str:
        """The three panels in words."""
        return " ".join(s.alt for s in self.specs())

    def words(self) -> str:
        """What the difference says most, and over what the means are."""
        last = self.specs()[-1]
        return f"{last.title}: {last.reading} {last.caption}".strip()

    def clicked(self, trace: int, point: Any) -> None:
        """Select what the cell (or the place along x) stands for."""
        r = mean_all(self.a)
        if isinstance(point, int):
            at = {r.axes[-1]: r.coords[r.axes[-1]][point]}
        else:
            at = {axis: r.coords[axis][int(i)] for axis, i in zip(r.axes, point, strict=True)}
        self.selection.set(**chosen(at))

    def outlines(self) -> list[dict[str, Any]]:
        """The selected cell in all three panels."""
        r = mean_all(self.a)
        if kind_of(r) == "lines" or len(r.axes) != 2:
            return []
        row, col = (index_of(a, r.coords[a], self.selection) for a in r.axes)
        if row is None and col is None:
            return []
        shape = cell_outline(row, col, *r.shape)
        return [{**shape, "xref": f"x{i}", "yref": f"y{i}"} for i in ("", "2", "3")]

    def refresh(self) -> None:
        """The panels, and the table of what differs."""
        super().refresh()
        self._recipes.value = self._table()

    def _make_widget(self) -> W.DOMWidget:
        box: Any = super()._make_widget()
        self._recipes.value = self._table()
        box.children = [*box.children, self._recipes]
        return box

    def _title(self) -> str:
        return f"{self.a.name or 'Comparison'}: {self.a.unit}"

    def _table(self) -> str:
        rows = self.differences()
        if not rows:
            return "<p class='vl-note'>The recipes do not differ.</p>"
        names = [n for n, _ in self.sides()]
        head = "".join(f"<th scope='col'>{html.escape(str(c))}</th>" for c in ("recipe", *names))
        body = "".join(f"<tr>{''.join(f'<td>{html.escape(str(c))}</td>' for c in row)}</tr>" for row in rows)
        return f"<table class='vl-diff'><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    def _save_picture(self, path: Path) -> Path:
        return write_picture(
            path, draw=lambda: row_matplotlib(self.specs(), self._title(), self.words()), page=self.picture,
            title=self._title(),
        )  # fmt: skip


def _check(a: Result, b: Result) -> None:
    if a.axes != b.axes or a.unit != b.unit:
        raise UsageError(
            f"cannot compare {a.axes} in {a.unit!r} with {b.axes} in {b.unit!r}; both must be the same"
        )
    for axis in a.axes:
        left, right = a.coords[axis], b.coords[axis]
        if left != right:
            raise UsageError(
                f"along {axis} the first has {len(left)} coordinates {left[:4]}, the second {len(right)} {right[:4]}; "
                f"select(...) those that both have"
            )
    shown = [n for axis, n in zip(a.axes, a.shape, strict=True) if axis not in AVERAGED]
    if not 1 <= len(shown) <= 2 or not all(a.shape) or max(shown) > MOST:
        raise UsageError(
            f"two Results are compared along one or two axes of 1 to {MOST} coordinates, these have {a.axes} of {a.shape}; "
            "select or average first"
        )


def _half(spec: FigureSpec) -> float:
    ends = [a for a in (spec.values, spec.low, spec.high) if a is not None]
    known = np.concatenate([np.abs(a[np.isfinite(a.astype(float))]).ravel() for a in ends])
    return float(known.max(initial=0.0)) or 1.0


def _flat(value: Any, where: str = "") -> dict[str, Any]:
    """Nested plain data as one mapping, "items.0.question" -> value."""
    if isinstance(value, Mapping) and value:
        parts = value.items()
    elif isinstance(value, list) and value:
        parts = enumerate(value)
    else:
        return {where: value} if where else {}
    return {
        k: v for key, part in parts for k, v in _flat(part, f"{where}.{key}" if where else str(key)).items()
    }
