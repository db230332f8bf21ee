"""Lay out: what the mechanisms' stages and layout do to the stream at the decoder's door.

Without stages the door passes as it is. With them, vision tokens go through the stages in order; each token that is
left stands where its `source` token stood and keeps that token's rope position, unless a Layout writes a new prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from lab.carriers import Frames, TokenMap, VisionTokens
from lab.errors import RunError
from lab.model.door import Door
from lab.model.ready import Ready
from lab.prompt import lay_out as lay_out_prompt
from lab.slots import Plan
from lab.spans import KINDS

VIDEO = KINDS.index("video")


def lay_out(model: Any, ready: Ready, door: Door, plan: Plan) -> tuple[Door, tuple[TokenMap, ...]]:
    """The door and the maps the decoder will see. Raises RunError for stages over several worlds."""
    if plan.encoder is None and not plan.stages and plan.layout is None:
        return door, ready.maps
    if ready.n_worlds != 1 or ready.item is None or ready.frames is None:
        raise RunError(
            f"stages and layouts work on one prepared question, not on {ready.n_worlds} worlds of a processor's "
            "tensors; use model.prepare(item)"
        )
    tokens = ready.maps[0]
    before = _vision(ready, door, tokens)
    after = _through_stages(plan, ready.frames, before, ready.item.question)
    if plan.layout is not None:
        return _written_anew(model, ready, after, plan)
    return _shortened(door, tokens, before, after)


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


def _vision(ready: Ready, door: Door, tokens: TokenMap) -> VisionTokens:
    rows = _video_rows(tokens).to(door.embeds.device)
    rope = door.rope[:, 0, rows] if door.rope.ndim == 3 else door.rope[:1, rows]
    return VisionTokens(door.embeds[0, rows], ready.grids[0], tuple(d[0, rows] for d in door.deep), rope)


def _through_stages(plan: Plan, frames: Frames, vision: VisionTokens, query: str) -> VisionTokens:
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
    door: Door, tokens: TokenMap, before: VisionTokens, after: VisionTokens
) -> tuple[Door, tuple[TokenMap, ...]]:
    source = after.grid.source
    if len(source) > 1 and not bool((source.diff() > 0).all()):
        raise RunError("the stages reordered vision tokens; a Layout must say where they stand")
    if len(source) and int(source.max()) >= len(before):
        raise RunError(
            f"the stages made a token with source {int(source.max())} of {len(before)}; give a Layout"
        )
    video = _video_rows(tokens)
    place = video[source]
    keep = torch.ones(len(tokens), dtype=torch.bool)
    keep[video] = False
    keep[place] = True
    index = keep.nonzero().squeeze(1)
    at = index.to(door.embeds.device)
    put = torch.searchsorted(index, place).to(at.device)
    embeds = door.embeds[:, at].clone()
    embeds[0, put] = cast(Tensor, after.x).to(embeds)
    deep = tuple(d[:, at] for d in door.deep)
    return Door(embeds, door.rope[..., at], None, deep), (_remapped(tokens.only(index), put.cpu(), after),)


def _remapped(tokens: TokenMap, put: Tensor, after: VisionTokens) -> TokenMap:
    """The map with what the stages say of their tokens (frame, place, seconds, weight)."""
    columns = {n: getattr(tokens, n).clone() for n in ("frame", "row", "col", "seconds", "weight", "source")}
    for name, column in columns.items():
        column[put] = getattr(after.grid, name).to(column)
    return replace(tokens, **columns)


def _written_anew(
    model: Any, ready: Ready, vision: VisionTokens, plan: Plan
) -> tuple[Door, tuple[TokenMap, ...]]:
    """A Layout's own prompt: text embedded by the checkpoint, vision tokens put where their spans stand."""
    assert plan.layout is not None and ready.item is not None and ready.frames is not None
    if model.mrope or vision.deep:
        raise RunError(
            "a Layout needs rope positions for its vision tokens; this family (M-RoPE) has none for new prompts"
        )
    spans = plan.layout(ready.item, ready.frames, vision)
    placeholder = model.family.placeholder(model.hf.config)
    ids, tokens = lay_out_prompt(spans, vision.grid, model.need_tokenizer(), placeholder)
    embeds = model.hf.get_input_embeddings()(ids.to(model.device)).clone()
    embeds[0, _video_rows(tokens).to(embeds.device)] = cast(Tensor, vision.x).to(embeds)
    rope = torch.arange(embeds.shape[1], device=embeds.device)[None]
    return Door(embeds, rope, None), (tokens,)
