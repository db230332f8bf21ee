"""Task moving_direction: one shape moves left, right, up or down; four options in shuffled order.

No single frame tells the direction, and shuffled frames leave two of four: the track's place is drawn first, and the
direction decides only in which order it is walked.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from lab.carriers import VideoQA
from lab.errors import UsageError
from lab.sim import stage as staged
from lab.sim.shapes import COLOURS, SHAPES, SIDE, Scene, render

TASK = "moving_direction"
DIRECTIONS: tuple[str, ...] = ("left", "right", "up", "down")


def items(n: int, seed: int, *, frames: int = 8, form: str = "choice", **knobs: Any) -> list[VideoQA]:
    """`n` questions with clips of `frames` frames. The same seed gives the same items, byte by byte.

    video   uint8 [frame, 64, 64, 3]
    state   the `Scene`, or with a knob turned (see `lab.sim.stage.Knobs`) the `Stage`; `direction(state)` is the answer
    twin    the same clip with the shape walking the other way, same options
    form    "choice" or "open": no options, the answer is the word
    """
    turned = staged.Knobs.of(knobs)
    if form not in ("choice", "open"):
        raise UsageError(f"form must be 'choice' or 'open', got {form!r}")
    out = [item(np.random.default_rng((seed, i)), id=f"{TASK}/{seed}/{i}", frames=frames) for i in range(n)]
    if turned != staged.Knobs():
        out = [_disturbed(one, turned, (seed, i, 1)) for i, one in enumerate(out)]
    return [_opened(one) for one in out] if form == "open" else out


def item(rng: np.random.Generator, *, id: str = "", frames: int = 8) -> VideoQA:
    """One question, drawn from `rng`."""
    scene = draw_scene(rng, frames)
    options = tuple(str(o) for o in rng.permutation(DIRECTIONS))
    other = _ask(twin_scene(scene), options, f"{id}/twin")
    return replace(_ask(scene, options, id), twin=other)


def direction(scene: Scene | staged.Stage) -> str:
    """Which way the shape moved, read from the ground truth (the longer axis from first to last frame)."""
    track = scene.track if isinstance(scene, Scene) else scene.things[0].track
    (x0, y0), (x1, y1) = track[0], track[-1]
    if abs(x1 - x0) > abs(y1 - y0):
        return "right" if x1 > x0 else "left"
    return "down" if y1 > y0 else "up"


def twin_scene(scene: Scene) -> Scene:
    """The same scene with its track walked backwards."""
    return replace(scene, track=scene.track[::-1])


def stage_of(scene: Scene) -> staged.Stage:
    """The same clip as a `Stage`: the same pixels, and room for knobs."""
    n = len(scene.track)
    thing = staged.Thing(scene.shape, scene.colour, scene.track, (scene.radius,) * n, (True,) * n)
    event = staged.Event("moves", 0, 0.0, (n - 1) / staged.FPS)
    return staged.Stage(
        (thing,), ("",) * n, (event,), ground=scene.ground, grain=scene.grain, seed=scene.seed
    )


def draw_scene(rng: np.random.Generator, frames: int, *, way: str | None = None) -> Scene:
    """A random scene; `way` fixes the direction."""
    way = way or DIRECTIONS[rng.integers(4)]
    radius = float(rng.integers(12, 22)) / 2
    return Scene(
        shape=SHAPES[rng.integers(len(SHAPES))],
        colour=list(COLOURS)[rng.integers(len(COLOURS))],
        radius=radius,
        track=_track(rng, frames, radius, way),
        ground=_ground(rng),
        grain=int(rng.integers(4, 21)) if rng.random() < 0.5 else 0,
        seed=int(rng.integers(2**31)),
    )


def _ask(scene: Scene, options: tuple[str, ...], id: str) -> VideoQA:
    return VideoQA(
        video=render(scene),
        question=f"Which way does the {scene.colour} {scene.shape} move?",
        options=options,
        answer=options.index(direction(scene)),
        id=id,
        task=TASK,
        state=scene,
    )


def _disturbed(one: VideoQA, knobs: staged.Knobs, seed: tuple[int, ...]) -> VideoQA:
    """The item and its twin with the same knobs turned the same way."""
    state = staged.disturb(stage_of(one.state), knobs, np.random.default_rng(seed))
    twin = None if one.twin is None else _disturbed(one.twin, knobs, seed)
    return replace(one, video=staged.render(state), state=state, twin=twin)


def _opened(one: VideoQA) -> VideoQA:
    """The item without its options."""
    twin = None if one.twin is None else _opened(one.twin)
    return replace(one, options=(), answer=one.options[int(one.answer or 0)], twin=twin)


def _ground(rng: np.random.Generator) -> tuple[int, int, int]:
    r, g, b = (int(rng.integers(20, 120)) + rng.integers(-10, 11, 3)).tolist()
    return r, g, b


def _track(rng: np.random.Generator, frames: int, radius: float, way: str) -> tuple[tuple[float, float], ...]:
    low, high = radius + 1, SIDE - radius - 1
    length = rng.uniform(16, min(42, high - low))
    start, across = rng.uniform(low, high - length), rng.uniform(low + 2, high - 2)
    pace = rng.uniform(-0.6, 0.6)  # 0: even speed; else the shape speeds up or slows down
    t = np.linspace(0, 1, frames)
    along = start + length * (t + pace * t * (1 - t))
    drift = across + rng.uniform(-2, 2) * t
    if way in ("left", "up"):
        along, drift = along[::-1], drift[::-1]
    pairs = zip(along, drift, strict=True) if way in ("left", "right") else zip(drift, along, strict=True)
    return tuple((round(float(x), 2), round(float(y), 2)) for x, y in pairs)
