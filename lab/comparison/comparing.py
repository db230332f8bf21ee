"""lab.compare: what does a mechanism do to the internals? Every variant and question is one piece, kept in a journal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lab.carriers import VideoQA
from lab.comparison.costs import costs
from lab.comparison.pieces import Asking, Base, piece
from lab.comparison.recipes import CompareJournal, CompareRecipe
from lab.comparison.reports import Report
from lab.comparison.results import Found, results_of
from lab.comparison.variants import VANILLA, Variant, variants_of
from lab.edges.identity import content_id, weights_id
from lab.edges.pathways import usual_pathways
from lab.edges.sweeping import _keys as item_keys
from lab.edges.windows import window_for
from lab.errors import UsageError
from lab.items import load_items, spec_of
from lab.mechanisms import plain
from lab.model.ready import Ready
from lab.recipe import ModelSpec
from lab.runs import Cancel, Run, progress


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

    Raises UsageError for nothing to compare, questions without a text, and models that do not fit together.
    """
    variants = variants_of(models, mechanisms, controls=controls, seed=seed)
    questions, sampling = _questions(items, n_frames)
    settings = {"pathways": None if pathways is None else tuple(pathways), "window": window, "controls": controls,
                "rounds": rounds, "new_tokens": new_tokens, "seed": seed}  # fmt: skip
    recipe = _recipe(variants, questions, sampling, n_frames, settings)
    return _compared(variants, questions, sampling, settings, recipe, out, cancel, show_progress)


def carried_out(recipe: CompareRecipe, model: Any, out: str | Path | None, show: bool) -> Report:
    """What a recipe asks for."""
    from probes.knockout import load_spec

    named = {
        VANILLA: model or load_spec(recipe.model),
        **{n: load_spec(s) for n, s in recipe.variants.items()},
    }
    variants = variants_of(named, recipe.mechanisms_on(), controls=recipe.controls, seed=recipe.seed)
    items, sampling = recipe.loaded_items()
    settings = recipe.model_dump(include={"pathways", "window", "controls", "rounds", "new_tokens", "seed"})
    return _compared(variants, items, sampling, settings, recipe.plain(), out, None, show)


def _questions(items: Any, n_frames: int) -> tuple[list[VideoQA], list[dict[str, Any]]]:
    if isinstance(items, str | Path | Mapping):
        items = load_items(items)
    given = list(items) if isinstance(items, list | tuple) else [items]
    asked = [i.item if isinstance(i, Ready) else i for i in given]
    wrong = next((i for i in asked if not isinstance(i, VideoQA)), None) if asked else "no item"
    if wrong is not None or not asked:
        raise UsageError(
            f"a comparison asks questions about videos, got {type(wrong).__name__}: {wrong!r:.60}"
        )
    how = [i.sampling if isinstance(i, Ready) else {} for i in given]
    return [i for i in asked if i is not None], [h or {"n_frames": n_frames} for h in how]


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


@dataclass(frozen=True)
class _Plan:
    """The pieces of one comparison."""

    variants: Sequence[Variant]
    bases: Sequence[tuple[str, Base]]
    asking: Asking
    rounds: int

    def todo(self) -> list[tuple[str, Base, Variant]]:
        """Question after question, so that vanilla's trace of one is used by all variants and then let go."""
        return [(key, base, v) for key, base in self.bases for v in self.variants]


def _compared(
    variants: Sequence[Variant], items: Sequence[VideoQA], sampling: Sequence[dict[str, Any]], settings: Mapping[str, Any],
    recipe: dict[str, Any], out: Any, cancel: Cancel | None, show: bool,
) -> Report:  # fmt: skip
    _check_shapes(variants)
    model = variants[0].model
    bases = [Base(variants[0], i, s) for i, s in zip(items, sampling, strict=True)]
    ways = settings["pathways"]
    ways = usual_pathways(model.maps(bases[0].ready)[0]) if ways is None else tuple(ways)
    window = settings["window"] or window_for(model.cfg.n_layers)
    keys = item_keys(list(items))
    plan = _Plan(variants, list(zip(keys, bases, strict=True)), Asking(ways, window, settings["new_tokens"]), settings["rounds"])  # fmt: skip
    with torch.no_grad(), nullcontext() if out is None else Run(out, _journal(plan), cancel=cancel) as run:
        done = _done(plan, run, cancel, show)
    numbers = done.pop(("", "costs"), None)
    frames = bases[0].ready.frames
    assert frames is not None
    pictures = frames.pixels.permute(0, 2, 3, 1).numpy()
    found = Found(variants, keys, items, ways, window, done, numbers, pictures, recipe)
    return Report(results_of(found))


def _done(plan: _Plan, run: Run | None, cancel: Cancel | None, show: bool) -> dict[tuple[str, str], Any]:
    had = {} if run is None else run.results()
    out: dict[tuple[str, str], Any] = {}
    for key, base, variant in progress(plan.todo(), desc="compare", show=show, cancel=cancel):
        name = f"{key}/{variant.name}"
        if name not in had:
            had[name] = piece(variant, base, plan.asking, painted=key == plan.bases[0][0])
            if run is not None:
                run.record(name, had[name])
        out[key, variant.name] = had[name]
        if variant is plan.variants[-1] and base is not plan.bases[0][1]:
            _let_go(base)
    if plan.rounds and "costs" not in had:
        first = plan.bases[0][1]
        ready = {v.name: v.prepared(first.item, first.sampling) for v in plan.variants}
        had["costs"] = costs(plan.variants, ready, plan.rounds)
        if run is not None:
            run.record("costs", had["costs"])
    return out | ({("", "costs"): had["costs"]} if plan.rounds else {})


def _let_go(base: Base) -> None:
    """Forget a question's trace."""
    for name in ("trace", "ready"):
        base.__dict__.pop(name, None)


def _journal(plan: _Plan) -> CompareJournal:
    who = tuple(f"{v.name} {weights_id(v.model)} {content_id(v.mechanisms)}" for v in plan.variants)
    items = tuple(f"{key} {content_id((b.item.video, b.item.question, b.item.options, b.item.answer, b.sampling))}" for key, b in plan.bases)  # fmt: skip
    return CompareJournal(variants=who, items=items, what=f"{plan.asking!r} {plan.rounds}")


def _check_shapes(variants: Sequence[Variant]) -> None:
    sizes = {v.name: (v.model.cfg.n_layers, v.model.cfg.d_model, v.model.cfg.d_vocab) for v in variants}
    first = next(iter(sizes.values()))
    wrong = next((n for n, s in sizes.items() if s != first), None)
    if wrong is not None:
        raise UsageError(
            f"{wrong!r} has {sizes[wrong]} layers, dimensions and words, vanilla {first}; compare models of one shape"
        )
