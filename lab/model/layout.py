"""Lay out: what the mechanisms' stages and layout do to the stream at the decoder's door.

Without stages the door passes as it is. With them, vision tokens go through the stages in order. Each token that is left
stands where its `source` token stood, with the rope position it brings; tokens in another order, or of no source, fill
the first places in the stages' order (families that write text between frames refuse that). A Layout writes a new prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from lab.carriers import Frames, TokenMap, VideoGrid, VisionTokens
from lab.errors import RunError
from lab.model.door import Door
from lab.model.ready import Ready
from lab.prompt import lay_out as lay_out_prompt
from lab.slots import Plan, called
from lab.spans import KINDS, ROLES

VIDEO = KINDS.index("video")


def lay_out(model: Any, ready: Ready, door: Door, plan: Plan) -> tuple[Door, tuple[TokenMap, ...]]:
    """The door and the maps the decoder will see. Raises RunError for stages over several worlds."""
    if plan.encoder is None and not plan.stages and plan.layout is None:
        return door, ready.maps
    if ready.n_worlds != 1 or ready.item is None or ready.frames is None:
        raise RunError(
            f"{_who(plan)}: stages and layouts work on one prepared question, not on {ready.n_worlds} worlds of a "
            "processor's tensors; use model.prepare(item)"
        )
    tokens = ready.maps[0]
    before = vision_of(ready, door)
    after = through_stages(plan, ready.frames, before, ready.item.question)
    if plan.layout is not None:
        return _written_anew(model, ready, before, after, plan)
    return _shortened(door, tokens, before, after, _who(plan))


def _who(plan: Plan) -> str:
    """What of a plan changes the prompt, by name."""
    return ", ".join(called(f) for f in (plan.encoder, *plan.stages, plan.layout) if f is not None)


def pieces(n: int, size: int, tokens: Sequence[TokenMap], *, whole_frames: bool) -> Iterator[tuple[int, int]]:
    """(start, stop) of pieces of at most `size` positions. Whole frames: no frame of any world is parted, and a piece
    grows where one frame is longer than `size`."""
    inside = torch.zeros(n + 1, dtype=torch.bool)  # True where a cut would part a frame
    for t in tokens if whole_frames else ():
        inside[1:n] |= (t.frame[1:] >= 0) & (t.frame[1:] == t.frame[:-1])
    parted: list[bool] = inside.tolist()
    start = 0
    while start < n:
        asked = min(start + size, n)
        before = (e for e in range(asked, start, -1) if not parted[e])
        stop = next(before, None) or next(e for e in range(asked, n + 1) if not parted[e])
        yield start, stop
        start = stop


def _video_rows(tokens: TokenMap) -> Tensor:
    return tokens.where(kind="video")


def vision_of(ready: Ready, door: Door) -> VisionTokens:
    """The video tokens of the one world at the door, as the first stage gets them."""
    rows = _video_rows(ready.maps[0]).to(door.embeds.device)
    rope = door.rope[:, 0, rows] if door.rope.ndim == 3 else door.rope[:1, rows]
    return VisionTokens(door.embeds[0, rows], ready.grids[0], tuple(d[0, rows] for d in door.deep), rope)


def through_stages(plan: Plan, frames: Frames, vision: VisionTokens, query: str) -> VisionTokens:
    """What the plan's encoder and stages make of a question's vision tokens. Raises RunError for a wrong grid."""
    if plan.encoder is not None:
        vision = plan.encoder(frames, None, query)
    for stage in plan.stages:
        vision = stage(frames, vision, query)
    if vision.x is None or len(vision.x) != len(vision.grid):
        made = "none" if vision.x is None else len(vision.x)
        raise RunError(
            f"the stages made {made} vision tokens but a grid of {len(vision.grid)}; both must agree"
        )
    return vision


def _shortened(
    door: Door, tokens: TokenMap, before: VisionTokens, after: VisionTokens, who: str
) -> tuple[Door, tuple[TokenMap, ...]]:
    """The same prompt with the video tokens that are left, each in its place.

    Raises RunError if there are more tokens than places, or if they come in another order and text stands between.
    """
    video = _video_rows(tokens)
    place = video[_places(before.grid.source, after.grid.source, video, who)]
    keep = torch.ones(len(tokens), dtype=torch.bool)
    keep[video] = False
    keep[place] = True
    index = keep.nonzero().squeeze(1)
    put = torch.searchsorted(index, place)
    rows = _Rows(index.to(door.embeds.device), put.to(door.embeds.device))
    embeds = rows.of(door.embeds, cast(Tensor, after.x))
    if len(after.deep) != len(door.deep):
        raise RunError(
            f"the stages made DeepStack features for {len(after.deep)} layers, this model adds them after {len(door.deep)}"
        )
    deep = tuple(rows.of(d, mine) for d, mine in zip(door.deep, after.deep, strict=True))
    rope = _rope(door.rope, rows, after)
    return Door(embeds, rope, None, deep), (_remapped(tokens.only(index), put, after),)


def _places(had: Tensor, source: Tensor, video: Tensor, who: str) -> Tensor:
    """Which of the prompt's places for video tokens are filled: those of the sources, where these rise. who: for errors."""
    had, source = had.cpu(), source.cpu()
    if len(source) and not bool(torch.isin(source[source >= 0], had).all()):
        raise RunError(
            f"{who} made a token with source {int(source.max())} of {len(had)}; give a Layout, or source -1"
        )
    if bool((source >= 0).all()) and bool((source.diff() > 0).all()):
        return torch.searchsorted(had, source)
    if len(source) > len(had):
        raise RunError(
            f"{who} made {len(source)} video tokens of {len(had)}, and the prompt has no place for more than it had: drop or "
            "merge more tokens, or give a Layout"
        )
    if bool((video.diff() > 1).any()):
        raise RunError(
            f"{who} reordered vision tokens or made new ones, and this model's prompt has text between its frames; keep the "
            "tokens in the order of their sources, or give a Layout"
        )
    return torch.arange(len(source))


@dataclass(frozen=True)
class _Rows:
    """Rows of the long sequence that stay (`index`), and where among them the vision tokens go (`put`)."""

    index: Tensor
    put: Tensor

    def of(self, x: Tensor, mine: Tensor) -> Tensor:
        """[world, pos, d] with the stages' own rows put in."""
        out = x[:, self.index].clone()
        out[0, self.put] = mine.to(out)
        return out


def _rope(rope: Tensor, rows: _Rows, after: VisionTokens) -> Tensor:
    """Rope positions of the rows that are left: those the tokens bring, closed up if the stages ask for it."""
    left = rope[..., rows.index].clone()
    if after.rope is not None:
        if rope.ndim == 3:
            left[:, 0, rows.put] = after.rope.to(left)
        else:
            left[:, rows.put] = after.rope.to(left)
    if after.positions == "preserve":
        return left
    if rope.ndim == 2:
        return rope[..., :1] + torch.arange(left.shape[-1], device=left.device)
    if len(rope) == 4:  # text positions of their own come first
        return torch.cat([_closed_up(rope[:1], left[:1]), _closed_up(rope[1:], left[1:])])
    return _closed_up(rope, left)


def _closed_up(had: Tensor, left: Tensor) -> Tensor:
    """Positions lowered by the number of smaller ones that were held before and are no more; native gaps stay."""
    gone = had.unique()
    gone = gone[~torch.isin(gone, left)]
    return left - torch.searchsorted(gone, left.contiguous())


def _remapped(tokens: TokenMap, put: Tensor, after: VisionTokens) -> TokenMap:
    """The map with what the stages say of their tokens (frame, place, seconds, weight, provenance)."""
    columns = {n: getattr(tokens, n).clone() for n in (*VideoGrid.columns(), "role")}
    for name in VideoGrid.columns():
        columns[name][put] = getattr(after.grid, name).to(columns[name])
    shows = (after.grid.frame >= 0) | (
        after.grid.source < 0
    )  # a token of the whole video belongs to the video, too
    columns["role"][put] = torch.where(shows, ROLES.index("frame"), ROLES.index("separator")).cpu()
    parts = None
    if after.grid.parts is not None:
        parts = torch.zeros(len(tokens), after.grid.parts.shape[1])
        parts[put] = after.grid.parts.to(parts)
    return replace(tokens, parts=parts, ahead=(), **columns)


def _written_anew(
    model: Any, ready: Ready, before: VisionTokens, vision: VisionTokens, plan: Plan
) -> tuple[Door, tuple[TokenMap, ...]]:
    """A Layout's own prompt: text embedded by the checkpoint, vision tokens put where their spans stand.

    Where stages only dropped tokens and positions are preserved, it is written for the tokens as they were, so that
    those who are left stand where they would stand without dropping.
    """
    assert plan.layout is not None and ready.item is not None and ready.frames is not None
    if model.mrope or vision.deep:
        raise RunError(
            f"{called(plan.layout)} writes the prompt anew, and this family (M-RoPE) has no rope positions for the vision "
            "tokens of a new prompt"
        )
    whole = _undropped(before, vision)
    spans = plan.layout(ready.item, ready.frames, whole)
    placeholder = model.family.placeholder(model.hf.config)
    ids, tokens = lay_out_prompt(spans, whole.grid, model.need_tokenizer(), placeholder)
    embeds = model.hf.get_input_embeddings()(ids.to(model.device)).clone()
    embeds[0, _video_rows(tokens).to(embeds.device)] = cast(Tensor, whole.x).to(embeds)
    rope = torch.arange(embeds.shape[1], device=embeds.device)[None]
    door = Door(embeds, rope, None)
    tokens = replace(tokens, n_layers=ready.maps[0].n_layers, n_heads=ready.maps[0].n_heads)
    if whole is vision:
        put = _video_rows(tokens)
        return door, (_remapped(tokens, put, vision),)
    at = rope[
        :,
        _video_rows(tokens)[torch.searchsorted(whole.grid.source.cpu(), vision.grid.source.cpu())].to(
            rope.device
        ),
    ]
    return _shortened(door, tokens, whole, replace(vision, rope=at), _who(plan))


def _undropped(before: VisionTokens, after: VisionTokens) -> VisionTokens:
    """The tokens before any was dropped, but for those of no frame; `after` itself where that is not all that was done."""
    source = after.grid.source
    dropped = bool((source >= 0).all()) and bool((source.diff() > 0).all()) and after.grid.parts is None
    if not dropped or after.positions == "compact":
        return after
    return before[(before.grid.frame >= 0) | torch.isin(before.grid.source, source)]
