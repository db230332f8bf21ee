"""The door of this room: a Result in, a picture out. Knows no model; every figure redraws from a saved Result.

show(result)                      plotly figure for a notebook
save(result, "flow.pdf")          .png .svg .pdf (matplotlib, same bytes each time) or .html (plotly, no network)
report([a, b], "report.html", title="...")
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lab.errors import UsageError
from lab.result import Result
from lab.view.facets import Panel, panel
from lab.view.matplotlib_out import SUFFIXES, save_image, to_matplotlib
from lab.view.pages import Answer, report
from lab.view.panel_out import panel_plotly
from lab.view.plotly_out import CONFIG, Figure, to_plotly
from lab.view.specs import FigureSpec, figure_spec, share_limits

__all__ = [
    "CONFIG", "Answer", "FigureSpec", "figure_spec", "panel", "report", "save", "share_limits", "show", "to_matplotlib", "to_plotly",
]  # fmt: skip


def show(what: Result | FigureSpec | Panel, **options: Any) -> Figure:
    """The plotly figure of a Result; options as in `figure_spec`. A notebook shows it when it ends a cell."""
    return panel_plotly(what) if isinstance(what, Panel) else to_plotly(_spec(what, options))


def save(what: Result | FigureSpec, path: str | Path, **options: Any) -> Path:
    """Writes a picture, choosing by the suffix of `path`: .png, .svg, .pdf or .html. Options as in `figure_spec`."""
    spec, path = _spec(what, options), Path(path)
    if path.suffix.lower() in SUFFIXES:
        return save_image(spec, path)
    if path.suffix.lower() == ".html":
        return report(spec, path, title=spec.title)
    raise UsageError(f"cannot tell the format of {path}; end its name in {', '.join(SUFFIXES)} or .html")


def _spec(what: Result | FigureSpec, options: dict[str, Any]) -> FigureSpec:
    if isinstance(what, FigureSpec):
        if options:
            raise UsageError(
                f"{', '.join(options)} belong to figure_spec(result, ...); this figure is made already"
            )
        return what
    return figure_spec(what, **options)
