"""Task scene_transition: the background changes from one place to another. The twin has the order exchanged."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import permutations
from typing import Any

import numpy as np

from lab.carriers import VideoQA
from lab.sim.program import Look, Plan, draw
from lab.sim.stage import FPS, PLACES, Event, Stage, Thing, still

TASK = "scene_transition"


def items(n: int, seed: int, **kw: Any) -> list[VideoQA]:
    """See `lab.sim.program.draw`."""
    return draw(sys.modules[__name__], n, seed, **kw)


def plans(frames: int) -> Sequence[tuple[Plan, float]]:
    """(first place, second place, frame of the change)."""
    cuts = (frames // 2 - 1, frames // 2, frames // 2 + 1)
    return [((a, b, cut), 1 / 60) for a, b in permutations(PLACES, 2) for cut in cuts]


def build(plan: Plan, look: Look, frames: int) -> Stage:
    """One shape stands in the middle while the place round it changes."""
    first, second, cut = plan
    places = (first,) * cut + (second,) * (frames - cut)
    middle = (32.0 + 4 * look.shift[0], 32.0 + 4 * look.shift[1])
    thing = Thing(
        look.shapes[0], look.colours[0], still(middle, frames), (look.radius,) * frames, (True,) * frames
    )
    event = Event("changes", -1, cut / FPS, cut / FPS)
    return Stage((thing,), places, (event,), grain=look.grain // 2, seed=look.seed)


def ask(stage: Stage) -> tuple[str, tuple[str, ...]]:
    """Both orders."""
    a, b = sorted(set(stage.places))
    return "How does the scene change?", (f"from {a} to {b}", f"from {b} to {a}")


def answer(stage: Stage) -> str:
    """From the first and the last frame of the ground truth."""
    return f"from {stage.places[0]} to {stage.places[-1]}"


def twin(plan: Plan, rng: np.random.Generator, frames: int) -> Plan:
    """Backwards: the same frames."""
    return plan[1], plan[0], frames - plan[2]
