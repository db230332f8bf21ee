"""Words on frames: a Result (frame, row, col) with `notes["words"]` drawn over the pictures it is about. Torch-free."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lab.errors import UsageError
from lab.result import Result, write_bytes
from lab.view.matplotlib_out import SUFFIXES, styled

ACROSS = 4  # frames in a row of the picture
LONG = 9  # characters of a word


def paint(result: Result, frames: Any, path: str | Path, *, dpi: int = 150) -> Path:
    """Write every token's word over its place in its frame, darker where the model is less sure; .png, .svg or .pdf.

    frames  uint8 [frame, height, width, 3]; may be more than the Result has (tubelets take the first of theirs)
    Raises UsageError for a Result without words, or pictures that do not fit.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"cannot tell the format of {path}; end its name in {', '.join(SUFFIXES)}")
    pictures = _pictures(result, frames)
    with styled():
        fig, out = _drawn(result, pictures), io.BytesIO()
        about = {".png": {"Software": None}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}[
            path.suffix.lower()
        ]
        fig.savefig(out, format=path.suffix.lower()[1:], dpi=dpi, metadata=about)
    return write_bytes(path, out.getvalue())


def _pictures(result: Result, frames: Any) -> NDArray[np.uint8]:
    pictures = np.asarray(frames)
    if result.axes != ("frame", "row", "col") or "words" not in result.notes:
        raise UsageError(
            f"words are painted from a Result (frame, row, col) with words in its notes; this has {result.axes}"
        )
    if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[-1] != 3:
        raise UsageError(
            f"frames must be uint8 [frame, height, width, 3], got {pictures.dtype} {pictures.shape}"
        )
    n = result.shape[0]
    if len(pictures) < n or len(pictures) % n:
        raise UsageError(f"{len(pictures)} pictures for {n} frames of words; give one each, or a multiple")
    return pictures[:: len(pictures) // n]


def _drawn(result: Result, pictures: NDArray[np.uint8]) -> Figure:
    n, rows, cols = result.shape
    across = min(n, ACROSS)
    down = -(-n // across)
    wide = max(2.2, 0.62 * cols)
    fig = Figure(figsize=(across * wide, down * wide * rows / cols + 0.7), layout="constrained")
    FigureCanvasAgg(fig)
    axes = fig.subplots(down, across, squeeze=False).ravel()
    for ax in axes:
        ax.axis("off")
    for f in range(n):
        _frame(axes[f], result, f, pictures[f])
    fig.suptitle(
        f"{result.name} ({result.notes.get('mode', '')}); faint: less sure", fontsize=10, x=0.01, ha="left"
    )
    return fig


def _frame(ax: Any, result: Result, f: int, picture: NDArray[np.uint8]) -> None:
    _, rows, cols = result.shape
    ax.imshow(picture, extent=(0, cols, rows, 0), aspect="auto")
    ax.set_title(f"frame {result.coords['frame'][f]}", fontsize=8)
    size = max(3.5, min(9.0, 34 / max(cols, 1)))
    for r in range(rows):
        for c in range(cols):
            p, word = float(result.values[f, r, c]), shown(result.notes["words"][f][r][c])
            if np.isfinite(p) and word:
                box = {"facecolor": "black", "alpha": 0.55, "edgecolor": "none", "pad": 0.8}
                colour = (1.0, 1.0, 1.0, 0.5 + 0.5 * min(1.0, max(0.0, p)))
                ax.text(
                    c + 0.5, r + 0.5, word, ha="center", va="center", fontsize=size, color=colour, bbox=box
                )


def shown(word: str) -> str:
    """A token's text as it fits on a patch: spaces and line ends made visible, long ones cut."""
    word = word.strip() or word.replace("\n", "\\n").replace(" ", "·")
    word = "".join(c if c.isprintable() else "?" for c in word)
    return word if len(word) <= LONG else f"{word[: LONG - 1]}…"
