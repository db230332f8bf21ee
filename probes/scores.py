"""Pruning, seen from outside: which attention edges the answer hangs on, as numbers a figure can be drawn of.

    found = edge_scores(model, items)                      # lab.edges.scores, with the recipe that reproduces it
    lab.view.draw.save(unit_map(found), "units.png")       # layer x kind of pair

The work is done by `lab.edges.scoring`; here are its recipe and its summary. Draws nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from lab.edges.cells import Cell
from lab.edges.scoring import AXES, scores
from lab.edges.validating import CELLS, validate_scores
from lab.errors import UsageError
from lab.items import spec_of
from lab.model.ready import Ready
from lab.recipe import ItemsSpec, ModelSpec, Recipe
from lab.result import Result
from probes.asking import MechanismSpecs, load_spec, prepared

Form = Literal["knockout", "gate", "read"]


class ScoresRecipe(Recipe):
    """Edge scores: model, items, segments, metric. `cells`: how many are held against real cuts; 0: none are."""

    model: ModelSpec = ModelSpec()
    items: ItemsSpec
    n_frames: int = Field(default=8, ge=1)
    segmentation: Literal["strict", "paper"] | tuple[str, ...] = "strict"
    metric: Literal["margin", "margin-right"] = "margin"
    form: Form = "knockout"
    drop: bool = False
    cells: int = Field(default=CELLS, ge=0)
    mechanisms: MechanismSpecs = ()
    added: ClassVar[tuple[str, ...]] = ("mechanisms",)

    def run(self, *, progress: bool = True, model: Any = None) -> list[Result]:
        """Load what the recipe names (or use `model`), score, validate. Raises ConfigError if file or weights changed."""
        model = model or load_spec(self.model)
        return [_scored(model, prepared(self, model), self, progress)]


def edge_scores(
    model: Any, items: Any, *, segmentation: Any = "strict", metric: str = "margin", form: Form = "knockout",
    drop: bool = False, cells: int = CELLS, n_frames: int = 8, show_progress: bool = True,
) -> Result:  # fmt: skip
    """What cutting the edges between every two segments would do, in every layer and head, held against real cuts.

    cells     how many sets of edges are cut for real (`lab.edges.validate_scores`); 0: none, and pruning refuses the scores
    the rest  see `lab.edges.scores`

    Returns a Result with axes (item, layer, head, query, key) in logits; negative where cutting hurts.
    """
    given = list(items) if isinstance(items, list | tuple) else [items]
    what = dict(
        segmentation=segmentation, metric=metric, form=form, drop=drop, cells=cells, n_frames=n_frames
    )
    recipe = _recipe(model, given, what)
    found = scores(
        model, given, segmentation=segmentation, metric=metric, form=form, drop=drop, n_frames=n_frames,
        show_progress=show_progress,
    )  # fmt: skip
    found = replace(found, recipe={} if recipe is None else recipe.plain())
    if not cells:
        return found
    return validate_scores(model, given, found, n=cells, n_frames=n_frames, show_progress=show_progress)


def _scored(model: Any, items: Sequence[Any], recipe: ScoresRecipe, show: bool) -> Result:
    found = edge_scores(
        model, items, segmentation=recipe.segmentation, metric=recipe.metric, form=recipe.form, drop=recipe.drop,
        cells=recipe.cells, n_frames=recipe.n_frames, show_progress=show,
    )  # fmt: skip
    return replace(found, recipe=recipe.plain())


def _recipe(model: Any, items: list[Any], what: dict[str, Any]) -> ScoresRecipe | None:
    """The recipe, or None where model or an item cannot be named again (arrays, wrapped models)."""
    specs: list[Any] = []
    for given in items:
        item, how = (given.item, given.sampling) if isinstance(given, Ready) else (given, {})
        if not getattr(model, "spec", None) or item is None or not isinstance(item.video, str):
            return None
        specs.append(spec_of(item, **how))
    return ScoresRecipe(model=ModelSpec(**model.spec), items=tuple(specs), **what)


def unit_map(result: Result, *, by: Literal["kind", "segment"] = "kind") -> Result:
    """Layer x pair of segments: the scores of all heads (and, by kind, of all frames and options) added up.

    by        "kind": frame:3 and frame:5 are one kind, "frame"; "segment": every pair for itself
    Returns a Result with axes (item, pair, layer); pairs are written as pathways, "frame->option". Pairs whose every
    score is 0 are left out (`notes["left_out"]` names them). Added up, scores say what first order predicts for cutting
    all of a pair: `notes["validation"]["additivity"]` of the scores tells how far that holds.
    Raises UsageError for anything but the scores of `lab.edges.scores`.
    """
    if tuple(result.axes) != AXES:
        raise UsageError(f"expected the scores of lab.edges.scores with axes {AXES}, got {result.axes}")
    if by not in ("kind", "segment"):
        raise UsageError(f"by={by!r}; use 'kind' or 'segment'")
    sums: dict[str, Any] = {}
    heads = result.values.sum(2)  # [item, layer, query, key]; nan where the prompt or the layer has none
    for i, q in enumerate(result.coords["query"]):
        for j, k in enumerate(result.coords["key"]):
            pair = Cell(0, None, q, k).pair if by == "kind" else f"{k}->{q}"
            sums.setdefault(pair, []).append(heads[:, :, i, j])
    tables = {pair: _added(np.stack(parts)) for pair, parts in sums.items()}
    kept = [pair for pair, table in tables.items() if np.nan_to_num(table).any()]
    values = np.stack([tables[p] for p in kept], 1) if kept else np.zeros((len(heads), 0, heads.shape[1]))
    return Result(
        values=values, axes=("item", "pair", "layer"),
        coords={"item": result.coords["item"], "pair": kept, "layer": result.coords["layer"]},
        unit=result.unit, recipe=result.recipe, name="predicted effect of cutting each pair of segments", baseline=0.0,
        notes={"left_out": [p for p in tables if p not in kept]},
    )  # fmt: skip


def _added(parts: Any) -> Any:
    """Sum over the first axis without nan; nan where all are."""
    missing = np.isnan(parts).all(0)
    return np.where(missing, np.nan, np.nansum(parts, 0))
