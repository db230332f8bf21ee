"""Labels for linear probes: what a simulated video's ground truth says, for the item or for every frame."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import Any

from lab.carriers import VideoQA
from lab.errors import UsageError
from lab.sim.moving import direction
from lab.sim.shapes import Scene

Label = Callable[[VideoQA], Any]
FPS = 8  # of simulated clips


def _things(item: VideoQA) -> tuple[Any, ...]:
    if item.state is None:
        raise UsageError(
            f"{item.id or item.question!r} has no ground truth; give labels= as a list or a function"
        )
    return (item.state,) if isinstance(item.state, Scene) else item.state.things


def _answer(item: VideoQA) -> str:
    if item.answer is None:
        raise UsageError(f"{item.id or item.question!r} has no known answer")
    return item.options[item.answer] if isinstance(item.answer, int) else item.answer


def _letter(item: VideoQA) -> str:
    if item.letter is None:
        raise UsageError(f"{item.id or item.question!r} has no options or no known answer")
    return item.letter


def _frames(item: VideoQA) -> int:
    _things(item)
    return len(item.state.track) if isinstance(item.state, Scene) else len(item.state)


def _next_event(item: VideoQA) -> list[str]:
    """For every frame, what begins after it; "none" where nothing does."""
    events = sorted(getattr(item.state, "events", ()), key=lambda e: e.start)
    if not events:
        raise UsageError(f"{item.id or item.question!r} has no events to predict; use another task")
    return [next((e.verb for e in events if e.start > f / FPS), "none") for f in range(_frames(item))]


def _direction(item: VideoQA) -> str:
    _things(item)
    return direction(item.state)


LABELS: dict[str, Label] = {
    "answer": _answer,
    "letter": _letter,
    "direction": _direction,
    "colour": lambda item: str(_things(item)[0].colour),
    "shape": lambda item: str(_things(item)[0].shape),
    "count": _answer,
    "position": lambda item: [tuple(map(float, at)) for at in _things(item)[0].track],
    "time": lambda item: [f / FPS for f in range(_frames(item))],
    "next event": _next_event,
}
"""Texts are classes, numbers (or tuples of them) are regressed; a list holds one label for every frame of the video."""


def labels_of(label: Any, items: Sequence[VideoQA | None]) -> list[Any]:
    """A label for every item: by name, by function, or given as a list. Raises UsageError with what is wrong."""
    if isinstance(label, str):
        if label not in LABELS:
            near = difflib.get_close_matches(label, LABELS, n=1)
            raise UsageError(
                f"no label {label!r}{f'; closest: {near[0]}' if near else ''}; there are {', '.join(LABELS)}"
            )
        label = LABELS[label]
    if callable(label):
        if any(i is None for i in items):
            raise UsageError("labels by name or function need items made by VideoQA; give a list of labels")
        return [label(i) for i in items if i is not None]
    if not isinstance(label, Sequence) or len(label) != len(items):
        raise UsageError(
            f"labels are a name, a function or one value for each of {len(items)} items, got {label!r:.60}"
        )
    return list(label)
