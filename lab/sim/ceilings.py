"""What can be answered from less than the video: from a blank one, from one frame, from its frames in any order.

    python -m lab.sim.ceilings          # the table of all tasks

Counted over all plans of a task, so exact (error 0): the best answer to every observation, weighted by its
probability. Whoever answers is taken to know the look (colours, sizes), on which the answer does not depend. Knobs
other than distractors only take information away: then these are upper bounds. moving_direction has no list of plans;
its numbers for single frames come from drawn scenes and carry an error.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from lab.sim.moving import DIRECTIONS, draw_scene
from lab.sim.program import Look, Program, check_frames
from lab.sim.shapes import SIDE
from lab.sim.stage import Stage
from lab.sim.tasks import TASKS, module_of

Observed = tuple[Hashable, Hashable, float]  # what is seen, the answer, probability


@dataclass(frozen=True)
class Ceilings:
    """Highest possible share of right answers.

    blank    from the question and its options alone
    frame    from one frame, drawn at random, without knowing which it is
    frames   from frame t, knowing that it is frame t, for every t
    bag      from all frames in unknown order (up to reversal, if distractors wander through the clip)
    error    of frame and frames, each way: 0 where counted; else 3 standard errors and the estimate's own bias
    """

    task: str
    blank: float
    frame: float
    bag: float
    frames: tuple[float, ...]
    error: float = 0.0


def ceilings_of(task: str, *, frames: int = 8, distractors: int = 0) -> Ceilings:
    """The ceilings of a task's clips of `frames` frames. Raises UsageError for an unknown task."""
    if task == "moving_direction":
        return _moving(frames)
    check_frames(frames)
    return counted(cast(Program, module_of(task)), frames, up_to_reversal=distractors > 0)


def counted(task: Program, frames: int, *, up_to_reversal: bool = False) -> Ceilings:
    """Ceilings of a task by counting over its plans."""
    seen = [(task.build(plan, Look(), frames), p) for plan, p in task.plans(frames)]
    cases = [_Case(task, stage, p, frames) for stage, p in seen]
    bag = _chain if up_to_reversal and not seen[0][0].calm else _sorted
    return Ceilings(
        task.TASK,
        blank=best((c.asked, c.said, c.p) for c in cases),
        frame=best(((c.asked, k), c.said, c.p / frames) for c in cases for k in c.keys),
        bag=best(((c.asked, bag(c.keys)), c.said, c.p) for c in cases),
        frames=tuple(best(((c.asked, c.keys[t]), c.said, c.p) for c in cases) for t in range(frames)),
    )


class _Case:
    """One plan: the question, the answer, what each frame shows, its probability."""

    def __init__(self, task: Program, stage: Stage, p: float, frames: int) -> None:
        question, options = task.ask(stage)
        self.asked, self.said, self.p = (question, tuple(sorted(options))), task.answer(stage), p
        self.keys = [stage.key(t) for t in range(frames)]


def best(observed: Iterable[Observed]) -> float:
    """Share of right answers of whoever gives the likeliest answer to everything that can be seen."""
    table: defaultdict[Hashable, defaultdict[Hashable, float]] = defaultdict(lambda: defaultdict(float))
    for seen, said, p in observed:
        table[seen][said] += p
    return sum(max(row.values()) for row in table.values())


def _sorted(keys: list[tuple[Any, ...]]) -> Hashable:
    return tuple(sorted(keys))


def _chain(keys: list[tuple[Any, ...]]) -> Hashable:
    """A shape that wanders evenly through the clip gives the order away, but not which end is the first."""
    return min(tuple(keys), tuple(keys[::-1]))


# ---- moving_direction: drawn scenes ----


def _moving(frames: int, n: int = 40_000, bins: int = 16) -> Ceilings:
    """A track is drawn first, and the direction decides which way it is walked: blank 1/4 and bag 1/2 are exact.

    One frame shows a place (x, y), here told apart to 4 pixels. The likeliest direction for each place is learned on half of the drawn scenes and
    tried on the other half; on its own half it does better than possible, on the other worse: the error spans both.
    """
    rng = np.random.default_rng(0)
    tracks = np.array([draw_scene(rng, frames, way="right").track for _ in range(n)])
    cells = (tracks / SIDE * bins).astype(int).clip(0, bins - 1)
    known = [_place_ceiling(cells[:, t], cells[:, frames - 1 - t], bins) for t in range(frames)]
    forward, backward = cells.reshape(-1, 2), cells[:, ::-1].reshape(-1, 2)
    pooled = _place_ceiling(forward, backward, bins)
    error = max((high - low) / 2 for low, high in [*known, pooled]) + 3 * 0.5 / np.sqrt(2 * n)
    middle = [round((low + high) / 2, 4) for low, high in known]
    return Ceilings(
        "moving_direction", 0.25, round(sum(pooled) / 2, 4), 0.5, tuple(middle), round(float(error), 4)
    )


def _place_ceiling(right: NDArray[np.int_], left: NDArray[np.int_], bins: int) -> tuple[float, float]:
    """(on scenes not learned from, on those learned from): share of right answers from the place alone.

    right, left  [scene, (x, y)] cells of a shape that moves right, or left; up and down are the same with x and y swapped
    """
    half = len(right) // 2
    by_way = {"right": right, "left": left, "down": right[:, ::-1], "up": left[:, ::-1]}
    flat = {way: places[:, 0] * bins + places[:, 1] for way, places in by_way.items()}
    learned = np.stack([np.bincount(flat[way][:half], minlength=bins**2) for way in DIRECTIONS])
    others = np.stack([np.bincount(flat[way][half:], minlength=bins**2) for way in DIRECTIONS])
    choice = learned.argmax(0)
    tried = others[choice, np.arange(bins * bins)].sum() / others.sum()
    return float(tried), float(learned.max(0).sum() / learned.sum())


def main() -> None:
    """Prints the table."""
    print(f"{'task':22}{'blank':>8}{'frame':>8}{'bag':>8}{'error':>8}   frame t known")
    for task in TASKS:
        c = ceilings_of(task)
        print(
            f"{task:22}{c.blank:8.3f}{c.frame:8.3f}{c.bag:8.3f}{c.error:8.3f}   {' '.join(f'{f:.2f}' for f in c.frames)}"
        )


if __name__ == "__main__":
    main()
