"""Attention knock-out (Map the Flow, arXiv 2510.13251, section 3): cut a pathway in a window of layers, watch the answer move.

1 run the prompt clean; note p of the token it would answer   2 for every pathway and centre layer, cut the pathway's
edges in the window round that layer, in all heads, and run again   3 the change of p, in percent, is the curve.
Dense masks and one full forward per point: slow, and obviously right. Knows no family and draws nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool
from pydantic import Field
from torch import Tensor

from lab.carriers import TokenMap, VideoQA
from lab.errors import ConfigError, LabWarning, UsageError
from lab.items import load_items, spec_of
from lab.model.answering import letter_ids
from lab.model.ready import Ready
from lab.model.run import Edges
from lab.model.zoo import load, weights_hash
from lab.recipe import ItemSpec, ItemsSpec, ModelSpec, Recipe
from lab.result import Result
from lab.runs import Cancel, Ledger, Run, progress
from probes.pathways import CROSS_FRAME, cut_mask

# The paper's curves; its "question" is the stem together with the options.
PATHWAYS = ("cross-frame", "video->question+option", "video->last", "question+option->last", "last->last")
# Where nobody told us which text is the question.
PORTABLE = ("cross-frame", "video->text", "video->last", "text->last", "last->last")
WINDOW = 9
UNIT = "% change in probability"
Metric = Literal["argmax", "answer"]


class KnockoutRecipe(Recipe):
    """A knock-out sweep: model, items, pathways, window. `n_frames` holds for items that do not say their own."""

    model: ModelSpec = ModelSpec()
    items: ItemsSpec
    n_frames: int = 8
    pathways: tuple[str, ...] = Field(default=PATHWAYS, min_length=1)
    window: int = Field(default=WINDOW, ge=1)
    metric: Metric = "argmax"

    def run(self, *, progress: bool = True, model: Any = None, out: str | Path | None = None) -> list[Result]:
        """Load what the recipe names (or use `model`) and sweep. Raises ConfigError if a file or the weights changed."""
        model = model or load_spec(self.model)
        items, ready = self._ready(model)
        return [
            _swept(model, items, ready, self.pathways, self.window, self.metric, self, out=out, cancel=None, show=progress)
        ]  # fmt: skip

    def _ready(self, model: Any) -> tuple[list[VideoQA | None], list[Ready]]:
        items = list(load_items([s.model_dump(mode="json") for s in self.items] if isinstance(self.items, tuple) else self.items, base=self.folder))  # fmt: skip
        specs = self.items if isinstance(self.items, tuple) else (None,) * len(items)
        return list(items), [model.prepare(i, **self._sampling(s)) for i, s in zip(items, specs, strict=True)]

    def _sampling(self, spec: ItemSpec | None) -> dict[str, Any]:
        return (spec.video.sampling() if spec else {}) or {"n_frames": self.n_frames}


def load_spec(spec: ModelSpec) -> Any:
    """The model a recipe names. Raises ConfigError if its weights are not the ones the recipe was made with."""
    have = weights_hash(spec.name) if spec.weights else None
    if spec.weights and have != spec.weights:
        raise ConfigError(
            f"weights of {spec.name} have hash {have}, the recipe was made with {spec.weights}; get those"
        )
    dtype, device = (None if v == "auto" else v for v in (spec.dtype, spec.device))
    return load(spec.name, dtype=dtype, device=device, revision=spec.revision)


def knockout(
    model: Any, items: Any, pathways: Sequence[str] | None = None, *, window: int = WINDOW, metric: Metric = "argmax",
    n_frames: int = 8, out: str | Path | None = None, cancel: Cancel | None = None, show_progress: bool = True,
) -> Result:  # fmt: skip
    """Sweep a centred window of cut layers over the model, for every pathway and item.

    items     one or several VideoQA or Ready (one world each)
    pathways  see `probes.pathways`: "cross-frame", or "keys->queries" for any pair of segments; None: the paper's
              five curves, as far as the first item's prompt has them
    window    number of layers; near the ends it is clipped, not shifted (the paper's rule), so end points cut fewer
    metric    "argmax": p of the token the clean run answers (the paper's); "answer": p of the right option's letter
    out       folder for a journal: an interrupted sweep goes on where it stopped

    Returns a Result with axes (item, pathway, layer); layers 1-based. `notes` holds each item's clean probability.
    Raises UsageError for unknown pathways or segments; warns (LabWarning) when a pathway changed nothing at all.
    """
    if window < 1:
        raise UsageError(f"window must be at least 1 layer, got {window}")
    given = list(items) if isinstance(items, list | tuple) else [items]
    if not given or (pathways is not None and not pathways):
        raise UsageError(
            f"nothing to do: {len(given)} items, {0 if pathways is None else len(pathways)} pathways"
        )
    ready = [i if isinstance(i, Ready) else model.prepare(i, n_frames) for i in given]
    pathways = usual_pathways(_map(ready[0])) if pathways is None else pathways
    recipe = _recipe(model, ready, pathways, window, metric, n_frames)
    return _swept(
        model, [r.item for r in ready], ready, tuple(pathways), window, metric, recipe, out=out, cancel=cancel,
        show=show_progress,
    )  # fmt: skip


def usual_pathways(tokens: TokenMap) -> tuple[str, ...]:
    """The paper's five curves for this prompt; "text" in place of the question where its place is not known."""
    known = len(tokens.where(role=["question", "option"])) > 0
    chosen = PATHWAYS if known else PORTABLE
    return tuple(p for p in chosen if p != CROSS_FRAME or tokens.n_frames > 1)


def layers_of(centre: int, window: int, n_layers: int) -> range:
    """Layers (0-based) of the window round `centre`, clipped at the ends (the paper's rule, A2)."""
    return range(max(0, centre - window // 2), min(n_layers, centre + (window + 1) // 2))


def dense_edges(cut: Bool[Tensor, "q k"]) -> Edges:
    """The kept edges as the model asks for them; generated rows follow the last prompt row, and read each other."""
    n = len(cut)

    def keep(q: Tensor, k: Tensor) -> Tensor:
        rows, columns = q.clamp(max=n - 1), k.clamp(max=n - 1)
        removed = cut.to(q.device)[rows[:, None], columns[None, :]]
        return ~removed | (k >= n)[None, :]

    return keep


@dataclass(frozen=True)
class _Case:
    """One item, ready to be cut: its id, what is measured, and its clean probability."""

    key: str
    ready: Ready
    item: VideoQA | None
    token: int
    clean: float


def _swept(
    model: Any, items: Sequence[VideoQA | None], ready: Sequence[Ready], pathways: tuple[str, ...], window: int,
    metric: Metric, recipe: KnockoutRecipe | None, *, out: Any, cancel: Cancel | None, show: bool,
) -> Result:  # fmt: skip
    keys = _keys(items)
    for item, r in zip(items, ready, strict=True):
        for pathway in pathways:  # before hours of work: every pathway can be read for every item
            cut_mask(_map(r), pathway, item)
    n_layers, calls = model.cfg.n_layers, model.tower_calls
    cases = [_case(model, k, r, i, metric) for k, r, i in zip(keys, ready, items, strict=True)]
    journal = _journal(out, recipe, cancel)
    with journal as run:
        rows = [
            _row(model, case, p, window, run)
            for case, p in progress(_pairs(cases, pathways), desc="knock-out", show=show, cancel=cancel)
        ]
    p = np.array(rows).reshape(len(cases), len(pathways), n_layers)
    clean = np.array([c.clean for c in cases])[:, None, None]
    _warn_if_dead(p, clean, pathways)
    spent = Ledger(
        len(cases) * (1 + len(pathways) * n_layers),
        len(cases) * (1 + len(pathways) * n_layers),
        model.tower_calls - calls,
    )
    return Result(
        values=(p - clean) * 100.0 / clean, axes=("item", "pathway", "layer"),
        coords={"item": keys, "pathway": list(pathways), "layer": list(range(1, n_layers + 1))},
        unit=UNIT, recipe=recipe.plain() if recipe else {}, name="attention knock-out", baseline=0.0,
        notes=_notes(model, cases, window, metric, spent),
    )  # fmt: skip


def _pairs(cases: Sequence[_Case], pathways: Sequence[str]) -> list[tuple[_Case, str]]:
    return [(case, pathway) for case in cases for pathway in pathways]


def _journal(out: Any, recipe: KnockoutRecipe | None, cancel: Cancel | None) -> Any:
    if out is None:
        return nullcontext()
    if recipe is None:
        raise UsageError(
            "a journal needs items that can be named again: videos must be files, prepared by model.prepare"
        )
    return Run(out, recipe, cancel=cancel)


def _row(model: Any, case: _Case, pathway: str, window: int, run: Run | None) -> list[float]:
    """p at every centre layer for one item and pathway; from the journal where it is there."""
    key = f"{case.key}|{pathway}"
    if run is not None and run.done(key):
        return list(run.results()[key])
    row = list(_curve(model, case, pathway, window))
    if run is not None:
        run.record(key, row, Ledger(len(row), len(row)))
    return row


def _curve(model: Any, case: _Case, pathway: str, window: int) -> Iterator[float]:
    cut = cut_mask(_map(case.ready), pathway, case.item)
    if not bool(
        cut.any()
    ):  # a cut that removes nothing takes the clean path: the same number on every device
        yield from [case.clean] * model.cfg.n_layers
        return
    keep = dense_edges(cut)
    for centre in range(model.cfg.n_layers):
        layers = [i for i in layers_of(centre, window, model.cfg.n_layers) if model.parts[i].attn is not None]
        yield _p(model, case.ready, case.token, {i: keep for i in layers})


@torch.no_grad()
def _p(model: Any, ready: Ready, token: int, edges: dict[int, Edges]) -> float:
    return float(model(ready, edges=edges)[0, -1].float().softmax(-1)[token])


@torch.no_grad()
def _case(model: Any, key: str, ready: Ready, item: VideoQA | None, metric: Metric) -> _Case:
    probs = model(ready)[0, -1].float().softmax(-1)
    token = int(probs.argmax()) if metric == "argmax" else _answer_token(model, item)
    return _Case(key, ready, item, token, float(probs[token]))


def _answer_token(model: Any, item: VideoQA | None) -> int:
    if item is None or not item.options or not isinstance(item.answer, int):
        raise UsageError(
            "metric='answer' needs items with options and the index of the right one; use metric='argmax'"
        )
    return letter_ids(model.need_tokenizer(), len(item.options))[item.answer]


def _map(ready: Ready) -> TokenMap:
    if ready.n_worlds != 1:
        raise UsageError(
            f"a knock-out takes one world at a time, got {ready.n_worlds}; prepare them one by one"
        )
    return ready.tokens


def _keys(items: Sequence[VideoQA | None]) -> list[str]:
    names = [(i.id if i is not None else "") or f"item:{n}" for n, i in enumerate(items, 1)]
    return [name if names.count(name) == 1 else f"{name}#{n}" for n, name in enumerate(names, 1)]


def _notes(model: Any, cases: Sequence[_Case], window: int, metric: Metric, spent: Ledger) -> dict[str, Any]:
    return {
        "window": window, "metric": metric, "ledger": spent.plain(),
        "p_clean": {c.key: c.clean for c in cases},
        "token": {c.key: model.tokenizer.decode([c.token]) if model.tokenizer is not None else str(c.token) for c in cases},
        "no_edges": [p.index + 1 for p in model.parts if p.attn is None],
    }  # fmt: skip


def _warn_if_dead(p: Any, clean: Any, pathways: Sequence[str]) -> None:
    """An intervention that changes nothing at all is more often a mistake than a finding."""
    for i, pathway in enumerate(pathways):
        if pathway != "none" and bool((p[:, i] == clean[:, 0]).all()):
            warnings.warn(
                f"cutting {pathway!r} changed nothing in any window of any item", LabWarning, stacklevel=4
            )


def _recipe(
    model: Any, ready: Sequence[Ready], pathways: Sequence[str], window: int, metric: Metric, n_frames: int
) -> KnockoutRecipe | None:
    """The recipe of a sweep, or None where an item or the model cannot be named again (arrays, wrapped models)."""
    if not getattr(model, "spec", None) or any(
        r.item is None or not isinstance(r.item.video, str) for r in ready
    ):
        return None
    items = tuple(spec_of(r.item, **r.sampling) for r in ready if r.item is not None)
    return KnockoutRecipe(
        model=ModelSpec(**model.spec), items=items, n_frames=n_frames, pathways=tuple(pathways), window=window, metric=metric
    )  # fmt: skip
