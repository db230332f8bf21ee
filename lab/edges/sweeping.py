"""Sweeps: cut every pathway in every window of layers and watch the answer move (Map the Flow, arXiv 2510.13251).

1 run the prompt clean; note p of the token it would answer   2 for every pathway and centre layer, cut the pathway's
edges in the window round that layer, in all heads, and run again   3 the change of p, in percent, is the curve.
"fast" computes step 2 from one stored clean run (`lab.edges.fast`), "reference" with one full forward per point.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor

from lab.carriers import TokenMap, VideoQA
from lab.edges.closure import Cuts
from lab.edges.dense import run_dense
from lab.edges.fast import ROWS, run_cut
from lab.edges.pathways import cut_mask, usual_pathways
from lab.edges.store import Store
from lab.errors import LabWarning, RunError, UsageError
from lab.model.answering import letter_ids
from lab.model.ready import Ready
from lab.recipe import Recipe
from lab.recipe import Recipe as Owner  # not listed among the recipes that can be run
from lab.result import Result
from lab.runs import Cancel, Ledger, Run, progress

WINDOW = 9
UNIT = "% change in probability"
Metric = Literal["argmax", "answer"]
Style = Literal["center", "shift", "inverse", "top_down", "bottom_up"]
Executor = Literal["fast", "reference"]


class SweepJournal(Owner):
    """What a journal belongs to: the model, the prompts' fingerprints, and what is cut. It cannot be run by itself."""

    model: str
    dtype: str
    items: tuple[str, ...]
    pathways: tuple[str, ...]
    window: int
    style: Style
    metric: Metric

    def run(self, *, progress: bool = True) -> list[Result]:
        """Raises UsageError: the items are only known by their fingerprints."""
        raise UsageError(
            "this journal knows its items only by fingerprint; call lab.edges.sweeping.sweep with the same items"
        )


@dataclass(frozen=True)
class Sweep:
    """What is cut and measured.

    pathways  "cross-frame", or "keys->queries" for any pair of segments (see `lab.edges.pathways`)
    window    number of layers
    style     "center": round the layer, clipped at the ends (the paper's rule: end points cut fewer layers); "shift":
              moved inside instead; "inverse": all layers but the centred window; "top_down": from the layer on;
              "bottom_up": up to the layer
    metric    "argmax": p of the token the clean run answers (the paper's); "answer": p of the right option's letter
    executor  "fast" or "reference": the same numbers up to rounding
    n_rows    about how many rows the fast executor runs together; halved when memory runs out
    """

    pathways: tuple[str, ...]
    window: int = WINDOW
    style: Style = "center"
    metric: Metric = "argmax"
    executor: Executor = "fast"
    n_rows: int = ROWS

    def __post_init__(self) -> None:
        if self.window < 1:
            raise UsageError(f"window must be at least 1 layer, got {self.window}")
        for name, allowed in (("style", Style), ("metric", Metric), ("executor", Executor)):
            if getattr(self, name) not in get_args(allowed):
                raise UsageError(f"{name}={getattr(self, name)!r}; use one of {', '.join(get_args(allowed))}")

    def layers(self, centre: int, n_layers: int) -> list[int]:
        """Layers (0-based) cut for the point `centre`."""
        inside = layers_of(centre, self.window, n_layers)
        match self.style:
            case "center":
                return list(inside)
            case "shift":
                first = max(0, min(inside.start, n_layers - self.window))
                return list(range(first, min(n_layers, first + self.window)))
            case "inverse":
                return [i for i in range(n_layers) if i not in inside]
            case "top_down":
                return list(range(centre, n_layers))
            case "bottom_up":
                return list(range(centre + 1))


def layers_of(centre: int, window: int, n_layers: int) -> range:
    """Layers (0-based) of the window round `centre`, clipped at the ends (the paper's rule, A2)."""
    return range(max(0, centre - window // 2), min(n_layers, centre + (window + 1) // 2))


def sweep(
    model: Any, items: Any, pathways: Sequence[str] | None = None, *, window: int = WINDOW, style: Style = "center",
    metric: Metric = "argmax", n_frames: int = 8, out: str | Path | None = None, cancel: Cancel | None = None,
    executor: Executor = "fast", n_rows: int = ROWS, show_progress: bool = True,
) -> Result:  # fmt: skip
    """Sweep cut layers over the model, for every pathway and item.

    items     one or several VideoQA or Ready (one world each)
    pathways  None: the paper's five curves, as far as the first item's prompt has them
    out       folder for a journal: an interrupted sweep goes on where it stopped
    the rest  see `Sweep`

    Returns a Result with axes (item, pathway, layer); layers 1-based. `notes` holds each item's clean probability and
    the ledger: forward-equivalents computed, what one full forward per point would have cost, tower calls; of an
    interrupted sweep, for all its pieces together, those read from the journal included.
    Raises UsageError for unknown pathways or segments; warns (LabWarning) when a pathway changed nothing at all.
    """
    ready = as_ready(model, items, pathways, n_frames)
    names = usual_pathways(map_of(ready[0])) if pathways is None else tuple(pathways)
    what = Sweep(names, window, style, metric, executor, n_rows)
    recipe = None if out is None else _recipe(model, ready, what)
    return run_sweep(model, [r.item for r in ready], ready, what, journal=recipe, out=out, cancel=cancel, show=show_progress)  # fmt: skip


def as_ready(model: Any, items: Any, pathways: Sequence[str] | None, n_frames: int) -> list[Ready]:
    """The items prepared. Raises UsageError if there is nothing to do."""
    given = list(items) if isinstance(items, list | tuple) else [items]
    if not given or (pathways is not None and not pathways):
        raise UsageError(
            f"nothing to do: {len(given)} items, {0 if pathways is None else len(pathways)} pathways"
        )
    return [model._ready(i, n_frames) for i in given]


def map_of(ready: Ready) -> TokenMap:
    """The token map of the one world. Raises UsageError if there are more."""
    if ready.n_worlds != 1:
        raise UsageError(
            f"a knock-out takes one world at a time, got {ready.n_worlds}; prepare them one by one"
        )
    return ready.tokens


def run_sweep(
    model: Any, items: Sequence[VideoQA | None], ready: Sequence[Ready], what: Sweep, *, recipe: Recipe | None = None,
    journal: Recipe | None = None, out: Any = None, cancel: Cancel | None = None, show: bool = True,
) -> Result:  # fmt: skip
    """The sweep over prepared items. recipe: what made it, kept in the Result; journal: whom the folder `out` belongs to."""
    if model.pruning.chosen(None) is not None:
        raise UsageError("a sweep cuts the model as it is, and `model.pruned` is open: sweep outside of it")
    keys = _keys(items)
    for item, r in zip(items, ready, strict=True):
        _check(model, r, item, what)  # before hours of work
    n_layers = model.cfg.n_layers
    with nullcontext() if out is None else Run(out, _named(journal), cancel=cancel) as run:
        # the fast executor cuts all pathways of an item together, so an item is one piece; else every curve is one
        groups = [what.pathways] if what.executor == "fast" else [(p,) for p in what.pathways]
        pieces = [(k, r, i, g) for k, r, i in zip(keys, ready, items, strict=True) for g in groups]
        rows = list(_rows(model, progress(pieces, desc="knock-out", show=show, cancel=cancel), what, run))
    p = np.array([row.p for row in rows]).reshape(len(keys), len(what.pathways), n_layers)
    first = {row.key: row for row in reversed(rows)}
    clean = np.array([first[k].clean for k in keys])[:, None, None]
    _warn_if_dead(p, clean, what, float(torch.finfo(model.dtype).eps))
    spent = sum((row.spent for row in rows), Ledger())
    return Result(
        values=_change(p, clean), axes=("item", "pathway", "layer"),
        coords={"item": keys, "pathway": list(what.pathways), "layer": list(range(1, n_layers + 1))},
        unit=UNIT, recipe=recipe.plain() if recipe else {}, name="attention knock-out", baseline=0.0,
        notes=_notes(model, first, what, spent),
    )  # fmt: skip


def _change(p: Any, clean: Any) -> Any:
    """Change in percent; nan, with a LabWarning, where the clean run gives the token no probability at all."""
    lost = int((clean == 0).sum())
    if lost:
        warnings.warn(
            f"{lost} of {clean.size} items give the measured token probability 0 in the clean run: no change can be "
            "given in percent (nan); use metric='argmax'",
            LabWarning,
            stacklevel=4,
        )
    return (p - clean) * 100.0 / np.where(clean == 0, np.nan, clean)


# ---- one item -------------------------------------------------------------------------------------------------------


class Engine(Protocol):
    """Evaluates cuts of one prompt."""

    clean: Tensor  # [d_vocab]

    @property
    def ledger(self) -> Ledger: ...

    @property
    def reason(self) -> str: ...

    def logits(self, cuts: Sequence[Cuts]) -> Iterator[Tensor]: ...

    def close(self) -> None: ...


class _Reference:
    """One full forward per set of cuts."""

    reason = ""

    def __init__(self, model: Any, ready: Ready, what: Sweep) -> None:
        self.model, self.ready = model, ready
        self.clean = run_dense(model, ready, {})[0, -1]
        self.n = 1

    @property
    def ledger(self) -> Ledger:
        return Ledger(self.n, self.n)

    def logits(self, cuts: Sequence[Cuts]) -> Iterator[Tensor]:
        for c in cuts:
            self.n += 1
            # a cut that removes nothing takes the clean path: the same number on every device
            nothing = not any(bool(cut.any()) for cut in c.values())
            yield self.clean if nothing else run_dense(self.model, self.ready, c)[0, -1]

    def close(self) -> None:
        pass


class _Fast:
    """All sets of cuts together, from one stored clean run."""

    def __init__(self, model: Any, ready: Ready, what: Sweep) -> None:
        self.model, self.n_rows = model, what.n_rows
        self.store: Store | None = Store.of(model, ready)
        self.clean = self.store.clean(model)[-1]
        self.reason = self.store.reason
        self._ledger = self.store.ledger

    @property
    def ledger(self) -> Ledger:
        return self._ledger if self.store is None else self.store.ledger

    def logits(self, cuts: Sequence[Cuts]) -> Iterator[Tensor]:
        assert self.store is not None
        while True:
            try:
                yield from run_cut(self.model, self.store, cuts, n_rows=self.n_rows)[:, -1]
                return
            except RuntimeError as e:
                self._smaller(e)

    def _smaller(self, e: RuntimeError) -> None:
        """Halve what is run together. Raises what was raised if it was not about memory, RunError at the last row."""
        if not (isinstance(e, torch.OutOfMemoryError) or "can't allocate memory" in str(e)):
            raise e
        if self.n_rows <= 1:
            raise RunError(
                f"one cut run of {self.store.n_pos if self.store else 0} positions does not fit in memory; use fewer "
                "frames, or executor='reference'"
            ) from e
        self.n_rows //= 2

    def close(self) -> None:
        self._ledger, self.store = self.ledger, None  # keys, values and streams of an item are large


@dataclass
class _Case:
    """One item being cut: its engine, what is measured, and its clean probability."""

    key: str
    ready: Ready
    item: VideoQA | None
    engine: Engine
    token: int
    clean: float

    def p(self, logits: Tensor) -> float:
        return float(logits.float().softmax(-1)[self.token])


@dataclass(frozen=True)
class _Row:
    """What is known of one piece of work: an item's curves, or one of them. All that a journal needs to go on."""

    key: str
    clean: float
    token: int
    reason: str
    p: list[list[float]]
    spent: Ledger

    @classmethod
    def read(cls, key: str, found: Any) -> _Row:
        kept = {n: found[n] for n in ("clean", "token", "reason", "p")}
        return cls(key, **kept, spent=Ledger(**found["spent"]))

    def plain(self) -> dict[str, Any]:
        kept = {n: getattr(self, n) for n in ("clean", "token", "reason", "p")}
        return {**kept, "spent": self.spent.plain()}


def _rows(model: Any, pieces: Any, what: Sweep, run: Run | None) -> Iterator[_Row]:
    """p at every layer for one piece after another; from the journal where it is there, and then nothing is run."""
    case: _Case | None = None
    for key, ready, item, pathways in pieces:
        name = key if what.executor == "fast" else f"{key}|{pathways[0]}"
        if run is not None and run.done(name):
            yield _Row.read(key, run.results()[name])
            continue
        calls, before = model.tower_calls, Ledger()
        if case is not None and case.key == key:
            before = case.engine.ledger
        else:
            if case is not None:
                case.engine.close()
            case = _case(model, key, ready, item, what)
        p = _curves(model, case, pathways, what)
        spent = _minus(case.engine.ledger, before) + Ledger(tower_calls=model.tower_calls - calls)
        row = _Row(key, case.clean, case.token, case.engine.reason, p, spent)
        if run is not None:
            run.record(name, row.plain(), spent)
        yield row
    if case is not None:
        case.engine.close()


def _minus(a: Ledger, b: Ledger) -> Ledger:
    return Ledger(a.forwards - b.forwards, a.naive - b.naive)


def _case(model: Any, key: str, ready: Ready, item: VideoQA | None, what: Sweep) -> _Case:
    engine: Engine = (_Fast if what.executor == "fast" else _Reference)(model, ready, what)
    token = int(engine.clean.argmax()) if what.metric == "argmax" else _answer_token(model, item)
    case = _Case(key, ready, item, engine, token, 0.0)
    case.clean = case.p(engine.clean)
    return case


def _curves(model: Any, case: _Case, pathways: Sequence[str], what: Sweep) -> list[list[float]]:
    n = model.cfg.n_layers
    cuts: list[Cuts] = []
    for pathway in pathways:
        cut = cut_mask(map_of(case.ready), pathway, case.item)
        for centre in range(n):
            cuts.append({i: cut for i in what.layers(centre, n) if model.parts[i].attn is not None})
    p = [case.p(logits) for logits in case.engine.logits(cuts)]
    return [p[i * n : (i + 1) * n] for i in range(len(pathways))]


# ---- checks and notes -----------------------------------------------------------------------------------------------


def _check(model: Any, ready: Ready, item: VideoQA | None, what: Sweep) -> None:
    for pathway in what.pathways:
        cut_mask(map_of(ready), pathway, item)
    if what.metric == "answer":
        _answer_token(model, item)


def _answer_token(model: Any, item: VideoQA | None) -> int:
    if item is None or not item.options or not isinstance(item.answer, int):
        raise UsageError(
            "metric='answer' needs items with options and the index of the right one; use metric='argmax'"
        )
    return letter_ids(model.need_tokenizer(), len(item.options))[item.answer]


def _keys(items: Sequence[VideoQA | None]) -> list[str]:
    names = [(i.id if i is not None else "") or f"item:{n}" for n, i in enumerate(items, 1)]
    return [name if names.count(name) == 1 else f"{name}#{n}" for n, name in enumerate(names, 1)]


def _notes(model: Any, rows: Mapping[str, _Row], what: Sweep, spent: Ledger) -> dict[str, Any]:
    reasons = sorted({r.reason for r in rows.values()} - {""})
    return {
        "window": what.window, "style": what.style, "metric": what.metric, "ledger": spent.plain(),
        "executor": what.executor, "fallbacks": reasons,
        "p_clean": {k: r.clean for k, r in rows.items()},
        "token": {
            k: model.tokenizer.decode([r.token]) if model.tokenizer is not None else str(r.token)
            for k, r in rows.items()
        },
        "no_edges": [p.index + 1 for p in model.parts if p.attn is None],
    }  # fmt: skip


def _warn_if_dead(p: Any, clean: Any, what: Sweep, eps: float) -> None:
    """An intervention that changes nothing at all is more often a mistake than a finding.

    Rows run again in other company differ from the clean run by rounding: that is nothing too.
    """
    slack = 0.0 if what.executor == "reference" else 64 * eps
    for i, pathway in enumerate(what.pathways):
        if pathway != "none" and bool((abs(p[:, i] - clean[:, 0]) <= slack * clean[:, 0]).all()):
            warnings.warn(
                f"cutting {pathway!r} changed nothing in any window of any item", LabWarning, stacklevel=4
            )


def _named(recipe: Recipe | None) -> Recipe:
    if recipe is None:
        raise UsageError(
            "a journal needs items that can be named again: videos must be files, prepared by model.prepare"
        )
    return recipe


def _recipe(model: Any, ready: Sequence[Ready], what: Sweep) -> SweepJournal:
    return SweepJournal(
        model=model.cfg.model_name, dtype=str(model.dtype), items=tuple(_fingerprint(r) for r in ready),
        pathways=what.pathways, window=what.window, style=what.style, metric=what.metric,
    )  # fmt: skip


def _fingerprint(ready: Ready) -> str:
    """Of all that the model is given."""
    seen = hashlib.sha256()
    for name, value in sorted(ready.inputs.items()):
        seen.update(name.encode())
        if isinstance(value, Tensor):
            seen.update(str((value.dtype, tuple(value.shape))).encode())
            seen.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            seen.update(repr(value).encode())
    return seen.hexdigest()[:16]
