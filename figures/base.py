"""What the files of figures share: the fields of their recipes, and small helpers for Results and captions. Torch-free.

A file `fig_NN_name.py` is one figure: its recipe class, `compute(recipe) -> Results` and `draw(Results) -> Plate`; the
recipe itself lies beside it as `fig_NN_name.yaml`. `compute` may import torch inside; `draw` never needs a model.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from pydantic import Field

from lab.recipe import FigureRecipe as Owner  # not listed among the recipes that can be run
from lab.recipe import ItemsSpec, ModelSpec
from lab.result import Result

GRID = ("frame", "row", "col")


class PictureRecipe(Owner):
    """Fields of every figure: which model, which items, how many frames of those that do not say their own."""

    model: ModelSpec = ModelSpec()
    items: ItemsSpec
    n_frames: int = Field(default=8, ge=1)

    def run(self, *, progress: bool = True) -> list[Result]:
        """The Results the figure is drawn from; each carries this recipe. Raises ConfigError if a file changed."""
        made = importlib.import_module(type(self).__module__).compute(self, progress=progress)
        return [replace(r, recipe=self.plain()) for r in made]

    def loaded(self) -> tuple[Any, list[Any]]:
        """The model and the items (VideoQA)."""
        from probes.knockout import load_spec

        return load_spec(self.model), self.drawn()

    def item_fields(self) -> list[str]:
        """Names of the fields that hold items."""
        return [n for n in ("items", "holdout") if n in type(self).model_fields]

    def drawn(self, name: str = "items") -> list[Any]:
        """The items of one of the `item_fields` alone."""
        from lab.items import load_items

        spec = getattr(self, name)
        given = [s.model_dump(mode="json") for s in spec] if isinstance(spec, tuple) else spec
        return list(load_items(given, base=self.folder))


def about(items: Sequence[Any]) -> dict[str, Any]:
    """Notes that let a Result with an item axis be averaged by task, with videos resampled together."""
    from lab.edges.evidence import video_key
    from probes.asking import item_keys

    keys = item_keys(list(items))
    tasks = {k: i.task for k, i in zip(keys, items, strict=True) if i.task}
    videos = {k: video_key(i) for k, i in zip(keys, items, strict=True)}
    return {"groups": {"item": videos}, **({"task": tasks} if len(tasks) == len(keys) else {})}


def noted(result: Result, **notes: Any) -> Result:
    """The Result with further notes."""
    return replace(result, notes={**result.notes, **notes})


def pictures(frames: Any, n: int) -> Result:
    """The first of every `len / n` frames (uint8 [frame, channel, height, width] or channel last) as a Result."""
    array = np.asarray(frames)
    array = np.moveaxis(array, 1, -1) if array.shape[1] == 3 and array.shape[-1] != 3 else array
    array = array[:: max(1, len(array) // n)][:n]
    axes = ("frame", "y", "x", "channel")
    coords: dict[str, list[Any]] = {a: list(range(k)) for a, k in zip(axes, array.shape, strict=True)}
    return Result(array.astype(np.uint8), axes, coords, "colour, 0 to 255", {}, "frames")


def by_task(result: Result) -> Result:
    """Mean over the items of each task, with intervals; all items together where they have no task."""
    if isinstance(result.notes.get("task"), Mapping):
        return result.mean_by("task")
    return noted(result, task={str(c): "all" for c in result.coords["item"]}).mean_by("task")


def counted(result: Result) -> str:
    """How many items a mean is over: "n = 20 each", or for every label its own."""
    n = (result.notes.get("n") or {}).get("item", len(result.coords.get("item", ())) or 1)
    if not isinstance(n, dict):
        return f"n = {n}"
    each = sorted(set(n.values()))
    if len(each) == 1:
        return f"n = {each[0]} each"
    return "n = " + ", ".join(f"{k} ({heading(t)})" for t, k in n.items())


def heading(name: Any) -> str:
    """A task's name as people read it."""
    return str(name).replace("_", " ")


def tall(name: str) -> str:
    """The name with a capital."""
    return name[:1].upper() + name[1:]


BANDS = "Bands: 95 % bootstrap intervals, videos resampled."
