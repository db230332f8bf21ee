"""Values of video tokens painted over the frames they lie on. Torch-free; knows no model."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lab.errors import UsageError
from lab.view.palette import rgba_scale


def overlay(values: Any, frames: Any, *, limit: float | None = None) -> NDArray[np.uint8]:
    """Frames with the values of their tokens on them, uint8 [frame, height, width, 3].

    values  [frame, row, col], or one per frame [frame]; nan is left clear. The farther from 0, the stronger the colour:
            one end of the diverging scale for values above 0, the other for those below
    frames  uint8 [frame, height, width, 3]; of n frames to a token (tubelets) each gets its token's value
    limit   the value with the strongest colour; None: the largest there is
    Raises UsageError where the numbers of frames do not fit.
    """
    grid, pictures = np.asarray(values, float), np.asarray(frames)
    grid = grid[:, None, None] if grid.ndim == 1 else grid
    if grid.ndim != 3 or pictures.ndim != 4 or pictures.dtype != np.uint8 or not len(grid):
        raise UsageError(
            f"need values [frame, row, col] and uint8 frames [frame, height, width, 3], got {grid.shape} and "
            f"{pictures.dtype} {pictures.shape}"
        )
    if len(pictures) < len(grid):
        raise UsageError(f"{len(grid)} frames of values for {len(pictures)} pictures")
    n, height, width = pictures.shape[:3]
    at = np.ix_(np.arange(n) * len(grid) // n, _spread(height, grid.shape[1]), _spread(width, grid.shape[2]))
    shown = np.nan_to_num(grid[at])
    top = limit if limit is not None else float(np.abs(shown).max(initial=0.0))
    share = np.clip(shown / top, -1, 1) if top > 0 else np.zeros_like(shown)
    scale = np.array(rgba_scale(True))
    places = np.arange(len(scale))
    at_scale = (share + 1) / 2 * (len(scale) - 1)
    colours = np.stack([np.interp(at_scale, places, scale[:, c]) for c in range(4)], -1)
    cover = colours[..., 3:] * (share != 0)[..., None]
    return np.round(pictures * (1 - cover) + 255 * colours[..., :3] * cover).clip(0, 255).astype(np.uint8)


def _spread(size: int, cells: int) -> NDArray[np.int64]:
    """Which cell each pixel lies in."""
    return np.arange(size) * cells // size
