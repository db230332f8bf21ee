"""Differential Token Drop of TimeChat-Online (arXiv 2504.17343, ACM MM 2025): what did not change is not read again.

1 every cell of a frame is compared with the same cell of the frame before: cosine of the merged vision tokens
("feature") or mean absolute difference of the pixels ("pixel")   2 a token whose cell hardly changed is dropped before
the decoder's first layer, the first frame is kept whole   3 what is left keeps its rope positions, and so does all text
4 the share dropped in each frame is a curve; where it falls, the scene changes (`scene_changes`)

The tower sees every frame; nothing is learned. Left out: the training with drop applied to half of the batches.
Knows grids and features; knows no model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from lab.carriers import Frames, Positions, VideoGrid, VisionTokens
from lab.errors import RunError, UsageError
from lab.settings import check_names, check_number, check_whole
from lab.slots import ModelSizes, Plan

Space = Literal["feature", "pixel"]
Scope = Literal["video", "frame"]
Reference = Literal["previous", "kept"]
Compat = Literal["paper", "released"]


@dataclass(frozen=True)
class DifferentialTokenDrop:
    """DTD (TimeChat-Online, section 3.2). Without `threshold` and `ratio` it drops nothing.

    threshold  feature: drop where the cosine is above it (0.5 drops about 45 % of a video in the paper, 0.25 about 83 %);
               pixel: drop where the mean absolute difference, of colours in 0..1, is below it
    ratio      in place of a threshold, the share of the compared tokens to drop (the first frame is not compared)
    scope      of a ratio: over the whole "video" or in every "frame" by itself (the only one a stream can have)
    space      what is compared
    reference  "previous": the frame before, whether it was kept or not, so that a slow drift is never seen; "kept": what
               was last kept in that cell
    positions  "preserve" the rope positions, or close them up ("compact")
    every      keep every so many-th frame whole, besides the first; 0: none
    memory     at most so many of the latest kept tokens (the paper keeps 6,000); 0: no limit
    compat     "released": in pixel space with tubelets, the *first* frame of the tubelet before is compared with the
               *last* of this one; in streams every piece forgets the one before, so its first frame is kept whole
    """

    NEUTRAL: ClassVar[Any]
    EXAMPLE: ClassVar[Any]

    threshold: float | None = None
    ratio: float | None = None
    scope: Scope = "video"
    space: Space = "feature"
    reference: Reference = "previous"
    positions: Positions = "preserve"
    every: int = 0
    memory: int = 0
    compat: Compat = "paper"

    def __post_init__(self) -> None:
        named = {
            "scope": Scope,
            "space": Space,
            "reference": Reference,
            "positions": Positions,
            "compat": Compat,
        }
        check_names(self, named)
        if self.threshold is not None and self.ratio is not None:
            raise UsageError(
                f"threshold={self.threshold} and ratio={self.ratio} both say what to drop; give one"
            )
        low = -1.0 if self.space == "feature" else 0.0
        if self.threshold is not None:
            check_number("threshold", self.threshold, low, 1.0)
        if self.ratio is not None:
            check_number("ratio", self.ratio, 0.0, 1.0)
        for name in ("every", "memory"):
            check_whole(name, getattr(self, name), 0)
        if self.ratio is not None and self.scope == "video" and self.reference == "kept":
            raise UsageError(
                "what was kept depends on the ratio reached so far: use scope='frame' with reference='kept'"
            )

    def control(self, seed: int = 0) -> RandomDrop:
        """As many tokens dropped, of those that are compared, but at random."""
        return RandomDrop(self, seed)

    def plan(self, cfg: ModelSizes) -> Plan:
        """One Stage; none if nothing is to be dropped."""
        return Plan() if self._drops_nothing else Plan(stages=(self,))

    @property
    def _drops_nothing(self) -> bool:
        return self.threshold is None and self.ratio is None and not self.memory

    def __call__(self, frames: Frames, vision: VisionTokens | None, query: str) -> VisionTokens:
        """The Stage. Raises RunError without vision tokens or without a known grid."""
        return self._left(vision, self.decide(frames, vision))

    def decide(self, frames: Frames, vision: VisionTokens | None, *, walk: Walk | None = None) -> Drop:
        """What would be dropped, and why. `walk` carries what a stream has seen before."""
        vision = _encoded(vision)
        walk = Walk() if walk is None else walk
        drop = self._walked(frames, vision, walk)
        return self._remembered(drop) if self.memory else drop

    def streamed(self) -> StreamedDrop:
        """This Stage for a stream: it remembers the last frame between calls. Raises RunError for what needs a whole video."""
        if self.ratio is not None and self.scope == "video":
            raise RunError(
                "DifferentialTokenDrop: a ratio over the whole video cannot be kept in a stream; use scope='frame', or a "
                "threshold"
            )
        if self.memory:
            raise RunError(
                "DifferentialTokenDrop: memory= forgets tokens that a stream's cache holds already; use it on whole videos"
            )
        return StreamedDrop(self)

    def _left(self, vision: VisionTokens | None, drop: Drop) -> VisionTokens:
        kept = _encoded(vision)[drop.keep.nonzero().squeeze(1)]
        return replace(kept, positions=self.positions if self.positions == "compact" else kept.positions)

    # ---- the walk over frames ---------------------------------------------------------------------------------------

    def _walked(self, frames: Frames, vision: VisionTokens, walk: Walk) -> Drop:
        """Frame after frame: closeness to the reference, and (but for a ratio over the video) what is kept."""
        grid = vision.grid
        keep, closeness = torch.ones(len(grid), dtype=torch.bool), torch.full((len(grid),), torch.nan)
        new, old = self._signals(frames, vision)
        cells = _cells(grid)
        composed = frames.composed(grid)
        for frame in grid.frame[(grid.frame >= 0) & ~composed].unique().tolist():
            at = (grid.frame == frame).nonzero().squeeze(1)
            closeness[at] = walk.compare(new[at], cells[at])
            if not (self.every and walk.seen % self.every == 0):
                keep[at] = self._kept(closeness[at])
            walk.move_on(old[at], cells[at], keep[at] if self.reference == "kept" else None)
        if self.ratio is not None and self.scope == "video":
            free = closeness.masked_fill(self._protected(grid), torch.nan)
            keep = _closest_dropped(free, int(self.ratio * int((~free.isnan()).sum())))
        return Drop(keep, closeness, grid.frame, self.space)

    def _kept(self, closeness: Float[Tensor, " token"]) -> Bool[Tensor, " token"]:
        """Which tokens of one frame stay; nan (nothing to compare with) stays."""
        if self.threshold is not None:
            bar = self.threshold if self.space == "feature" else -self.threshold
            return ~(closeness > bar)
        if self.ratio is not None and self.scope == "frame":
            return _closest_dropped(closeness, int(len(closeness) * self.ratio))
        return torch.ones_like(closeness, dtype=torch.bool)

    def _protected(self, grid: VideoGrid) -> Bool[Tensor, " token"]:
        if not self.every:
            return torch.zeros(len(grid), dtype=torch.bool)
        order = {f: i for i, f in enumerate(grid.frame[grid.frame >= 0].unique().tolist())}
        return torch.tensor(
            [f >= 0 and order[f] % self.every == 0 for f in grid.frame.tolist()], dtype=torch.bool
        )

    def _remembered(self, drop: Drop) -> Drop:
        """The bank: of the frames' kept tokens only the latest `memory` stay."""
        kept = (drop.keep & (drop.frame >= 0)).nonzero().squeeze(1)
        keep = drop.keep.clone()
        keep[kept[: max(0, len(kept) - self.memory)]] = False
        return replace(drop, keep=keep)

    def _signals(self, frames: Frames, vision: VisionTokens) -> tuple[Tensor, Tensor]:
        """What is compared, [token, feature]: of a token as the new one, and later as the reference."""
        if self.space == "feature":
            assert vision.x is not None
            x = vision.x.detach().float()
            return x, x
        first, last = _tubelet_ends(frames, vision.grid)
        as_new, as_old = (last, first) if self.compat == "released" else (first, last)
        return _patches(frames, vision.grid, as_new), _patches(frames, vision.grid, as_old)


@dataclass(frozen=True)
class RandomDrop:
    """The control of a token drop: as many as `like` drops of the same video, at random among those it compares.

    The draw belongs to the video and the seed: the same question always meets the same draw.
    """

    like: DifferentialTokenDrop
    seed: int = 0

    def plan(self, cfg: ModelSizes) -> Plan:
        """One Stage; none if nothing is to be dropped."""
        return Plan() if self.like._drops_nothing else Plan(stages=(self,))

    def __call__(self, frames: Frames, vision: VisionTokens | None, query: str) -> VisionTokens:
        """The Stage. Raises RunError as the drop itself does."""
        drop = self.like.decide(frames, vision)
        free = (~drop.closeness.isnan()).nonzero().squeeze(1)
        n = int((~drop.keep).sum())
        g = torch.Generator().manual_seed((int(frames.pixels.long().sum()) + self.seed) % (1 << 31))
        gone = free[torch.randperm(len(free), generator=g)[:n]]
        return self.like._left(
            vision, replace(drop, keep=torch.ones_like(drop.keep).index_fill(0, gone, False))
        )


@dataclass(frozen=True)
class Drop:
    """A decision.

    keep       [token] which stay
    closeness  [token] to the reference: the cosine, or minus the difference of pixels; nan where nothing was compared
    frame      [token] the grid's frames
    """

    keep: Bool[Tensor, " token"]
    closeness: Float[Tensor, " token"]
    frame: Tensor
    space: Space

    def ratio(self, *, over: Literal["compared", "all"] = "compared") -> float:
        """Share dropped: of the tokens that were compared, or (as the released logger counts) of all video tokens."""
        base = ~self.closeness.isnan() if over == "compared" else self.frame >= 0
        n = int(base.sum())
        return int((base & ~self.keep).sum()) / n if n else 0.0

    def curve(self) -> Float[Tensor, " frame"]:
        """Share dropped in every frame, the first one included (0)."""
        at = self.frame[self.frame >= 0].unique().tolist()
        return torch.tensor([float((~self.keep[self.frame == f]).float().mean()) for f in at])


class Walk:
    """What has been seen: the reference of every cell, and how many frames."""

    def __init__(self) -> None:
        self.held: tuple[Tensor, Tensor] | None = None  # [cell, feature], [cell]
        self.seen = 0

    def compare(self, x: Float[Tensor, "token feature"], cells: Tensor) -> Float[Tensor, " token"]:
        """Closeness of one frame's tokens to what is held for their cells; nan where nothing is."""
        out = torch.full((len(x),), torch.nan)
        if self.held is None:
            return out
        held, places = self.held
        same = cells[:, None] == places[None, :]
        known = same.any(1)
        reference = held[same[known].int().argmax(1).to(held.device)]
        out[known] = closeness_of(reference, x[known.to(x.device)]).cpu()
        return out

    def move_on(self, x: Float[Tensor, "token feature"], cells: Tensor, keep: Tensor | None) -> None:
        """Take the frame's tokens as the new reference: all of them, and nothing else; or those kept, beside the old."""
        self.seen += 1
        if keep is None or self.held is None:
            self.held = x, cells
            return
        held, places = self.held
        stay = ~torch.isin(places, cells[keep])
        self.held = (
            torch.cat([held[stay.to(held.device)], x[keep.to(x.device)]]),
            torch.cat([places[stay], cells[keep]]),
        )

    def state(self) -> dict[str, Any]:
        """What `restore` takes."""
        return {"held": self.held, "seen": self.seen}

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to an earlier `state`."""
        self.held, self.seen = state["held"], state["seen"]


class StreamedDrop:
    """The Stage for a stream: `decide` frame by frame with the reference carried on. Same decisions as offline."""

    def __init__(self, config: DifferentialTokenDrop) -> None:
        self.config, self.walk = config, Walk()

    def __call__(self, frames: Frames, vision: VisionTokens | None, query: str) -> VisionTokens:
        walk = Walk() if self.config.compat == "released" else self.walk
        return self.config._left(vision, self.config.decide(frames, vision, walk=walk))

    def reset(self) -> None:
        """Forget everything: another video begins."""
        self.walk = Walk()

    def state(self) -> dict[str, Any]:
        """What `restore` takes."""
        return self.walk.state()

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to an earlier `state`."""
        self.walk.restore(state)


def closeness_of(
    a: Float[Tensor, "token feature"], b: Float[Tensor, "token feature"]
) -> Float[Tensor, " token"]:
    """Cosine of features; of pixels (uint8) minus their mean absolute difference, colours in 0..1."""
    if a.dtype == torch.uint8:
        return -(a.float() - b.float()).abs().mean(-1) / 255
    return F.cosine_similarity(a, b, dim=-1)


def scene_changes(
    curve: Float[Tensor, " frame"], *, level: float = 0.6, compat: Compat = "paper"
) -> list[int]:
    """Frames where the scene changes, from the share dropped in every frame (section 3.4).

    paper     valleys (no neighbour is lower) below `level`; whether a frame is below it needs no future, so a stream can
              use that part alone
    released  the tenth of the frames (rounded up) with the lowest share, over the whole video: not causal
    The first frame is kept whole by rule and never counts. Raises UsageError for a curve that is not one number a frame.
    """
    if curve.ndim != 1:
        raise UsageError(f"the curve must be one number a frame, got shape {tuple(curve.shape)}")
    check_number("level", level, 0.0, 1.0)
    v = curve.tolist()
    later = range(1, len(v))
    if compat == "released":
        lowest = sorted(later, key=lambda t: (v[t], t))[: math.ceil(len(v) / 10)]
        return sorted(lowest)
    # the first frame's 0 is no neighbour
    return [t for t in later if v[t] < level and all(v[t] <= v[n] for n in (t - 1, t + 1) if 1 <= n < len(v))]


# ---- cells, pixels, numbers -----------------------------------------------------------------------------------------


def _encoded(vision: VisionTokens | None) -> VisionTokens:
    if vision is None or vision.x is None:
        raise RunError("differential token drop compares vision tokens; it needs an encoder before it")
    return vision


def _cells(grid: VideoGrid) -> Tensor:
    """One number per place in a frame. Raises RunError where nobody knows the places."""
    on = grid.frame >= 0
    if bool((grid.row[on] < 0).any()):
        raise RunError(
            "nobody knows where this model's video tokens lie in their frames, so none can be compared"
        )
    return grid.row * (1 << 20) + grid.col


def _closest_dropped(closeness: Float[Tensor, " token"], n: int) -> Bool[Tensor, " token"]:
    """True for all but the `n` closest; the earlier ones of equals go first, what was not compared stays."""
    ranked = closeness.nan_to_num(nan=-math.inf).sort(descending=True, stable=True).indices
    keep = torch.ones_like(closeness, dtype=torch.bool)
    keep[ranked[: min(n, int((~closeness.isnan()).sum()))]] = False
    return keep


def _tubelet_ends(frames: Frames, grid: VideoGrid) -> tuple[Tensor, Tensor]:
    """Index of the first and last frame in the tubelet of every token."""
    n = int(grid.frame.max()) + 1 if len(grid) else 1
    depth = -(-len(frames) // max(n, 1))
    first = grid.frame.clamp_min(0) * depth
    return first, (first + depth - 1).clamp_max(len(frames) - 1)


def _patches(frames: Frames, grid: VideoGrid, at: Tensor) -> Tensor:
    """The pixels under every token, uint8 [token, pixel * 3], of the frame that `at` names: the frame cut evenly."""
    rows, cols = int(grid.row.max()) + 1, int(grid.col.max()) + 1
    height, width = (
        max(1, round(n / k)) * k for n, k in zip(frames.pixels.shape[-2:], (rows, cols), strict=True)
    )
    pixels = frames.pixels.cpu()
    if (height, width) != tuple(pixels.shape[-2:]):
        pixels = F.interpolate(pixels.float(), (height, width), mode="area").round().to(torch.uint8)
    cut = pixels.unflatten(3, (cols, -1)).unflatten(2, (rows, -1))  # frame 3 row y col x
    cut = cut.permute(0, 2, 4, 1, 3, 5).flatten(3)
    return cut[at, grid.row.clamp_min(0), grid.col.clamp_min(0)]


NEUTRAL = DifferentialTokenDrop.NEUTRAL = DifferentialTokenDrop()
EXAMPLE = DifferentialTokenDrop.EXAMPLE = DifferentialTokenDrop(threshold=0.5)
