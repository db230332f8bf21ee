"""FigureSpec -> plotly figure, for notebooks and web pages. Draws what the FigureSpec says and computes nothing new."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import plotly.graph_objects as go
import plotly.io as pio
from numpy.typing import NDArray
from PIL import Image

from lab.view.palette import anchors, grey, rgb, rgba_scale, stroke
from lab.view.specs import FigureSpec, Mark, mosaic, text

# No upload button, no logo. Names that a plotly release does not know are ignored by it.
CONFIG: dict[str, Any] = {
    "displaylogo": False,
    "displayModeBar": "hover",
    "responsive": True,
    "plotlyServerURL": "",
    "showSendToCloud": False,
    "modeBarButtonsToRemove": ["sendChartToCloud", "sendDataToCloud", "select2d", "lasso2d", "autoScale2d"],
}
PATTERNS = ("", "/", "x", ".")  # bars stay apart without colour
BOTH_THEMES = (
    "#747a80"  # text that stands out against JupyterLab's white and its dark background alike (4.3 : 1)
)
THUMBNAIL = 240  # pixels of the longer side of a frame below a strip


class Figure(go.Figure):
    """A plotly figure that shows itself without plotly's upload button and without loading anything from the network."""

    def show(self, *args: Any, **kwargs: Any) -> None:
        # a copy: plotly takes entries out of the config it is given
        super().show(*args, **{"config": dict(CONFIG), **kwargs})

    def to_html(self, *args: Any, **kwargs: Any) -> str:
        return str(super().to_html(*args, **{"config": dict(CONFIG), **kwargs}))

    def write_html(self, *args: Any, **kwargs: Any) -> None:
        super().write_html(*args, **{"config": dict(CONFIG), **kwargs})

    def _ipython_display_(self) -> None:  # a figure that ends a notebook cell
        if pio.renderers.render_on_display and pio.renderers.default:
            Figure(self).update_layout(font_color=BOTH_THEMES).show()
        else:
            print(repr(self))

    def _repr_html_(self) -> str:  # hosts that are no notebook; plotly's own would load plotly.js from a CDN
        return self.to_html(full_html=False, include_plotlyjs=True)


def to_plotly(spec: FigureSpec) -> Figure:
    """The figure as plotly draws it."""
    fig = Figure()
    draw = {
        "lines": _lines, "bars": _bars, "barh": _barh, "heat": _heat, "strip": _strip, "table": _table, "graph": _graph,
    }  # fmt: skip
    draw[spec.kind](fig, spec)
    fig.update_layout(
        template="none",
        title={"text": _safe(spec.title), "x": 0, "xref": "paper", "font": {"size": 16}},
        margin={"l": 8 if spec.kind == "strip" else 70, "r": 20, "t": 54, "b": 60},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        hovermode="x unified" if spec.kind == "lines" else "closest",
        font={"family": "system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif", "color": "#1d2126"},
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": "#8a939c", "activecolor": "#0b62a4"},
        meta={"recipe": spec.recipe_id, "unit": spec.unit},
    )
    return fig


def picture_uri(pixels: NDArray[np.uint8], longest: int = THUMBNAIL) -> str:
    """A picture uint8 [height, width, 3] as a JPEG data URI, shrunk so that its longer side is at most `longest`."""
    image = Image.fromarray(np.ascontiguousarray(pixels), "RGB")
    scale = longest / max(image.size)
    if scale < 1:
        image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    elif scale >= 2:  # tiny simulated frames: whole-number enlargement keeps their pixels sharp
        image = image.resize((image.width * int(scale), image.height * int(scale)), Image.Resampling.NEAREST)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


def _lines(fig: Figure, spec: FigureSpec) -> None:
    x, values = spec.x_numbers(), spec.masked()
    for i, name in enumerate(spec.series):
        if spec.low is not None and spec.high is not None:
            fig.add_trace(_band(x, spec.low[i], spec.high[i], i))
        fig.add_trace(_curve(spec, x, values[i], i, name))
    if spec.reference is not None:
        fig.add_hline(y=spec.reference, line={"color": "#888", "width": 1, "dash": "dot"})
    _x_axis(fig, spec)
    _logarithmic(fig, spec)
    if not any(isinstance(c, str) for c in spec.x):
        fig.update_xaxes(unifiedhovertitle={"text": f"{_safe(spec.x_label)} %{{x}}"})
    for mark in spec.marks:
        _mark(fig, mark)
    _value_axis(fig, spec)


def _bars(fig: Figure, spec: FigureSpec) -> None:
    x, values = spec.x_numbers(), spec.masked()
    for i, name in enumerate(spec.series):
        bounds = None
        if spec.low is not None and spec.high is not None:
            bounds = {
                "array": spec.high[i] - values[i],
                "arrayminus": values[i] - spec.low[i],
                "thickness": 1.4,
                "color": "#888888",
            }
        fig.add_trace(go.Bar(
            x=x, y=values[i], name=_safe(name), error_y=bounds, hovertemplate=f"<b>%{{y:.4g}}</b><extra>{_safe(name)}</extra>",
            marker={"color": stroke(i).colour, "pattern": _pattern(i)},
        ))  # fmt: skip
    _x_axis(fig, spec)
    _value_axis(fig, spec)


def _pattern(i: int) -> dict[str, Any]:
    return {"shape": PATTERNS[i % len(PATTERNS)], "fillmode": "overlay", "fgcolor": "#ffffff", "fgopacity": 0.7, "size": 7}  # fmt: skip


def _value_axis(fig: Figure, spec: FigureSpec) -> None:
    """The axis of the values, and the legend below, of lines and bars."""
    fig.update_yaxes(
        title=_safe(spec.y_label), range=spec.limits, zeroline=False, gridcolor="rgba(128,128,128,0.25)"
    )
    legend = {"orientation": "h", "x": 0, "y": -0.2, "yanchor": "top", "font": {"size": 13}, "itemwidth": 40}
    fig.update_layout(height=430, showlegend=len(spec.series) > 1, legend=legend)


def _mark(fig: Figure, mark: Mark) -> None:
    if mark.line:
        fig.add_vline(x=mark.x, line={"color": "#888", "width": 1.2, "dash": "dash"})
        fig.add_annotation(x=mark.x, y=1, yref="paper", text=_safe(mark.text), showarrow=False, xanchor="left", yanchor="top", font={"size": 11})  # fmt: skip
        return
    fig.add_annotation(
        x=mark.x, y=0, yref="paper", text="\u25bc", hovertext=_safe(mark.text), showarrow=False, yanchor="bottom",
        font={"size": 11, "color": "#8c8c8c"},
    )  # fmt: skip


def add_curves(fig: Figure, spec: FigureSpec, *, row: int, col: int, group: str, legend: bool) -> None:
    """The curves of a line figure as one cell of a grid; curves of one `group` and name share their legend entry."""
    x, values = spec.x_numbers(), spec.masked()
    for i, name in enumerate(spec.series):
        entry = f"{group}/{name}"
        if spec.low is not None and spec.high is not None:
            fig.add_trace(_band(x, spec.low[i], spec.high[i], i).update(legendgroup=entry), row=row, col=col)
        curve = _curve(spec, x, values[i], i, name).update(legendgroup=entry, showlegend=legend)
        fig.add_trace(curve, row=row, col=col)
    if spec.reference is not None:
        fig.add_hline(y=spec.reference, line={"color": "#888", "width": 1, "dash": "dot"}, row=row, col=col)  # type: ignore[arg-type]


def _x_axis(fig: Figure, spec: FigureSpec) -> None:
    """Ticks and title along the layers (or whatever stands there)."""
    at, words = spec.x_ticks()
    fig.update_xaxes(
        title=_safe(spec.x_label),
        tickvals=at,
        ticktext=[_safe(w) for w in words],
        showgrid=False,
        zeroline=False,
    )


def _curve(spec: FigureSpec, x: list[float], y: NDArray[Any], i: int, name: str) -> go.Scatter:
    s = stroke(i)
    interval = ""
    shown = [[text(c)] for c in spec.x]
    if spec.low is not None and spec.high is not None:
        interval = " [%{customdata[1]}, %{customdata[2]}]"
        shown = [
            [text(c), text(a), text(b)] for c, a, b in zip(spec.x, spec.low[i], spec.high[i], strict=True)
        ]
    return go.Scatter(
        x=x, y=y, name=_safe(name), mode="lines+markers", legendgroup=str(i), connectgaps=False, customdata=shown,
        line={"color": s.colour, "dash": s.plotly_dash, "width": 2.2}, marker={"symbol": s.symbol, "size": 7 if len(x) <= 40 else 4},
        hovertemplate=f"<b>%{{y:.4g}}</b>{interval}<extra>{_safe(name)}</extra>",
    )  # fmt: skip


def _band(x: list[float], low: NDArray[Any], high: NDArray[Any], i: int) -> go.Scatter:
    """One closed outline for each stretch of finite bounds, in one trace."""
    known = np.isfinite(low) & np.isfinite(high)
    px: list[float | None] = []
    py: list[float | None] = []
    for part in np.split(np.arange(len(x)), np.flatnonzero(np.diff(known.astype(int))) + 1):
        if len(part) and known[part[0]]:
            px += [*(x[j] for j in part), *(x[j] for j in part[::-1]), None]
            py += [*high[part].tolist(), *low[part[::-1]].tolist(), None]
    r, g, b = rgb(stroke(i).colour)
    return go.Scatter(
        x=px, y=py, fill="toself", fillcolor=f"rgba({r},{g},{b},0.18)", line={"width": 0}, mode="lines",
        hoverinfo="skip", legendgroup=str(i), showlegend=False,
    )  # fmt: skip


def _heat(fig: Figure, spec: FigureSpec) -> None:
    places = {"x": list(range(len(spec.x))), "y": list(range(len(spec.series)))}
    shown = np.array([[[y, text(x)] for x in spec.x] for y in spec.series], dtype=object)
    where = f"{_safe(spec.y_label)} %{{customdata[0]}}, {_safe(spec.x_label)} %{{customdata[1]}}"
    z = spec.masked()
    fig.add_trace(_cells(spec, z, places, shown, f"{where}: <b>%{{z:.4g}}</b><extra></extra>"))
    if np.isnan(z).any():
        fig.add_trace(_grey_cells(spec, np.isnan(z), places, shown, f"{where}: not finite<extra></extra>"))
    _x_axis(fig, spec)
    every = max(1, -(-len(spec.series) // 24))
    names = [_safe(s) for s in spec.series]
    fig.update_yaxes(
        title={"text": _safe(spec.y_label), "standoff": 14}, tickvals=places["y"][::every], ticktext=names[::every],
        showgrid=False, zeroline=False, autorange=True if spec.y_up else "reversed", automargin=True,
    )  # fmt: skip
    fig.update_layout(height=int(np.clip(160 + 22 * len(spec.series), 300, 760)))


def _strip(fig: Figure, spec: FigureSpec) -> None:
    m = mosaic(spec)
    places = {"x": m.x, "y": m.y}
    shown = _strip_hover(spec, m.z.shape)
    hover = "%{customdata[0]}, row %{customdata[1]}, column %{customdata[2]}: "
    cells = _cells(spec, m.z, places, shown, hover + "<b>%{z:.4g}</b><extra></extra>")
    fig.add_trace(cells if spec.frames is None else cells.update(showscale=False))
    if spec.frames is not None:
        fig.add_trace(_bar_over(spec))
    if m.bad.any():
        fig.add_trace(_grey_cells(spec, m.bad, places, shown, hover + "not finite<extra></extra>"))
    width, height = m.size
    for i, (x, y) in enumerate(m.corners):
        if spec.frames is not None:
            fig.add_layout_image(
                source=picture_uri(spec.frames[i]), x=x, y=y, sizex=width, sizey=height, xref="x", yref="y",
                sizing="stretch", layer="below",
            )  # fmt: skip
        fig.add_annotation(
            x=x,
            y=y,
            text=_safe(spec.series[i]),
            showarrow=False,
            xanchor="left",
            yanchor="bottom",
            font={"size": 11},
        )
    fig.update_xaxes(visible=False, range=[0, m.width], constrain="domain")
    fig.update_yaxes(visible=False, range=[m.height, 0], scaleanchor="x", constrain="domain")
    fig.update_layout(height=int(np.clip(130 + 930 * m.height / m.width, 240, 1000)))


def _bar_over(spec: FigureSpec) -> go.Scatter:
    """A trace without points whose colour bar shows the see-through colours as they look on the frames' mean colour."""
    assert spec.frames is not None
    lo, hi = spec.limits or (0.0, 1.0)
    below = spec.frames.reshape(-1, 3).mean(0) / 255
    over = [[c * a + b * (1 - a) for c, b in zip((r, g, u), below, strict=True)] for r, g, u, a in rgba_scale(spec.diverging)]  # fmt: skip
    places = np.linspace(0, 1, len(over)).tolist()
    scale = [[at, f"rgb({r * 255:.0f},{g * 255:.0f},{b * 255:.0f})"] for at, (r, g, b) in zip(places, over, strict=True)]  # fmt: skip
    marker = {
        "color": [lo],
        "cmin": lo,
        "cmax": hi,
        "colorscale": scale,
        "colorbar": _colorbar(spec),
        "showscale": bool(spec.unit),
    }
    return go.Scatter(x=[None], y=[None], mode="markers", marker=marker, hoverinfo="skip", showlegend=False)


def _strip_hover(spec: FigureSpec, shape: tuple[int, int]) -> NDArray[Any]:
    n, rows, cols = spec.values.shape
    shown = np.full((*shape, 3), "", dtype=object)
    wide = (shape[1] + 1) // (cols + 1)
    for i in range(n):
        for r in range(rows):
            for c in range(cols):
                shown[(i // wide) * (rows + 1) + r, (i % wide) * (cols + 1) + c] = (spec.series[i], r, c)
    return shown


def _logarithmic(fig: Figure, spec: FigureSpec) -> None:
    if "x" in spec.log:
        fig.update_xaxes(type="log")
    if "y" in spec.log:
        fig.update_yaxes(type="log")


def _barh(fig: Figure, spec: FigureSpec) -> None:
    names = [_safe(str(x)) for x in spec.x]
    for i, (group, row) in enumerate(zip(spec.series, spec.masked(), strict=True)):
        reach = None
        if spec.low is not None and spec.high is not None:
            reach = {
                "type": "data",
                "symmetric": False,
                "array": spec.high[i] - row,
                "arrayminus": row - spec.low[i],
            }
        fig.add_trace(
            go.Bar(
                x=row,
                y=names,
                orientation="h",
                name=_safe(group),
                marker={"color": stroke(i).colour},
                error_x=reach,
            )
        )
    fig.update_xaxes(
        title=_safe(spec.unit), type="log" if spec.log else "linear", range=None if spec.log else spec.limits
    )
    fig.update_yaxes(autorange="reversed", automargin=True)
    fig.update_layout(
        height=int(np.clip(150 + 26 * spec.values.size, 240, 900)), showlegend=len(spec.series) > 1
    )


def _graph(fig: Figure, spec: FigureSpec) -> None:
    """Nodes at their places; a link's width goes with its number, and all links of a node are one trace."""
    assert spec.places is not None
    weight, at = spec.masked(), spec.places
    for i, name in enumerate(spec.series):
        ends = np.flatnonzero(weight[i] > 0)
        x = [v for j in ends for v in (at[i, 0], at[j, 0], None)]
        y = [v for j in ends for v in (at[i, 1], at[j, 1], None)]
        line = {"color": "rgba(120,130,140,0.35)", "width": 1}
        fig.add_trace(
            go.Scatter(
                x=x, y=y, mode="lines", line=line, hoverinfo="skip", name=_safe(name), showlegend=False
            )
        )
    uses = [
        f"{name}: imports {int((weight[i] > 0).sum())}, imported by {int((weight[:, i] > 0).sum())}"
        for i, name in enumerate(spec.series)
    ]
    colours = [stroke(0).colour if m else "#b9c0c7" for m in spec.marked]
    fig.add_trace(
        go.Scatter(
            x=at[:, 0], y=at[:, 1], mode="markers+text", text=[_safe(n) for n in spec.series], textposition="bottom center",
            hovertext=[_safe(u) for u in uses], hoverinfo="text", marker={"size": 13, "color": colours}, showlegend=False,
        )
    )  # fmt: skip
    fig.update_xaxes(visible=False)
    fig.update_yaxes(visible=False)
    fig.update_layout(height=640)


def _table(fig: Figure, spec: FigureSpec) -> None:
    columns = [list(c) for c in zip(*spec.rows, strict=True)] if spec.rows else [[] for _ in spec.columns]
    header = {"values": [_safe(c) for c in spec.columns], "align": "left"}
    fig.add_trace(
        go.Table(header=header, cells={"values": [[_safe(v) for v in c] for c in columns], "align": "left"})
    )
    fig.update_layout(height=int(np.clip(110 + 26 * len(spec.rows), 180, 700)))


def _cells(spec: FigureSpec, z: NDArray[Any], places: dict[str, Any], shown: Any, hover: str) -> go.Heatmap:
    lo, hi = spec.limits or (0.0, 1.0)
    return go.Heatmap(
        z=z, **places, customdata=shown, hovertemplate=hover, zmin=lo, zmax=hi, colorscale=_scale(spec),
        hoverongaps=False, colorbar=_colorbar(spec), showscale=bool(spec.unit),
    )  # fmt: skip


def _colorbar(spec: FigureSpec) -> dict[str, Any]:
    if spec.kind != "strip":
        return {"title": {"text": _safe(spec.unit), "side": "right"}, "thickness": 14}
    title = {"text": _safe(spec.unit), "side": "top"}
    return {
        "title": title,
        "thickness": 10,
        "orientation": "h",
        "x": 0,
        "xanchor": "left",
        "y": -0.02,
        "yanchor": "top",
        "len": 0.4,
    }


def _grey_cells(
    spec: FigureSpec, bad: NDArray[Any], places: dict[str, Any], shown: Any, hover: str
) -> go.Heatmap:
    colour = grey(spec.diverging)
    return go.Heatmap(
        z=np.where(bad, 1.0, np.nan), **places, customdata=shown, hovertemplate=hover, showscale=False, zmin=0, zmax=1,
        colorscale=[[0, colour], [1, colour]], hoverongaps=False,
    )  # fmt: skip


def _scale(spec: FigureSpec) -> list[list[Any]]:
    colours = anchors(spec.diverging)
    if spec.frames is not None:
        scale = rgba_scale(spec.diverging)
        colours = [f"rgba({r * 255:.0f},{g * 255:.0f},{b * 255:.0f},{a})" for r, g, b, a in scale]
    return [[at, c] for at, c in zip(np.linspace(0, 1, len(colours)).tolist(), colours, strict=True)]


def _safe(words: str) -> str:
    """plotly reads a little HTML in every text; names from files must not become tags or placeholders."""
    return words.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("%{", "% {")
