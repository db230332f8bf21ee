"""A lens table as a picture for papers: layers by tokens, the word in each cell, its probability as the colour."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lab.result import write_bytes
from lab.view.matplotlib_out import SUFFIXES, styled
from lab.view.palette import anchors, rgb
from lab.view.specs import FigureSpec
from lab.view.words import shown

UNDATED: dict[str, dict[str, Any]] = {
    ".png": {"Software": None}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None, "ModDate": None},
}  # fmt: skip


def save_lens(spec: FigureSpec, shares: Sequence[Sequence[float]], path: Path, *, dpi: int = 150) -> Path:
    """Write the table of `spec` (first column: the layer) as .png, .svg or .pdf.

    shares  0..1 for every cell, as `spec.rows` without their first column: the colour
    """
    suffix, out = path.suffix.lower(), io.BytesIO()
    assert suffix in SUFFIXES
    with styled():
        fig = _drawn(spec, shares)
        fig.savefig(out, format=suffix[1:], dpi=dpi, metadata=UNDATED[suffix])
    return write_bytes(path, out.getvalue())


def _drawn(spec: FigureSpec, shares: Sequence[Sequence[float]]) -> Figure:
    n, m = len(spec.rows), len(spec.columns) - 1
    fig = Figure(figsize=(1.0 + 0.62 * m, 1.3 + 0.27 * n), layout="constrained")
    FigureCanvasAgg(fig)
    ax = fig.add_subplot()
    ax.set(xlim=(0, m), ylim=(n, 0))
    for i, row in enumerate(spec.rows):
        for j, word in enumerate(row[1:]):
            _cell(ax, j, i, shown(word), shares[i][j])
    ax.set_xticks([j + 0.5 for j in range(m)], [shown(c) for c in spec.columns[1:]], rotation=35, ha="right")
    ax.set_yticks([i + 0.5 for i in range(n)], [row[0] for row in spec.rows])
    ax.set(ylabel="Layer")
    ax.set_title(spec.title, loc="left")
    fig.supxlabel(spec.caption, fontsize=8, color="#555555", x=0.01, ha="left")
    return fig


def _cell(ax: Any, x: int, y: int, word: str, share: float) -> None:
    scale = anchors(False)
    colour = scale[round(min(1.0, max(0.0, share)) * (len(scale) - 1))]
    r, g, b = rgb(colour)
    ink = "#000000" if 0.299 * r + 0.587 * g + 0.114 * b > 140 else "#ffffff"
    ax.fill([x, x + 1, x + 1, x], [y, y, y + 1, y + 1], color=colour, edgecolor="white", linewidth=0.5)
    ax.text(x + 0.5, y + 0.5, word, ha="center", va="center", fontsize=7, color=ink)
