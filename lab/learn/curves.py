"""Draws how a training run went: `python -m lab.learn.curves RUN [-o curves.png]`.

RUN is the folder of a `Trainer`. Above: the loss of every step; below: accuracy on held-out clips by task; lines
between stages.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lab.errors import UsageError
from lab.view.palette import stroke

Line = dict[str, Any]


def draw(folder: str | Path) -> Figure:
    """The figure of a run. Raises UsageError for a folder without a journal."""
    journal, losses = _lines(Path(folder) / "journal.jsonl"), _lines(Path(folder) / "losses.jsonl")
    if not journal:
        raise UsageError(f"{folder} has no journal.jsonl with lines in it: not the folder of a training run")
    figure = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True)
    _losses(above, losses)
    _held_out(below, [line for line in journal if "held_out" in line])
    for line in journal:
        if "ends" in line:
            _stage(above, below, line)
    return figure


def _lines(path: Path) -> list[Line]:
    text = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in text]


def _losses(ax: Axes, losses: list[Line]) -> None:
    steps, values = [line["step"] for line in losses], [line["loss"] for line in losses]
    ax.plot(steps, values, ".", markersize=1, color=stroke(0).colour)
    ax.set(ylabel="loss of a step (nats)", yscale="log")


def _held_out(ax: Axes, found: list[Line]) -> None:
    names = list(dict.fromkeys(name for line in found for name in line["held_out"]))
    for i, name in enumerate(names):
        rows = [(line["step"], line["held_out"][name]) for line in found if name in line["held_out"]]
        points = [(step, v["letter"] if isinstance(v, dict) else v) for step, v in rows]
        look = stroke(i)
        ax.plot(
            *zip(*points, strict=True),
            look.dash,
            marker=look.marker,
            markersize=3,
            color=look.colour,
            label=name,
        )
    ax.set(xlabel="step", ylabel="held-out accuracy, letters", ylim=(0, 1.02))
    if names:
        ax.legend(fontsize=7, ncols=2, frameon=False)


def _stage(above: Axes, below: Axes, line: Line) -> None:
    for ax in (above, below):
        ax.axvline(line["step"], color="#bbbbbb", linewidth=0.8)
    above.annotate(
        line["stage"], (line["step"], 1), xycoords=("data", "axes fraction"), rotation=90, fontsize=6,
        va="top", ha="right", color="#333333", bbox={"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 0.6},
    )  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Draw loss and accuracy of a training run.")
    parser.add_argument("run", type=Path)
    parser.add_argument("-o", "--out", type=Path, help="picture to write; RUN/curves.png by default")
    args = parser.parse_args()
    draw(args.run).savefig(args.out or args.run / "curves.png", dpi=150)


if __name__ == "__main__":
    main()
