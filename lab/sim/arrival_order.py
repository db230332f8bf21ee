"""Task arrival_order: three shapes visit the box one after the other; which was there first (or last)?

After SIMS-V's order of appearance. Every order shows the same frames. The twin exchanges two visits.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import permutations
from typing import Any

import numpy as np

from lab.carriers import VideoQA
from lab.sim.program import Look, Plan, draw
from lab.sim.stage import FPS, Event, Stage, Thing

TASK = "arrival_order"
BOX = (40.0, 18.0, 60.0, 46.0)
THINGS = 3


def items(n: int, seed: int, **kw: Any) -> list[VideoQA]:
    """See `lab.sim.program.draw`."""
    return draw(sys.modules[__name__], n, seed, **kw)


def plans(frames: int) -> Sequence[tuple[Plan, float]]:
    """(order of the visitors, "first" | "last")."""
    return [((order, ask), 1 / 12) for order in permutations(range(THINGS)) for ask in ("first", "last")]


def build(plan: Plan, look: Look, frames: int) -> Stage:
    """Between the first and the last frame each shape is in the box for a third of the time, else at home."""
    order, word = plan
    stay = (frames - 2) // THINGS
    things, events = list[Thing](), list[Event]()
    for i in range(THINGS):
        home = (14.0 + look.shift[0], 12.0 + 20 * i + look.shift[1])
        start = 1 + order.index(i) * stay
        track = tuple((50.0, 32.0) if start <= t < start + stay else home for t in range(frames))
        things.append(
            Thing(look.shapes[i], look.colours[i], track, (look.radius,) * frames, (True,) * frames)
        )
        events.append(Event("enters", i, start / FPS, (start + stay) / FPS))
    return Stage(
        tuple(things), ("",) * frames, tuple(events), word, look.ground, box=BOX, calm=True, grain=look.grain, seed=look.seed
    )  # fmt: skip


def ask(stage: Stage) -> tuple[str, tuple[str, ...]]:
    """The three shapes."""
    return f"Which object enters the box {stage.ask}?", tuple(thing.name for thing in stage.things)


def answer(stage: Stage) -> str:
    """From the tracks: who is inside the box first, or last."""
    left, top, right, bottom = stage.box or BOX
    when = [
        next(t for t, (x, y) in enumerate(thing.track) if left < x < right and top < y < bottom)
        for thing in stage.things
    ]
    pick = min if stage.ask == "first" else max
    return stage.things[when.index(pick(when))].name


def twin(plan: Plan, rng: np.random.Generator, frames: int) -> Plan:
    """The visit asked about changes places with its neighbour in time."""
    order, word = plan
    a, b, c = order
    return ((b, a, c) if word == "first" else (a, c, b)), word
