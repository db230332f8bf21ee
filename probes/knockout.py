"""Attention knock-out (Map the Flow, arXiv 2510.13251, section 3): cut a pathway in a window of layers, watch the answer move.

1 run the prompt clean; note p of the token it would answer   2 for every pathway and centre layer, cut the pathway's
edges in the window round that layer, in all heads, and run again   3 the change of p, in percent, is the curve.
The work is done by `lab.edges.sweeping`; here are the question's name, its recipe and its defaults. Draws nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from lab.edges.dense import dense_edges
from lab.edges.pathways import PATHWAYS, PORTABLE, cut_mask, listed, usual_pathways
from lab.edges.sweeping import (
    UNIT,
    WINDOW,
    Executor,
    Metric,
    Style,
    Sweep,
    as_ready,
    journal_of,
    layers_of,
    map_of,
    run_sweep,
)
from lab.items import load_items, spec_of
from lab.model.ready import Ready
from lab.recipe import ItemsSpec, ModelSpec, Recipe
from lab.result import Result
from lab.runs import Cancel
from lab.slots import Plan
from probes.asking import MechanismSpecs, load_spec, prepared

__all__ = [
    "PATHWAYS", "PORTABLE", "UNIT", "WINDOW", "KnockoutRecipe", "Metric", "cut_mask", "dense_edges", "knockout",
    "layers_of", "load_spec", "usual_pathways",
]  # fmt: skip


DEFAULT: Executor = "reference"


class KnockoutRecipe(Recipe):
    """A knock-out sweep: model, items, pathways, window. `n_frames` holds for items that do not say their own."""

    model: ModelSpec = ModelSpec()
    items: ItemsSpec
    n_frames: int = Field(default=8, ge=1)
    pathways: tuple[str, ...] = Field(default=PATHWAYS, min_length=1)
    window: int = Field(default=WINDOW, ge=1)
    metric: Metric = "argmax"
    metrics: tuple[Metric, ...] = ()  # several at once; empty: `metric` alone
    style: Style = "center"
    target: str | tuple[str | None, ...] | None = None
    per_token: bool = False
    heads: Literal["each"] | tuple[int, ...] | None = None
    frame_pairs: Literal["each"] | tuple[tuple[int, int], ...] | None = None
    mechanisms: MechanismSpecs = ()
    added: ClassVar[tuple[str, ...]] = ("mechanisms",)

    def run(
        self, *, progress: bool = True, model: Any = None, out: str | Path | None = None, executor: Executor = DEFAULT,
    ) -> list[Result]:  # fmt: skip
        """Load what the recipe names (or use `model`) and sweep. Raises ConfigError if a file or the weights changed."""
        model = model or load_spec(self.model)
        items = load_items(self.items, base=self.folder)
        ready = prepared(self, model, items)
        what = Sweep(
            listed(self.pathways), self.window, self.style, self.metrics or (self.metric,), executor, heads=self.heads,
            frame_pairs=self.frame_pairs, target=self.target, per_token=self.per_token,
        )  # fmt: skip
        passing = [True] * len(ready)
        return [
            run_sweep(
                model,
                list(items),
                ready,
                what,
                recipe=self,
                journal=self,
                out=out,
                show=progress,
                passing=passing,
            )
        ]


def knockout(
    model: Any, items: Any, pathways: Sequence[str] | None = None, *, window: int = WINDOW, metric: Metric = "argmax",
    n_frames: int = 8, out: str | Path | None = None, cancel: Cancel | None = None, show_progress: bool = True,
    executor: Executor = DEFAULT,
) -> Result:  # fmt: skip
    """Sweep a centred window of cut layers over the model, for every pathway and item.

    items     one or several VideoQA or Ready (one world each)
    pathways  see `lab.edges.pathways`: "cross-frame", or "keys->queries" for any pair of segments; None: the paper's
              five curves, as far as the first item's prompt has them
    window    number of layers; near the ends it is clipped, not shifted (the paper's rule), so end points cut fewer
    metric    "argmax": p of the token the clean run answers (the paper's); "answer": p of the right option's letter
    out       folder for a journal: an interrupted sweep goes on where it stopped
    executor  "reference": dense masks, one full forward per point; "fast": the same numbers up to rounding, from one
              stored clean run

    Returns a Result with axes (item, pathway, layer); layers 1-based. `notes` holds each item's clean probability.
    Raises UsageError for unknown pathways or segments; warns (LabWarning) when a pathway changed nothing at all.
    """
    ready = as_ready(model, items, pathways, n_frames)
    names = usual_pathways(map_of(ready[0])) if pathways is None else listed(pathways)
    what = Sweep(names, window, metrics=(metric,), executor=executor)
    recipe = _recipe(model, ready, names, window, metric, n_frames)
    journal = None if out is None else journal_of(model, ready, what)
    return run_sweep(
        model, [r.item for r in ready], ready, what, recipe=recipe, journal=journal, out=out, cancel=cancel,
        show=show_progress,
    )  # fmt: skip


def _recipe(
    model: Any, ready: Sequence[Ready], pathways: Sequence[str], window: int, metric: Metric, n_frames: int
) -> KnockoutRecipe | None:
    """The recipe of a sweep, or None where an item, its mechanisms or the model cannot be named again (arrays, wrapped
    models)."""
    if not getattr(model, "spec", None) or any(
        r.item is None or not isinstance(r.item.video, str) or r.plan != Plan() for r in ready
    ):
        return None
    items = tuple(spec_of(r.item, **r.sampling) for r in ready if r.item is not None)
    return KnockoutRecipe(
        model=ModelSpec(**model.spec), items=items, n_frames=n_frames, pathways=tuple(pathways), window=window, metric=metric
    )  # fmt: skip
