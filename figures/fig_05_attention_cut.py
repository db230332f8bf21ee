"""Attention maps, clean and with the edges between frames cut: where the last position and the frames look.

What is much looked at is not always used: the knock-out of the same edges stands beside the maps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from figures.base import BANDS, GRID, PictureRecipe, about, noted, pictures
from lab.result import Result
from lab.view.plates import FULL, Plate
from lab.view.specs import FigureSpec, figure_spec, share_limits, text


class AttentionCutRecipe(PictureRecipe):
    """No fields of its own: the policy cuts what frames read of earlier frames, in every layer."""


def compute(recipe: AttentionCutRecipe, *, progress: bool = True) -> list[Result]:
    """Frame maps (item, run, layer, query frame, key frame), the knock-out (item, layer), maps on frames of item 1, frames."""
    from lab.edges.presets import frame_local
    from probes.attention import frame_map, rows

    model, items = recipe.loaded()
    n, layers = recipe.n_frames, model.cfg.n_layers
    policy = frame_local(layers, layers)
    maps = frame_map(model, items, policy=policy, n_frames=n, show_progress=progress)
    coords = {"item": maps.coords["item"], "layer": maps.coords["layer"]}
    cut = Result(np.array(maps.notes["causal"], float), ("item", "layer"), coords, maps.notes["causal_unit"], {}, "knock-out of edges between frames", about(items), baseline=0.0)  # fmt: skip
    ready = model.prepare(items[0], n)
    films = [_on_frames(model, ready, rows(model, ready, "last", policy=p), p) for p in (None, policy)]
    stacked = Result(np.stack(films), ("run", *GRID), {"run": ["clean", "cut"], **_grid(films[0])}, "% of attention", {}, "where the last position looks", {"question": items[0].question})  # fmt: skip
    return [noted(maps, **about(items)), cut, stacked, pictures(ready.frames.pixels.cpu(), films[0].shape[0])]


def _on_frames(model: Any, ready: Any, pattern: Result, policy: Any) -> Any:
    """Percent of the last row's attention on each video token, mean over layers and heads."""
    import torch

    share = 100 * np.nanmean(pattern.values[:, :, 0], axis=(0, 1))
    return ready.maps[0].painted(torch.as_tensor(share), ready.grids[0]).numpy()


def _grid(film: Any) -> dict[str, list[int]]:
    return {a: list(range(k)) for a, k in zip(GRID, film.shape, strict=True)}


def draw(results: Sequence[Result]) -> Plate:
    """Frame-to-frame maps clean and cut with the knock-out beside them; below, the last position on the frames."""
    maps, cut, films, film = results
    half = _later(maps)
    pair = share_limits([_map(half, run) for run in ("clean", "cut")])
    curve = replace(
        figure_spec(cut, title="Cut in one layer alone", caption=""),
        x_label="Layer",
        y_label="Change of p (%)",
    )
    strips = share_limits([_strip(films, run, film) for run in ("clean", "cut")])
    n = len(maps.coords["item"])
    height = 0.5 + 6.1 / 8 * -(-len(film.values) // 8)
    return Plate(
        "Attention clean and with edges between frames cut", (tuple([*pair, curve]), (strips[0],), (strips[1],)),
        "Above: share of attention from the tokens of one frame (rows) to those of another (columns), mean over heads, layers and "
        f"n = {n} questions, clean and with all edges from earlier frames cut in every layer; and the change of the answer's probability when "
        f"these edges are cut in one layer alone. {BANDS} Below: attention of the last position on every video token of one video "
        f"({films.notes['question']}), % of its whole attention, mean over layers and heads.",
        width=FULL, heights=(2.0, height, height), shares=((1.0, 1.0, 1.05), (), ()),
    )  # fmt: skip


def _later(maps: Result) -> Result:
    """Mean over items and layers."""
    found = maps.mean("item").mean("layer")
    return replace(found, low=None, high=None)


def _map(maps: Result, run: str) -> FigureSpec:
    part = maps.select(run=run)
    named = {a: [text(c) for c in part.coords[a]] for a in part.axes}
    title = "Clean" if run == "clean" else "Edges between frames cut"
    spec = figure_spec(replace(part, coords=named), kind="heat", title=title, caption="")
    return replace(spec, x_label="Frame that is read", y_label="Frame that reads")


def _strip(films: Result, run: str, film: Result) -> FigureSpec:
    part = films.select(run=run)
    title = "Last position, clean" if run == "clean" else "Last position, edges between frames cut"
    return figure_spec(part, frames=film.values, title=title, caption="")
