"""Task action_antonym: one shape does one of two opposite things. The twin is the shape's clip backwards."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from lab.carriers import VideoQA
from lab.sim.program import Look, Plan, draw
from lab.sim.stage import FPS, Event, Stage, Thing, still

TASK = "action_antonym"
PAIRS = (("grows", "shrinks"), ("rises", "falls"), ("appears", "disappears"), ("enters", "leaves"))


def items(n: int, seed: int, **kw: Any) -> list[VideoQA]:
    """See `lab.sim.program.draw`."""
    return draw(sys.modules[__name__], n, seed, **kw)


def plans(frames: int) -> Sequence[tuple[Plan, float]]:
    """(pair, 0 forwards | 1 backwards, frame of the change)."""
    cuts = (
        frames // 2 - 1,
        frames // 2,
        frames // 2 + 1,
    )  # as many before the middle as after: backwards is a plan too
    return [((p, way, cut), 1 / 24) for p in range(4) for way in (0, 1) for cut in cuts]


def build(plan: Plan, look: Look, frames: int) -> Stage:
    """Sizes, heights and entries change evenly over the clip; appearing takes one frame, at `cut`."""
    pair, way, cut = plan
    middle, r = (32.0 + look.shift[0], 32.0 + look.shift[1]), look.radius
    ramp = [i / (frames - 1) for i in range(frames)]
    track, radius, shown = still(middle, frames), (r,) * frames, (True,) * frames
    if pair == 0:
        radius = tuple(round(r * (0.6 + 1.4 * s), 2) for s in ramp)
    elif pair == 1:
        track = tuple((middle[0], round(middle[1] + 20 - 40 * s, 2)) for s in ramp)
    elif pair == 2:
        shown = tuple(t >= cut for t in range(frames))
    else:
        track = tuple((round(-r + (middle[0] + r) * s, 2), middle[1]) for s in ramp)
        shown = tuple(x > -r for x, _ in track)
    if way:
        track, radius, shown = track[::-1], radius[::-1], shown[::-1]
    thing = Thing(look.shapes[0], look.colours[0], track, radius, shown)
    at = shown.index(not shown[0]) if pair == 2 else 0
    event = Event(PAIRS[pair][way], 0, at / FPS, (at if pair == 2 else frames - 1) / FPS)
    return Stage(
        (thing,), ("",) * frames, (event,), PAIRS[pair][0], look.ground, grain=look.grain, seed=look.seed
    )


def ask(stage: Stage) -> tuple[str, tuple[str, ...]]:
    """Two opposite verbs."""
    pair = next(p for p in PAIRS if p[0] == stage.ask)
    return f"What does the {stage.things[0].name} do?", pair


def answer(stage: Stage) -> str:
    """From the first and the last frame of the ground truth."""
    (x0, y0), (x1, y1) = stage.things[0].track[0], stage.things[0].track[-1]
    r, shown = stage.things[0].radius, stage.things[0].shown
    if x0 != x1:
        return "enters" if x1 > x0 else "leaves"
    if shown[0] != shown[-1]:
        return "appears" if shown[-1] else "disappears"
    if r[0] != r[-1]:
        return "grows" if r[-1] > r[0] else "shrinks"
    return "rises" if y1 < y0 else "falls"


def twin(plan: Plan, rng: np.random.Generator, frames: int) -> Plan:
    """Backwards."""
    return plan[0], 1 - plan[1], plan[2]
