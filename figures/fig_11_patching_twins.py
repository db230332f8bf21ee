"""Patching grids on twins: where one video's values, put into its twin's run, carry the answer over.

A twin is the same video with one thing changed, so that the right answer is another. Cells: the share of the way from the
twin's answer to the clean one when the clean values are put there, by layer and frame, role, and head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from figures.base import PictureRecipe, noted
from lab.result import Result
from lab.view.plates import FULL, Plate
from lab.view.specs import FigureSpec, figure_spec, text

TITLES = {"frame": "Frames", "role": "Roles", "head": "Heads"}


class PatchingTwinsRecipe(PictureRecipe):
    """No fields of its own."""


def compute(recipe: PatchingTwinsRecipe, *, progress: bool = True) -> list[Result]:
    """Three grids, axes (item, layer, frame | role | head): share of the way recovered."""
    from probes.patching import patching

    model, items = recipe.loaded()
    sites = {"frame": "resid_pre", "role": "resid_pre", "head": "z"}
    made = [
        patching(model, items, by=by, site=site, n_frames=recipe.n_frames, show_progress=progress)  # type: ignore[arg-type]
        for by, site in sites.items()
    ]
    return [noted(r, task=items[0].task) for r in made]


def draw(results: Sequence[Result]) -> Plate:
    """The three grids side by side, on one scale."""
    n = len(results[0].coords["item"])
    cells = tuple(_grid(r) for r in results)
    return Plate(
        "Patching grids on twins", (cells,),
        "Share of the way from the twin's answer (0) to the clean video's (1), measured on the difference of the two answers' logits, when the "
        "clean run's values replace the twin's: the stream entering a layer, at the tokens of one frame (a) or of one role (b), "
        f"or the output of one head at all positions (c). Mean over n = {n} pairs of videos; intervals are in the data. Below 0: away from the clean answer.",
        width=FULL, heights=(2.2,), shares=((1.0, 1.15, 0.8),),
    )  # fmt: skip


def _grid(result: Result) -> FigureSpec:
    axis = result.axes[-1]
    mean = result.mean("item")
    named = replace(mean, coords={"layer": mean.coords["layer"], axis: [text(c) for c in mean.coords[axis]]})
    spec = figure_spec(
        replace(named, low=None, high=None),
        kind="heat",
        title=TITLES[axis],
        caption="",
        limits=(-1.0, 1.0),
        diverging=True,
    )
    return replace(spec, unit="share recovered")
