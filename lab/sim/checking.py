"""Answers read from the pixels: a second opinion on every item, on a path of its own.

    python -m lab.sim.checking --n 10000          # items in all; exits with 1 if one is wrong

Knows the palette, the words of the questions and where the box stands. Uses no track, no plan and no event. For
clips without knobs: noise, shake and flicker hide the exact colours it looks for.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lab.carriers import VideoQA
from lab.errors import UsageError
from lab.sim.shapes import COLOURS, Pixels
from lab.sim.tasks import TASKS, draw_items

PLAIN = {  # mean colours of the places
    "grass": (53, 115, 48), "sand": (179, 151, 97), "snow": (213, 218, 227), "water": (41, 94, 152), "night": (19, 18, 42),
}  # fmt: skip
CRITICAL = {1: 10.83, 2: 13.82, 3: 16.27}  # chi-square at p = 0.001, by degrees of freedom


@dataclass(frozen=True)
class Seen:
    """One colour through a clip: pixels in every frame, and the middle of their bounding box (nan where none)."""

    count: NDArray[np.int_]  # [frame]
    x: NDArray[np.float64]
    y: NDArray[np.float64]


def look(video: Pixels, colour: str) -> Seen:
    """Finds a colour in every frame."""
    r, g, b = COLOURS[colour]
    hit = (video[..., 0] == r) & (video[..., 1] == g) & (video[..., 2] == b)
    middle = [
        [(np.flatnonzero(m.any(axis))[[0, -1]].sum() + 1) / 2 if m.any() else np.nan for axis in (0, 1)]
        for m in hit
    ]
    x, y = np.array(middle).T
    return Seen(hit.sum((1, 2)), x, y)


def reread(item: VideoQA) -> str:
    """The answer to an item, from its pixels and its question. Raises UsageError for a task it does not know."""
    if item.task not in READERS:
        raise UsageError(f"no reader for task {item.task!r}; there are {', '.join(READERS)}")
    named = [c for c in re.findall(r"[a-z]+", item.question) if c in COLOURS]
    return READERS[item.task](item.video, named, item.question)


def _moving(video: Pixels, named: list[str], question: str) -> str:
    seen = look(video, named[0])
    dx, dy = seen.x[-1] - seen.x[0], seen.y[-1] - seen.y[0]
    if abs(dx) > abs(dy):
        return "left" if dx < 0 else "right"
    return "up" if dy < 0 else "down"


def _antonym(video: Pixels, named: list[str], question: str) -> str:
    seen = look(video, named[0])
    there = seen.count > 0
    if not there.all():
        moves = np.nanmax(seen.x) - np.nanmin(seen.x) > 1
        return ("enters" if there[-1] else "leaves") if moves else ("appears" if there[-1] else "disappears")
    if abs(seen.y[-1] - seen.y[0]) > 10:
        return "rises" if seen.y[-1] < seen.y[0] else "falls"
    return "grows" if seen.count[-1] > seen.count[0] else "shrinks"


def _sequence(video: Pixels, named: list[str], question: str) -> str:
    seen, half = look(video, named[0]), len(video) // 2
    t = half // 2 if "first" in question else half + half // 2
    if not seen.count[t]:
        return "vanishes"
    if abs(seen.y[t] - seen.y[0]) > 8:
        return "jumps" if seen.y[t] < seen.y[0] else "drops"
    return "grows" if seen.count[t] > seen.count[0] else "shrinks"


def _count(video: Pixels, named: list[str], question: str) -> str:
    half = len(video) // 2
    part = video[:half] if "beginning" in question else video[half:]
    everyone = [look(part, c) for c in COLOURS]
    moving = [s for s in everyone if s.count[0] > 0 and float(np.ptp(s.x)) > 10]
    return ("zero", "one", "two", "three")[len(moving)]


def _scene(video: Pixels, named: list[str], question: str) -> str:
    corner = [
        np.concatenate([frame[:, :8].reshape(-1, 3), frame[:, -8:].reshape(-1, 3)]).mean(0) for frame in video
    ]
    first, last = (
        min(PLAIN, key=lambda name: float(abs(np.array(PLAIN[name]) - c).sum()))
        for c in (corner[0], corner[-1])
    )
    return f"from {first} to {last}"


def _middle(video: Pixels, colour: str) -> complex:
    seen = look(video, colour)
    return complex(float(np.nanmean(seen.x)), -float(np.nanmean(seen.y)))  # y upwards


def _distance(video: Pixels, named: list[str], question: str) -> str:
    gap = abs(_middle(video, named[0]) - _middle(video, named[1])) / 8
    return ("zero", "one", "two", "three", "four", "five", "six", "seven")[round(gap)]


def _relation(video: Pixels, named: list[str], question: str) -> str:
    p, o, q = (_middle(video, c) for c in named)
    turn = float(np.degrees(np.angle((q - p) / (o - p))))
    if abs(turn) < 45:
        return "front"
    return "behind" if abs(turn) > 135 else ("left" if turn > 0 else "right")


def _arrival(video: Pixels, named: list[str], question: str) -> str:
    there = {c: np.flatnonzero(look(video, c).x > 40) for c in COLOURS}
    times = {c: int(t[0]) for c, t in there.items() if len(t)}
    return (min if "first" in question else max)(times, key=lambda c: times[c])


READERS: dict[str, Callable[[Pixels, list[str], str], str]] = {
    "moving_direction": _moving, "action_antonym": _antonym, "action_sequence": _sequence, "object_count": _count,
    "scene_transition": _scene, "metric_distance": _distance, "perspective_relation": _relation, "arrival_order": _arrival,
}  # fmt: skip


def agrees(item: VideoQA) -> bool:
    """Whether the item's answer is what the pixels say."""
    said = item.options[int(item.answer or 0)] if item.options else str(item.answer)
    read = reread(item)
    return said.startswith(read) if item.task == "arrival_order" else said == read


def chi_square(counts: list[int]) -> float:
    """How far counts are from all equal."""
    mean = sum(counts) / len(counts)
    return sum((c - mean) ** 2 for c in counts) / mean


@dataclass(frozen=True)
class Verdict:
    """What a check of many items found.

    letters      chi-square of how often each letter is right; options: of how often the first, second, ... option in
                 alphabetical order is (p = 0.001 at CRITICAL[n_letters - 1])
    twins_same   twins with the clip's own answer, or with another question
    changed      share of pixels that differ between clip and twin, mean
    """

    task: str
    items: int
    wrong: int
    twins_wrong: int
    twins_same: int
    letters: float
    options: float
    changed: float
    n_letters: int


def check(task: str, n: int, seed: int = 0, **kw: Any) -> Verdict:
    """Draws `n` items and checks each, and its twin."""
    wrong = twins_wrong = same = 0
    changed, letters, options, k = 0.0, Counter[int](), Counter[int](), 0
    for start in range(0, n, 250):
        for item in draw_items(task, min(250, n - start), seed + 1_000_003 * (start // 250), **kw):
            twin = item.twin
            assert twin is not None
            wrong += not agrees(item)
            twins_wrong += not agrees(twin)
            same += (
                twin.answer == item.answer or twin.question != item.question or twin.options != item.options
            )
            changed += float((item.video != twin.video).any(-1).mean())
            letters[int(item.answer or 0)] += 1
            options[sorted(item.options).index(item.options[int(item.answer or 0)])] += 1
            k = len(item.options)
    by_letter, by_option = (chi_square([c[i] for i in range(k)]) for c in (letters, options))
    return Verdict(task, n, wrong, twins_wrong, same, by_letter, by_option, changed / n, k)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description="Re-derive the answers of simulated items from their pixels."
    )
    parser.add_argument("--n", type=int, default=10_000, help="items in all, shared among the tasks")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    bad = 0
    head = (
        "items",
        "wrong",
        "twins wrong",
        "not flipped",
        "chi2 letters",
        "chi2 options",
        "limit",
        "pixels changed",
    )
    print(f"{'task':22}" + "".join(f"{h:>{len(h) + 2}}" for h in head))
    for task in TASKS:
        v = check(task, args.n // len(TASKS), args.seed)
        bad += v.wrong + v.twins_wrong + v.twins_same
        limit = CRITICAL[v.n_letters - 1]
        print(
            f"{task:22}{v.items:7}{v.wrong:7}{v.twins_wrong:13}{v.twins_same:13}"
            f"{v.letters:14.2f}{v.options:14.2f}{limit:7.2f}{v.changed:16.1%}"
        )
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
