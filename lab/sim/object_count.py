"""Task object_count: how many of three shapes move at first (or last)? The twin lets one shape more, or fewer, move.

A moving shape goes back and forth between two places of its lane, a resting one stays at either: no single frame
tells which is which, and only the frames of one half count.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import combinations, product
from math import comb
from typing import Any

import numpy as np

from lab.carriers import VideoQA
from lab.sim.program import Look, Plan, draw
from lab.sim.stage import FPS, Event, Stage, Thing

TASK = "object_count"
NUMBERS = ("zero", "one", "two", "three")
THINGS = 3


def items(n: int, seed: int, **kw: Any) -> list[VideoQA]:
    """See `lab.sim.program.draw`."""
    return draw(sys.modules[__name__], n, seed, **kw)


def plans(frames: int) -> Sequence[tuple[Plan, float]]:
    """(who moves in the first half, who in the second, where each begins, "first" | "last"); the counts are uniform."""
    sets = [(s, 1 / 4 / comb(THINGS, k)) for k in range(THINGS + 1) for s in combinations(range(THINGS), k)]
    begin = list(product((0, 1), repeat=THINGS))
    return [
        ((a, b, begins, ask), p * q / len(begin) / 2)
        for (a, p), (b, q), begins, ask in product(sets, sets, begin, ("first", "last"))
    ]


def build(plan: Plan, look: Look, frames: int) -> Stage:
    """Three lanes from top to bottom, two places in each, 20 pixels apart."""
    *movers, begins, word = plan
    half, things, events = frames // 2, list[Thing](), list[Event]()
    for i in range(THINGS):
        places = [begins[i]]
        for t in range(1, frames):
            places.append(places[-1] ^ (i in movers[t >= half]))
        track = tuple((22.0 + 20 * p + look.shift[0], 12.0 + 20 * i + look.shift[1]) for p in places)
        things.append(
            Thing(look.shapes[i], look.colours[i], track, (look.radius,) * frames, (True,) * frames)
        )
        events += [
            Event("moves", i, h * half / FPS, ((h + 1) * half - 1) / FPS) for h in (0, 1) if i in movers[h]
        ]
    return Stage(
        tuple(things), ("",) * frames, tuple(events), word, look.ground, calm=True, grain=look.grain, seed=look.seed
    )  # fmt: skip


def ask(stage: Stage) -> tuple[str, tuple[str, ...]]:
    """Numbers in words."""
    when = "beginning" if stage.ask == "first" else "end"
    return f"How many objects move at the {when}?", NUMBERS


def answer(stage: Stage) -> str:
    """Counts the tracks that change within the half."""
    half = len(stage) // 2
    part = slice(0, half) if stage.ask == "first" else slice(half, None)
    return NUMBERS[sum(len(set(thing.track[part])) > 1 for thing in stage.things)]


def twin(plan: Plan, rng: np.random.Generator, frames: int) -> Plan:
    """One shape starts or stops in the half the question is about; it ends up where it must, the others as before."""
    which = 0 if plan[3] == "first" else 1
    one = int(rng.integers(THINGS))
    changed = tuple(sorted(set(plan[which]) ^ {one}))
    return (changed, plan[1], *plan[2:]) if which == 0 else (plan[0], changed, *plan[2:])
