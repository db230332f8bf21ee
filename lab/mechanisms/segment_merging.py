"""LongVLM's hierarchical token merging (arXiv 2404.03384, ECCV 2024): few tokens a segment, and tokens of the whole video.

1 the frames are cut into segments of neighbours   2 inside a segment, tokens at even places each find the most similar
one at an odd place; the most similar pairs are merged into size-weighted means (bipartite soft matching, as in ToMe);
this halves the segment again and again until `keep` are left   3 global tokens stand before them   4 the decoder reads
[global | segment 1 | segment 2 ...], positions as in a prompt written so

Every merged token knows the share of each original token in it (`VideoGrid.parts`), so values on it can be painted back
on the patches. It stands for one of its members: that one's frame, row, column and rope position are its own.

What differs from the paper, because a mechanism sees the tokens that come out of the checkpoint's connector, and trains
nothing: merging is done after the projection, not before it; and where LongVLM's five global tokens are the CLS tokens of
the tower's last five layers, averaged over all frames, ours are the means of `n_global` equal stretches of the video.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lab.carriers import Frames, Positions, VideoGrid, VisionTokens
from lab.errors import RunError, UsageError
from lab.settings import check_names, check_whole
from lab.slots import ModelSizes, Plan

Place = Literal["first", "last", "each"]
Weighting = Literal["size", "uniform"]
Compat = Literal["paper", "released"]
Match = Literal["similar", "random"]
# merges of each step in the script that was released; made for segments of 5,760 tokens, capped at half of what is left
RELEASED_STEPS = (2880, 1440, 720, 360, 180, 90, 40)


@dataclass(frozen=True)
class SegmentMerging:
    """LongVLM's local and global tokens (section 3.2). The paper's setting is 100 frames: 10 segments, 30 each, 5 global.

    n_segments     as many as there are frames, if these are fewer
    keep           tokens left of each segment; None: all
    n_global       global tokens; they and a prompt with text between its frames do not go together
    place          of the global tokens; "each": before every segment, the mean of that segment (n_global is not used)
    weighting      means weighted by how many patches each token holds, or "uniform"
    channel_groups the matching compares the mean over so many groups of channels
    match          "similar" tokens are merged, or, as a control, "random" ones (drawn with `seed`), as many in every step
    compat         "released": the steps of the script that was released (20 tokens left of 2,560, not 30), the order its
                   merging leaves (the unmerged first, most similar first), no global tokens, which its inference never
                   loads
    """

    NEUTRAL: ClassVar[Any]
    EXAMPLE: ClassVar[Any]

    n_segments: int = 10
    keep: int | None = 30
    n_global: int = 5
    place: Place = "first"
    weighting: Weighting = "size"
    channel_groups: int = 16
    positions: Positions = "compact"
    compat: Compat = "paper"
    match: Match = "similar"
    seed: int = 0

    def __post_init__(self) -> None:
        named = {
            "place": Place,
            "weighting": Weighting,
            "positions": Positions,
            "compat": Compat,
            "match": Match,
        }
        check_names(self, named)
        for name, low in (("n_segments", 1), ("n_global", 0), ("channel_groups", 1), ("seed", 0)):
            check_whole(name, getattr(self, name), low)
        if self.keep is not None:
            check_whole("keep", self.keep, 1)

    def control(self, seed: int = 0) -> SegmentMerging | None:
        """As many merges of random tokens; None where nothing is merged."""
        return (
            None if self.keep is None and self.compat == "paper" else replace(self, match="random", seed=seed)
        )

    def plan(self, cfg: ModelSizes) -> Plan:
        """One Stage; none if nothing is merged and nothing added. Raises UsageError if the channels do not fit."""
        if cfg.d_model % self.channel_groups:
            raise UsageError(
                f"channel_groups={self.channel_groups} does not divide the model's {cfg.d_model} channels; "
                "give one that does"
            )
        idle = self.keep is None and not self.n_global and self.place != "each" and self.compat == "paper"
        return Plan() if idle else Plan(stages=(self,))

    def __call__(self, frames: Frames, vision: VisionTokens | None, query: str) -> VisionTokens:
        """The Stage. Tokens of no frame (newlines) and of composed pictures pass by, at the end."""
        if vision is None or vision.x is None:
            raise RunError(
                "segments are merged from vision tokens; this mechanism needs an encoder before it"
            )
        grid = vision.grid
        local = ((grid.frame >= 0) & ~frames.composed(grid)).nonzero().squeeze(1)
        rest = torch.ones(len(grid), dtype=torch.bool)
        rest[local] = False
        segments = [local[s] for s in _segments(grid.frame[local], self.n_segments)]
        groups = [g for at in segments for g in self._merged(vision.x, grid, at)]
        out = self._with_global(groups, segments, grid)
        out += [_Group(torch.tensor([i]), torch.ones(1), i) for i in rest.nonzero().squeeze(1).tolist()]
        kept = _built(vision, out)
        return replace(kept, positions=self.positions if self.positions == "compact" else kept.positions)

    def _merged(self, x: Tensor, grid: VideoGrid, at: Int[Tensor, " token"]) -> list[_Group]:
        steps = RELEASED_STEPS if self.compat == "released" else steps_to(len(at), self.keep)
        found = merge(
            self._compared(x[at.to(x.device)]), steps, grid.weight[at].clamp_min(1e-9), channel_groups=self.channel_groups,
            weighting=self.weighting,
        )  # fmt: skip
        made = [
            _Group(
                at[(found.group == g).nonzero().squeeze(1)],
                found.share[found.group == g],
                int(at[found.of[g]]),
            )
            for g in range(len(found.of))
        ]
        return made if self.compat == "released" else sorted(made, key=lambda g: -1 if g.of is None else g.of)

    def _compared(self, x: Float[Tensor, "token d"]) -> Float[Tensor, "token d"]:
        """What the matching compares."""
        if self.match == "similar":
            return x
        return torch.randn(x.shape, generator=torch.Generator().manual_seed(self.seed))

    def _with_global(self, groups: list[_Group], segments: Sequence[Tensor], grid: VideoGrid) -> list[_Group]:
        if self.compat == "released" or not groups:
            return groups
        if self.place == "each":
            first = [_mean(at, grid) for at in segments]
            owner = [next(i for i, at in enumerate(segments) if bool((at == g.of).any())) for g in groups]
            return [
                g
                for i, f in enumerate(first)
                for g in [f, *(x for x, o in zip(groups, owner, strict=True) if o == i)]
            ]
        every = torch.cat(list(segments))
        stretches = [every[s] for s in _segments(grid.frame[every], self.n_global)] if self.n_global else []
        added = [_mean(at, grid) for at in stretches]
        return added + groups if self.place == "first" else groups + added


@dataclass(frozen=True)
class _Group:
    """Tokens that become one: their indices, the share of each, and the one it stands for (None: for none)."""

    at: Int[Tensor, " member"]
    share: Float[Tensor, " member"]
    of: int | None


@dataclass(frozen=True)
class Merged:
    """What merging made of some tokens.

    group  [token] which output each went into; share: its share there, summing to 1 in every group
    of     for every output, in order, the token it stands for
    """

    group: Int[Tensor, " token"]
    share: Float[Tensor, " token"]
    of: Int[Tensor, " group"]

    def apply(self, x: Float[Tensor, "token d"]) -> Float[Tensor, "group d"]:
        """The outputs' values; gradients go to the tokens, none to the matching."""
        weighted = x * self.share.to(x)[:, None]
        return x.new_zeros(len(self.of), x.shape[1]).index_add(0, self.group.to(x.device), weighted)


def steps_to(tokens: int, keep: int | None) -> tuple[int, ...]:
    """Merges of each step that lead to `keep` tokens: halves, and what is left in the last (2,560 to 30: 1280 ... 40, 10)."""
    steps: list[int] = []
    while keep is not None and tokens > keep:
        steps.append(min(tokens // 2, tokens - keep))
        tokens -= steps[-1]
    return tuple(steps)


@torch.no_grad()
def merge(
    x: Float[Tensor, "token d"], steps: Sequence[int], weight: Float[Tensor, " token"], *, channel_groups: int,
    weighting: Weighting,
) -> Merged:  # fmt: skip
    """Bipartite soft matching, step after step. A step merges at most half of what is left; one of 0 or less nothing.

    Outputs stand in the released code's order: what was not merged, by falling similarity, then the odd places.
    """
    x, n = x.detach().float().cpu(), len(x)
    group, share, of = torch.arange(n), torch.ones(n), torch.arange(n)
    size = weight.double()
    for r in steps:
        r = min(r, len(of) // 2)
        if r <= 0:
            continue
        into, kept = _matched(x, r, channel_groups)
        total = torch.zeros(len(kept), dtype=torch.double).index_add(0, into, size)
        count = torch.zeros(len(kept)).index_add(0, into, torch.ones(len(into)))
        part = (size / total[into]).float() if weighting == "size" else 1 / count[into]
        x = torch.zeros(len(kept), x.shape[1]).index_add(0, into, x * part[:, None])
        share, group = share * part[group], into[group]
        size, of = total, of[kept]
    return Merged(group, share, of)


def _matched(x: Float[Tensor, "token d"], r: int, channel_groups: int) -> tuple[Tensor, Tensor]:
    """(output of every token, the token each output keeps its place from) after one step."""
    metric = F.normalize(x.unflatten(1, (channel_groups, -1)).mean(1), dim=-1)
    even, odd = torch.arange(0, len(x), 2), torch.arange(1, len(x), 2)
    best, who = (metric[even] @ metric[odd].T).max(1)
    ranked = best.sort(descending=True, stable=True).indices
    gone, stay = ranked[:r], ranked[r:]
    kept = torch.cat([even[stay], odd])
    into = torch.empty(len(x), dtype=torch.long)
    into[kept] = torch.arange(len(kept))
    into[even[gone]] = len(stay) + who[gone]
    return into, kept


def _segments(frame: Int[Tensor, " token"], n: int) -> list[Int[Tensor, " token"]]:
    """Places of the tokens of each of `n` stretches of neighbouring frames, as even as can be."""
    names = frame.unique()
    n = max(1, min(n, len(names)))
    return [torch.isin(frame, part).nonzero().squeeze(1) for part in names.tensor_split(n)]


def _mean(at: Int[Tensor, " token"], grid: VideoGrid) -> _Group:
    weight = grid.weight[at].clamp_min(1e-9)
    return _Group(at, weight / weight.sum(), None)


def _built(vision: VisionTokens, groups: Sequence[_Group]) -> VisionTokens:
    """The groups as vision tokens, with exact provenance."""
    grid, x = vision.grid, vision.x
    assert x is not None
    owner = torch.cat([torch.full_like(g.at, i) for i, g in enumerate(groups)])
    at, share = torch.cat([g.at for g in groups]), torch.cat([g.share for g in groups])

    def mixed(values: Tensor, part: Tensor = share) -> Tensor:
        """Each group's sum of its members' rows, times their share."""
        rows = values[at.to(values.device)] * part.to(values)[(...,) + (None,) * (values.ndim - 1)]
        return values.new_zeros(len(groups), *values.shape[1:]).index_add(0, owner.to(values.device), rows)

    of = torch.tensor([-1 if g.of is None else g.of for g in groups])
    first = torch.tensor([int(g.at[0]) if g.of is None else g.of for g in groups])
    none = of < 0
    columns = {n: getattr(grid, n)[first].masked_fill(none, -1) for n in ("frame", "row", "col", "source")}
    made = VideoGrid(
        **columns, seconds=mixed(grid.seconds), weight=mixed(grid.weight, torch.ones_like(share)),
        parts=mixed(grid.shares().float()),
    )  # fmt: skip
    rope = None if vision.rope is None else vision.rope[:, first.to(vision.rope.device)]
    return VisionTokens(mixed(x), made, tuple(mixed(d) for d in vision.deep), rope, vision.positions)


NEUTRAL = SegmentMerging.NEUTRAL = SegmentMerging(keep=None, n_global=0)
EXAMPLE = SegmentMerging.EXAMPLE = SegmentMerging(n_segments=2, keep=8, n_global=1)
