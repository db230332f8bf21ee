"""Timeline: what the model would answer after every frame of a stream, and what was left out on the way.

Timeline(result)      axes (frame, option): P(option) after each frame; or (frame): one curve, such as p(silence)
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ipywidgets as W
import numpy as np

from lab.errors import UsageError
from lab.result import Result
from lab.view.averages import mean_all
from lab.view.live import LiveView
from lab.view.selection import Selection
from lab.view.specs import FigureSpec, Mark, figure_spec, text

FRAMES = ("frame", "n_frames", "seconds")


class Timeline(LiveView):
    """P(option) against frames seen. The slider (or a click, or Play) sets the selection's frame.

    result   an axis frame, n_frames or seconds, and at most an axis option beside it (item and seed are averaged).
             Of its notes, each with one entry for every frame: `kept` and `of` (tokens that were let in, and how many
             there were); and `skipped`, `triggered` (lists of frames)
    Raises UsageError for other axes.
    """

    css = "vl-timeline"

    def __init__(
        self, result: Result, *, selection: Selection | None = None, theme: str = "auto"
    ) -> None:  # fmt: skip
        super().__init__(selection, theme)
        result = mean_all(result)
        self.whole, self.time = result, _time_axis(result)
        n = len(result.coords[self.time])
        self.scrub = W.IntSlider(
            min=0, max=n - 1, value=min(self.selection.frame or 0, n - 1), description="Frame"
        )
        self.scrub.add_class("vl-scrub")
        self.play = W.Play(min=0, max=n - 1, interval=250)
        W.jslink((self.play, "value"), (self.scrub, "value"))
        self.scrub.observe(lambda c: self.guarded(lambda: self.selection.set(frame=c["new"])), "value")
        self.selection.observe(self._frame_selected, "frame")

    def result(self) -> Result:
        """The numbers, axes (option, frame) or (frame)."""
        r = self.whole
        if r.axes[-1] == self.time:
            return r
        turned = {n: None if (v := getattr(r, n)) is None else v.T for n in ("values", "low", "high")}
        return replace(r, axes=r.axes[::-1], **turned)

    def stable(self) -> int | None:
        """Index of the frame from which on the likeliest option stays the same; None without options."""
        return first_stable(self.result().values) if len(self.whole.axes) == 2 else None

    def spec(self) -> FigureSpec:
        """The curves with their marks."""
        r = self.result()
        title = (
            f"{r.name or 'Stream'}: {r.unit} against {'time' if self.time == 'seconds' else 'frames seen'}"
        )
        spec = figure_spec(r, kind="lines", title=title, limits=_limits(r))
        return replace(spec, marks=tuple(self._marks()), caption=f"{spec.caption} {self._left_out()}".strip())

    def clicked(self, trace: int, point: Any) -> None:
        """Select the frame."""
        self.selection.set(frame=int(point))

    def outlines(self) -> list[dict[str, Any]]:
        """A line at the selected frame."""
        x = self.whole.coords[self.time]
        at = self.selection.frame
        if at is None or at >= len(x):
            return []
        line = {"color": "#d55e00", "width": 2}
        return [{"type": "line", "x0": x[at], "x1": x[at], "y0": 0, "y1": 1, "yref": "paper", "line": line}]

    def extras(self) -> list[W.Widget]:
        """Play and the slider."""
        return [self.play, self.scrub]

    def _frame_selected(self, change: Any) -> None:
        if change["new"] is not None and change["new"] <= self.scrub.max:
            self.scrub.value = change["new"]

    def _marks(self) -> list[Mark]:
        x, notes = self.whole.coords[self.time], self.whole.notes
        at = self.stable()
        marks = [] if at is None else [Mark(float(x[at]), f"stable from here: {self._winner()}")]
        marks += [Mark(float(x[i]), "the model spoke") for i in _frames(notes, "triggered", len(x))]
        for i, (kept, of) in enumerate(self._kept()):
            if kept < of:
                marks.append(Mark(float(x[i]), f"{of - kept} of {of} tokens dropped", line=False))
        skipped = _frames(notes, "skipped", len(x))
        return [*marks, *(Mark(float(x[i]), "frame skipped", line=False) for i in skipped)]

    def _winner(self) -> str:
        r = self.result()
        return text(r.coords[r.axes[0]][int(np.nanargmax(r.values[:, -1]))])

    def _kept(self) -> list[tuple[int, int]]:
        kept, of = (self.whole.notes.get(n) or [] for n in ("kept", "of"))
        n = len(self.whole.coords[self.time])
        return [(int(a), int(b)) for a, b in zip(kept, of, strict=True)] if len(kept) == len(of) == n else []

    def _left_out(self) -> str:
        counts = self._kept()
        words = []
        if counts:
            dropped, all_ = sum(b - a for a, b in counts), sum(b for _, b in counts)
            words.append(f"{dropped} of {all_} video tokens were dropped (triangles).")
        at = self.stable()
        if at is not None:
            words.append(
                f"The answer is {self._winner()} from frame {text(self.whole.coords[self.time][at])} on."
            )
        return " ".join(words)


def first_stable(values: Any) -> int | None:
    """The first index from which the largest of values [option, frame] is always the one it is at the end.

    None where the last frame has no number; a frame without numbers counts as a change.
    """
    known = np.isfinite(values).any(0)
    if not known.size or not known[-1]:
        return None
    best = np.where(known, np.where(np.isfinite(values), values, -np.inf).argmax(0), -1)
    changes = np.flatnonzero(best != best[-1])
    return int(changes[-1]) + 1 if changes.size else 0


def _time_axis(result: Result) -> str:
    time = next((a for a in FRAMES if a in result.axes), None)
    rest = [a for a in result.axes if a != time]
    if time is None or rest not in ([], ["option"]) or not all(result.shape):
        raise UsageError(
            f"a timeline needs an axis frame, n_frames or seconds, and at most option beside it; the result has "
            f"{result.axes} of {result.shape}"
        )
    return time


def _limits(result: Result) -> tuple[float, float] | None:
    """Probabilities are drawn from 0 to 1, whatever they are: so that two timelines can be compared."""
    known = result.values[np.isfinite(result.values)]
    return (
        (0.0, 1.0)
        if "probability" in result.unit and known.size and 0 <= known.min() <= known.max() <= 1
        else None
    )


def _frames(notes: dict[str, Any], name: str, n: int) -> list[int]:
    return [int(i) for i in notes.get(name) or [] if 0 <= int(i) < n]
