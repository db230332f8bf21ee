"""Panels: a Result of many axes as several that can each be drawn. Torch-free; draws nothing."""

from __future__ import annotations

from dataclasses import replace

from lab.result import Result
from lab.view.specs import AVERAGED, kind_of, label, text

MOST = 12  # panels of one Result
GRID = ("frame", "row", "col")


def panels(result: Result, most: int = MOST) -> list[Result]:
    """The Result itself where a figure can show it; else one panel for every coordinate of its leading axes.

    Item and seed axes are averaged by the figure. Axes of one coordinate are left out. At most `most` panels: the last
    ones where there are more (of layers, the late ones).
    """
    axes = tuple(a for a in result.axes if a not in AVERAGED)
    if len(axes) <= 2 or axes == GRID or not all(result.shape):
        return [result]
    for axis in (a for a in result.axes if a in AVERAGED):
        result = result.mean(axis)
    grid = GRID if result.axes[-3:] == GRID else ()
    for axis in axes:
        if len(result.coords[axis]) == 1 and len(result.axes) > 2 and axis not in grid:
            result = _one(result, axis, 0)
    return _parts(result)[-most:]


def _parts(result: Result) -> list[Result]:
    if len(result.axes) <= 2 or kind_of(result) == "strip":
        return [result]
    first = result.axes[0]
    return [p for i in range(len(result.coords[first])) for p in _parts(_one(result, first, i))]


def _one(result: Result, axis: str, index: int) -> Result:
    """The part at one coordinate, which stands in its name if there were others."""
    values = result.coords[axis]
    part = result.select(**{axis: values[index]})
    said = f"{result.name}, {label(axis).lower()} {text(values[index])}" if len(values) > 1 else result.name
    return replace(part, name=said)
