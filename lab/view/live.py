"""LiveView: a view whose widget is one plotly figure with controls above, words below, and an export line.

The controls *are* the state: `settings()` reads them, the static twin draws by them, and a test sets them.
A view says what it shows (`spec` or `picture`), what a click means (`clicked`) and what is outlined (`outlines`).
"""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ipywidgets as W
import plotly.graph_objects as go
from traitlets import TraitError

from lab.errors import ConfigError, LabError, UsageError
from lab.view.live_figure import LiveFigure, Theme, check_theme, themed
from lab.view.plotly_out import to_plotly
from lab.view.selection import NAMES, Selection
from lab.view.view import CONFIGS, DATA, PICTURES, View

SUFFIXES = (*PICTURES, *DATA, CONFIGS[0])


class LiveView(View):
    """A view on a `LiveFigure`.

    theme    "auto" follows JupyterLab's theme; "light" and "dark" stay what they are
    css      class of the widget's root
    follows  fields of the selection that change the numbers shown; the others only move outlines
    """

    css = ""
    follows: tuple[str, ...] = ()

    def __init__(self, selection: Selection | None, theme: str) -> None:
        super().__init__(selection)
        self.theme: Theme = check_theme(theme)
        self.controls: dict[str, Any] = {}
        self._live: LiveFigure | None = None
        self._note = W.HTML()
        self._note.add_class("vl-note")

    # ---- what a view says -----------------------------------------------------------------------------------------

    def picture(self) -> go.Figure:
        """The plotly figure, without outlines and theme."""
        return to_plotly(self.spec())

    def words(self) -> str:
        """What stands below the figure."""
        spec = self.spec()
        return " ".join(w for w in (spec.reading, spec.caption) if w)

    def alt(self) -> str:
        """The figure in words, for those who do not see it."""
        return self.spec().alt

    def clicked(self, trace: int, point: Any) -> None:
        """A click on a point of a trace: its index, (row, column) in a heat map."""

    def outlines(self) -> list[dict[str, Any]]:
        """plotly shapes round what is selected."""
        return []

    def extras(self) -> Sequence[W.Widget]:
        """Widgets beside the controls: buttons, pickers."""
        return ()

    # ---- controls -------------------------------------------------------------------------------------------------

    def control(self, name: str, widget: Any) -> Any:
        """Take a widget in as a setting of this name: a change redraws."""
        self.controls[name] = widget
        widget.style.description_width = "initial"  # whole words, not "Layer gro..."
        widget.observe(lambda _: self.guarded(self.refresh), "value")
        return widget

    def settings(self) -> dict[str, Any]:
        """The values of the controls."""
        return {name: w.value for name, w in self.controls.items()}

    def _set(self, settings: Mapping[str, Any]) -> None:
        for name in settings:
            if name not in self.controls:
                known = ", ".join(self.controls) or "none"
                raise ConfigError(f"{type(self).__name__} has no setting {name!r}; it has {known}")
        for name, value in settings.items():
            try:
                self.controls[name].value = value
            except (TraitError, TypeError, ValueError) as e:
                raise ConfigError(f"settings.{name}: {' '.join(str(e).split())}") from None

    # ---- drawing --------------------------------------------------------------------------------------------------

    def figure(self) -> go.Figure:
        """The figure without a kernel, with what is selected outlined."""
        figure = themed(self.picture(), self.theme)
        layout: Any = figure.layout
        figure.update_layout(shapes=[*layout.shapes, *self.outlines()])
        return figure

    def refresh(self) -> None:
        """Draw what is to be shown now, sending only what differs; nothing happens before there is a widget."""
        if self._live is not None:
            self._live.become(themed(self.picture(), self.theme), self.alt())
            self._outline()
            self._say(self.words())

    def guarded(self, act: Callable[[], Any]) -> None:
        """Do something for the reader; what goes wrong is said below the figure (errors in callbacks vanish otherwise)."""
        try:
            act()
        except LabError as e:
            self._say(str(e), wrong=True)
        except Exception as e:
            self._say(f"{type(e).__name__}: {e}", wrong=True)

    def _say(self, words: str, *, wrong: bool = False) -> None:
        kind = "vl-wrong" if wrong else "vl-said"
        self._note.value = (
            f'<div class="{kind}" role="{"alert" if wrong else "note"}">{html.escape(words)}</div>'
        )

    @property
    def message(self) -> str:
        """What stands below the figure now, as HTML."""
        return str(self._note.value)

    def _make_widget(self) -> W.DOMWidget:
        live = self._live = LiveFigure(
            themed(self.picture(), self.theme), lambda t, p: self.guarded(lambda: self.clicked(t, p)), theme=self.theme,
            alt=self.alt(),
        )  # fmt: skip
        self._outline()
        self.selection.observe(self._selected, list(NAMES))
        above = W.HBox(
            [*self._shown_controls(), *self.extras()],
            layout=W.Layout(flex_flow="row wrap", grid_gap="4px 12px"),
        )
        box = W.VBox([above, live, self._note, export_line(self)])
        for name in ("vl-view", f"vl-{self.theme}", self.css):
            box.add_class(name)
        self._say(self.words())
        return box

    def _shown_controls(self) -> list[Any]:
        return [w for w in self.controls.values() if w.layout.display != "none"]

    def _selected(self, change: Any) -> None:
        self.guarded(self.refresh if change["name"] in self.follows else self._outline)

    def _outline(self) -> None:
        if self._live is not None:
            self._live.outline(self.outlines())


def export_line(view: LiveView) -> W.HBox:
    """A file name and a button: figure, data or config, by the suffix."""
    name = W.Text(
        f"out/{view.css}.svg", description="Export to", layout=W.Layout(width="260px"),
        tooltip=f"the suffix says what: {' '.join(SUFFIXES)}",
    )  # fmt: skip
    button, said = W.Button(description="Export"), W.HTML()
    name.add_class("vl-export-name")
    button.add_class("vl-export")
    said.add_class("vl-note")

    def write(_: Any) -> None:
        def act() -> None:
            if not name.value.strip():
                raise UsageError("name a file to export to, such as out/figure.svg")
            said.value = f"wrote {html.escape(str(view.export(Path(name.value.strip()))))}"

        said.value = ""
        view.guarded(act)

    button.on_click(write)
    return W.HBox([name, button, said])
