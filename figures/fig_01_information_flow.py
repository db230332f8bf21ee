"""Information flow by pathway and task: the curves of Map the Flow (arXiv 2510.13251, figures 2 and 3).

Every pathway is cut in a window of layers round each layer; the curve is the change of the probability of the answer
that the clean run gives. Rows: the paper's four analyses; columns: tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pydantic import Field

from figures.base import BANDS, PictureRecipe, by_task, counted, heading, noted, tall
from lab.result import Result
from lab.view.plates import FULL, Plate, one_scale
from lab.view.specs import figure_spec


class InformationFlowRecipe(PictureRecipe):
    """The paper's eleven curves. window: layers cut together."""

    window: int = Field(default=3, ge=1)


def compute(recipe: InformationFlowRecipe, *, progress: bool = True) -> list[Result]:
    """One Result, axes (item, pathway, layer): change of the answer's probability in percent."""
    from probes.knockout import KnockoutRecipe
    from probes.pathways import PANEL

    asked = KnockoutRecipe(
        model=recipe.model, items=recipe.items, n_frames=recipe.n_frames, window=recipe.window,
        pathways=tuple(p for group in PANEL.values() for p in group),
    ).at(recipe.folder)  # fmt: skip
    (found,) = asked.run(progress=progress, executor="fast")
    return [noted(found, panel=[[k, list(v)] for k, v in PANEL.items()])]


def draw(results: Sequence[Result]) -> Plate:
    """Rows: analyses; columns: tasks. Each row has one scale."""
    (found,) = results
    right = any(v is True for v in found.notes["correct"].values())
    chosen = found.split("correct") if right else found
    means = by_task(chosen)
    tasks = means.coords["task"]
    panel: list[Any] = found.notes["panel"]  # a list: a dict comes back from its file in another order
    last = len(panel) - 1
    rows = [
        one_scale([_cell(means, t, ways, i == 0, i == last) for t in tasks])
        for i, (_, ways) in enumerate(panel)
    ]
    which = "answered right in the clean run" if right else "all of them (none is answered right)"
    window = found.notes["window"]
    return Plate(
        "Information flow by pathway and task", tuple(rows),
        f"Change of the probability of the model's answer (%, negative: less probable) when a pathway's attention edges are cut in a "
        f"window of {window} layers round each layer. Rows: {', '.join(name for name, _ in panel)}; columns: tasks. Questions {which}, "
        f"{counted(means)}. {BANDS}",
        width=FULL, heights=(1.35, *(1.2,) * (last - 1), 1.35), letters=False,
    )  # fmt: skip


def _cell(means: Result, task: Any, ways: Sequence[str], top: bool, bottom: bool) -> Any:
    n = (means.notes["n"] or {}).get("item", {})
    count = f"\nn = {n[task]}" if isinstance(n, dict) and task in n else ""
    spec = figure_spec(
        means.select(task=task, pathway=list(ways)),
        title=tall(heading(task)) + count if top else "",
        caption="",
    )
    named = tuple(s.replace("->", " \u2192 ") for s in spec.series)
    return replace(spec, series=named, x_label="Layer" if bottom else "", y_label="Change of p (%)")
