"""The work of a comparison: every variant and question is one piece, kept in a journal; then the costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from lab.carriers import VideoQA
from lab.comparison.costing import costs
from lab.comparison.pieces import Asking, Base, piece
from lab.comparison.reports import Report
from lab.comparison.results import Found, results_of
from lab.comparison.variants import Variant
from lab.edges.identity import content_id, weights_id
from lab.edges.pathways import cut_mask, usual_pathways
from lab.edges.sweeping import _keys as item_keys
from lab.edges.windows import window_for
from lab.errors import UsageError
from lab.recipe import Recipe as Owner  # not listed among the recipes that can be run
from lab.result import Result
from lab.runs import Cancel, Run, progress


class CompareJournal(Owner):
    """What a journal belongs to: weights, mechanisms, prompts and what is measured, by content. Cannot be run by itself."""

    variants: tuple[str, ...]
    items: tuple[str, ...]
    what: str

    def run(self, *, progress: bool = True) -> list[Result]:
        """Raises UsageError: all is known by fingerprint only."""
        raise UsageError(
            "this journal knows its items only by fingerprint; call lab.compare with the same ones"
        )


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


def compared(
    variants: Sequence[Variant], items: Sequence[VideoQA], sampling: Sequence[dict[str, Any]], settings: Mapping[str, Any],
    recipe: dict[str, Any], out: Any, cancel: Cancel | None, show: bool,
) -> Report:  # fmt: skip
    """Run all pieces that the journal does not hold. settings: fields of CompareRecipe of the same names."""
    _check_shapes(variants)
    model = variants[0].model
    bases = [Base(variants[0], i, s) for i, s in zip(items, sampling, strict=True)]
    ways = settings["pathways"]
    ways = usual_pathways(model.maps(bases[0].ready)[0]) if ways is None else _known(tuple(ways), bases)
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


def _known(ways: tuple[str, ...], bases: Sequence[Base]) -> tuple[str, ...]:
    """The pathways. Raises UsageError for one that no question's prompt has."""
    for way in ways:
        missing: UsageError | None = None
        for base in bases:
            try:
                cut_mask(base.variant.model.maps(base.ready)[0], way, base.item)
                break
            except UsageError as e:
                missing = missing or e
        else:
            assert missing is not None
            raise missing
    return ways


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
