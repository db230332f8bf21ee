"""When the answer appears: its probability at the last position, read at every layer (Map the Flow, generation probability).

The lens with the model's final norm, and below it what the paper's scripts compute (no norm before the last layer): there
much of the late rise comes from the missing norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from figures.base import BANDS, PictureRecipe, about, by_task, counted, heading, noted, tall
from lab.result import Result
from lab.view.plates import FULL, Plate, one_scale
from lab.view.specs import FigureSpec, figure_spec


class AnswerByLayerRecipe(PictureRecipe):
    """No fields of its own."""


def compute(recipe: AnswerByLayerRecipe, *, progress: bool = True) -> list[Result]:
    """Two Results, axes (item, answer, layer): the normed lens and the raw one."""
    from probes.lens import gen_prob

    model, items = recipe.loaded()
    notes = about(items)
    made = [
        gen_prob(model, items, mode=m, n_frames=recipe.n_frames, show_progress=progress)
        for m in ("normed", "raw")
    ]
    return [noted(r, **notes) for r in made]


def draw(results: Sequence[Result]) -> Plate:
    """Rows: normed and raw lens; columns: tasks."""
    rows = [_row(r, i == 0) for i, r in enumerate(results)]
    means = by_task(results[0])
    return Plate(
        "Probability of the answer by layer", tuple(rows),
        "Probability of the right option's letter and mean probability of the other letters at the last position, read at every layer with "
        "the model's final norm (top) and without it (bottom, as the paper's scripts do). All questions, answered right or wrong, "
        f"{counted(means)}. {BANDS}",
        width=FULL, heights=(1.45, 1.45), letters=False,
    )  # fmt: skip


def _row(result: Result, top: bool) -> tuple[FigureSpec, ...]:
    means = by_task(result)
    cells = [_cell(means, t, top) for t in means.coords["task"]]
    return one_scale(cells)


def _cell(means: Result, task: str, top: bool) -> FigureSpec:
    n = means.notes["n"]["item"][task]
    spec = figure_spec(
        means.select(task=task), title=f"{tall(heading(task))}\nn = {n}" if top else "", caption=""
    )
    norm = "normed" if means.notes["mode"] == "normed" else "raw"
    return replace(
        spec,
        x_label="" if top else "Layer",
        y_label=f"Probability ({norm})",
        series=("right option", "other options"),
    )
