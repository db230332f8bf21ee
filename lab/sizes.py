"""What size a checkpoint wants its frames, from the preprocessor's numbers alone. Touches no pixels."""

from __future__ import annotations

import math

from lab.errors import VideoError
from lab.preprocessor import Preprocessor

MAX_ASPECT = 200  # Qwen's limit: longer strips are refused


def target_size(pre: Preprocessor, n: int, height: int, width: int) -> tuple[int, int]:
    """(height, width) after resizing, for n frames of height x width; before any crop. Computes no pixels."""
    if pre.patch_size is not None:
        return _patched_size(pre, n, height, width)
    if {"height", "width"} <= pre.size.keys():
        return pre.size["height"], pre.size["width"]
    return _by_edge(height, width, pre.size["shortest_edge"], pre.size.get("longest_edge"))


def _by_edge(height: int, width: int, short: int, limit: int | None) -> tuple[int, int]:
    """The short side becomes `short`, unless the long one would pass `limit`: then the long one becomes `limit`."""
    low, high = min(height, width), max(height, width)
    exact = float(short)
    if limit is not None and high / low * short > limit:
        exact = limit * low / high
        short = round(exact)
    if limit is not None and low == short:  # transformers leaves such a picture as it is
        return height, width
    long = int(exact * high / low)
    return (short, long) if height <= width else (long, short)


def _patched_size(pre: Preprocessor, n: int, height: int, width: int) -> tuple[int, int]:
    factor = (pre.patch_size or 1) * pre.merge_size
    low, high = pre.size["shortest_edge"], _largest(pre, n, factor)
    if pre.budget != "video":
        return smart_resize(height, width, factor, low, high)
    return smart_resize_3d(
        max(n, pre.temporal_patch_size), height, width, factor, low, high, pre.temporal_patch_size
    )


def _largest(pre: Preprocessor, n: int, factor: int) -> int:
    """Largest number of pixels for `smart_resize`, of a frame or (budget "video") of all n."""
    low, high, tokens = pre.size["shortest_edge"], pre.size["longest_edge"], pre.max_video_tokens
    if pre.budget == "share":
        return high // n
    if not pre.cap_pixels_per_frame:
        return high
    floor = int(low * 1.05)
    if pre.budget == "video":
        return max(min((tokens or 768) * factor * factor, high // n), floor) * n
    total = int((tokens or 128000) * factor * factor * 0.9)
    return max(min(high, total * pre.temporal_patch_size // n), floor)


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Qwen2-VL's size: both sides multiples of `factor`, pixels within the limits, aspect ratio nearly kept."""
    _check_aspect(height, width)
    return _fit((height, width), 1, 1, factor, min_pixels, max_pixels)


def smart_resize_3d(
    n: int, height: int, width: int, factor: int, min_pixels: int, max_pixels: int, temporal: int = 2
) -> tuple[int, int]:
    """Qwen3-VL's size: as `smart_resize`, with the limits counting the pixels of all n frames together."""
    if min(height, width) < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    _check_aspect(height, width)
    return _fit((height, width), n, round(n / temporal) * temporal, factor, min_pixels, max_pixels)


def _fit(
    sides: tuple[int, int], n: int, n_rounded: int, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    height, width = (round(s / factor) * factor for s in sides)
    exact = n * sides[0] * sides[1]
    if n_rounded * height * width > max_pixels:
        beta = math.sqrt(exact / max_pixels)
        height, width = (max(factor, math.floor(s / beta / factor) * factor) for s in sides)
    elif n_rounded * height * width < min_pixels:
        beta = math.sqrt(min_pixels / exact)
        height, width = (math.ceil(s * beta / factor) * factor for s in sides)
    return height, width


def _check_aspect(height: int, width: int) -> None:
    aspect = max(height, width) / min(height, width)
    if aspect > MAX_ASPECT:
        raise VideoError(
            f"frames of {width} x {height}: aspect ratio {aspect:.0f}, at most {MAX_ASPECT}; crop them"
        )
