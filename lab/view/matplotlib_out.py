"""FigureSpec -> matplotlib figure and image files, for papers. No browser, no pyplot, no dates in the files.

The same FigureSpec gives the same bytes, whatever style the user has set.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, LinearSegmentedColormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lab.errors import UsageError
from lab.result import write_bytes
from lab.view.palette import anchors, grey, rgba_scale, stroke
from lab.view.specs import FigureSpec, Mark, mosaic, wrapped

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
    return out.getvalue()


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
            label=name,
        )
    if spec.limits is not None:
        ax.set_ylim(spec.limits)


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
        ax.text(x, y - 0.03, spec.series[i], fontsize=8, va="bottom")
    _cells(ax, spec, m.x, m.y, m.z, m.bad)
    ax.set(xlim=(0, m.width), ylim=(m.height, 0), aspect="equal")
    ax.set_axis_off()


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
        table.set_fontsize(8)


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
    assert isinstance(figure, Figure)
    if not bar:
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
}
