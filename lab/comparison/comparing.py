"""lab.compare: what does a mechanism do to the internals? The questions it asks, and the recipe it leaves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from lab.carriers import VideoQA
from lab.comparison.recipes import CompareRecipe
from lab.comparison.reports import Report
from lab.comparison.running import compared
from lab.comparison.variants import Variant, variants_of
from lab.edges.pathnames import listed
from lab.errors import UsageError
from lab.items import load_items, spec_of
from lab.mechanisms import plain
from lab.model.ready import Ready
from lab.recipe import ModelSpec
from lab.runs import Cancel
from lab.settings import check_whole
from lab.slots import Plan


def compare(
    models: Any, mechanisms: Any, items: Any, *, n_frames: int = 8, pathways: Sequence[str] | None = None,
    window: int | None = None, controls: bool = True, rounds: int = 5, new_tokens: int = 8, seed: int = 0,
    out: str | Path | None = None, cancel: Cancel | None = None, show_progress: bool = True,
) -> Report:  # fmt: skip
    """Run questions through a model as it is and with mechanisms on, and compare what happens inside.

    models      a model or its name; or name -> model: the first is vanilla, the others run with the mechanisms they were
                trained with, or with those given: name -> (model, mechanisms)
    mechanisms  one or several, or name -> one or several at once; a text names a file of lab.mechanisms (its EXAMPLE)
    items       one or several VideoQA or Ready, or what `lab.load_items` reads
    pathways    that are knocked out, as in `lab.edges.sweep`; None: the paper's five; (): none
    window      layers a knock-out cuts; None: 9, in small models a third of the layers
    controls    also run every mechanism that drops, merges, skips or quantises with random choices of the same budget
    rounds      of timing; 0: no costs
    new_tokens  length of the written answers that are compared
    out         folder for a journal: an interrupted comparison goes on where it stopped

    Raises UsageError for nothing to compare, questions without a text, settings that make no sense, pathways that no
    question has, and models that do not fit together.
    """
    for name, value, low in (("rounds", rounds, 0), ("new_tokens", new_tokens, 1), ("seed", seed, 0)):
        check_whole(name, value, low)
    if window is not None:
        check_whole("window", window, 1)
    pathways = None if pathways is None else listed(pathways)
    variants = variants_of(models, mechanisms, controls=controls, seed=seed)
    questions, sampling = _questions(items, n_frames)
    settings = {"pathways": pathways, "window": window, "controls": controls,
                "rounds": rounds, "new_tokens": new_tokens, "seed": seed}  # fmt: skip
    recipe = _recipe(variants, questions, sampling, n_frames, settings)
    return compared(variants, questions, sampling, settings, recipe, out, cancel, show_progress)


def _questions(items: Any, n_frames: int) -> tuple[list[VideoQA], list[dict[str, Any]]]:
    if isinstance(items, str | Path | Mapping):
        items = load_items(items)
    one = isinstance(items, VideoQA | Ready) or not isinstance(items, Iterable)
    given: list[Any] = [items] if one else list(cast(Iterable[Any], items))
    if not given:
        raise UsageError("a comparison asks questions about videos, got none")
    asked = [_question(i) for i in given]
    how = [i.sampling if isinstance(i, Ready) else {} for i in given]
    return asked, [h or {"n_frames": n_frames} for h in how]


def _question(given: Any) -> VideoQA:
    if isinstance(given, Ready) and given.plan != Plan():
        raise UsageError(
            "this question was prepared with mechanisms of its own; prepare it without, vanilla reads it too"
        )
    item = given.item if isinstance(given, Ready) else given
    if not isinstance(item, VideoQA):
        raise UsageError(
            f"a comparison asks questions about videos, got {type(given).__name__}: {given!r:.60}"
        )
    return item


def _recipe(
    variants: Sequence[Variant], items: Sequence[VideoQA], sampling: Sequence[Mapping[str, Any]], n_frames: int, settings: Mapping[str, Any]
) -> dict[str, Any]:  # fmt: skip
    """The recipe as plain data; {} where something cannot be named again: wrapped models, videos that are arrays."""
    own = [v for v in variants if not v.control_of]
    if any(not isinstance(i.video, str) for i in items) or any(
        not getattr(v.model, "spec", None) for v in own
    ):
        return {}
    base, others = own[0], [v for v in own if v.model is not own[0].model]
    try:
        on = {v.name: tuple(plain(m) for m in v.mechanisms) for v in own[1:] if v.model is base.model}
        return CompareRecipe(
            model=ModelSpec(**(base.model.spec or {})), mechanisms=on, n_frames=n_frames,
            variants={v.name: ModelSpec(**(v.model.spec or {})) for v in others},
            items=tuple(spec_of(i, **s) for i, s in zip(items, sampling, strict=True)), **settings,
        ).plain()  # fmt: skip
    except UsageError:  # a mechanism of somebody else's
        return {}
