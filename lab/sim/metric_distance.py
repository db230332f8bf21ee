"""Task metric_distance: how many cells of the floor are between two shapes that are never seen together?

After SIMS-V's absolute distance. No frame holds both shapes; any order of the frames does. The twin moves one by a cell.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from lab.carriers import VideoQA
from lab.sim.program import Look, Plan, draw
from lab.sim.stage import FPS, Event, Stage, Thing, still

TASK = "metric_distance"
CELL = 8  # pixels
CELLS = 8
WORDS = {2: "two", 3: "three", 4: "four", 5: "five"}


def items(n: int, seed: int, **kw: Any) -> list[VideoQA]:
    """See `lab.sim.program.draw`."""
    return draw(sys.modules[__name__], n, seed, **kw)


def plans(frames: int) -> Sequence[tuple[Plan, float]]:
    """(cell of the first-named shape, cell of the other, whether the first-named is seen first); distances are uniform."""
    out: list[tuple[Plan, float]] = []
    for d in WORDS:
        pairs = [(a, b) for a in range(CELLS) for b in range(CELLS) if abs(a - b) == d]
        out += [((a, b, seen), 1 / 4 / len(pairs) / 2) for a, b in pairs for seen in (True, False)]
    return out


def build(plan: Plan, look: Look, frames: int) -> Stage:
    """One row of the floor; each shape is there for one half of the clip."""
    half, row = frames // 2, (4 + look.shift[1]) * CELL + CELL / 2
    early = (True,) * half + (False,) * half
    shown = (early, early[::-1]) if plan[2] else (early[::-1], early)
    things = tuple(
        Thing(look.shapes[i], look.colours[i], still((plan[i] * CELL + CELL / 2, row), frames), (3.5,) * frames, shown[i])
        for i in (0, 1)
    )  # fmt: skip
    events = tuple(
        Event("appears", i, thing.shown.index(True) / FPS, (frames if thing.shown[-1] else half) / FPS)
        for i, thing in enumerate(things)
    )
    return Stage(things, ("",) * frames, events, ground=look.ground, grid=CELL, seed=look.seed)


def ask(stage: Stage) -> tuple[str, tuple[str, ...]]:
    """Cells of the floor, in words."""
    a, b = stage.things
    return f"What is the distance from the {a.name} to the {b.name}?", tuple(WORDS.values())


def answer(stage: Stage) -> str:
    """Distance of the centres, in cells."""
    (x0, y0), (x1, y1) = (thing.track[0] for thing in stage.things)
    return WORDS[round(float(np.hypot(x1 - x0, y1 - y0)) / CELL)]


def twin(plan: Plan, rng: np.random.Generator, frames: int) -> Plan:
    """One of the shapes stands one cell further, or nearer."""
    a, b, seen = plan
    near = [(a + s, b, seen) for s in (-1, 1)] + [(a, b + s, seen) for s in (-1, 1)]
    fit = [p for p in near if 0 <= p[0] < CELLS and 0 <= p[1] < CELLS and abs(p[0] - p[1]) in WORDS]
    return fit[rng.integers(len(fit))]
