"""Task perspective_relation: looking from P to O, where is Q? Left, right, in front or behind, seen from P.

After SIMS-V's relative direction. The three shapes are seen one after the other on a floor seen from above: no frame
answers, any order of the frames does. The twin moves Q to the nearest place with another answer.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache
from itertools import permutations, product
from math import atan2, degrees, hypot
from typing import Any

import numpy as np

from lab.carriers import VideoQA
from lab.sim.program import Look, Plan, draw
from lab.sim.stage import FPS, Event, Stage, Thing, still

TASK = "perspective_relation"
SIDES = ("left", "right", "front", "behind")
Point = tuple[float, float]
SPOTS: tuple[Point, ...] = tuple((x, y) for x, y in product((12, 32, 52), repeat=2))  # pixels
MARGIN = 10  # degrees round the borders between answers that no item comes near


def items(n: int, seed: int, **kw: Any) -> list[VideoQA]:
    """See `lab.sim.program.draw`."""
    return draw(sys.modules[__name__], n, seed, **kw)


def side(p: Point, o: Point, q: Point) -> str | None:
    """Where q is for somebody at p who looks to o; y downwards. None within MARGIN of a border (45, 135 degrees)."""
    (fx, fy), (gx, gy) = (o[0] - p[0], o[1] - p[1]), (q[0] - p[0], q[1] - p[1])
    cross = fy * gx - fx * gy  # y runs downwards: positive is to the left
    angle = degrees(atan2(abs(cross), fx * gx + fy * gy))
    if min(abs(angle - 45), abs(angle - 135)) < MARGIN:
        return None
    if angle < 45:
        return "front"
    return "behind" if angle > 135 else ("left" if cross > 0 else "right")


@cache
def plans(frames: int) -> Sequence[tuple[Plan, float]]:
    """(P, O, Q, order in which they are seen); the answers are uniform."""
    found = [(spots, side(*spots)) for spots in permutations(SPOTS, 3)]
    found = [((p, o, q), s) for (p, o, q), s in found if s and _elsewhere(p, o, s)]  # a twin there must be
    count = {s: sum(got == s for _, got in found) for s in SIDES}
    orders = list(permutations(range(3)))
    return [((*p, order), 1 / 4 / count[s] / len(orders)) for p, s in found if s for order in orders]


def _elsewhere(p: Point, o: Point, here: str | None) -> list[Point]:
    """Places for Q with another answer than `here`."""
    return [s for s in SPOTS if s not in (p, o) and side(p, o, s) not in (here, None)]


def build(plan: Plan, look: Look, frames: int) -> Stage:
    """Each shape is there for a third of the clip."""
    *spots, order = plan
    cuts = [round(frames * k / 3) for k in range(4)]
    things, events = list[Thing](), list[Event]()
    for i, (x, y) in enumerate(spots):
        turn = order.index(i)
        start, stop = cuts[turn], cuts[turn + 1]
        at = (float(x + look.shift[0]), float(y + look.shift[1]))
        shown = tuple(start <= t < stop for t in range(frames))
        things.append(
            Thing(look.shapes[i], look.colours[i], still(at, frames), (look.radius,) * frames, shown)
        )
        events.append(Event("appears", i, start / FPS, stop / FPS))
    return Stage(
        tuple(things), ("",) * frames, tuple(events), ground=look.ground, grain=look.grain, seed=look.seed
    )


def ask(stage: Stage) -> tuple[str, tuple[str, ...]]:
    """Four sides."""
    p, o, q = (thing.name for thing in stage.things)
    return f"Looking from {p} to {o}, where is {q}?", SIDES


def answer(stage: Stage) -> str:
    """From the three places."""
    found = side(*(thing.track[0] for thing in stage.things))  # type: ignore[arg-type]
    assert found is not None
    return found


def twin(plan: Plan, rng: np.random.Generator, frames: int) -> Plan:
    """Q at the nearest place with another answer."""
    p, o, q, order = plan
    free = _elsewhere(p, o, side(p, o, q))
    nearest = min(hypot(s[0] - q[0], s[1] - q[1]) for s in free)
    fit = [s for s in free if hypot(s[0] - q[0], s[1] - q[1]) == nearest]
    return p, o, fit[rng.integers(len(fit))], order
