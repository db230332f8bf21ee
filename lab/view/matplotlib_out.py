"""FigureSpec -> matplotlib figure and image files, for papers. No browser, no pyplot, no dates in the files.

The same FigureSpec gives the same bytes, whatever style the user has set.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, LinearSegmentedColormap, ListedColormap
from matplotlib.figure import Figure, FigureBase
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from lab.errors import UsageError
from lab.result import write_bytes
from lab.view.palette import anchors, grey, rgba_scale, stroke
from lab.view.specs import FigureSpec, Mark, mosaic, text, wrapped

STYLE: Any = {
    "font.family": "DejaVu Sans",  # shipped with matplotlib, so the same everywhere
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "text.parse_math": False,  # "$" in an item's name is a letter
    "legend.frameon": False,
    "svg.hashsalt": "videollm-lab",
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
}
HATCHES = ("", "//", "xx", "..")  # bars stay apart in print without colour
SUFFIXES = (".png", ".svg", ".pdf")


def to_matplotlib(spec: FigureSpec) -> Figure:
    """The figure as matplotlib draws it, on a canvas of its own (pyplot is not touched)."""
    with styled():
        draw, size = _PLAN[spec.kind]
        fig = Figure(figsize=size(spec), layout="constrained")
        FigureCanvasAgg(fig)
        ax = fig.add_subplot()
        draw(ax, spec)
        ax.set_title(wrapped(spec.title, int(fig.get_figwidth() * 10.5)), loc="left")
        if spec.caption:
            words = wrapped(spec.caption, int(fig.get_figwidth() * 15))
            fig.supxlabel(words, fontsize=8, color="#555555", x=0.01, ha="left")
        return fig


def image_bytes(spec: FigureSpec, suffix: str, *, dpi: int = 150) -> bytes:
    """The file a figure makes; suffix is one of `SUFFIXES`. Equal for equal figures."""
    if suffix not in SUFFIXES:
        raise UsageError(
            f"no picture format {suffix or '(no suffix)'!r}; the formats are {', '.join(SUFFIXES)}"
        )
    fig, out = to_matplotlib(spec), io.BytesIO()
    with styled():
        fig.savefig(out, format=suffix[1:], dpi=dpi, metadata=_metadata(spec, suffix))
    return numbered(out.getvalue()) if suffix == ".svg" else out.getvalue()


def numbered(svg: bytes) -> bytes:
    """The picture with its clip paths numbered as they appear: matplotlib names them by the hash of coordinates, whose
    last bits the layout's solver does not repeat."""
    names: dict[bytes, bytes] = {}
    return re.sub(rb"\bp[0-9a-f]{10}\b", lambda m: names.setdefault(m[0], b"clip%d" % (len(names) + 1)), svg)


def save_image(spec: FigureSpec, path: str | Path, *, dpi: int = 150) -> Path:
    """Writes a .png, .svg or .pdf; the recipe's id stands in its metadata."""
    return write_bytes(path, image_bytes(spec, Path(path).suffix.lower(), dpi=dpi))


def _metadata(spec: FigureSpec, suffix: str) -> dict[str, Any]:
    about = f"recipe {spec.recipe_id}" if spec.recipe_id else spec.unit
    if suffix == ".png":
        return {"Title": spec.title, "Description": about, "Software": None}
    if suffix == ".svg":
        return {"Title": spec.title, "Description": about, "Date": None}
    return {"Title": spec.title, "Subject": about, "CreationDate": None, "ModDate": None}


@contextmanager
def styled() -> Iterator[None]:
    """The house style, whatever style the user has set."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a user's own style must not change the bytes
        matplotlib.rcParams.update(STYLE)
        yield


def draw_on(ax: Axes, spec: FigureSpec, *, size: float | None = None) -> None:
    """One figure on axes that lie somewhere on a page, without title, caption and legend. size: of markers, in points."""
    if spec.kind == "lines":
        curves(ax, spec, size=size)
        if len(spec.x) <= 8 or (
            not spec.log and len(spec.x) <= 60
        ):  # of more, round numbers are easier to read
            ax.set_xticks(*spec.x_ticks(8))
        ax.set(xlabel=spec.x_label, ylabel=spec.y_label)
    else:
        _PLAN[spec.kind][0](ax, spec)


def _lines(ax: Axes, spec: FigureSpec) -> None:
    curves(ax, spec)
    for mark in spec.marks:
        _mark(ax, mark)
    _named(ax, spec)


def _named(ax: Axes, spec: FigureSpec) -> None:
    """Legend, ticks and labels of lines and bars."""
    if len(spec.series) > 1:
        ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0)
    ax.set_xticks(*spec.x_ticks())
    ax.set(xlabel=spec.x_label, ylabel=spec.y_label)


def _mark(ax: Axes, mark: Mark) -> None:
    """A line with its text beside it; triangles at the foot go without text (the caption says what they are)."""
    foot = ax.get_xaxis_transform()  # x in data, y in shares of the panel
    if not mark.line:
        ax.plot([mark.x], [0.02], marker="v", color="#8C8C8C", markersize=5, transform=foot, clip_on=False)
        return
    ax.axvline(mark.x, color="#555555", linewidth=1.0, linestyle=(0, (4, 2)), zorder=0)
    ax.text(mark.x, 1.0, f" {mark.text}", fontsize=8, color="#555555", va="top", transform=foot)


def _bars(ax: Axes, spec: FigureSpec) -> None:
    x, values, n = np.array(spec.x_numbers()), spec.masked(), max(1, len(spec.series))
    for i, name in enumerate(spec.series):
        at, s, bounds = x + (i - (n - 1) / 2) * 0.8 / n, stroke(i), None
        if spec.low is not None and spec.high is not None:
            # an interval of the bootstrap need not hold the mean; an error bar cannot be negative
            bounds = np.nan_to_num(
                np.maximum([values[i] - spec.low[i], spec.high[i] - values[i]], 0.0).astype(float)
            )
        ax.bar(
            at, values[i], 0.8 / n, color=s.colour, hatch=HATCHES[i % len(HATCHES)], edgecolor="white", yerr=bounds,
            label=name, error_kw={"linewidth": 1.0, "capsize": 2.5},
        )  # fmt: skip
    if spec.limits is not None:
        ax.set_ylim(spec.limits)
    _named(ax, spec)


def curves(ax: Axes, spec: FigureSpec, *, size: float | None = None) -> None:
    """The curves of a line figure with their bands, reference and limits. size: of markers, in points."""
    x, values = np.array(spec.x_numbers()), spec.masked()
    if spec.reference is not None:
        ax.axhline(spec.reference, color="#888888", linewidth=0.8, linestyle=(0, (1, 2)), zorder=0)
    for i, name in enumerate(spec.series):
        s = stroke(i)
        if spec.low is not None and spec.high is not None:
            low, high = spec.low[i].astype(float), spec.high[i].astype(float)
            known = np.isfinite(low) & np.isfinite(high)
            ax.fill_between(x, low, high, where=known.tolist(), color=s.colour, alpha=0.18, linewidth=0)
        ax.plot(
            x,
            values[i],
            color=s.colour,
            marker=s.marker,
            linestyle=s.dash,
            markersize=size or (4.5 if len(x) <= 40 else 2.5),
            linewidth=1.6 if size is None else 1.2,
            markevery=max(1, len(x) // 12) if len(x) > 60 else None,
            label=name,
        )
    if spec.limits is not None:
        ax.set_ylim(spec.limits)
    _logarithmic(ax, spec)


def _logarithmic(ax: Axes, spec: FigureSpec) -> None:
    for name, axis in (("x", ax.xaxis), ("y", ax.yaxis)):
        if name in spec.log:
            getattr(ax, f"set_{name}scale")("log")
            axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=7))
            axis.set_major_formatter(
                FuncFormatter(lambda value, _: text(float(value)))
            )  # "$" is a letter here
            axis.set_minor_locator(NullLocator())


def _barh(ax: Axes, spec: FigureSpec) -> None:
    """Lying bars, the first on top; the number stands at the end of each."""
    n = len(spec.series)
    thick = 0.8 / n
    for i, row in enumerate(spec.masked()):
        at = np.arange(len(spec.x)) + (i - (n - 1) / 2) * thick
        reach = None
        if spec.low is not None and spec.high is not None:
            reach = np.abs(np.stack([row - spec.low[i], spec.high[i] - row]))
        ax.barh(
            at,
            row,
            thick * 0.9,
            xerr=reach,
            color=stroke(i).colour,
            label=spec.series[i],
            error_kw={"elinewidth": 0.7},
        )
        ends = row if spec.high is None else np.maximum(row, spec.high[i])
        for y, end, value in zip(at, ends, row, strict=True):
            if np.isfinite(value):
                ax.annotate(
                    text(float(f"{value:.3g}")),
                    (end, y),
                    (2, 0),
                    textcoords="offset points",
                    va="center",
                    size="small",
                )
    ax.set_yticks(np.arange(len(spec.x)), [str(x) for x in spec.x])
    ax.invert_yaxis()
    ax.set_xlabel(spec.unit)
    ax.margins(x=0.16)
    _logarithmic(ax, spec)
    if spec.limits is not None:
        ax.set_xlim(spec.limits)


def _graph(ax: Axes, spec: FigureSpec) -> None:
    """Boxes with names, joined by lines that grow stronger with the number of links."""
    assert spec.places is not None
    weight, at = spec.masked(), spec.places
    for i, j in zip(*np.nonzero(weight > 0), strict=True):
        strong = min(1.0, float(weight[i, j]) / 12)
        ax.plot(
            *at[[i, j]].T, color="#5b6570", alpha=0.10 + 0.4 * strong, linewidth=0.4 + 1.2 * strong, zorder=1
        )
    for name, (x, y), full in zip(spec.series, at, spec.marked, strict=True):
        ink, paper = ("white", stroke(0).colour) if full else ("#1d2126", "white")
        box = {
            "boxstyle": "round,pad=0.28",
            "facecolor": paper,
            "edgecolor": stroke(0).colour,
            "linewidth": 0.6,
        }
        ax.text(x, y, name, ha="center", va="center", size="small", color=ink, bbox=box, zorder=2)
    ax.set(xlim=(0, 1), ylim=(0, 1))
    ax.set_axis_off()


def _heat(ax: Axes, spec: FigureSpec) -> None:
    draw_cells(ax, spec)
    name_places(ax, spec)
    ax.set(ylabel=spec.y_label)


def name_places(ax: Axes, spec: FigureSpec, most: int = 16) -> None:
    """Ticks and title along x; names too long to stand side by side are turned."""
    at, words = spec.x_ticks(most)
    turned = sum(len(w) for w in words) > 48
    ax.set_xticks(at, words, rotation=35 if turned else 0, ha="right" if turned else "center")
    ax.set_xlabel(spec.x_label)


def draw_cells(ax: Axes, spec: FigureSpec, *, bar: bool = True) -> None:
    """The cells of a heat map with the names of its rows and its colour bar."""
    z = spec.masked()
    edges = np.arange(len(spec.x) + 1) - 0.5, np.arange(len(spec.series) + 1) - 0.5
    _cells(ax, spec, *edges, z, np.isnan(z), bar=bar)
    every = max(1, -(-len(spec.series) // 24))
    ax.set_yticks(range(0, len(spec.series), every), spec.series[::every])
    if not spec.y_up:
        ax.invert_yaxis()


def _strip(ax: Axes, spec: FigureSpec) -> None:
    m = mosaic(spec)
    width, height = m.size
    for i, (x, y) in enumerate(m.corners):
        if spec.frames is not None:
            ax.imshow(spec.frames[i], extent=(x, x + width, y + height, y), zorder=0, interpolation="nearest")
        ax.text(x, y - 0.03, spec.series[i], fontsize=min(8, rcParams["font.size"]), va="bottom")
        if spec.words is not None:
            _words(ax, spec, i, x, y, m.size)
    if spec.words is None or spec.frames is None:
        _cells(ax, spec, m.x, m.y, m.z, m.bad)
    ax.set(xlim=(0, m.width), ylim=(m.height, 0), aspect="equal")
    ax.set_axis_off()


def _words(ax: Axes, spec: FigureSpec, i: int, x: float, y: float, size: tuple[float, float]) -> None:
    """The word of every token of frame i, fainter where its value (a probability) is small."""
    assert spec.words is not None
    _, rows, cols = spec.values.shape
    for r in range(rows):
        for c in range(cols):
            p, word = float(spec.values[i, r, c]), spec.words[i][r][c]
            if np.isfinite(p) and word:
                box = {"facecolor": "black", "alpha": 0.55, "edgecolor": "none", "pad": 0.7}
                place = x + (c + 0.5) * size[0] / cols, y + (r + 0.5) * size[1] / rows
                shade = (1.0, 1.0, 1.0, 0.55 + 0.45 * min(1.0, max(0.0, p)))
                ax.text(*place, word, ha="center", va="center", size="small", color=shade, bbox=box, zorder=2)


def _table(ax: Axes, spec: FigureSpec) -> None:
    ax.set_axis_off()
    shown = [list(row) for row in spec.rows[:60]]
    if len(spec.rows) > 60:
        shown.append([f"{len(spec.rows) - 60} more rows", *[""] * (len(spec.columns) - 1)])
    if shown:
        table = ax.table(
            cellText=shown, colLabels=list(spec.columns), loc="upper left", cellLoc="left", edges="horizontal"
        )
        table.auto_set_font_size(False)
        table.set_fontsize(min(8, rcParams["font.size"]))
        for cell in table.get_celld().values():
            cell.set_linewidth(0.6)
        table.auto_set_column_width(list(range(len(spec.columns))))


def _cells(ax: Axes, spec: FigureSpec, x: Any, y: Any, z: Any, bad: Any, *, bar: bool = True) -> None:
    lo, hi = spec.limits or (0.0, 1.0)
    mesh = ax.pcolormesh(x, y, np.ma.masked_invalid(z), cmap=_colormap(spec), vmin=lo, vmax=hi, zorder=1)
    if bad.any():
        ax.pcolormesh(
            x,
            y,
            np.ma.masked_where(~bad, np.ones(bad.shape)),
            cmap=ListedColormap([grey(spec.diverging)]),
            zorder=2,
        )
    figure = ax.get_figure()
    assert isinstance(figure, FigureBase)
    if not bar or not spec.unit:  # without a unit the colours mean nothing by themselves
        return
    shrink = 0.8 if spec.kind == "strip" else 1.0
    figure.colorbar(
        mesh, ax=ax, label=spec.unit, shrink=shrink, ticks=MaxNLocator(5), pad=0.02, fraction=0.06
    )


def _colormap(spec: FigureSpec) -> Colormap:
    colours: Any = anchors(spec.diverging) if spec.frames is None else rgba_scale(spec.diverging)
    return LinearSegmentedColormap.from_list("lab", colours)


def _strip_size(spec: FigureSpec) -> tuple[float, float]:
    m = mosaic(spec)
    return 9.0, float(np.clip(1.1 + 7.6 * m.height / m.width, 2.2, 11.0))


_PLAN: dict[str, tuple[Callable[[Axes, FigureSpec], None], Callable[[FigureSpec], tuple[float, float]]]] = {
    "lines": (_lines, lambda s: (7.6 if len(s.series) > 1 else 6.0, 3.9)),
    "bars": (_bars, lambda s: (7.6 if len(s.series) > 1 else 6.0, 3.9)),
    "heat": (_heat, lambda s: (6.8, float(np.clip(1.4 + 0.24 * len(s.series), 2.6, 9.0)))),
    "strip": (_strip, _strip_size),
    "table": (_table, lambda s: (max(5.0, 1.5 * len(s.columns)), 1.2 + 0.24 * min(61, len(s.rows)))),
    "barh": (_barh, lambda s: (6.4, 1.2 + 0.28 * s.values.size)),
    "graph": (_graph, lambda s: (9.0, 6.4)),
}
