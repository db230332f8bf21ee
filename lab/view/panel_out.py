"""A Panel -> one matplotlib picture or one plotly page."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Picture
from plotly.subplots import make_subplots

from lab.view.facets import Panel
from lab.view.matplotlib_out import curves, styled
from lab.view.pictures import write_picture
from lab.view.plotly_out import Figure, add_curves
from lab.view.specs import FigureSpec, wrapped

CELL = (2.5, 1.75)  # inches


def save_panel(panel: Panel, path: str | Path) -> Path:
    """Writes .png, .svg or .pdf (matplotlib) or .html (plotly, no network)."""
    return write_picture(
        path, draw=lambda: panel_matplotlib(panel), page=lambda: panel_plotly(panel), title=panel.title
    )


def panel_matplotlib(panel: Panel) -> Picture:
    """The grid as matplotlib draws it."""
    n_rows, n_columns = panel.shape
    with styled():
        fig = Picture(figsize=(CELL[0] * n_columns + 2.2, CELL[1] * n_rows + 1.2), layout="constrained")
        FigureCanvasAgg(fig)
        axes = fig.subplots(n_rows, n_columns, squeeze=False, sharex=True)
        for r, row in enumerate(panel.cells):
            for c, spec in enumerate(row):
                _cell(axes[r, c], panel, spec, r, c)
        fig.suptitle(panel.title, x=0.01, ha="left", fontsize=12)
        fig.supylabel(panel.unit, fontsize=9)
        fig.supxlabel(
            wrapped(panel.caption, int(fig.get_figwidth() * 14)),
            fontsize=8,
            color="#555555",
            x=0.01,
            ha="left",
        )
        return fig


def _cell(ax: Axes, panel: Panel, spec: FigureSpec, r: int, c: int) -> None:
    n_rows, n_columns = panel.shape
    curves(ax, spec, size=3.0)
    ax.set_xticks(*spec.x_ticks(8))
    ax.tick_params(labelsize=7)
    if r == 0:
        ax.set_title(panel.columns[c], fontsize=9)
    if r == n_rows - 1:
        ax.set_xlabel(spec.x_label, fontsize=8)
    if c == 0:
        ax.set_ylabel(panel.rows[r], fontsize=8)
    else:
        ax.tick_params(labelleft=False)
    if c == n_columns - 1:
        ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0, fontsize=7)


def panel_plotly(panel: Panel) -> Figure:
    """The grid as plotly draws it: a click on a curve's name hides it in its whole row."""
    n_rows, n_columns = panel.shape
    grid = make_subplots(
        n_rows, n_columns, shared_xaxes=True, shared_yaxes=True, row_titles=list(panel.rows),
        column_titles=[wrapped(c, 18).replace("\n", "<br>") for c in panel.columns],
        horizontal_spacing=0.015, vertical_spacing=0.04,
    )  # fmt: skip
    fig = Figure(grid)
    for r, row in enumerate(panel.cells):
        for c, spec in enumerate(row):
            add_curves(fig, spec, row=r + 1, col=c + 1, group=panel.rows[r], legend=c == 0)
            fig.update_yaxes(
                range=spec.limits, zeroline=False, gridcolor="rgba(128,128,128,0.25)", row=r + 1, col=c + 1
            )
            at, words = spec.x_ticks(8)
            fig.update_xaxes(
                tickvals=at, ticktext=words, showgrid=False, zeroline=False, row=r + 1, col=c + 1
            )
    for c, spec in enumerate(panel.cells[-1]):
        fig.update_xaxes(title=spec.x_label, row=n_rows, col=c + 1)
    for r in range(n_rows):
        fig.update_yaxes(title={"text": panel.unit, "font": {"size": 11}}, row=r + 1, col=1)
    fig.update_layout(
        template="none", title={"text": panel.title, "x": 0, "xref": "paper"}, height=190 * n_rows + 160, hovermode="closest",
        legend={"tracegroupgap": 14, "font": {"size": 12}}, margin={"l": 75, "r": 20, "t": 90, "b": 60},
        font={"family": "system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif", "color": "#1d2126"},
    )  # fmt: skip
    fig.update_annotations(font_size=12)  # headings of rows and columns
    return fig
