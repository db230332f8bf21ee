"""Means that a live view takes before it draws: quick, also of large Results. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lab.result import Result
from lab.view.specs import AVERAGED

DRAWS = 1000  # of the bootstrap
ROOM = 20_000_000  # numbers a bootstrap may hold at once


def mean_all(result: Result, also: Sequence[str] = ()) -> Result:
    """The mean over items and seeds, and over the axes named in `also`, as far as the Result has them."""
    for axis in (*also, *AVERAGED):
        result = mean_over(result, axis) if axis in result.axes else result
    return result


def mean_over(result: Result, axis: str) -> Result:
    """The mean over an axis: with its interval where items or seeds were repeated and the draws fit into memory."""
    at = result.axes.index(axis)
    if axis in AVERAGED and result.values.size // max(1, result.shape[at]) * DRAWS <= ROOM:
        return result.mean(axis, n_boot=DRAWS)
    values = np.ma.masked_invalid(result.values.astype(float)).mean(at).filled(np.nan)
    axes = tuple(a for a in result.axes if a != axis)
    notes = {**result.notes, "n": {**result.notes.get("n", {}), axis: result.shape[at]}}
    coords = {a: result.coords[a] for a in axes}
    return replace(result, values=values, axes=axes, coords=coords, notes=notes, low=None, high=None)
