"""Moving Direction: one question put to four probes, and whether they agree.

Where patching a twin's values flips the answer, what each frame is worth by exact Shapley values, and which pathway the
knock-out picks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from figures.base import BANDS, PictureRecipe, about, noted
from lab.result import Result
from lab.view.plates import FULL, Plate
from lab.view.specs import FigureSpec, figure_spec

ROLES = ("frame", "question", "option", "last")


class MovingDirectionRecipe(PictureRecipe):
    """No fields of its own."""


def compute(recipe: MovingDirectionRecipe, *, progress: bool = True) -> list[Result]:
    """Patching by role (share of flips) and by frame (share of the way), worth of frames, and the knock-out."""
    from lab.edges.sweeping import sweep
    from probes.attribution import attribute
    from probes.patching import patching

    model, items = recipe.loaded()
    n, notes = recipe.n_frames, about(items)
    asked: tuple[tuple[Any, Any], ...] = (("role", "flip"), ("frame", "recovered"))
    grids = [
        patching(model, items, by=by, into="clean", metric=metric, n_frames=n, show_progress=progress)
        for by, metric in asked
    ]
    worth = attribute(model, items, method="shapley", n_frames=n, show_progress=progress)
    flow = sweep(model, items, window=3, n_frames=n, show_progress=progress)
    return [noted(r, **notes) for r in (*grids, worth, flow)]


def draw(results: Sequence[Result]) -> Plate:
    """Four panels: flips by role, way by frame, worth of frames, pathways."""
    roles, frames, worth, flow = results
    n = len(roles.coords["item"])
    return Plate(
        "Moving direction: four probes of one answer", ((_roles(roles), _flow(flow)), (_frames(frames), _worth(worth))),
        "(a) Share of answers that flip when the twin's values (the same scene moving the other way) replace the stream entering a layer, by role. "
        "(b) Change of the answer's probability when a pathway is cut in 3 layers round each layer. (c) Share of the way to the twin's answer "
        f"when one frame's tokens are replaced. (d) What each frame is worth: exact Shapley values against the twin. {_agreement(roles, frames, worth)} "
        f"n = {n} questions. {BANDS}",
        width=FULL, heights=(2.1, 2.1), legend="inside",
    )  # fmt: skip


def _roles(roles: Result) -> FigureSpec:
    shown = [r for r in ROLES if r in roles.coords["role"]]
    mean = roles.select(role=shown).mean("item")
    turned = replace(
        mean, values=mean.values.T, low=None if mean.low is None else mean.low.T, high=None if mean.high is None else mean.high.T,
        axes=("role", "layer"), coords={"role": shown, "layer": mean.coords["layer"]},
    )  # fmt: skip
    spec = figure_spec(turned, title="Twin's values at a role", caption="", limits=(-0.03, 1.03))
    return replace(spec, x_label="Layer", y_label="Share of answers flipped")


def _flow(flow: Result) -> FigureSpec:
    spec = figure_spec(flow, title="Pathways cut", caption="")
    named = tuple(s.replace("->", " \u2192 ") for s in spec.series)
    return replace(spec, series=named, x_label="Layer", y_label="Change of p (%)")


def _frames(frames: Result) -> FigureSpec:
    mean = replace(frames.mean("item"), low=None, high=None)
    spec = figure_spec(
        mean, kind="heat", title="Twin's values at a frame", caption="", limits=(-1.0, 1.0), diverging=True
    )
    return replace(spec, unit="share of the way")


def _worth(worth: Result) -> FigureSpec:
    spec = figure_spec(worth, title="Worth of each frame", caption="")
    return replace(spec, x_label="Frame", y_label="Shapley value (logits)")


def _agreement(roles: Result, frames: Result, worth: Result) -> str:
    """Which two frames patching and attribution pick, and up to where the video carries the answer."""
    patched = np.nan_to_num(frames.mean("item").values)[0]
    valued = np.nan_to_num(worth.mean("item").values)
    two, others = (sorted(np.argsort(-v, kind="stable")[:2].tolist()) for v in (patched, valued))
    video = roles.mean("item").select(role="frame").values if "frame" in roles.coords["role"] else np.zeros(1)
    until = max((i + 1 for i, v in enumerate(video) if v > 0.5), default=0)
    said = f"Patching at layer 1 picks frames {two[0]} and {two[1]}, attribution {others[0]} and {others[1]}."
    return f"{said} The video carries more than half of the answers up to layer {until}." if until else said
