"""Mixture-of-Depths: how deep each video token goes, how alike selectors choose, and where information flows then.

In every other layer a share of each frame's tokens passes and the rest skip the layer. Selectors: untrained linear
routers, random, evenly spaced, largest norm. The knock-out of two pathways is repeated with each of them on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from pydantic import Field

from figures.base import BANDS, GRID, PictureRecipe, about, pictures, tall
from lab.result import Result
from lab.view.plates import FULL, Plate, one_scale
from lab.view.specs import FigureSpec, figure_spec, share_limits

ALL = "all tokens"


class MixtureOfDepthsRecipe(PictureRecipe):
    """keep: share of a frame's tokens that pass a routed layer; window: layers cut together; learn: untrained routers too."""

    keep: float = Field(default=0.2, gt=0, le=1)
    selectors: tuple[str, ...] = Field(default=("learned", "norm", "uniform", "random"), min_length=2)
    pathways: tuple[str, ...] = Field(default=("cross-frame", "video->question+option"), min_length=1)
    window: int = Field(default=3, ge=1)


def compute(recipe: MixtureOfDepthsRecipe, *, progress: bool = True) -> list[Result]:
    """Depth of each token (selector, frame, row, col); frames; overlap (selector, other); flow (item, run, pathway, layer);
    right answers (item, run)."""
    from lab.runs import progress as bar

    model, items = recipe.loaded()
    chosen = {s: _mechanism(recipe, s) for s in recipe.selectors}
    ready = model.prepare(items[0], recipe.n_frames)
    depth = np.stack([_depth(model, ready, m) for m in chosen.values()])
    kept = [
        _kept(model, model.prepare(i, recipe.n_frames), chosen)
        for i in bar(items, desc="selectors", show=progress)
    ]
    alike = np.mean([[[_jaccard(a, b) for b in one] for a in one] for one in kept], axis=0)
    flow, right = _flows(recipe, model, items, {ALL: None, **chosen}, progress)
    names, notes = list(chosen), about(items)
    return [
        Result(depth, ("selector", *GRID), {"selector": names, **{a: list(range(k)) for a, k in zip(GRID, depth.shape[1:], strict=True)}}, "layers passed", {}, "layers each token passes", {"layers": model.cfg.n_layers}),
        pictures(ready.frames.pixels.cpu(), depth.shape[1]),
        Result(alike, ("selector", "other"), {"selector": names, "other": names}, "tokens chosen by both, of those chosen by either", {}, "overlap of selectors", {"n": {"item": len(items)}, "chance": recipe.keep / (2 - recipe.keep)}),
        replace(flow, notes={**notes, "window": recipe.window}), replace(right, notes=notes),
    ]  # fmt: skip


def _mechanism(recipe: MixtureOfDepthsRecipe, selector: str) -> Any:
    from lab.mechanisms.mixture_of_depths import MixtureOfDepths

    gate: Any = "tanh1" if selector == "learned" else "none"
    return MixtureOfDepths(keep=recipe.keep, selector=selector, gate=gate)  # type: ignore[arg-type]


def _depth(model: Any, ready: Any, mechanism: Any) -> Any:
    """Layers every video token of the prompt passes, on the frames' grid."""
    found = model.run(ready, mechanisms=[mechanism]).heads["mod.depth"][0]
    n = len(ready.maps[0])
    return ready.maps[0].painted(found.float()[:n], ready.grids[0]).numpy()


def _kept(model: Any, ready: Any, chosen: dict[str, Any]) -> list[Any]:
    """For every selector which video tokens pass, [routed layer, token]."""
    video = ready.maps[0].where(role="frame")
    return [
        model.run(ready, mechanisms=[m]).heads["mod.keep"][:, 0][:, video].numpy() for m in chosen.values()
    ]


def _jaccard(a: Any, b: Any) -> float:
    return float((a & b).sum() / max(1, (a | b).sum()))


def _flows(
    recipe: MixtureOfDepthsRecipe, model: Any, items: Sequence[Any], runs: dict[str, Any], show: bool
) -> tuple[Result, Result]:
    """The knock-out curves and the answers with each mechanism on."""
    from lab.edges.sweeping import sweep

    found: list[Result] = []
    for mechanism in runs.values():
        mechanisms = [] if mechanism is None else [mechanism]
        ready = [model.prepare(i, recipe.n_frames, mechanisms=mechanisms) for i in items]
        found.append(sweep(model, ready, recipe.pathways, window=recipe.window, show_progress=show))
    first, names = found[0], list(runs)
    keys = first.coords["item"]
    coords = {"item": keys, "run": names, "pathway": first.coords["pathway"], "layer": first.coords["layer"]}
    flow = Result(
        np.stack([f.values for f in found], 1),
        tuple(coords),
        coords,
        first.unit,
        {},
        "knock-out with tokens skipping layers",
        baseline=0.0,
    )
    right = np.array([[float(bool(f.notes["correct"][str(k)])) for f in found] for k in keys])
    return flow, Result(
        right, ("item", "run"), {"item": keys, "run": names}, "share answered right", {}, "answers"
    )


def draw(results: Sequence[Result]) -> Plate:
    """Two depth maps on frames; the overlap, the pathways and the accuracy below."""
    depth, film, alike, flow, right = results
    names = depth.coords["selector"]
    strips = share_limits([_strip(depth, s, film) for s in (names[0], names[-1])])
    curves = one_scale([_curves(flow, p) for p in flow.coords["pathway"]])
    n, height = len(flow.coords["item"]), 0.5 + 6.1 / 8 * -(-len(film.values) // 8)
    return Plate(
        "Mixture-of-Depths: depth, choice and flow", ((strips[0],), (strips[1],), (_overlap(alike), _answers(right)), curves),
        f"Above: layers that each video token of one video passes (of {depth.notes['layers']}) when {_share(depth)} with untrained routers and at random. "
        f"Overlap of the tokens that two selectors choose (two independent random choices: {alike.notes['chance']:.2f}); share of questions "
        f"answered right; and the change of the answer's probability (%) when a pathway is cut in {flow.notes['window']} layers round each "
        f"layer, with every selector on. n = {n} questions. {BANDS} Routers are not trained: this is Mixture-of-Depths switched on, not learned.",
        width=FULL, heights=(height, height, 2.0, 1.9), shares=((), (), (1.0, 1.0), ()),
    )  # fmt: skip


def _share(depth: Result) -> str:
    return "most tokens skip every other layer,"


def _strip(depth: Result, name: str, film: Result) -> FigureSpec:
    return figure_spec(
        depth.select(selector=name),
        frames=film.values,
        title=f"Depth, selector: {name}",
        caption="",
        limits=(float(depth.values.min()) - 0.5, float(depth.values.max())),
    )


def _overlap(alike: Result) -> FigureSpec:
    spec = figure_spec(alike, kind="heat", limits=(0.0, 1.0), title="Overlap of selectors", caption="")
    return replace(spec, unit="Jaccard index", x_label="", y_label="Selector")


def _answers(right: Result) -> FigureSpec:
    spec = figure_spec(right, kind="barh", title="Questions answered right", caption="", limits=(0.0, 1.25))
    return replace(spec, unit="Share answered right")


def _curves(flow: Result, pathway: str) -> FigureSpec:
    spec = figure_spec(
        flow.select(pathway=pathway), title=tall(pathway.replace("->", " \u2192 ")) + " cut", caption=""
    )
    return replace(spec, x_label="Layer", y_label="Change of p (%)")
