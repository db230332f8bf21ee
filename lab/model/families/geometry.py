"""Geometry of video tokens: grids joined, shared out over worlds, and timed. Knows no model; families build on it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lab.carriers import Frames, VideoGrid
from lab.errors import ModelError, PromptError
from lab.spans import Span


def join(grids: Sequence[VideoGrid]) -> VideoGrid:
    """Grids one after another: frames and source ids count on."""
    if not grids:
        return VideoGrid.regular(0, 1, 1, seconds=None, weight=1.0)
    parts, frames, tokens = [], 0, 0
    for g in grids:
        shifted = torch.where(g.frame >= 0, g.frame + frames, g.frame)
        parts.append(replace(g, frame=shifted, source=g.source + tokens))
        frames, tokens = frames + (int(g.frame.max()) + 1 if len(g) else 0), tokens + len(g)
    return VideoGrid(**{name: torch.cat([getattr(p, name) for p in parts]) for name in VideoGrid.columns()})


def share_out(grids: Sequence[VideoGrid], wanted: Sequence[int]) -> list[list[VideoGrid]]:
    """Hand the vision inputs to the worlds in order, by their number of placeholders; PromptError if they do not fit."""
    left, shared = list(grids), []
    for world, n in enumerate(wanted):
        mine: list[VideoGrid] = []
        while left and sum(map(len, mine)) < n:
            mine.append(left.pop(0))
        made = sum(map(len, mine))
        if made != n:
            raise PromptError(
                f"world {world}: {n} video placeholders in the prompt but the vision inputs make {made} video tokens; "
                "prompt and pixels must come from the same processor call"
            )
        shared.append(mine)
    if left:
        raise PromptError(
            f"{sum(wanted)} video placeholders in the prompt but the vision inputs make {sum(map(len, grids))} video "
            "tokens; prompt and pixels must come from the same processor call"
        )
    return shared


def merged_grids(
    config: Any, grid_thw: Tensor, merge: int, seconds: Sequence[float] | None = None
) -> list[VideoGrid]:
    """Grids of videos given as patch counts [video, 3] (time, height, width), merged `merge` x `merge`.

    seconds  seconds per temporal patch, one per video, counted from the start of the video; None: unknown.
    """
    depth = temporal_patch(config)
    grids = []
    for i, (t, h, w) in enumerate(grid_thw.tolist()):
        # a temporal patch is seen at the mean of the frames in it
        times = None if seconds is None else (torch.arange(t) + (depth - 1) / (2 * depth)) * float(seconds[i])
        grids.append(
            VideoGrid.regular(t, h // merge, w // merge, seconds=times, weight=merge * merge * depth)
        )
    return grids


def frame_spans(grid: VideoGrid) -> list[Span]:
    """One video span per run of tokens of the same frame. Tokens of no frame (newline) become separators."""
    edges = (
        [0, *((grid.frame.diff() != 0).nonzero().squeeze(1) + 1).tolist(), len(grid)] if len(grid) else [0]
    )
    spans = []
    for a, b in zip(edges, edges[1:], strict=False):
        frame, seconds = int(grid.frame[a]), float(grid.seconds[a])
        role = "frame" if frame >= 0 else "separator"
        spans.append(
            Span(
                role,
                kind="video",
                rows=(a, b),
                frame=frame if frame >= 0 else None,
                seconds=None if math.isnan(seconds) else seconds,
            )
        )
    return spans


def run_lengths(is_video: Tensor) -> list[int]:
    """Lengths of the unbroken runs of True in a 1-D mask."""
    edges = torch.diff(
        is_video.int(), prepend=is_video.new_zeros(1).int(), append=is_video.new_zeros(1).int()
    )
    return ((edges == -1).nonzero() - (edges == 1).nonzero()).squeeze(1).tolist()


def run_grid(n: int) -> VideoGrid:
    """One frame of `n` tokens of unknown shape: row by row if `n` is a square, else rows and columns are -1."""
    side = math.isqrt(n)
    if side * side == n:
        return VideoGrid.regular(1, side, side, seconds=None, weight=1.0)
    flat = VideoGrid.regular(1, 1, n, seconds=None, weight=1.0)
    nowhere = torch.full((n,), -1)
    return replace(flat, row=nowhere, col=nowhere.clone())


def temporal_patch(config: Any) -> int:
    """Frames that the tower merges into one temporal patch."""
    return int(getattr(config.vision_config, "temporal_patch_size", 1))


def pair(value: Any) -> tuple[int, int]:
    """(height, width) of a config entry that is one number or two."""
    return (int(value[0]), int(value[1])) if isinstance(value, (list, tuple)) else (int(value), int(value))


def clock(frames: Frames) -> list[float]:
    """Seconds of every frame as processors write them: index / fps, in double precision.

    Where the file's own times say otherwise by half a frame or more (variable frame rate), they win.
    """
    times = [float(s) for s in frames.seconds.tolist()]
    if frames.fps <= 0:
        return times
    by_index = [int(i) / frames.fps for i in frames.index.tolist()]
    return [b if abs(b - t) < 0.5 / frames.fps else t for b, t in zip(by_index, times, strict=True)]


def spoken_time(span: Span) -> float:
    """The time a family writes before a frame; a source without a clock counts one second a frame (or tubelet)."""
    return float(span.frame or 0) if span.seconds is None else span.seconds


def tubelet_times(times: Sequence[float], depth: int) -> list[float]:
    """Mean of the first and last time in each group of `depth` frames; the last frame is repeated to fill a group."""
    filled = [*times, *[times[-1]] * (-len(times) % depth)]
    return [(filled[i] + filled[i + depth - 1]) / 2 for i in range(0, len(filled), depth)]


def timed(grid: VideoGrid, times: Sequence[float]) -> VideoGrid:
    """The grid with the time of each frame or tubelet; tokens of no frame keep nan.

    In double precision, since families write these times into the prompt: 0.15 would round up in single.
    """
    known = torch.tensor([*times, torch.nan], dtype=torch.float64)  # frame -1 reads the nan at the end
    return replace(grid, seconds=known[grid.frame])


def check_square(pixels: Tensor, config: Any) -> None:
    """ModelError if the preprocessed frames [..., h, w] are not of the size the tower was built for."""
    want, got = pair(config.vision_config.image_size), tuple(pixels.shape[-2:])
    if got != want:
        raise ModelError(
            f"preprocessed frames are {got[0]} x {got[1]} but the vision tower takes {want[0]} x {want[1]}; "
            "the preprocessor json and the config belong to different checkpoints"
        )
