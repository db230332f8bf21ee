"""Video in: any source to `Frames`, sampled uniformly, by frame rate or by index.

Which frames (N frames in the source, counted from 0):

n_frames  round(linspace(0, N - 1, n)), halves to even: first and last frame are always in, the rest evenly between.
          More than N repeats frames, as linspace does, so a model always gets the number it is made for; a LabWarning
          says so. A single image counts as a video of one frame.
fps       the frame on screen at 0, 1/fps, 2/fps ... seconds after the first one. Shown times count, so a variable
          frame rate is honoured, and a rate above the file's own repeats frames.
index     exactly these, in this order, repeats allowed.

max_frames keeps at most so many, chosen from the above as n_frames would.
"""

from __future__ import annotations

import bisect
import math
import numbers
import operator
import os
import warnings
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch

from lab.carriers import Frames
from lab.errors import LabWarning, TooBig, UsageError
from lab.video_info import VideoInfo as VideoInfo
from lab.video_sources import Source, open_source

N_FRAMES = 8  # when the caller names neither number, rate nor index
LARGEST_SHARE = 4  # frames may take a quarter of the free memory
SLACK = 1e-6  # seconds: times from integer ticks miss round numbers by less


def read(
    video: Any,
    *,
    n_frames: int | None = None,
    fps: float | None = None,
    index: Sequence[int] | None = None,
    max_frames: int | None = None,
    clip: tuple[float, float] | None = None,
) -> Frames:
    """Frames of a video, upright RGB uint8 at the video's own size. See the module for which frames.

    video       path of a video file (whatever ffmpeg reads), of an image or of a folder of images (natural order);
                uint8 array or tensor [frame, height, width, 3] or [frame, 3, height, width]; list of paths, PIL images
                or arrays; `Frames`, which are sampled again and keep their times and indices
    n_frames    how many, evenly spread; 8 if neither this nor fps nor index is given
    fps         frames per second, more than 0. Not for sources without a clock (arrays, images)
    index       frames by their place in the source
    max_frames  upper limit
    clip        (start, end): only frames shown in these seconds of the video, for n_frames and fps

    Times come from the file's presentation timestamps, seen from its first frame; nan for sources without a clock.
    10-bit video is reduced to 8 bit, transparent parts show white, non-square pixels are left as stored, interlaced
    video is not deinterlaced, HDR is not tone-mapped. A file cut off in mid-stream gives the frames that are left,
    and a frame that does not decode is replaced by its nearest neighbour; a LabWarning gives both numbers.

    Raises VideoError (source missing, empty, damaged, without pictures), UsageError (arguments), TooBig (more than a
    quarter of the free memory).
    """
    _one_of(n_frames, fps, index)
    limit = None if max_frames is None else _count(max_frames, "max_frames")
    source = open_source(video)
    total = len(source.seconds)
    if index is not None:
        wanted = _explicit(index, total, limit)
    elif clip is not None:
        wanted = _in_clip(source, clip, n_frames, fps, limit)
    elif fps is not None:
        wanted = _at_rate(source, _rate(fps), limit)
    else:
        wanted = _spread(source, _count(N_FRAMES if n_frames is None else n_frames, "n_frames"), limit)
    _check_size(source.info, len(wanted))
    return _frames(source, wanted, video)


def probe(video: Any) -> VideoInfo:
    """Size, number of frames, rate, duration and codec of a video. Takes what `read` takes, raises what it raises."""
    return open_source(video).info


def uniform(n: int, total: int) -> list[int]:
    """n indices spread evenly over 0..total - 1, both ends included; repeats where n > total."""
    return [int(i) for i in np.linspace(0, total - 1, n).round()]


def _frames(source: Source, wanted: list[int], video: Any) -> Frames:
    distinct = sorted(set(wanted))
    taken, pixels = source.take(distinct)
    place = {asked: at for at, asked in enumerate(distinct)}
    rows = torch.tensor([place[i] for i in wanted])
    if rows.tolist() != list(range(len(distinct))):
        pixels = pixels[rows.to(pixels.device)]
    actual = [taken[r] for r in rows.tolist()]
    at = torch.tensor(actual)
    if isinstance(video, Frames):
        at = video.index[at.to(video.index.device)]
    seconds = torch.tensor([source.seconds[i] for i in actual], dtype=torch.float32)
    info = source.info
    return Frames(pixels, seconds, at, info.fps, info.duration, info.source)


def _one_of(n_frames: object, fps: object, index: object) -> None:
    given = {k: v for k, v in (("n_frames", n_frames), ("fps", fps), ("index", index)) if v is not None}
    if len(given) > 1:
        both = " and ".join(f"{k}={v!r}" for k, v in given.items())
        raise UsageError(f"{both} contradict each other; give one of them")


def _count(value: Any, name: str) -> int:
    try:
        n = operator.index(value)
    except TypeError:
        raise UsageError(f"{name} must be a whole number, got {value!r}") from None
    if n < 1 or isinstance(value, bool):
        raise UsageError(f"{name} must be at least 1, got {value!r}")
    return n


def _rate(fps: Any) -> float:
    if not isinstance(fps, numbers.Real) or isinstance(fps, bool) or not math.isfinite(fps) or fps <= 0:
        raise UsageError(f"fps must be a finite number above 0, got {fps!r}")
    return float(fps)


def _spread(source: Source, n: int, limit: int | None) -> list[int]:
    n = n if limit is None else min(n, limit)
    _check_size(source.info, n)  # before a list of n is built
    total = len(source.seconds)
    if n > total:
        warnings.warn(
            f"{source.info.source}: {n} frames asked, it has {total}; frames are repeated",
            LabWarning,
            stacklevel=3,
        )
    return uniform(n, total)


def _at_rate(source: Source, fps: float, limit: int | None) -> list[int]:
    seconds, start = source.seconds, source.seconds[0]
    if math.isnan(start):
        raise UsageError(
            f"fps={fps:g} needs to know when frames are shown, {source.info.source} does not say; use n_frames"
        )
    length = max(source.info.duration, seconds[-1] - start)
    n = max(1, math.ceil(length * fps - SLACK))
    _check_size(source.info, n if limit is None else min(n, limit))
    ticks = range(n) if limit is None or n <= limit else uniform(limit, n)
    return [max(0, bisect.bisect_right(seconds, start + t / fps + SLACK) - 1) for t in ticks]


def _in_clip(
    source: Source, clip: tuple[float, float], n_frames: int | None, fps: float | None, limit: int | None
) -> list[int]:
    """Frames between two times, by their number or rate."""
    first = source.seconds[0]
    if math.isnan(first):
        raise UsageError(f"a clip needs to know when frames are shown, {source.info.source} does not say")
    inside = [i for i, s in enumerate(source.seconds) if clip[0] - SLACK <= s - first <= clip[1] + SLACK]
    if not inside:
        raise UsageError(
            f"{source.info.source}: no frame is shown from {clip[0]:g} to {clip[1]:g} s; it lasts {source.info.duration:g} s"
        )
    if fps is not None:
        rate = _at_rate(source, _rate(fps), None)
        found = [i for i in rate if inside[0] <= i <= inside[-1]] or inside[:1]
        return (
            found if limit is None or len(found) <= limit else [found[i] for i in uniform(limit, len(found))]
        )
    n = _count(N_FRAMES if n_frames is None else n_frames, "n_frames")
    n = n if limit is None else min(n, limit)
    _check_size(source.info, n)
    return [inside[i] for i in uniform(n, len(inside))]


def _explicit(index: Sequence[int], total: int, limit: int | None) -> list[int]:
    try:
        wanted = [operator.index(i) for i in cast("Sequence[Any]", index)]
    except TypeError:
        raise UsageError(f"index must be a sequence of whole numbers, got {index!r}") from None
    if not wanted:
        raise UsageError("index is empty; name at least one frame")
    bad = [i for i in wanted if not 0 <= i < total]
    if bad:
        raise UsageError(f"frame {bad[0]} asked, the video has {total} frames; use 0..{total - 1}")
    if limit is not None and len(wanted) > limit:
        raise UsageError(
            f"index names {len(wanted)} frames, max_frames is {limit}; shorten one or raise the other"
        )
    return wanted


def _check_size(info: VideoInfo, n: int) -> None:
    need, free = n * 3 * info.width * info.height, free_bytes()
    if need > free // LARGEST_SHARE:
        raise TooBig(
            f"{info.source}: {_short(n)} frames of {info.width} x {info.height} need {_short(need)} bytes, "
            f"a quarter of the free memory is {free // LARGEST_SHARE:,}; take fewer frames or a smaller video"
        )


def _short(n: int) -> str:
    return f"{n:,}" if n < 10**18 else f"10^{len(str(n)) - 1}"


def free_bytes() -> int:
    """Main memory that is free, in bytes."""
    try:
        import psutil
    except ImportError:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(psutil.virtual_memory().available)
