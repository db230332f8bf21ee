"""Three figures of one kind side by side (A, B, A - B), in plotly and in matplotlib."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Picture
from plotly.subplots import make_subplots

from lab.view.matplotlib_out import curves, draw_cells, name_places, styled
from lab.view.plotly_out import Figure, _safe, _scale, add_curves
from lab.view.specs import FigureSpec, text, wrapped

SPACE = 0.055


def row_plotly(specs: Sequence[FigureSpec], title: str) -> Figure:
    """Zooming one zooms all; heat maps of one scale share a colour bar."""
    n = len(specs)
    grid = make_subplots(1, n, shared_yaxes=True, column_titles=[_safe(s.title) for s in specs], horizontal_spacing=SPACE)  # fmt: skip
    fig = Figure(grid)
    for i, spec in enumerate(specs):
        if spec.kind == "heat":
            fig.add_trace(_heat(spec, i, specs), row=1, col=i + 1)
        else:
            add_curves(fig, spec, row=1, col=i + 1, group="", legend=i == 0)
            fig.update_yaxes(range=spec.limits, zeroline=False, gridcolor="rgba(128,128,128,0.25)")
        at, words = spec.x_ticks(8)
        fig.update_xaxes(title=_safe(spec.x_label), tickvals=at, ticktext=[_safe(w) for w in words], showgrid=False, zeroline=False, matches="x", row=1, col=i + 1)  # fmt: skip
    _y_axis(fig, specs[0])
    fig.update_layout(
        template="none", title={"text": _safe(title), "x": 0, "xref": "paper", "font": {"size": 16}}, hovermode="closest",
        paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)", margin={"l": 80, "r": 20, "t": 84, "b": 60},
        height=int(np.clip(190 + 22 * len(specs[0].series), 320, 760)) if specs[0].kind == "heat" else 400,
        font={"family": "system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif", "color": "#1d2126"},
    )  # fmt: skip
    return fig


def row_matplotlib(specs: Sequence[FigureSpec], title: str, caption: str) -> Picture:
    """The same for paper."""
    with styled():
        tall = float(np.clip(1.8 + 0.24 * len(specs[0].series), 3.0, 9.0)) if specs[0].kind == "heat" else 3.6
        fig = Picture(figsize=(4.0 * len(specs), tall), layout="constrained")
        FigureCanvasAgg(fig)
        panels = fig.subplots(1, len(specs), squeeze=False, sharey=specs[0].kind != "heat")[0]
        for i, (ax, spec) in enumerate(zip(panels, specs, strict=True)):
            if spec.kind == "heat":
                draw_cells(ax, spec, bar=_ends_scale(i, specs))
            else:
                curves(ax, spec)
            name_places(ax, spec, 8)
            ax.set_title(spec.title)
        panels[0].set_ylabel(specs[0].y_label)
        if specs[0].kind != "heat":
            panels[-1].legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0)
        fig.suptitle(wrapped(title, 40 * len(specs)), x=0.01, ha="left", fontsize=12)
        fig.supxlabel(wrapped(caption, 60 * len(specs)), fontsize=8, color="#555555", x=0.01, ha="left")
        return fig


def _ends_scale(i: int, specs: Sequence[FigureSpec]) -> bool:
    """Whether the next figure has another colour scale, or there is none."""
    return i == len(specs) - 1 or specs[i + 1].limits != specs[i].limits


def _heat(spec: FigureSpec, i: int, specs: Sequence[FigureSpec]) -> go.Heatmap:
    """One colour bar for neighbours of one scale, on the right of the last of them."""
    lo, hi = spec.limits or (0.0, 1.0)
    end = (1 - SPACE * (len(specs) - 1)) / len(specs) * (i + 1) + SPACE * i
    where = f"{_safe(spec.y_label)} %{{customdata[0]}}, {_safe(spec.x_label)} %{{customdata[1]}}"
    return go.Heatmap(
        z=spec.masked(), x=list(range(len(spec.x))), y=list(range(len(spec.series))), zmin=lo, zmax=hi, colorscale=_scale(spec),
        customdata=np.array([[[_safe(y), _safe(text(x))] for x in spec.x] for y in spec.series], dtype=object), hoverongaps=False,
        hovertemplate=f"{where}: <b>%{{z:.4g}}</b><extra>{_safe(spec.title)}</extra>", showscale=_ends_scale(i, specs), name=_safe(spec.title),
        colorbar={"title": {"text": _safe(spec.unit), "side": "right"}, "thickness": 10, "x": end, "xpad": 4},
    )  # fmt: skip


def _y_axis(fig: Figure, spec: FigureSpec) -> None:
    if spec.kind != "heat":
        fig.update_yaxes(title=_safe(spec.y_label), row=1, col=1)
        return
    every = max(1, -(-len(spec.series) // 24))
    names = [_safe(s) for s in spec.series]
    fig.update_yaxes(
        tickvals=list(range(len(names)))[::every], ticktext=names[::every], showgrid=False, zeroline=False,
        autorange=True if spec.y_up else "reversed",
    )  # fmt: skip
    fig.update_yaxes(title=_safe(spec.y_label), row=1, col=1)
