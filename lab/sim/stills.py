"""Questions that one frame answers: colour, shape, place, side, number. Clips of one frame repeated.

What an image model is asked: the control to the tasks over time. A fact's answer is read from the stage, as everywhere.
"""

from __future__ import annotations

import difflib
import zlib
from dataclasses import replace

import numpy as np

from lab.carriers import VideoQA
from lab.errors import UsageError
from lab.sim.program import Look, draw_look
from lab.sim.shapes import COLOURS, SHAPES
from lab.sim.stage import PLACES, Stage, Thing, render, still

FACTS = ("still_colour", "still_shape", "still_place", "still_side", "still_number")
OPTIONS: dict[str, tuple[str, ...]] = {
    "still_colour": tuple(COLOURS),
    "still_shape": SHAPES,
    "still_place": tuple(PLACES),
    "still_side": ("left", "right", "top", "bottom"),
    "still_number": ("one", "two", "three"),
}
_SIDES = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}


def items(fact: str, n: int, seed: int, *, frames: int = 1) -> list[VideoQA]:
    """`n` questions of one fact; video: uint8 [frame, 64, 64, 3], `frames` times the same picture.

    Options are shuffled, and the twin shows another answer to the same question. Raises UsageError for an unknown fact.
    """
    if fact not in FACTS:
        near = difflib.get_close_matches(str(fact), FACTS, n=1)
        raise UsageError(
            f"no fact {fact!r}{f'; closest: {near[0]}' if near else ''}; there are {', '.join(FACTS)}"
        )
    code = zlib.crc32(fact.encode())
    rngs = [np.random.default_rng((seed, code, i)) for i in range(n)]
    return [_item(fact, rng, f"{fact}/{seed}/{i}", frames) for i, rng in enumerate(rngs)]


def draw_fact(fact: str, rng: np.random.Generator, frames: int = 1) -> tuple[Stage, str, str]:
    """A random stage, the question about it, its answer."""
    said = str(rng.choice(OPTIONS[fact]))
    return _show(fact, said, draw_look(rng), _Layout(rng), frames)


class _Layout:
    """Where things stand, drawn before the answer is used."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.anywhere = (float(rng.integers(14, 51)), float(rng.integers(14, 51)))
        self.along, self.across = float(rng.integers(13, 22)), float(rng.integers(-5, 6))
        self.radius = (
            float(rng.integers(17, 27)) / 2
        )  # larger than in clips: half a pixel more tells shapes apart
        self.lanes = rng.permutation(3)
        self.lean = rng.integers(-10, 11, 3)


def _item(fact: str, rng: np.random.Generator, id: str, frames: int) -> VideoQA:
    options = OPTIONS[fact]
    said, other = (str(o) for o in rng.permutation(options)[:2])
    look, layout = draw_look(rng), _Layout(rng)
    order = tuple(str(o) for o in rng.permutation(options))

    def ask(word: str, name: str) -> VideoQA:
        stage, question, _ = _show(fact, word, look, layout, frames)
        return VideoQA(render(stage), question, order, order.index(word), id=name, task=fact, state=stage)

    return replace(ask(said, id), twin=ask(other, f"{id}/twin"))


def _show(fact: str, said: str, look: Look, layout: _Layout, frames: int) -> tuple[Stage, str, str]:
    colour = said if fact == "still_colour" else look.colours[0]
    shape = said if fact == "still_shape" else look.shapes[0]
    at = _at_side(said, layout) if fact == "still_side" else layout.anywhere
    things = [_thing(shape, colour, at, layout.radius, frames)]
    if fact == "still_number":
        number = OPTIONS[fact].index(said) + 1
        things = [
            _thing(look.shapes[i], look.colours[i], (32.0 + float(layout.lean[i]), 12.0 + 20 * float(lane)), look.radius, frames)
            for i, lane in enumerate(layout.lanes[:number])
        ]  # fmt: skip
    places = (said if fact == "still_place" else "",) * frames
    stage = Stage(tuple(things), places, ground=look.ground, grain=look.grain, seed=look.seed)
    return stage, _question(fact, things[0]), said


def _question(fact: str, thing: Thing) -> str:
    return {
        "still_colour": f"What colour is the {thing.shape}?",
        "still_shape": f"What shape is the {thing.colour} object?",
        "still_place": "Which place do you see?",
        "still_side": f"Where is the {thing.colour} {thing.shape}?",
        "still_number": "How many objects do you see?",
    }[fact]


def _at_side(said: str, layout: _Layout) -> tuple[float, float]:
    dx, dy = _SIDES[said]
    return 32 + dx * layout.along + abs(dy) * layout.across, 32 + dy * layout.along + abs(dx) * layout.across


def _thing(shape: str, colour: str, at: tuple[float, float], radius: float, frames: int) -> Thing:
    return Thing(shape, colour, still(at, frames), (radius,) * frames, (True,) * frames)


def answer(fact: str, stage: Stage) -> str:
    """Read from the ground truth alone."""
    thing, (x, y) = stage.things[0], stage.things[0].track[0]
    if fact == "still_side":
        if abs(x - 32) > abs(y - 32):
            return "right" if x > 32 else "left"
        return "bottom" if y > 32 else "top"
    return {
        "still_colour": thing.colour,
        "still_shape": thing.shape,
        "still_place": stage.places[0],
        "still_number": ("one", "two", "three")[len(stage.things) - 1],
    }[fact]
