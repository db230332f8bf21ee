"""Layer maps: values of layers by something else on a canvas; of tokens, folded to frames (the efficiency map)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from traitlets import Bool, Bytes, Float, Int, List, Tuple, Unicode

from lab.errors import ConfigError, UsageError
from lab.result import Result
from lab.view.canvas import Canvas, colours, extent, floats, script
from lab.view.selection import Selection
from lab.view.specs import FigureSpec, figure_spec, text
from lab.view.view import View


class MapWidget(Canvas):
    """The live map. values: flat [row, column], rows are layers; column: the name of the chosen one."""

    _esm = script("map.js")
    name = Unicode("vl-layers").tag(sync=True)
    rows = List(Int()).tag(sync=True)
    columns = List(Unicode()).tag(sync=True)
    values = Bytes(b"").tag(sync=True)
    colours = Bytes(b"").tag(sync=True)
    limits = Tuple(Float(), Float(), default_value=(0.0, 1.0)).tag(sync=True)
    diverging = Bool(False).tag(sync=True)
    pinned = Bool(False).tag(sync=True)
    layer = Int(None, allow_none=True).tag(sync=True)
    column = Unicode(None, allow_none=True).tag(sync=True)


class LayerMap(View):
    """A Result with axes (layer, other), in any order, as a map; a click chooses the layer and, of frames, the frame."""

    css = "vl-layers"

    def __init__(
        self, result: Result, *, selection: Selection | None = None, limits: tuple[float, float] | None = None
    ) -> None:
        super().__init__(selection)
        self._live = MapWidget(
            name=self.css, pinned=limits is not None, **({"limits": limits} if limits else {})
        )
        self.show(result)
        self._live.layer = self.selection.layer
        self._live.observe(self._chose, ["layer", "column"])
        self.selection.observe(self._follow, ["layer", "frame"])
        self._follow()

    def show(self, result: Result) -> None:
        """Show other values; the limits stay where they are pinned."""
        self._result = self._two(result)
        live, r = self._live, self._result
        other = r.axes[1]
        with live.hold_sync():
            live.title, live.unit = r.name, r.unit
            live.rows = list(r.coords["layer"])
            live.columns = [f"frame {c}" if other == "frame" else text(c) for c in r.coords[other]]
            live.values = floats(r.values)
            found, diverging = extent(r.values, r.baseline or 0.0)
            if not live.pinned:
                live.limits, live.diverging = found, diverging
            live.colours = colours(live.diverging)

    def _two(self, result: Result) -> Result:
        """The Result as (layer, other)."""
        for axis in [
            a for a in result.axes if a != "layer" and len(result.coords[a]) == 1 and len(result.axes) > 2
        ]:
            result = result.select(**{axis: result.coords[axis][0]})
        if len(result.axes) != 2 or "layer" not in result.axes:
            raise UsageError(
                f"a layer map needs the axis layer and one more, the result has {result.axes}; select or average first"
            )
        if result.axes[0] == "layer":
            return result
        return Result(result.values.T, result.axes[::-1], result.coords, result.unit, result.recipe, result.name, result.notes, baseline=result.baseline)  # fmt: skip

    def _chose(self, change: Any) -> None:
        live, other = self._live, self._result.axes[1]
        if change["name"] == "layer":
            self.selection.set(layer=live.layer)
        elif live.column in live.columns:
            self._chose_column(self._result.coords[other][live.columns.index(live.column)])

    def _chose_column(self, value: Any) -> None:
        if self._result.axes[1] == "frame":
            self.selection.set(frame=int(value))

    def _follow(self, _: Any = None) -> None:
        self._live.layer = self.selection.layer
        if self._result.axes[1] == "frame" and self.selection.frame in self._result.coords["frame"]:
            self._live.column = f"frame {self.selection.frame}"

    # ---- View -------------------------------------------------------------------------------------------------------

    def result(self) -> Result:
        """The values shown, axes (layer, other)."""
        return self._result

    def spec(self) -> FigureSpec:
        """The map as a heat map, with the limits that are set."""
        return figure_spec(
            self._result, kind="heat", limits=tuple(self._live.limits), diverging=self._live.diverging
        )  # type: ignore[arg-type]

    def settings(self) -> dict[str, Any]:
        """The limits, if they are pinned."""
        return {"limits": list(self._live.limits)} if self._live.pinned else {}

    def _set(self, settings: Mapping[str, Any]) -> None:
        if set(settings) - {"limits"}:
            raise ConfigError(
                f"a layer map has no settings {', '.join(sorted(set(settings) - {'limits'}))}; it has limits"
            )
        if "limits" in settings:
            self._live.pinned, self._live.limits = True, tuple(settings["limits"])

    def _make_widget(self) -> MapWidget:
        return self._live


class DepthMap(LayerMap):
    """Efficiency map: which video token is computed at which layer, folded to frames.

    result  axes (layer, frame, row, col) or (layer, frame): 1 where the token runs through the layer, 0 where it skips
            it or is gone, or any share between; nan where there is no token
    """

    css = "vl-depth"

    def __init__(
        self, result: Result, *, selection: Selection | None = None, limits: tuple[float, float] = (0.0, 1.0)
    ) -> None:
        super().__init__(result, selection=selection, limits=limits)

    def show(self, result: Result) -> None:
        """Show another run's tokens. `tokens` keeps the Result as it came."""
        self.tokens = result
        super().show(_folded(result))

    def at(self, layer: int) -> Result:
        """The tokens of one layer (1-based), axes (frame, row, col), for a `FrameStrip`."""
        return self.tokens.select(layer=layer)


def _folded(result: Result) -> Result:
    """Mean over the tokens of every frame."""
    if result.axes != ("layer", "frame", "row", "col"):
        return result
    known = np.isfinite(result.values)
    total, n = np.where(known, result.values, 0.0).sum((2, 3)), known.sum((2, 3))
    share = np.where(n > 0, total / np.maximum(n, 1), np.nan)
    coords = {a: result.coords[a] for a in ("layer", "frame")}
    return Result(share, ("layer", "frame"), coords, result.unit, result.recipe, result.name, result.notes)
