"""What a task is: all its plans, how a plan becomes a stage, and how the answer is read from the stage.

The *plan* is the part of a clip that may decide the answer; all plans of a task can be listed, with their
probabilities, and ceilings are counted over that list. The *look* (colours, shapes, sizes, background) is drawn
independently of the plan. What is asked: TVBench (arXiv 2410.07752), SIMS-V (Simulated Instruction-Tuning for Spatial
Video Understanding).
"""

from __future__ import annotations

import zlib
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate
from types import ModuleType
from typing import Any, Literal, Protocol, cast

import numpy as np

from lab.carriers import VideoQA
from lab.errors import UsageError
from lab.sim.shapes import COLOURS, SHAPES
from lab.sim.stage import Knobs, Stage, disturb, render

Plan = Any  # hashable: a tuple, of the task's own making
Form = Literal["choice", "open"]
FRAMES = 8


@dataclass(frozen=True)
class Look:
    """Everything about a picture that the answer does not depend on. Colours of different things differ."""

    colours: tuple[str, ...] = ("red", "green", "blue", "yellow")
    shapes: tuple[str, ...] = ("circle", "square", "triangle", "circle")
    radius: float = 7.0
    shift: tuple[int, int] = (0, 0)
    ground: tuple[int, int, int] = (40, 40, 40)
    grain: int = 0
    seed: int = 0


class Program(Protocol):
    """A task: a module of `lab.sim` that has these names."""

    TASK: str

    def plans(self, frames: int) -> Sequence[tuple[Plan, float]]:
        """All plans with their probabilities."""
        ...

    def build(self, plan: Plan, look: Look, frames: int) -> Stage:
        """The ground truth of a clip."""
        ...

    def ask(self, stage: Stage) -> tuple[str, tuple[str, ...]]:
        """The question, and its options before they are shuffled."""
        ...

    def answer(self, stage: Stage) -> str:
        """Read from the ground truth alone."""
        ...

    def twin(self, plan: Plan, rng: np.random.Generator, frames: int) -> Plan:
        """A plan of the same question whose video differs as little as possible and whose answer differs."""
        ...


def draw_look(rng: np.random.Generator) -> Look:
    """A random look."""
    r, g, b = (int(rng.integers(20, 100)) + rng.integers(-10, 11, 3)).tolist()
    return Look(
        colours=tuple(str(c) for c in rng.permutation(list(COLOURS))),
        shapes=tuple(SHAPES[i] for i in rng.integers(len(SHAPES), size=4)),
        radius=float(rng.integers(11, 15)) / 2,
        shift=(int(rng.integers(-2, 3)), int(rng.integers(-2, 3))),
        ground=(r, g, b),
        grain=int(rng.integers(4, 17)) if rng.random() < 0.5 else 0,
        seed=int(rng.integers(2**31)),
    )


def draw(
    module: Program | ModuleType,
    n: int,
    seed: int,
    *,
    frames: int = FRAMES,
    form: Form = "choice",
    **knobs: Any,
) -> list[VideoQA]:
    """`n` questions of a task, given as its module. The same arguments give the same items, byte by byte.

    video   uint8 [frame, 64, 64, 3] at 8 frames per second; frames: even, at least 8
    form    "choice": options in shuffled order, answer their index; "open": no options, answer the text
    state   the `Stage`; twin: the same question of the nearest video with another answer
    knobs   see `Knobs`. Raises UsageError for unknown ones, and for a number of frames that does not fit.
    """
    task, turned = cast(Program, module), Knobs.of(knobs)
    check_frames(frames)
    if form not in ("choice", "open"):
        raise UsageError(f"form must be 'choice' or 'open', got {form!r}")
    code = zlib.crc32(task.TASK.encode())
    rngs = [np.random.default_rng((seed, code, i)) for i in range(n)]
    return [_item(task, rng, f"{task.TASK}/{seed}/{i}", frames, form, turned) for i, rng in enumerate(rngs)]


def check_frames(frames: int) -> None:
    """Raises UsageError for a number of frames the tasks are not made for."""
    if not isinstance(frames, int) or frames < 8 or frames % 2:
        raise UsageError(f"frames must be an even number, at least 8, got {frames!r}")


def _item(task: Program, rng: np.random.Generator, id: str, frames: int, form: Form, knobs: Knobs) -> VideoQA:
    plan = draw_plan(task, rng, frames)
    look, quiver = draw_look(rng), int(rng.integers(2**31))
    other = task.twin(plan, rng, frames)
    stages = [
        disturb(task.build(p, look, frames), knobs, np.random.default_rng(quiver)) for p in (plan, other)
    ]
    order = rng.permutation(len(task.ask(stages[0])[1]))
    item, twin = (_question(task, s, order, form, i) for s, i in zip(stages, (id, f"{id}/twin"), strict=True))
    return replace(item, twin=twin)


def _question(task: Program, stage: Stage, order: np.ndarray[Any, Any], form: Form, id: str) -> VideoQA:
    question, listed = task.ask(stage)
    options = tuple(listed[i] for i in order) if form == "choice" else ()
    said = task.answer(stage)
    right = options.index(said) if options else said
    return VideoQA(render(stage), question, options, right, id=id, task=task.TASK, state=stage)


def draw_plan(task: Program, rng: np.random.Generator, frames: int) -> Plan:
    """One plan, with its probability."""
    plans, sums = _cumulated(task, frames)
    return plans[min(bisect(sums, float(rng.random()) * sums[-1]), len(plans) - 1)]


@cache
def _cumulated(task: Program, frames: int) -> tuple[list[Plan], list[float]]:
    pairs = task.plans(frames)
    return [p for p, _ in pairs], list(accumulate(w for _, w in pairs))
