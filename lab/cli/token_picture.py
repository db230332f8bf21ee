"""The token map as a picture: one cell a position in reading order, coloured by role; frame numbers and text in the cells."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from lab.errors import UsageError
from lab.view.palette import SEQUENTIAL, STROKES

SUFFIXES = (".png", ".svg", ".pdf")
READABLE = 1024  # cells; beyond, words in them are too small to read
LIGHT = "#d9d9d9"


def check_suffix(out: str) -> Path:
    """Raises UsageError unless the name ends in a format that can be drawn."""
    if Path(out).suffix.lower() not in SUFFIXES or "\0" in out:
        raise UsageError(f"--out {out}: end the name in {', '.join(SUFFIXES)}")
    return Path(out)


def draw_tokens(rows: Sequence[dict[str, Any]], path: Path, title: str) -> Path:
    """Draws positions (see `lab.cli.showing.positions`) to a file that `check_suffix` accepts."""
    wide = 32 if len(rows) <= READABLE else 128
    high = -(-len(rows) // wide)
    fig = Figure(figsize=(11, 1.1 + 11 * high / wide), layout="constrained")
    FigureCanvasAgg(fig)
    ax = fig.add_subplot()
    colours = {role: _colour(role, i) for i, role in enumerate(dict.fromkeys(r["role"] for r in rows))}
    for row in rows:
        _cell(ax, row, wide, colours[row["role"]], words=len(rows) <= READABLE)
    ax.set(xlim=(0, wide), ylim=(high, 0), aspect="equal")
    ax.set_title(title, loc="left", fontsize=11, parse_math=False)  # a question may hold "$"
    ax.set_axis_off()
    fig.legend(
        handles=[Patch(color=c, label=role) for role, c in colours.items()], ncols=8, frameon=False, loc="outside lower left"
    )  # fmt: skip
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fig.savefig(path, dpi=150, metadata={"Software": None} if path.suffix == ".png" else None)
    except OSError as e:
        raise UsageError(f"cannot write {path}: {e.strerror or e}") from None
    return path


def _colour(role: str, i: int) -> str:
    """Frames keep one colour in every picture; `last`, where the answer is read, another."""
    if role in ("template", "pad"):
        return LIGHT
    if role in ("frame", "last"):
        return {"frame": STROKES[0].colour, "last": SEQUENTIAL[0]}[role]
    return STROKES[1 + i % (len(STROKES) - 1)].colour


def _cell(ax: Axes, row: dict[str, Any], wide: int, colour: str, *, words: bool) -> None:
    y, x = divmod(row["position"], wide)
    # every other frame is paler, so that one can count them
    pale = row["role"] == "frame" and row["frame"] % 2
    ax.add_patch(
        Rectangle((x + 0.04, y + 0.04), 0.92, 0.92, facecolor=colour, alpha=0.7 if pale else 1.0, linewidth=0)
    )
    text = str(row["frame"]) if row["role"] == "frame" else row["text"].strip()[:5]
    if words and text:
        dark = row["role"] in ("frame", "last")
        ax.text(
            x + 0.5, y + 0.52, text.replace("$", r"\$"), ha="center", va="center",
            fontsize=7 if len(text) < 4 else 5, color="white" if dark else "black",
        )  # fmt: skip
