"""Task action_sequence: one shape does two things, one in each half. The twin has the halves exchanged.

Each half begins and ends with the same resting pose, so that exchanging them leaves no jump, and both orders show
the same frames.
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

TASK = "action_sequence"
VERBS = ("grows", "shrinks", "jumps", "drops", "vanishes")


def items(n: int, seed: int, **kw: Any) -> list[VideoQA]:
    """See `lab.sim.program.draw`."""
    return draw(sys.modules[__name__], n, seed, **kw)


def plans(frames: int) -> Sequence[tuple[Plan, float]]:
    """(verb of the first half, verb of the second, "first" | "last")."""
    return [((a, b, ask), 1 / 40) for a, b in permutations(VERBS, 2) for ask in ("first", "last")]


def build(plan: Plan, look: Look, frames: int) -> Stage:
    """The shape rests in the middle; in the inner frames of each half it is changed."""
    half = frames // 2
    poses = [_pose(verb if 0 < t < half - 1 else "", look) for verb in plan[:2] for t in range(half)]
    thing = Thing(
        look.shapes[0],
        look.colours[0],
        *(tuple(column) for column in zip(*poses, strict=True)),  # type: ignore[arg-type]
    )
    events = tuple(
        Event(v, 0, (i * half + 1) / FPS, (i * half + half - 1) / FPS) for i, v in enumerate(plan[:2])
    )
    return Stage((thing,), ("",) * frames, events, plan[2], look.ground, grain=look.grain, seed=look.seed)


def _pose(verb: str, look: Look) -> tuple[tuple[float, float], float, bool]:
    x, y = 32.0 + look.shift[0], 32.0 + look.shift[1]
    y += {"jumps": -16, "drops": 16}.get(verb, 0)
    radius = round(look.radius * {"grows": 1.9, "shrinks": 0.45}.get(verb, 1.0), 2)
    return (x, y), radius, verb != "vanishes"


def ask(stage: Stage) -> tuple[str, tuple[str, ...]]:
    """Both verbs, in an order that does not depend on the clip."""
    verbs = sorted(e.verb for e in stage.events)
    return f"What does the {stage.things[0].name} do {stage.ask}?", tuple(verbs)


def answer(stage: Stage) -> str:
    """The event that begins first, or last."""
    pick = min if stage.ask == "first" else max
    return pick(stage.events, key=lambda e: e.start).verb


def twin(plan: Plan, rng: np.random.Generator, frames: int) -> Plan:
    """The halves exchanged."""
    return plan[1], plan[0], plan[2]
