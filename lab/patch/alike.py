"""Worlds of one length where a mechanism drops video tokens by content: one world's choice holds in all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lab.carriers import Frames, Positions, VisionTokens
from lab.model.layout import through_stages, vision_of
from lab.model.ready import Ready


@dataclass(frozen=True)
class SameTokens:
    """A Stage that keeps the tokens of these sources, whatever they hold."""

    source: Tensor
    positions: Positions

    def __call__(self, frames: Frames, vision: VisionTokens | None, query: str) -> VisionTokens:
        assert vision is not None
        return replace(
            vision[torch.isin(vision.grid.source, self.source).nonzero().squeeze(1)], positions=self.positions
        )


@torch.no_grad()
def same_tokens(model: Any, ready: Mapping[str, Ready]) -> dict[str, Ready]:
    """The worlds; those after the first keep the video tokens that the first one's stages keep.

    Worlds stay as they are where no stage does anything, where stages merge or change tokens (only what is dropped can be
    dropped elsewhere), and where prompts are not of one layout.
    """
    first, *others = ready.values()
    kept = _kept(model, first) if others else None
    if kept is None:
        return dict(ready)
    stages = (SameTokens(kept.grid.source, kept.positions),)
    name = next(iter(ready))
    return {n: r if n == name else replace(r, plan=replace(r.plan, stages=stages)) for n, r in ready.items()}


def _kept(model: Any, ready: Ready) -> VisionTokens | None:
    """What the stages of a world leave of its video; None where they do not only drop."""
    plan = ready.plan
    if not plan.stages or plan.encoder is not None or plan.layout is not None:
        return None
    if ready.n_worlds != 1 or ready.item is None or ready.frames is None:
        return None
    with model.plan_hooks(plan), model.lock.shared():
        before = vision_of(ready, model.see(ready))
    after = through_stages(plan, ready.frames, before, ready.item.question)
    at = torch.isin(before.grid.source, after.grid.source)
    assert before.x is not None and after.x is not None
    only_dropped = after.grid.parts is None and int(at.sum()) == len(after)
    return after if only_dropped and torch.equal(before.x[at], after.x) else None
