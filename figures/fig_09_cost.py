"""What one knock-out sweep costs: ours, naive, TransformerLens and nnsight, on the same model, prompt, pathways and windows.

Every tool computes the same logits (the largest difference is noted). Naive is the released method: eager attention
with an additive mask, one full forward a point, the vision tower in it. CPU seconds of one thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from pydantic import Field

from figures.base import PictureRecipe, noted
from lab.result import Result
from lab.view.plates import COLUMN, Plate
from lab.view.specs import FigureSpec, figure_spec

FAST, REFERENCE, NAIVE, LENS, NNSIGHT = "ours, fast", "ours, reference", "naive", "TransformerLens", "nnsight"
LEAST = 2.0  # the fast executor must be this much cheaper than naive: the ratio the figure states


class CostRecipe(PictureRecipe):
    """items: the first one is used; window: layers cut together; rounds: how often every tool runs the sweep."""

    pathways: tuple[str, ...] = Field(
        default=("cross-frame", "video->question+option", "video->last", "question+option->last"),
        min_length=1,
    )
    window: int = Field(default=3, ge=1)
    rounds: int = Field(default=3, ge=1)


def compute(recipe: CostRecipe, *, progress: bool = True) -> list[Result]:
    """Seconds of the whole sweep (tool, round), and the largest difference of logits to the reference (tool)."""
    import torch

    from figures.sweeping_tools import Case, works

    model, items = recipe.loaded()
    case = Case.of(model, items[0], recipe.n_frames, recipe.pathways, recipe.window)
    tools, left_out = works(case)
    with torch.no_grad():
        seconds, apart = _measured(tools, recipe.rounds, progress)
    names, rounds = list(tools), list(range(1, recipe.rounds + 1))
    notes = {
        "positions": case.ready.n_pos,
        "points": len(case.cuts),
        "layers": model.cfg.n_layers,
        "left_out": left_out,
        **_where(),
    }
    return [
        Result(np.array([seconds[n] for n in names]), ("tool", "round"), {"tool": names, "round": rounds}, "seconds (CPU, one thread)", {}, "seconds of one sweep", notes),
        Result(np.array([apart[n] for n in names]), ("tool",), {"tool": names}, "largest difference of logits to the reference", {}, "same numbers", notes),
    ]  # fmt: skip


def _measured(
    tools: dict[str, Any], rounds: int, show: bool
) -> tuple[dict[str, list[float]], dict[str, float]]:
    from lab.bench.measuring import paired
    from lab.runs import progress as bar

    said = {name: work() for name, work in bar(list(tools.items()), desc="tools", show=show)}  # also warms up
    apart = {n: float((s - said[REFERENCE]).abs().max()) for n, s in said.items()}
    return paired(tools, pairs=rounds, warm=0), apart


def _where() -> dict[str, Any]:
    from lab.bench.measuring import setting

    found = setting()
    return {k: found[k] for k in ("date", "device_name", "threads")}


def check(results: Sequence[Result]) -> list[str]:
    """What is wrong with measured Results: counts, units, and the order that the figure states."""
    seconds, apart = results
    wrong = [] if seconds.unit.startswith("seconds") else [f"unit of times is {seconds.unit!r}, not seconds"]
    if not (np.isfinite(seconds.values).all() and (seconds.values > 0).all()):
        wrong.append("a time is not above 0")
    if float(apart.values.max()) > 1e-3:
        wrong.append(f"the tools' logits differ by {float(apart.values.max()):.2g}, more than 1e-3")
    ratio = float(np.median(seconds.select(tool=NAIVE).values / seconds.select(tool=FAST).values))
    if ratio < LEAST:
        wrong.append(f"naive takes {ratio:.2f} times as long as ours, less than {LEAST}")
    return wrong


def draw(results: Sequence[Result]) -> Plate:
    """One bar a tool, with its ratio to ours."""
    seconds, apart = results
    notes = seconds.notes
    left = "; ".join(f"{k} is left out: {v}" for k, v in notes["left_out"].items())
    return Plate(
        "Cost of one knock-out sweep", ((_bars(seconds),),),
        f"CPU seconds of the same sweep ({notes['points']} knock-outs, {notes['positions']} positions, {notes['layers']} layers) by each tool; bars: median of "
        f"{len(seconds.coords['round'])} rounds, whiskers: fastest and slowest. All logits agree within {float(apart.values.max()):.1g}. Naive: eager attention with an additive "
        f"mask, a full forward with its vision tower for every knock-out. One prompt; measured on {notes['device_name']}, {notes['threads']} thread, {notes['date']}. {left}",
        width=COLUMN, heights=(1.75,), letters=False,
    )  # fmt: skip


def _bars(seconds: Result) -> FigureSpec:
    low, middle, high = (f(seconds.values, axis=1) for f in (np.min, np.median, np.max))
    ours = float(middle[seconds.coords["tool"].index(FAST)])
    names = [
        n if n == FAST else f"{n} ({m / ours:.1f}\u00d7)"
        for n, m in zip(seconds.coords["tool"], middle, strict=True)
    ]
    mean = noted(replace(seconds, values=middle, low=low, high=high, axes=("tool",), coords={"tool": names}))
    spec = figure_spec(mean, kind="barh", title="One sweep, the same numbers", caption="")
    return replace(spec, unit="CPU seconds (log scale)", log="x")
