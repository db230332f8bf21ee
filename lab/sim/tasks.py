"""All tasks by name. Reachable as `lab.sim.items(task, n, seed)`."""

from __future__ import annotations

import difflib
import importlib
from types import ModuleType
from typing import Any

from lab.carriers import VideoQA
from lab.errors import UsageError

TEMPORAL = ("moving_direction", "action_antonym", "action_sequence", "object_count", "scene_transition")
SPATIAL = ("metric_distance", "perspective_relation", "arrival_order")
TASKS = TEMPORAL + SPATIAL


def draw_items(task: str, n: int, seed: int, **kw: Any) -> list[VideoQA]:
    """`n` questions of `task`, drawn with `seed`; each has `state` (ground truth) and `twin`.

    frames=8, form="choice" | "open", and knobs (distractors, noise, camera, static): see `lab.sim.program.draw`.
    Raises UsageError for an unknown task, naming the closest, and for n below 0.
    """
    if n < 0:
        raise UsageError(f"n={n}: the number of questions cannot be below 0")
    return module_of(task).items(n, seed, **kw)


def named_tasks(names: str) -> list[str]:
    """Tasks with commas between; "temporal" stands for the five of `TEMPORAL`."""
    parts = [n.strip() for n in names.split(",")]
    return [task for n in parts for task in (TEMPORAL if n == "temporal" else (n,))]


def module_of(task: str) -> ModuleType:
    """The file of a task. Raises UsageError for an unknown one."""
    if task not in TASKS:
        near = difflib.get_close_matches(str(task), TASKS, n=1)
        raise UsageError(
            f"no task {task!r}{f'; closest: {near[0]}' if near else ''}; there are {', '.join(TASKS)}"
        )
    return importlib.import_module("lab.sim.moving" if task == "moving_direction" else f"lab.sim.{task}")
