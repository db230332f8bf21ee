"""FigureSpec: one figure as data, before anything is drawn. Made from a Result by its axes; torch-free.

Both back ends draw from the same FigureSpec, so the picture in the notebook and the one in the paper cannot differ.

    axes after the mean over items            kind
    (layer), (pathway, layer), ...            lines   one curve per text coordinate, band = interval
    two other axes                            heat    last axis to the right
    (frame, row, col)                         strip   token heat over the frames
    on request: one or two axes               bars    like lines, where nothing lies between two coordinates
    anything else                             table

On request: barh (lying bars, one per coordinate of the last axis, or groups of them) and graph (who points at whom, by places).
"""

from __future__ import annotations

import hashlib
import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lab.errors import UsageError
from lab.result import Result

Kind = Literal["lines", "bars", "barh", "heat", "strip", "table", "graph"]
KINDS: tuple[Kind, ...] = ("lines", "bars", "barh", "heat", "strip", "table", "graph")
AVERAGED = ("item", "seed")  # axes a figure averages over
MAX_CURVES = 8
LABELS = {
    "layer": "Layer",
    "window": "Centre layer of the window",
    "pathway": "Pathway",
    "frame": "Frame",
    "row": "Row",
    "col": "Column",
    "head": "Head",
    "pos": "Position",
    "q": "Query position",
    "k": "Key position",
    "seconds": "Time (s)",
    "n_frames": "Frames",
    "option": "Option",
    "role": "Role",
    "key_frame": "Frame that is read",
    "query_frame": "Frame that reads",
    "first": "First layer cut",
    "last": "Last layer cut",
    "token": "Token of the answer",
    "kept": "Edges kept, at most (%)",
}


@dataclass(frozen=True)
class Mark:
    """Something that happened at one place along x: a line across the panel, or a triangle at its foot."""

    x: float
    text: str
    line: bool = True


@dataclass(frozen=True, eq=False)
class FigureSpec:
    """One figure.

    values   lines and bars [curve, x], barh [group, bar], heat [y, x], strip [frame, row, col], graph [from, to]; nan and
             infinities still in it
    low, high   interval of lines, bars and barh, same shape
    series   names of the curves (lines, bars), groups (barh), nodes (graph), labels of the rows (heat) or frames (strip)
    x        coordinates along x (lines, bars, heat), names of the bars (barh)
    log      axes of lines and barh that are logarithmic: "", "x", "y" or "xy"
    words    strip: a text on every token, nested like the values
    places   graph: where the nodes stand, [node, (x, y)] in 0..1; marked: the nodes that are filled
    limits   ends of the value axis (None: the back end's choice) or of the colour scale
    reference   the value that means "nothing happened": a line across the panel
    y_up     heat: first row at the bottom
    marks    lines: what happened where
    frames   strip: pictures below the heat, uint8 [frame, height, width, 3]; across: frames in a line
    columns, rows   table
    reading  one sentence that says what stands out; alt: the figure in words
    """

    kind: Kind
    title: str
    unit: str
    values: NDArray[Any] = field(default_factory=lambda: np.zeros((0, 0)))
    low: NDArray[Any] | None = None
    high: NDArray[Any] | None = None
    series: tuple[str, ...] = ()
    x: tuple[Any, ...] = ()
    x_label: str = ""
    y_label: str = ""
    limits: tuple[float, float] | None = None
    diverging: bool = False
    reference: float | None = None
    y_up: bool = False
    marks: tuple[Mark, ...] = ()
    frames: NDArray[np.uint8] | None = None
    across: int = 8
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    log: Literal["", "x", "y", "xy"] = ""
    words: tuple[tuple[tuple[str, ...], ...], ...] | None = None
    places: NDArray[Any] | None = None
    marked: tuple[bool, ...] = ()
    caption: str = ""
    reading: str = ""
    alt: str = ""
    recipe_id: str = ""

    def masked(self) -> NDArray[Any]:
        """The values as floats, nan wherever they are not finite."""
        values = self.values.astype(float)
        return np.where(np.isfinite(values), values, np.nan)

    def x_numbers(self) -> list[float]:
        """Places along x: the coordinates where they are numbers, else 0, 1, 2, ..."""
        if self.kind == "lines" and not any(isinstance(c, str) for c in self.x):
            return [float(c) for c in self.x]
        return [float(i) for i in range(len(self.x))]

    def x_ticks(self, most: int = 16) -> tuple[list[float], list[str]]:
        """At most `most` places along x and what to write there; every step the same."""
        every = max(1, -(-len(self.x) // most))
        return self.x_numbers()[::every], [text(c) for c in self.x[::every]]


def figure_spec(
    result: Result,
    *,
    kind: Kind | None = None,
    title: str | None = None,
    caption: str | None = None,
    limits: tuple[float, float] | None = None,
    diverging: bool | None = None,
    frames: Any = None,
) -> FigureSpec:
    """The figure of a Result; item and seed axes are averaged first, with a 95 % interval.

    diverging  colour scale centred on the reference; by default when a value lies below it
    frames     uint8 [frame, height, width, 3] to lie below a strip
    Raises UsageError if the Result cannot be drawn as `kind`.
    """
    for axis in (a for a in AVERAGED if a in result.axes):
        result = result.mean(axis)
    if kind is not None and kind not in KINDS:
        raise UsageError(f"no figure kind {kind!r}; the kinds are {', '.join(KINDS)}")
    makers = {
        "lines": _lines, "bars": _bars, "barh": _barh, "heat": _heat, "strip": _strip, "table": _table, "graph": _graph,
    }  # fmt: skip
    make = makers[kind or kind_of(result)]
    spec = make(result)
    spec = replace(
        spec,
        title=title if title is not None else result.name or result.unit,
        caption=_caption(result, spec.kind) if caption is None else caption,
        reading=_reading(result, spec),
        recipe_id=recipe_id(result.recipe),
    )
    if spec.kind in ("heat", "strip"):
        spec = _coloured(spec, result, limits, diverging)
    elif limits is not None:
        spec = replace(spec, limits=(float(limits[0]), float(limits[1])))
    if frames is not None:
        spec = replace(spec, frames=_pictures(frames, spec))
    return replace(spec, alt=_alt(spec))


def kind_of(result: Result) -> Kind:
    """What a Result without item and seed axes is drawn as."""
    axes = result.axes
    if axes == ("frame", "row", "col"):
        return "strip"
    numeric = [not any(isinstance(c, str) for c in result.coords[a]) for a in axes]
    if axes and numeric[-1] and (len(axes) == 1 or (len(axes) == 2 and _few_names(result, numeric[0]))):
        return "lines"
    return "heat" if len(axes) == 2 else "table"


def share_limits(specs: Sequence[FigureSpec]) -> list[FigureSpec]:
    """The same figures with one scale, so that their colours (or heights) can be compared."""
    ends = np.array([s.limits or _extent(s.masked(), s.reference, False) for s in specs])
    limits = (float(ends[:, 0].min()), float(ends[:, 1].max()))
    if any(s.diverging for s in specs):
        middle = specs[0].reference or 0.0
        half = max(abs(limits[0] - middle), abs(limits[1] - middle))
        limits = (middle - half, middle + half)
    return [replace(s, limits=limits, diverging=any(o.diverging for o in specs)) for s in specs]


def recipe_id(recipe: dict[str, Any]) -> str:
    """Id of a recipe given as plain data; "" if there is none."""
    if not recipe:
        return ""
    canonical = json.dumps(recipe, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def label(axis: str) -> str:
    """Axis name as people read it."""
    return LABELS.get(axis, axis.replace("_", " ").capitalize())


def text(value: Any) -> str:
    """A coordinate or a number as people read it: at most four digits that matter."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        return str(value)
    if isinstance(value, int | np.integer):
        return str(value)
    return f"{float(value):.4g}"


# ---- one maker per kind -------------------------------------------------------------------------------------------


def _lines(r: Result) -> FigureSpec:
    if len(r.axes) not in (1, 2):
        raise UsageError(
            f"lines need one or two axes, the result has {len(r.axes)}: {r.axes}; select or average first"
        )
    if len(r.axes) == 2 and r.shape[0] > 4 * MAX_CURVES:
        raise UsageError(
            f"{r.shape[0]} curves are too many to tell apart, at most {4 * MAX_CURVES}; draw a heat map"
        )
    named = len(r.axes) == 2
    series = tuple(text(c) for c in r.coords[r.axes[0]]) if named else (r.name or r.unit,)
    values, low, high = (None if a is None else np.atleast_2d(a) for a in (r.values, r.low, r.high))
    assert values is not None
    x = r.axes[-1]
    return FigureSpec(
        "lines", "", r.unit, values, low, high, series, x=tuple(r.coords[x]), x_label=label(x), y_label=r.unit,
        reference=0.0 if r.baseline is None else r.baseline,
    )  # fmt: skip


def _bars(r: Result) -> FigureSpec:
    return replace(_lines(r), kind="bars")


def _heat(r: Result) -> FigureSpec:
    if len(r.axes) != 2:
        raise UsageError(
            f"a heat map needs two axes, the result has {len(r.axes)}: {r.axes}; select or average first"
        )
    y, x = r.axes
    rows = tuple(text(c) for c in r.coords[y])
    return FigureSpec(
        "heat", "", r.unit, values=r.values, series=rows, x=tuple(r.coords[x]), x_label=label(x),
        y_label=label(y), y_up=y in ("layer", "window", "first"), reference=r.baseline,
    )  # fmt: skip


def _strip(r: Result) -> FigureSpec:
    if r.axes != ("frame", "row", "col"):
        raise UsageError(f"a strip needs the axes ('frame', 'row', 'col'), the result has {r.axes}")
    seconds = r.notes.get("seconds", [None] * r.shape[0])
    names = tuple(
        f"frame {text(c)}" + (f" · {s:.1f} s" if isinstance(s, float) and np.isfinite(s) else "")
        for c, s in zip(r.coords["frame"], seconds, strict=False)
    )
    return FigureSpec("strip", "", r.unit, values=r.values, series=names, reference=r.baseline)


def _table(r: Result) -> FigureSpec:
    rows = r.tidy()
    columns = tuple(rows[0]) if rows else (*r.axes, "value")
    names = tuple(r.unit if c == "value" else c if c in ("low", "high") else label(c) for c in columns)
    return FigureSpec(
        "table", "", r.unit, columns=names, rows=tuple(tuple(text(row[c]) for c in columns) for row in rows)
    )


def _barh(r: Result) -> FigureSpec:
    if len(r.axes) not in (1, 2):
        raise UsageError(
            f"bars need one or two axes, the result has {len(r.axes)}: {r.axes}; select or average first"
        )
    spec, last = _lines(r), r.axes[-1]
    names = tuple(text(c) for c in r.coords[last])
    return replace(spec, kind="barh", x=names, x_label=label(last), reference=r.baseline)


def _graph(r: Result) -> FigureSpec:
    """`notes["places"]` says where every node stands, `notes["marked"]` which are filled."""
    places = np.asarray(r.notes.get("places", []), float)
    if len(r.axes) != 2 or r.shape[0] != r.shape[1] or places.shape != (r.shape[0], 2):
        raise UsageError(
            f"a graph needs as many rows as columns and a place for each node, got {r.shape} and {places.shape}"
        )
    names = tuple(text(c) for c in r.coords[r.axes[0]])
    marked = tuple(bool(m) for m in r.notes.get("marked", [False] * len(names)))
    return FigureSpec(
        "graph", "", r.unit, values=r.values, series=names, x=names, places=places, marked=marked
    )


def _few_names(r: Result, numeric: bool) -> bool:
    return not numeric and r.shape[0] <= MAX_CURVES


def _coloured(
    spec: FigureSpec, r: Result, limits: tuple[float, float] | None, diverging: bool | None
) -> FigureSpec:
    middle = 0.0 if r.baseline is None else r.baseline
    values = spec.masked()
    if diverging is None:
        diverging = bool((values < middle).any())  # nan compares False
    lo, hi = limits if limits is not None else _extent(values, middle, diverging)
    if not lo < hi:
        raise UsageError(f"colour limits must rise, got {lo} to {hi}")
    return replace(spec, limits=(float(lo), float(hi)), diverging=diverging)


def _extent(values: NDArray[Any], middle: float | None, diverging: bool) -> tuple[float, float]:
    known = values[np.isfinite(values)]
    start = middle or 0.0
    if diverging:
        half = float(np.abs(known - start).max()) if known.size else 0.0
        return start - (half or 1.0), start + (half or 1.0)
    lo = float(min(known.min(), start)) if known.size else start
    hi = float(known.max()) if known.size else start + 1.0
    return (lo, hi) if hi > lo else (lo, lo + 1.0)


def _pictures(frames: Any, spec: FigureSpec) -> NDArray[np.uint8]:
    pictures = np.asarray(frames)
    if spec.kind != "strip":
        raise UsageError(f"frames go with a strip, this figure is of kind {spec.kind!r}")
    if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[-1] != 3:
        raise UsageError(
            f"frames must be uint8 [frame, height, width, 3], got {pictures.dtype} {pictures.shape}"
        )
    if len(pictures) != len(spec.values):
        raise UsageError(f"{len(pictures)} pictures for {len(spec.values)} frames of values; give one each")
    return pictures


# ---- words --------------------------------------------------------------------------------------------------------


def _caption(r: Result, kind: Kind) -> str:
    counts = r.notes.get("n") or {}
    split = {"correct": " answered right", "wrong": " answered wrong"}.get(r.notes.get("split", ""), "")
    parts = [_counted(axis, n, split if axis == "item" else "") for axis, n in counts.items()]
    if r.low is not None and counts:
        drawn = _drawn(r, counts)
        where = "in brackets: 95 % bootstrap interval" if kind == "heat" else "band: 95 % bootstrap interval"
        parts.append(f"{where}{drawn}" if len(r.axes) < 3 else f"95 % bootstrap interval in the table{drawn}")
    words = [f"{label(a)}: {text(c)}." for a, c in (r.notes.get("selected") or {}).items()]
    words += [f"{'; '.join(parts)}."] if parts else []
    if r.not_finite:
        words.append(
            f"{r.not_finite} of {np.size(r.values)} values are not finite; they are left out or shown grey."
        )
    return " ".join(words)


def _counted(axis: str, n: Any, split: str) -> str:
    """Over how many a mean is; `n` is a number, or one for each label."""
    if isinstance(n, dict):
        return f"Mean over {', '.join(f'{c} ({k})' for k, c in n.items())} {axis}s{split}"
    return f"Mean over {n} {axis}s{split}" if n > 1 else f"One {axis}{split}"


def _drawn(r: Result, counts: dict[str, Any]) -> str:
    """What an interval's draws were, where several items share a video."""
    labels = list((r.notes.get("groups") or {}).get("item", {}).values())
    shared = len(set(labels)) < len(labels)
    return " (videos resampled)" if "item" in counts and shared else ""


def _reading(r: Result, spec: FigureSpec) -> str:
    """Where the value farthest from the reference lies."""
    values = r.values.astype(float)
    known = np.where(np.isfinite(values), np.abs(values - (r.baseline or 0.0)), -1.0)
    if spec.kind == "table" or not known.size or known.max() < 0:
        return ""
    place = np.unravel_index(int(known.argmax()), known.shape)
    where = ", ".join(
        f"{label(a).lower()} {text(r.coords[a][i])}" for a, i in zip(r.axes, place, strict=True)
    )
    interval = ""
    if r.low is not None and r.high is not None:
        interval = f" [{text(r.low[place])}, {text(r.high[place])}]"
    what = f"Farthest from {text(r.baseline)}" if r.baseline else "Largest"
    return f"{what}: {text(float(values[place]))}{interval} at {where}."


def _alt(spec: FigureSpec) -> str:
    what = {
        "lines": "Line chart", "bars": "Bar chart", "barh": "Bar chart", "heat": "Heat map", "strip": "Heat over video frames",
        "table": "Table", "graph": "Graph",
    }[spec.kind]  # fmt: skip
    size = {
        "lines": f"{len(spec.series)} curve{'s' * (len(spec.series) != 1)} over {spec.x_label.lower()}: {', '.join(spec.series)}",
        "bars": f"{len(spec.series)} bar{'s' * (len(spec.series) != 1)} for each {spec.x_label.lower()}: {', '.join(spec.series)}",
        "heat": f"{spec.y_label.lower()} by {spec.x_label.lower()}, {' by '.join(str(n) for n in spec.values.shape)} cells",
        "strip": " by ".join(str(n) for n in spec.values.shape) + " tokens (frames, rows, columns)",
        "table": f"{len(spec.rows)} rows",
        "barh": f"{spec.values.size} bars by {spec.x_label.lower()}: {', '.join(str(x) for x in spec.x)}",
        "graph": f"{len(spec.series)} nodes, {int((spec.masked() > 0).sum())} links",
    }[spec.kind]
    return " ".join(f"{what}: {spec.title} ({spec.unit}); {size}. {spec.reading} {spec.caption}".split())


def wrapped(words: str, width: int) -> str:
    """Text broken into lines of at most `width` characters."""
    return "\n".join(textwrap.wrap(words, width))


# ---- the strip's geometry -------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Mosaic:
    """Frames side by side as one picture. Each frame is 1 wide; y runs down.

    z          values [y cell, x cell], nan between frames and where values are not finite; bad: True for the latter
    x, y       edges of the cells, one more than cells
    corners    upper left corner (x, y) of each frame; size: width and height of a frame
    width, height   of the whole picture
    """

    z: NDArray[Any]
    bad: NDArray[np.bool_]
    x: NDArray[Any]
    y: NDArray[Any]
    corners: tuple[tuple[float, float], ...]
    size: tuple[float, float]
    width: float
    height: float


def mosaic(spec: FigureSpec, *, gap: float = 0.06, head: float = 0.2) -> Mosaic:
    """Lays the frames of a strip out, `spec.across` to a line, with room for a label of height `head` above each line."""
    n, rows, cols = spec.values.shape
    wide = max(1, min(n, spec.across))
    lines = -(-n // wide)
    tall = rows / cols if spec.frames is None else spec.frames.shape[1] / spec.frames.shape[2]
    corners = tuple(((i % wide) * (1 + gap), (i // wide) * (tall + head) + head) for i in range(n))
    x = np.concatenate([i * (1 + gap) + np.linspace(0, 1, cols + 1) for i in range(wide)])
    y = np.concatenate([i * (tall + head) + head + np.linspace(0, tall, rows + 1) for i in range(lines)])
    z, bad = np.full((len(y) - 1, len(x) - 1), np.nan), np.zeros((len(y) - 1, len(x) - 1), bool)
    values = spec.masked()
    for i in range(n):
        top, left = (i // wide) * (rows + 1), (i % wide) * (cols + 1)
        at = np.s_[top : top + rows, left : left + cols]
        z[at], bad[at] = values[i], np.isnan(values[i])
    return Mosaic(z, bad, x, y, corners, (1.0, tall), float(x[-1]), float(y[-1]))
