"""Frame strip: the frames of a video with the values of their tokens on them; a click on a patch chooses its token.

The frames go to the browser once. Another set of values, another scale, threshold or opacity is drawn there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from traitlets import Bool, Bytes, Float, Int, List, Tuple, Unicode

from lab.errors import ConfigError, UsageError
from lab.result import Result
from lab.view.canvas import Canvas, colours, extent, floats, ints, jpegs, script, tie
from lab.view.selection import Selection
from lab.view.specs import FigureSpec, figure_spec, text
from lab.view.view import View

AXES = ("frame", "row", "col")
SETTINGS = ("opacity", "threshold", "per_frame", "pinned")


class StripWidget(Canvas):
    """The live strip. frames: one JPEG each; shape: (frames, rows, columns) of the tokens; values, tokens: flat."""

    _esm = script("strip.js")
    frames = List(Bytes()).tag(sync=True)
    labels = List(Unicode()).tag(sync=True)
    shape = Tuple(Int(), Int(), Int(), default_value=(0, 0, 0)).tag(sync=True)
    values = Bytes(b"").tag(sync=True)
    tokens = Bytes(b"").tag(sync=True)
    colours = Bytes(b"").tag(sync=True)
    limits = Tuple(Float(), Float(), default_value=(0.0, 1.0)).tag(sync=True)
    diverging = Bool(False).tag(sync=True)
    pinned = Bool(False).tag(sync=True)
    per_frame = Bool(False).tag(sync=True)
    opacity = Float(1.0, min=0.0, max=1.0).tag(sync=True)
    threshold = Float(0.0, min=0.0, max=1.0).tag(sync=True)
    frame = Int(None, allow_none=True).tag(sync=True)
    patch = Tuple(Int(), Int(), default_value=None, allow_none=True).tag(sync=True)
    token = Int(None, allow_none=True).tag(sync=True)


class FrameStrip(View):
    """Values of video tokens over the frames they lie on.

    result     axes (frame, row, col), others of one coordinate beside them; or None: the frames alone
    frames     uint8 [frame, height, width, 3]; of n frames to a token (tubelets) the first of each n is shown
    positions  the prompt position of every token, int [frame, row, col], -1 where there is none; None: not known
    grid       (frames, rows, columns) of the tokens where there is no Result yet
    Raises UsageError for a Result of other axes, or numbers of frames that do not fit.
    """

    def __init__(
        self, result: Result | None, frames: Any, *, positions: Any = None, grid: tuple[int, int, int] | None = None,
        seconds: Any = None, selection: Selection | None = None,
    ) -> None:  # fmt: skip
        super().__init__(selection)
        self._result = (
            empty(grid or np.asarray(frames).shape[:1] + (1, 1)) if result is None else _grid(result)
        )
        shape = self._result.shape
        self.pictures = _pictures(frames, shape[0])
        self._positions = None if positions is None else np.asarray(positions)
        if self._positions is not None and self._positions.shape != shape:
            raise UsageError(
                f"positions have shape {self._positions.shape}, the values {shape}; give one for each"
            )
        self._seconds = list(seconds) if seconds is not None else self._result.notes.get("seconds", [])
        self._live = self._first()

    # ---- View -------------------------------------------------------------------------------------------------------

    def result(self) -> Result:
        """The values that are shown now: axes (frame, row, col)."""
        return self._result

    def spec(self) -> FigureSpec:
        """The strip as a static figure, with the limits that are set."""
        limits = tuple(self._live.limits)
        return figure_spec(
            self._result, kind="strip", frames=self.pictures, limits=limits, diverging=self._live.diverging
        )  # type: ignore[arg-type]

    def settings(self) -> dict[str, Any]:
        """Opacity, threshold (share of the scale below which nothing is shown), scale per frame, limits and pin."""
        kept = {n: getattr(self._live, n) for n in SETTINGS}
        return {**kept, **({"limits": list(self._live.limits)} if self._live.pinned else {})}

    def _set(self, settings: Mapping[str, Any]) -> None:
        wrong = sorted(set(settings) - {*SETTINGS, "limits"})
        if wrong:
            raise ConfigError(
                f"a frame strip has no settings {', '.join(wrong)}; it has {', '.join(SETTINGS)}, limits"
            )
        for name, value in settings.items():
            setattr(self._live, name, tuple(value) if name == "limits" else value)

    def _make_widget(self) -> StripWidget:
        return self._live

    # ---- what it shows ------------------------------------------------------------------------------------------------

    def show(self, result: Result) -> None:
        """Show other values over the same frames; the limits stay where they are pinned."""
        result = _grid(result)
        if result.shape != self._result.shape:
            raise UsageError(f"these values have shape {result.shape}, the strip {self._result.shape}")
        self._result = result
        live = self._live
        with live.hold_sync():
            live.title, live.unit, live.values = result.name, result.unit, floats(result.values)
            if not live.pinned:
                live.limits, live.diverging = extent(result.values, result.baseline or 0.0)
                live.colours = colours(live.diverging, on_picture=True)

    def _first(self) -> StripWidget:
        r = self._result
        limits, diverging = extent(r.values, r.baseline or 0.0)
        live = StripWidget(
            title=r.name, unit=r.unit, frames=jpegs(self.pictures), labels=self._labels(), shape=r.shape,
            values=floats(r.values), colours=colours(diverging, on_picture=True), limits=limits, diverging=diverging,
            tokens=b"" if self._positions is None else ints(self._positions),
        )  # fmt: skip
        tie(live, self.selection, ("frame", "patch", "token"))
        self.selection.observe(self._follow_token, "token")
        live.observe(self._follow_patch, ["frame", "patch"])
        return live

    def _labels(self) -> list[str]:
        names = [f"frame {text(c)}" for c in self._result.coords["frame"]]
        times = [*self._seconds, *[None] * len(names)]
        return [
            n + (f" · {t:.1f} s" if isinstance(t, float) and np.isfinite(t) else "")
            for n, t in zip(names, times, strict=False)
        ]

    def _follow_token(self, change: Any) -> None:
        """Another view chose a token: if it lies in a frame, so do frame and patch."""
        if self._positions is None or change["new"] is None:
            return
        places = np.argwhere(self._positions == change["new"]).tolist()
        if places:
            frame, row, col = places[0]
            self.selection.set(frame=frame, patch=(row, col))

    def _follow_patch(self, _: Any) -> None:
        """A frame and patch were chosen: so is their token."""
        frame, patch = self._live.frame, self._live.patch
        if self._positions is None or frame is None or patch is None:
            return
        n, rows, cols = self._positions.shape
        if frame < n and patch[0] < rows and patch[1] < cols:
            at = int(self._positions[frame, patch[0], patch[1]])
            self.selection.set(token=at if at >= 0 else None)


def empty(shape: tuple[int, ...]) -> Result:
    """A Result of a strip that shows nothing yet."""
    coords: dict[str, list[Any]] = {a: list(range(n)) for a, n in zip(AXES, shape, strict=True)}
    return Result(np.full(shape, np.nan), AXES, coords, "", {})


def _grid(result: Result) -> Result:
    """The Result with axes (frame, row, col); axes of one coordinate are left out, (frame) gets one row and column."""
    for axis in [a for a in result.axes if a not in AXES and len(result.coords[a]) == 1]:
        result = result.select(**{axis: result.coords[axis][0]})
    if result.axes == ("frame",):
        coords = {**result.coords, "row": [0], "col": [0]}
        return Result(
            result.values[:, None, None], AXES, coords, result.unit, result.recipe, result.name, result.notes
        )
    if result.axes != AXES:
        raise UsageError(
            f"a frame strip needs the axes {AXES}, the result has {result.axes}; select or average first"
        )
    return result


def _pictures(frames: Any, n: int) -> NDArray[np.uint8]:
    pictures = np.asarray(frames)
    if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[-1] != 3 or not n:
        raise UsageError(
            f"frames must be uint8 [frame, height, width, 3], got {pictures.dtype} {pictures.shape}"
        )
    if len(pictures) < n or len(pictures) % n:
        raise UsageError(f"{len(pictures)} pictures for {n} frames of tokens; give one each, or a multiple")
    return pictures[:: len(pictures) // n]
