"""One piece of a comparison: one variant, one question. Plain data, so that it can stand in a journal."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from lab.carriers import VideoQA
from lab.comparison.alike import likeness
from lab.comparison.flow import knocked, mass
from lab.comparison.traces import Trace, trace
from lab.comparison.variants import Variant
from lab.model.ready import Ready


@dataclass(frozen=True)
class Asking:
    """What is measured: pathways that are cut (none: no knock-outs) in windows of layers, tokens of the answer's text."""

    pathways: tuple[str, ...]
    window: int
    new_tokens: int


@dataclass
class Base:
    """One question, and what vanilla does with it; run when the first piece needs it."""

    variant: Variant
    item: VideoQA
    sampling: dict[str, Any]
    memo: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def ready(self) -> Ready:
        return self.variant.prepared(self.item, self.sampling)

    @cached_property
    def trace(self) -> Trace:
        return trace(self.variant.model, self.ready)


def piece(variant: Variant, base: Base, asking: Asking, *, painted: bool) -> dict[str, Any]:
    """All that is measured of one variant on one question. painted: also the pictures of depth and of what is left."""
    model = variant.model
    ready = base.ready if variant is base.variant else variant.prepared(base.item, base.sampling)
    mine = base.trace if variant is base.variant else trace(model, ready)
    out = likeness(base.trace, mine) | _rows(mine, base.trace) | said(variant, ready, asking.new_tokens)
    out["mass"] = mass(model, ready).tolist()
    out["cut"] = knocked(model, ready, asking.pathways, asking.window)
    return out | (_pictures(mine, base.trace) if painted else {})


def _rows(mine: Trace, base: Trace) -> dict[str, Any]:
    """How many tokens are read, and the share of vanilla's video tokens that each layer runs."""
    video = mine.tokens.where(role="video")
    whole = len(base.tokens.where(role="video"))
    ran = mine.ran[:, video].sum(1) / max(1, whole)
    return {"positions": len(mine.tokens), "video": len(video), "ran": ran.tolist()}


def said(variant: Variant, ready: Ready, new_tokens: int) -> dict[str, Any]:
    """The answer: the chosen option, whether it is right, and the first tokens of what the model writes.

    Both, because caches that quantise after the prompt leave the first token as it is.
    """
    model, item = variant.model, ready.item
    text = str(model.generate(ready, max_new_tokens=new_tokens))
    if item is None or not item.options:
        right = text.strip().casefold() == item.answer.strip().casefold() if item and isinstance(item.answer, str) else None  # fmt: skip
        return {"choice": text, "correct": right, "text": text, "p": None}
    answer = model.answer(ready)
    assert answer.option_probs is not None
    at = item.answer if isinstance(item.answer, int) else answer.index
    return {
        "choice": answer.letter, "correct": answer.correct, "text": text, "p": float(answer.option_probs[at]),
    }  # fmt: skip


def _pictures(mine: Trace, base: Trace) -> dict[str, Any]:
    """Painted on the places of vanilla's video: layers that ran each token; its share of a token (0: dropped)."""
    patch = float(base.grid.weight[base.grid.frame >= 0].min())
    painted = {
        "depth": mine.painted(mine.ran.sum(0).float()),
        "left": mine.painted(patch / mine.tokens.weight.clamp(min=patch)),
    }
    frames = int(base.grid.frame.max()) + 1  # pictures that a mechanism composed come after the video's own
    return {name: p[:frames].tolist() for name, p in painted.items()}
