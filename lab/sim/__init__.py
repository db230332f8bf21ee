"""The simulator. `items(task, n, seed)` makes questions about simulated videos, with ground truth and twins."""

from typing import Any

_HANDED_OUT = {"items": "draw_items", "TASKS": "TASKS"}


def __getattr__(name: str) -> Any:
    if name not in _HANDED_OUT:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lab.sim import tasks

    return getattr(tasks, _HANDED_OUT[name])
