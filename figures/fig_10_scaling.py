"""How the cost of knock-out sweeps grows with positions, layers and knock-outs, naive and from one stored run.

Longer prompts by more frames of the same video, deeper models by stacking the model's own layers, more knock-outs by more
windows. Naive is one forward with a dense mask a knock-out, of which some are timed and scaled. CPU seconds, one thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from pydantic import Field

from figures.base import PictureRecipe
from lab.result import Result
from lab.view.plates import FULL, Plate
from lab.view.specs import FigureSpec, figure_spec

NAMES = {"positions": "Longer prompts", "layers": "Deeper models", "knock-outs": "More knock-outs"}
WAYS = ("naive", "fast")
LEAST = 1.5  # at the largest size fast must be this much cheaper


class ScalingRecipe(PictureRecipe):
    """items: the first one is used; frames, depths (times the model's layers), windows: the sizes measured."""

    frames: tuple[int, ...] = Field(default=(8, 16, 32, 64), min_length=2)
    depths: tuple[int, ...] = Field(default=(1, 2, 4), min_length=2)
    windows: tuple[int, ...] = Field(default=(1, 2, 4, 8), min_length=2)
    pathways: tuple[str, ...] = Field(
        default=("video->question+option", "video->last", "question+option->last", "last->last"), min_length=1
    )
    timed: int = Field(default=3, ge=2)


def compute(recipe: ScalingRecipe, *, progress: bool = True) -> list[Result]:
    """Three Results, axes (way, size): seconds of a sweep as positions, layers and knock-outs grow."""
    import torch

    from figures.growing import stacked, timed

    model, items = recipe.loaded()
    n = model.cfg.n_layers
    with torch.no_grad():
        longer = [timed(model, items[0], f, recipe, n) for f in recipe.frames]
        deeper = [timed(stacked(model, k), items[0], recipe.n_frames, recipe, n * k) for k in recipe.depths]
        more = [timed(model, items[0], recipe.frames[-1], recipe, w) for w in recipe.windows]
    rows = {"positions": longer, "layers": deeper, "knock-outs": more}
    return [_result(what, found) for what, found in rows.items()]


def _result(what: str, found: Sequence[dict[str, Any]]) -> Result:
    from lab.bench.measuring import setting

    key = {"positions": "positions", "layers": "layers", "knock-outs": "points"}[what]
    kept = {row[key]: row for row in found}  # two sizes may come to the same (tubelets)
    about = setting()
    seconds = np.array(
        [[r["naive_s_scaled"] for r in kept.values()], [r["store_s"] + r["fast_s"] for r in kept.values()]]
    )
    notes = {
        "rows": [{k: r[k] for k in ("positions", "layers", "points", "max_difference", "fallbacks")} for r in kept.values()],
        **{k: about[k] for k in ("date", "device_name", "threads")},
    }  # fmt: skip
    return Result(
        seconds,
        ("way", what),
        {"way": list(WAYS), what: list(kept)},
        "seconds (CPU, one thread)",
        {},
        NAMES[what],
        notes,
    )


def check(results: Sequence[Result]) -> list[str]:
    """What is wrong with measured Results: units, exactness, and that naive costs more at the largest size."""
    wrong: list[str] = []
    for r in results:
        if not r.unit.startswith("seconds") or not (r.values > 0).all():
            wrong.append(f"{r.name}: {r.unit!r} is no time above 0")
        if max(row["max_difference"] for row in r.notes["rows"]) > 1e-3:
            wrong.append(f"{r.name}: fast and naive logits differ by more than 1e-3")
        ratio = float(r.values[0, -1] / r.values[1, -1])
        if ratio < LEAST:
            wrong.append(
                f"{r.name}: naive takes {ratio:.2f} times as long at the largest size, less than {LEAST}"
            )
    return wrong


def draw(results: Sequence[Result]) -> Plate:
    """Three growths on logarithmic axes."""
    notes, worst = results[0].notes, max(row["max_difference"] for r in results for row in r.notes["rows"])
    usual = results[1].notes["rows"][0]
    return Plate(
        "How the cost of a sweep grows", (tuple(_curve(r) for r in results),),
        "CPU seconds of a whole sweep: naive, one forward with a dense mask for each knock-out (some timed in the same run and scaled), and fast, one "
        f"stored clean run and all knock-outs from it. (a) more frames, (b) the model's layers stacked, at {usual['positions']} positions, (c) more windows, at "
        f"{results[2].notes['rows'][0]['positions']} positions. Numbers: naive over fast. Logits of both agree within {worst:.1g}. One prompt; measured on "
        f"{notes['device_name']}, {notes['threads']} thread, {notes['date']}.",
        width=FULL, heights=(2.1,),
    )  # fmt: skip


def _curve(r: Result) -> FigureSpec:
    what = r.axes[1]
    ratio = r.values[0] / r.values[1]
    title = f"{NAMES[what]}: {ratio[0]:.1f}\u00d7 to {ratio[-1]:.1f}\u00d7"
    spec = figure_spec(r, title=title, caption="")
    return replace(
        spec,
        reference=None,
        log="xy",
        x_label=what.capitalize() + " (log scale)",
        y_label="CPU seconds (log scale)",
    )
