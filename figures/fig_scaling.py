"""How the cost of knock-out sweeps grows, and what one knock-out costs elsewhere: drawn from the bench's numbers.

python -m figures.fig_scaling [--data lab/bench/data/scaling_cpu.json] [--out figures/scaling.png]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lab.view.matplotlib_out import STYLE

HERE = Path(__file__).resolve().parent
DATA = HERE.parent / "lab" / "bench" / "data" / "scaling_cpu.json"
NAIVE, FAST, GREY = "#c0392b", "#1f6fb2", "#777777"
X = {
    "frames": ("positions", "Positions"),
    "layers": ("layers", "Layers"),
    "windows": ("points", "Knock-outs in the sweep"),
}
TITLES = {"frames": "Longer prompts", "layers": "Deeper models", "windows": "More knock-outs"}
OTHERS = (
    "ours, fast, stored", "clean, sdpa", "ours, fast, no store", "clean with its tower", "ours, reference", "clean, eager",
    "eager with a mask", "nnsight", "TransformerLens",
)  # fmt: skip


def growth(ax: Axes, what: str, rows: Sequence[dict[str, Any]]) -> None:
    """Seconds of a whole sweep, both ways, on logarithmic axes; the ratio beside every point."""
    key, label = X[what]
    x = [r[key] for r in rows]
    fast = [r["store_s"] + r["fast_s"] for r in rows]
    naive = [r["naive_s_scaled"] for r in rows]
    ax.loglog(x, naive, "o-", color=NAIVE, label="naive: one forward a knock-out")
    ax.loglog(x, fast, "s-", color=FAST, label="fast: from one stored run")
    for at, low, row in zip(x, fast, rows, strict=True):
        ax.annotate(
            f"{row['ratio']:.0f}x", (at, low), (0, -14), textcoords="offset points", ha="center", color=FAST
        )
    ax.set_xticks(x, [f"{v:,}" for v in x])
    ax.minorticks_off()
    ax.margins(0.12)
    ax.set(title=TITLES[what], xlabel=label, ylabel="Seconds, one thread")


def elsewhere(ax: Axes, found: dict[str, Any]) -> None:
    """One knock-out by each tool over a clean forward."""
    ratios = found["ratios"]
    names = [n for n in OTHERS if n in ratios][::-1]
    colours = [
        FAST if n.startswith("ours, fast") else GREY if n.startswith("clean") else NAIVE for n in names
    ]
    ax.barh(names, [ratios[n] for n in names], color=colours)
    for i, n in enumerate(names):
        ax.annotate(
            f"{ratios[n]:.2f}", (ratios[n], i), (4, 0), textcoords="offset points", va="center", fontsize=9
        )
    ax.axvline(1, color=GREY, linewidth=0.8, linestyle=":")
    ax.margins(x=0.15)
    ax.set(title=f"One knock-out, {found['positions']:,} positions", xlabel="Times a clean SDPA forward")


def draw(data: dict[str, Any]) -> Figure:
    """Four panels."""
    with rc_context(STYLE):
        fig = Figure(figsize=(11, 7.6), layout="constrained")
        FigureCanvasAgg(fig)
        axes = fig.subplots(2, 2).ravel()
        for ax, (what, rows) in zip(axes, data["pieces"].items(), strict=False):
            growth(ax, what, rows)
        axes[0].legend(loc="upper left")
        elsewhere(axes[3], data["others"])
        base, text = data["base"], data["pieces"]["windows"][0]["positions"]
        fig.supxlabel(
            f"Ten text pathways, d {data['shape']['d']}; unless it grows: {text:,} positions, {base['layers']} layers, {base['windows']} windows of a third of "
            "the layers (all of them where layers grow).\nCPU time of one thread; of the naive points some are timed in the same run, and scaled.",
            fontsize=8, color="#555555", x=0.01, ha="left",
        )  # fmt: skip
        return fig


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw the cost of knock-out sweeps.")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--out", type=Path, default=HERE / "scaling.png")
    args = parser.parse_args(argv)
    fig = draw(json.loads(args.data.read_text(encoding="utf-8")))
    fig.savefig(args.out, dpi=130, metadata={"Software": None})
    print(args.out)


if __name__ == "__main__":
    main()
