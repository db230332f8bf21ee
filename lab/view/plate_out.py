"""A Plate -> .svg, .pdf, .png (matplotlib: the same plate gives the same bytes) and .html (plotly, no network)."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Picture
from matplotlib.figure import SubFigure

from lab.errors import UsageError
from lab.result import Result, write_bytes
from lab.view.matplotlib_out import SUFFIXES, draw_on, numbered, styled
from lab.view.pages import report
from lab.view.plates import Plate
from lab.view.specs import FigureSpec, wrapped

# points; nothing in a paper is smaller than 6
PAPER: Any = {
    "font.size": 7.0, "axes.titlesize": 7.5, "axes.labelsize": 7.0, "xtick.labelsize": 6.5, "ytick.labelsize": 6.5,
    "legend.fontsize": 6.5, "axes.linewidth": 0.6, "xtick.major.width": 0.6, "ytick.major.width": 0.6,
    "xtick.major.size": 2.5, "ytick.major.size": 2.5, "axes.titlepad": 3.0, "axes.labelpad": 2.0,
    "figure.constrained_layout.h_pad": 0.03, "figure.constrained_layout.w_pad": 0.03,
}  # fmt: skip
EMPTY: dict[str, dict[str, Any]] = {
    ".png": {"Software": None}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None, "ModDate": None},
}  # fmt: skip
DPI = 300
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@contextmanager
def paper() -> Iterator[None]:
    """The house style in the sizes of a paper."""
    with styled():
        matplotlib.rcParams.update(PAPER)
        yield


def plate_matplotlib(plate: Plate) -> Picture:
    """The plate as matplotlib draws it, on a canvas of its own."""
    with paper():
        fig = Picture(figsize=(plate.width, sum(plate.heights)), layout="constrained")
        FigureCanvasAgg(fig)
        parts = fig.subfigures(len(plate.rows), 1, height_ratios=list(plate.heights), squeeze=False)[:, 0]
        first = 0
        for i, (part, row) in enumerate(zip(parts, plate.rows, strict=True)):
            shares = plate.shares[i] if i < len(plate.shares) and plate.shares[i] else (1.0,) * len(row)
            _row(part, plate, row, shares, first)
            if plate.legend == "below" and _curves_of(row) not in [
                _curves_of(r) for r in plate.rows[i + 1 :]
            ]:
                _legend(part, plate, row)
            first += len(row)
        return fig


def _row(
    part: SubFigure, plate: Plate, row: Sequence[FigureSpec], shares: Sequence[float], first: int
) -> None:
    axes: Sequence[Axes] = part.subplots(1, len(row), squeeze=False, width_ratios=list(shares))[0]
    for i, (ax, spec) in enumerate(zip(axes, row, strict=True)):
        draw_on(ax, spec, size=2.6)
        letter = f"({LETTERS[first + i]}) " if plate.letters and len(plate.figures) > 1 else ""
        inches = plate.width * shares[i] / sum(shares)
        ax.set_title(_broken(letter + spec.title, max(12, int(inches * 17))), loc="left")
        if spec.kind == "heat" and sum(len(str(x)) + 2 for x in spec.x) > 11 * inches:
            ax.tick_params(axis="x", labelrotation=90)
        if i and spec.kind == "lines" and row[0].limits is not None and spec.limits == row[0].limits:
            ax.set_ylabel("")
            ax.tick_params(labelleft=False)
    for ax, spec in zip(axes, row, strict=True):
        if plate.legend == "inside" and _named(spec):
            ax.legend(borderaxespad=0.2, handlelength=1.8, frameon=True, framealpha=0.75, edgecolor="none")


def _broken(title: str, width: int) -> str:
    """Lines of at most `width` characters; those that stand in the title stay."""
    return "\n".join(wrapped(line, width) for line in title.split("\n"))


def _curves_of(row: Sequence[FigureSpec]) -> tuple[str, ...]:
    """The names that a row's legend lists."""
    return next((s.series for s in row if _named(s)), ())


def _legend(part: SubFigure, plate: Plate, row: Sequence[FigureSpec]) -> None:
    """One legend for all figures of the row that draw the same curves."""
    for ax in (a for a, s in zip(part.axes, row, strict=False) if _named(s)):
        handles, names = ax.get_legend_handles_labels()
        longest = max(map(len, names))
        columns = max(1, min(len(names), int(plate.width / (0.38 + 0.055 * longest))))
        part.legend(
            handles,
            names,
            loc="outside lower left",
            ncols=columns,
            handlelength=2.0,
            columnspacing=1.0,
            borderaxespad=0.1,
        )
        return


def _named(spec: FigureSpec) -> bool:
    return spec.kind in ("lines", "bars", "barh") and len(spec.series) > 1


def plate_bytes(plate: Plate, suffix: str, *, about: str = "") -> bytes:
    """The file a plate makes; `about` stands in its metadata. Equal for equal plates."""
    if suffix not in SUFFIXES:
        raise UsageError(
            f"no picture format {suffix or '(no suffix)'!r}; the formats are {', '.join(SUFFIXES)}"
        )
    fig, out = plate_matplotlib(plate), io.BytesIO()
    named = {"Title": plate.title, "Subject" if suffix == ".pdf" else "Description": about}
    with paper():
        _settle(fig)
        fig.savefig(out, format=suffix[1:], dpi=DPI, metadata={**EMPTY[suffix], **named})
    return numbered(out.getvalue()) if suffix == ".svg" else out.getvalue()


def _settle(fig: Picture) -> None:
    """Everything where the layout puts it, rounded: the last bits that its solver finds differ from run to run."""
    fig.draw_without_rendering()
    fig.set_layout_engine("none")
    for part in fig.subfigs:
        box = part.bbox_relative
        box.set_points(np.round(box.get_points(), 6))
    for ax in fig.axes:
        left, bottom, width, height = np.round(ax.get_position(original=True).bounds, 6)
        ax.set_position((left, bottom, width, height))


def save_plate(
    plate: Plate, folder: str | Path, *, about: str = "", results: Sequence[Result] = ()
) -> list[Path]:
    """figure.svg, figure.pdf, figure.png and figure.html in `folder`. results: whose recipes the page shows."""
    folder = Path(folder)
    made = [
        write_bytes(folder / f"figure{s}", plate_bytes(plate, s, about=about))
        for s in (".svg", ".pdf", ".png")
    ]
    return [*made, plate_page(plate, folder / "figure.html")]


def plate_page(plate: Plate, path: str | Path) -> Path:
    """One page with every figure of the plate by itself, its numbers in tables; asks the network for nothing."""
    figures = [_headed(plate, i, j) for i, n in enumerate(plate.across) for j in range(n)]
    return report(figures, path, title=plate.title, intro=plate.caption, across=plate.across)


def _headed(plate: Plate, i: int, j: int) -> FigureSpec:
    """The figure with a heading: its own, or that of the column's first figure with what is measured here."""
    spec, first = plate.rows[i][j], plate.rows[0]
    above = first[j].title if j < len(first) else ""
    other = f"{above.splitlines()[0]}: {spec.y_label or spec.unit}" if above else plate.title
    return replace(spec, title=spec.title or other)
