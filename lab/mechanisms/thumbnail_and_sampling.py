"""TS-LLaVA (arXiv 2411.11066): one thumbnail of a few frames, and evenly picked tokens of all frames. Training free.

1 a few frames, evenly spread, are shrunk and tiled into one picture, the thumbnail, which the tower sees as one more
frame   2 of the tokens of all other frames, in reading order, evenly spaced ones are kept   3 the decoder reads
[sampled | thumbnail], positions as in a prompt written so

The thumbnail is made of the frames at their own size, before the checkpoint's resizing; it is the last frame of
`ready.frames` (index -1), its tokens have the frame number after the last one and no time. Left out: the variants with
several thumbnails, with shuffled frames, and the prompts of the released evaluation.
Knows pictures and grids; knows no model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Int, UInt8
from torch import Tensor

from lab.carriers import Frames, Positions, VisionTokens
from lab.errors import RunError, UsageError
from lab.settings import check_names, check_whole
from lab.slots import ModelSizes, Plan

Stratify = Literal["none", "random", "even"]
Order = Literal["sampled-first", "thumbnail-first"]
GOLDEN = 0.618033988749895  # starts of neighbouring frames fall far apart, without drawing anything


@dataclass(frozen=True)
class ThumbnailAndSampling:
    """TS-LLaVA (section 3). The paper's setting is 50 frames, a thumbnail of 6, 2,880 samples.

    n_thumbnail  frames in the thumbnail; 0: none. Tiled as the factor pair closest to a square, no wider than high
    n_samples    tokens kept of the other frames; None: all
    order        what comes first; thumbnail-first needs a prompt without text between frames
    stratify     "none", the released code: round(linspace(0, tokens - 1, n)) over all frames, whose stride may meet only
                 every other column of a frame; "random": as many in every frame, drawn with `seed`; "even": as many in
                 every frame, evenly spaced, each frame beginning elsewhere
    phase        by how many tokens the released spacing is shifted: a change that should mean nothing
    """

    NEUTRAL: ClassVar[Any]
    EXAMPLE: ClassVar[Any]

    n_thumbnail: int = 6
    n_samples: int | None = 2880
    order: Order = "sampled-first"
    stratify: Stratify = "none"
    phase: int = 0
    seed: int = 0
    positions: Positions = "compact"

    def __post_init__(self) -> None:
        check_names(self, {"order": Order, "stratify": Stratify, "positions": Positions})
        for name in ("n_thumbnail", "phase", "seed"):
            check_whole(name, getattr(self, name), 0)
        if self.n_samples is not None:
            check_whole("n_samples", self.n_samples, 1)

    def control(self, seed: int = 0) -> ThumbnailAndSampling | None:
        """As many tokens of every frame, but at random places; None where all are kept."""
        return None if self.n_samples is None else replace(self, stratify="random", seed=seed)

    def plan(self, cfg: ModelSizes) -> Plan:
        """A sampler that adds the thumbnail, and the Stage; nothing of what is not asked."""
        sampler = WithThumbnail(self.n_thumbnail) if self.n_thumbnail else None
        return Plan(sampler=sampler, stages=(self,) if sampler or self.n_samples is not None else ())

    def __call__(self, frames: Frames, vision: VisionTokens | None, query: str) -> VisionTokens:
        """The Stage. Raises UsageError for more samples than tokens, RunError without the thumbnail it asks for."""
        if vision is None:
            raise RunError("sampling picks among vision tokens; it needs an encoder before it")
        grid = vision.grid
        thumbnail = frames.composed(grid)
        if self.n_thumbnail and not bool(thumbnail.any()):
            raise RunError(
                f"no vision token shows the thumbnail alone: {len(frames)} frames (thumbnail included) went into tubelets; "
                "give a number of frames that fills them"
            )
        whole = ((grid.frame >= 0) & ~thumbnail).nonzero().squeeze(1)
        sampled = whole[self.chosen(grid.frame[whole])]
        other = (grid.frame < 0).nonzero().squeeze(1)  # newline tokens stay where they are: at the end
        pieces = [sampled, thumbnail.nonzero().squeeze(1)]
        order = torch.cat([*(pieces if self.order == "sampled-first" else pieces[::-1]), other])
        if self.order == "sampled-first":
            order = order.sort().values  # [sampled | thumbnail], and newline tokens where they stood
        kept = vision[order.to(vision.x.device) if vision.x is not None else order]
        return replace(kept, positions=self.positions if self.positions == "compact" else kept.positions)

    def chosen(self, frame: Int[Tensor, " token"]) -> Int[Tensor, " sample"]:
        """Which of the tokens are sampled, ascending, given the frame of each."""
        n, want = len(frame), self.n_samples
        if want is None:
            return torch.arange(n)
        if want > n:
            raise UsageError(
                f"{want} samples of {n} video tokens; give n_samples of at most {n}, or more frames"
            )
        if self.stratify == "none":
            at = torch.linspace(0, n - 1, want, dtype=torch.double).round().long()
            return ((at + self.phase) % n).sort().values
        return self._by_frame(frame, want)

    def _by_frame(self, frame: Int[Tensor, " token"], want: int) -> Int[Tensor, " sample"]:
        g = torch.Generator().manual_seed(self.seed)
        picked: list[Tensor] = []
        names, counts = frame.unique(return_counts=True)
        shares = _shared(want, counts.tolist())
        for i, (name, k) in enumerate(zip(names.tolist(), shares, strict=True)):
            mine = (frame == name).nonzero().squeeze(1)
            if self.stratify == "random":
                at = torch.randperm(len(mine), generator=g)[:k].sort().values
            else:
                start = (i * GOLDEN) % 1.0
                at = ((torch.arange(k, dtype=torch.double) + start) * len(mine) / max(k, 1)).long()
            picked.append(mine[at])
        return torch.cat(picked)


@dataclass(frozen=True)
class WithThumbnail:
    """The Sampler: the frames it is given, and one picture tiled from `n` of them at the end."""

    n: int

    def __call__(self, frames: Frames, query: str) -> Frames:
        if len(frames) < self.n:
            raise UsageError(
                f"a thumbnail of {self.n} frames, but the video has {len(frames)}; sample more frames"
            )
        picture = thumbnail(frames.pixels[picks(len(frames), self.n)])
        return replace(
            frames,
            pixels=torch.cat([frames.pixels, picture[None]]),
            seconds=torch.cat([frames.seconds, frames.seconds.new_full((1,), torch.nan)]),
            index=torch.cat([frames.index, frames.index.new_full((1,), -1)]),
        )


def picks(frames: int, n: int) -> Int[Tensor, " pick"]:
    """Which of the frames are in a thumbnail of `n`: round(linspace(0, frames - 1, n))."""
    return torch.linspace(0, frames - 1, n, dtype=torch.double).round().long()


def tiles(n: int) -> tuple[int, int]:
    """(rows, columns) of a thumbnail of `n` frames: the factor pair closest to a square with rows >= columns."""
    cols = max(c for c in range(1, int(n**0.5) + 1) if n % c == 0)
    return n // cols, cols


def thumbnail(pixels: UInt8[Tensor, "pick 3 h w"]) -> UInt8[Tensor, "3 h w"]:
    """The frames shrunk by area and tiled row by row into a picture of one frame's size. The aspect is not kept."""
    rows, cols = tiles(len(pixels))
    heights, widths = (_split(n, k) for n, k in zip(pixels.shape[-2:], (rows, cols), strict=True))
    lines: list[Tensor] = []
    for r, height in enumerate(heights):
        cells = [
            F.interpolate(pixels[r * cols + c][None].float(), (height, width), mode="area")[0]
            for c, width in enumerate(widths)
        ]
        lines.append(torch.cat(cells, 2))
    return torch.cat(lines, 1).round().to(torch.uint8)


def of_tile(
    n: int, row: Int[Tensor, " token"], col: Int[Tensor, " token"], rows: int, cols: int
) -> Int[Tensor, " token"]:
    """Which frame of the thumbnail (0 .. n - 1) lies under the centre of each cell of a grid of rows x cols."""
    down, across = tiles(n)
    return ((2 * row + 1) * down // (2 * rows)) * across + (2 * col + 1) * across // (2 * cols)


def _split(n: int, parts: int) -> list[int]:
    """`n` pixels in `parts` pieces that differ by at most one. Raises UsageError for fewer pixels than pieces."""
    if n < parts:
        raise UsageError(f"a thumbnail of {parts} tiles in {n} pixels; use fewer frames in it")
    return [n // parts + (i < n % parts) for i in range(parts)]


def _shared(want: int, counts: list[int]) -> list[int]:
    """`want` handed out evenly to frames that have so many tokens, none getting more than it has."""
    out = [0] * len(counts)
    while want:
        open_ = [i for i, c in enumerate(counts) if out[i] < c]
        each = max(1, want // len(open_))
        for i in open_ if want >= len(open_) else _spread(open_, want):
            give = min(each, counts[i] - out[i], want)
            out[i], want = out[i] + give, want - give
    return out


def _spread(places: list[int], n: int) -> list[int]:
    """`n` of the places, evenly spread."""
    return [
        places[i] for i in torch.linspace(0, len(places) - 1, n, dtype=torch.double).round().long().tolist()
    ]


NEUTRAL = ThumbnailAndSampling.NEUTRAL = ThumbnailAndSampling(n_thumbnail=0, n_samples=None)
EXAMPLE = ThumbnailAndSampling.EXAMPLE = ThumbnailAndSampling(n_thumbnail=4, n_samples=16)
