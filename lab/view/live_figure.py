"""LiveFigure: a plotly figure in the notebook that turns into another one by sending only what differs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast, get_args

import numpy as np
import plotly.graph_objects as go

from lab.errors import UsageError
from lab.view.plotly_out import CONFIG
from lab.view.view import asset

Theme = Literal["auto", "light", "dark"]
PAPER = {
    "light": ("#ffffff", "#1d2126"),
    "dark": ("#16191d", "#e8eaed"),
}  # paper and text; "auto" is left to live.css
Clicked = Callable[[int, Any], None]  # index of the trace, and of the point in it


class LiveFigure(go.FigureWidget):
    """plotly's FigureWidget without its upload button. `clicked` hears of clicks; `become` changes what is drawn."""

    _css = asset("live.css")

    def __init__(self, figure: go.Figure, clicked: Clicked) -> None:
        super().__init__(figure)
        self._drawn = cast("dict[str, Any]", figure.to_plotly_json())
        self._clicked = clicked
        self._listen()
        if hasattr(self, "_config"):  # private, and the only way to leave the upload button out
            self._config = {**CONFIG, "displayModeBar": False}

    def become(self, figure: go.Figure) -> None:
        """Draw another figure. What the reader has zoomed stays, unless that part of the layout differs."""
        was, now = self._drawn, cast("dict[str, Any]", figure.to_plotly_json())
        kinds = [[t["type"] for t in f["data"]] for f in (was, now)]
        with self.batch_update():
            if kinds[0] == kinds[1]:
                for trace, old, new in zip(self.data, was["data"], now["data"], strict=True):
                    _change(trace, old, new)
            _change(self.layout, was["layout"], now["layout"])
        if kinds[0] != kinds[1]:
            self.data = ()
            self.add_traces(figure.data)
            self._listen()
        self._drawn = now

    def outline(self, shapes: Sequence[Mapping[str, Any]]) -> None:
        """Draw only these shapes anew (what is selected), beside everything else."""
        wanted = [dict(s) for s in shapes]
        if not _same(self._drawn["layout"].get("shapes", []), wanted):
            self.layout.shapes = wanted
            self._drawn["layout"]["shapes"] = wanted

    def _listen(self) -> None:
        for i, trace in enumerate(self.data):
            trace.on_click(lambda _, points, __, i=i: [self._clicked(i, p) for p in points.point_inds])


def check_theme(theme: str) -> Theme:
    """Raises UsageError for a theme there is not."""
    if theme not in get_args(Theme):
        raise UsageError(f"no theme {theme!r}; use {', '.join(get_args(Theme))}")
    return theme  # type: ignore[return-value]


def themed(figure: go.Figure, theme: Theme) -> go.Figure:
    """The figure on light or dark paper; "auto": see-through, for the page's own."""
    if theme != "auto":
        paper, words = PAPER[theme]
        figure.update_layout(paper_bgcolor=paper, plot_bgcolor=paper, font_color=words)
    return figure


def _change(part: Any, was: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Set what differs between two plain descriptions of a trace or layout."""
    for key in {**was, **now}:
        if key not in ("type", "uid") and not _same(was.get(key), now.get(key)):
            part[key] = now.get(key)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        x, y = np.asarray(a), np.asarray(b)
        return x.shape == y.shape and bool(((x == y) | ((x != x) & (y != y))).all())
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)
