"""LiveFigure: a plotly figure in the notebook, drawn by plotly.js itself from what the kernel sends.

plotly's own FigureWidget is not used. Each one carries 5 MB of script, and where loading that takes a browser more than
2 s, anywidget drops every later message to it: the figure stays blank. Here plotly.js goes to the page once, in a
widget of its own that all figures name, and a figure's script is a few kB.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import anywidget
import plotly.graph_objects as go
from ipywidgets import widget_serialization
from plotly.offline import get_plotlyjs
from plotly.utils import PlotlyJSONEncoder
from traitlets import Bytes, Instance, Unicode

from lab.errors import UsageError
from lab.view.plotly_out import CONFIG
from lab.view.view import asset

Theme = Literal["auto", "light", "dark"]
PAPER = {
    "light": ("#ffffff", "#1d2126"),
    "dark": ("#16191d", "#e8eaed"),
}  # paper and text; live.js does "auto"
Clicked = Callable[[int, Any], None]  # number of the trace, and of the point in it


class PlotlySource(anywidget.AnyWidget):
    """plotly.js for a page; it shows nothing."""

    _esm = "export default { render() {} };"
    source = Bytes(b"").tag(sync=True)


class LiveFigure(anywidget.AnyWidget):
    """A plotly figure; `become` draws another one in its place, `outline` only other shapes.

    clicked  called with the number of the trace and of the point ((row, column) in a heat map) that was clicked
    """

    _esm = asset("live.js")
    _css = asset("live.css")
    library = Instance(PlotlySource).tag(sync=True, **widget_serialization)
    drawing = Unicode("").tag(sync=True)
    shapes = Unicode("[]").tag(sync=True)
    config = Unicode("").tag(sync=True)
    theme = Unicode("auto").tag(sync=True)
    alt = Unicode("").tag(sync=True)

    def __init__(self, figure: go.Figure, clicked: Clicked, *, theme: Theme, alt: str = "") -> None:
        # all in the first message: what is shown does not wait for a second one
        super().__init__(
            library=_library(), drawing=figure.to_json(), config=json.dumps(CONFIG), theme=theme, alt=alt
        )
        self._clicked = clicked
        self.on_msg(self._heard)

    def become(self, figure: go.Figure, alt: str) -> None:
        """Draw another figure; what the reader has zoomed stays."""
        with self.hold_sync():
            self.drawing, self.alt = str(figure.to_json()), alt

    def outline(self, shapes: Sequence[Mapping[str, Any]]) -> None:
        """Draw these shapes above the figure's own."""
        self.shapes = json.dumps(list(shapes), cls=PlotlyJSONEncoder)

    def _heard(self, _: Any, content: Any, buffers: Any) -> None:
        if isinstance(content, dict) and content.get("do") == "click" and content.get("part") != "node":
            point = content.get("point")
            self._clicked(int(content["trace"]), tuple(point) if isinstance(point, list) else point)


_SOURCES: list[PlotlySource] = []


def _library() -> PlotlySource:
    """The one widget that holds plotly.js; another one once it was closed."""
    if not _SOURCES or _SOURCES[-1].comm is None:
        _SOURCES[:] = [PlotlySource(source=get_plotlyjs().encode())]
    return _SOURCES[-1]


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
