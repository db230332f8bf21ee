"""Sweeps: cut every pathway in every window of layers and watch the answer move (Map the Flow, arXiv 2510.13251).

1 run the prompt clean; note p of the token it would answer   2 for every pathway and centre layer, cut the pathway's
edges in the window round that layer, in all heads, and run again   3 the change of p, in percent, is the curve.
"fast" computes step 2 from one stored clean run (`lab.edges.fast`), "reference" with one full forward per point.
What is cut at a point: `lab.edges.grid`; what is measured: `lab.edges.metrics`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lab.carriers import TokenMap, VideoQA
from lab.edges.asked import Executor, Sweep, chosen_metrics
from lab.edges.closure import Cuts
from lab.edges.dense import run_dense
from lab.edges.fast import ROWS, run_cut
from lab.edges.grid import FramePairs, Grid, Heads, grid_of
from lab.edges.identity import content_id, weights_id
from lab.edges.metrics import OF_OPTIONS, OF_TARGET, UNITS, Gauge, Metric
from lab.edges.pathways import listed, name_of, usual_pathways
from lab.edges.reuse import Videos, staged
from lab.edges.rows import Row, Todo, result_of, with_response_map
from lab.edges.store import Store
from lab.edges.targets import Target, Targets, given_targets, letters_of, target_of
from lab.edges.windows import WINDOW, Style, layers_of
from lab.errors import RunError, UsageError
from lab.model.continuing import with_response
from lab.model.hooking import hooked
from lab.model.ready import Ready
from lab.recipe import Recipe
from lab.recipe import Recipe as Owner  # not listed among the recipes that can be run
from lab.result import Result
from lab.runs import Cancel, Ledger, Run, progress
from lab.slots import Plan

__all__ = [
    "UNIT", "WINDOW", "Executor", "Metric", "Style", "Sweep", "SweepJournal", "as_ready", "journal_of", "layers_of", "map_of", "run_sweep",
    "sweep",
]  # fmt: skip

UNIT = UNITS["argmax"]

Pathways = str | Sequence[str] | Mapping[str, str | Sequence[str]]
TOGETHER = 1 << 29  # bytes of logits and masks that are held at a time, about


class SweepJournal(Owner):
    """What a journal belongs to: the model and its weights, the prompts' fingerprints, and what is cut.

    It cannot be run by itself.
    """

    model: str
    weights: str
    dtype: str
    items: tuple[str, ...]
    what: str

    def run(self, *, progress: bool = True) -> list[Result]:
        """Raises UsageError: the items are only known by their fingerprints."""
        raise UsageError(
            "this journal knows its items only by fingerprint; call lab.edges.sweeping.sweep with the same items"
        )


def sweep(
    model: Any, items: Any, pathways: Pathways | None = None, *, window: int = WINDOW, style: Style = "center",
    metric: Metric | None = None, metrics: Sequence[Metric] | None = None, target: Targets = None, per_token: bool = False,
    heads: Heads = None, frame_pairs: FramePairs = None, n_frames: int = 8, out: str | Path | None = None,
    cancel: Cancel | None = None, executor: Executor = "fast", n_rows: int = ROWS, show_progress: bool = True,
) -> Result:  # fmt: skip
    """Sweep cut layers over the model, for every pathway and item.

    items     one or several VideoQA or Ready (one world each); several about one video share what they can
    pathways  texts, or name -> text or texts cut together; None: the paper's five curves, as far as the first item's
              prompt has them, and those into the response where a text is measured
    metric    one of `lab.edges.metrics`; "argmax" by default, "target" where a target is given. metrics: several
    target    an answer's text, or one for each item, teacher-forced: its tokens follow the prompt as role "response".
              Only "...->response" cuts the rows of these tokens; "video->last+response" cuts as generation would
    out       folder for a journal: an interrupted sweep goes on where it stopped
    the rest  see `Sweep`

    Returns a Result with axes (item, pathway, layer); layers 1-based. Before them "metric" if several are asked, and
    after "pathway" what is asked besides: "head", "key_frame" and "query_frame" (0-based), "first" and "last" in place
    of "layer" for a triangle, "token" of the target. Points that do not exist (a last layer before the first one) are
    nan. `notes` holds each item's clean probability, whether its clean answer is right (see `Result.split`), its video
    (intervals of means resample videos) and the ledger: forward-equivalents computed, what one full forward per point
    would have cost, tower calls; of an interrupted sweep, for all its pieces together, those read from the journal
    included.
    Raises UsageError for unknown pathways or segments; warns (LabWarning) when a pathway changed nothing at all.
    """
    ready = as_ready(model, items, pathways, n_frames)
    chosen = chosen_metrics(metric, metrics, target)
    texts = given_targets(target, len(ready))
    if pathways is None:
        follows = _target(model, ready[0].item, texts[0], chosen)
        names = usual_pathways(
            map_of(ready[0]) if follows is None else with_response_map(map_of(ready[0]), follows)
        )
    else:
        names = listed(pathways)
    what = Sweep(names, window, style, chosen, executor, n_rows, heads, frame_pairs, tuple(texts), per_token)
    recipe = None if out is None else journal_of(model, ready, what)
    return run_sweep(
        model, [r.item for r in ready], ready, what, journal=recipe, out=out, cancel=cancel, show=show_progress,
        passing=_passing(items, ready),
    )  # fmt: skip


def as_ready(model: Any, items: Any, pathways: Any, n_frames: int) -> list[Ready]:
    """The items prepared. Raises UsageError if there is nothing to do."""
    given = list(items) if isinstance(items, list | tuple) else [items]
    if not given or (pathways is not None and not pathways):
        raise UsageError(
            f"nothing to do: {len(given)} items, {0 if pathways is None else len(pathways)} pathways"
        )
    return [model._ready(i, n_frames) for i in given]


def _passing(items: Any, ready: Sequence[Ready]) -> list[bool]:
    """Which prompts were prepared here, and were not handed in."""
    given = list(items) if isinstance(items, list | tuple) else [items]
    return [r is not i for r, i in zip(ready, given, strict=True)]


def map_of(ready: Ready) -> TokenMap:
    """The token map of the one world. Raises UsageError if there are more."""
    if ready.n_worlds != 1:
        raise UsageError(
            f"a knock-out takes one world at a time, got {ready.n_worlds}; prepare them one by one"
        )
    return ready.tokens


def decoder_map(model: Any, ready: Ready) -> tuple[TokenMap, int]:
    """The token map of the one world as the decoder sees it, after the stages of the mechanisms it was prepared with;
    and how many tower calls it took to know it."""
    tokens, before = map_of(ready), model.tower_calls
    tokens = model.maps(ready)[0] if staged(ready.plan) else tokens
    return tokens, model.tower_calls - before


def run_sweep(
    model: Any, items: Sequence[VideoQA | None], ready: Sequence[Ready], what: Sweep, *, recipe: Recipe | None = None,
    journal: Recipe | None = None, out: Any = None, cancel: Cancel | None = None, show: bool = True,
    passing: Sequence[bool] | None = None,
) -> Result:  # fmt: skip
    """The sweep over prepared items. recipe: what made it, kept in the Result; journal: whom the folder `out` belongs to.

    passing   which prompts were prepared for this sweep alone (see `lab.edges.reuse`)
    """
    if model.pruning.chosen(None) is not None:
        raise UsageError("a sweep cuts the model as it is, and `model.pruned` is open: sweep outside of it")
    maps = [decoder_map(model, r) for r in ready]
    grid = grid_of(model, [m for m, _ in maps], what.style, what.window, what.heads, what.frame_pairs)
    texts = given_targets(what.target, len(ready))
    todo = [Todo(k, r, m, i, _checked(model, m, i, t, what, grid), calls) for k, r, (m, calls), i, t in zip(_keys(items), ready, maps, items, texts, strict=True)]  # fmt: skip
    videos = Videos(model, ready, passing)
    with nullcontext() if out is None else Run(out, _named(journal), cancel=cancel) as run:
        # the fast executor cuts all pathways of an item together, so an item is one piece; else every curve is one
        groups = [what.pathways] if what.executor == "fast" else [(p,) for p in what.pathways]
        pieces = [(n, todo[n], g) for n in videos.order for g in groups]
        rows = list(
            _rows(
                model, progress(pieces, desc="knock-out", show=show, cancel=cancel), what, grid, videos, run
            )
        )
    return result_of(model, todo, rows, what, grid, recipe)


# ---- one item -------------------------------------------------------------------------------------------------------


class Engine(Protocol):
    """Evaluates cuts of one prompt."""

    clean: Tensor  # [read, d_vocab]

    @property
    def ledger(self) -> Ledger: ...

    @property
    def reason(self) -> str: ...

    def logits(self, cuts: Sequence[Cuts]) -> Iterator[Tensor]: ...

    def close(self) -> None: ...


class _Reference:
    """One full forward per set of cuts."""

    reason = ""

    def __init__(self, model: Any, ready: Ready, read: Sequence[int]) -> None:
        self.model, self.ready = model, ready
        self.read = () if list(read) == [ready.n_pos - 1] else (list(read),)
        self.clean = run_dense(model, ready, {}, *self.read)[0]
        self.n = 1

    @property
    def ledger(self) -> Ledger:
        return Ledger(self.n, self.n)

    def logits(self, cuts: Sequence[Cuts]) -> Iterator[Tensor]:
        for c in cuts:
            self.n += 1
            # a cut that removes nothing takes the clean path: the same number on every device
            nothing = not any(bool(cut.any()) for cut in c.values())
            yield self.clean if nothing else run_dense(self.model, self.ready, c, *self.read)[0]

    def close(self) -> None:
        pass


class _Fast:
    """All sets of cuts together, from one stored clean run."""

    def __init__(self, model: Any, store: Store, read: Sequence[int], n_rows: int, before: Ledger) -> None:
        self.model, self.n_rows, self.read, self.before = model, n_rows, list(read), before
        self.store: Store | None = store
        self.clean = store.clean(model, self.read)
        self.reason = store.reason
        self._ledger = store.ledger

    @property
    def ledger(self) -> Ledger:
        return self.before + (self._ledger if self.store is None else self.store.ledger)

    def logits(self, cuts: Sequence[Cuts]) -> Iterator[Tensor]:
        assert self.store is not None
        while True:
            try:
                yield from run_cut(self.model, self.store, cuts, read=self.read, n_rows=self.n_rows)
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
        # keys, values and streams of an item are large
        self._ledger, self.store = self.ledger, None
        self.before = Ledger()


@dataclass
class _Case:
    """One item being cut: its engine, and what is read from its logits."""

    todo: Todo
    engine: Engine
    gauge: Gauge


def _rows(model: Any, pieces: Any, what: Sweep, grid: Grid, videos: Videos, run: Run | None) -> Iterator[Row]:
    """The levels at every point for one piece after another; from the journal where they are, and then nothing is run."""
    case: _Case | None = None
    for n, todo, pathways in pieces:
        name = todo.key if what.executor == "fast" else f"{todo.key}|{name_of(pathways[0])}"
        if run is not None and run.done(name):
            yield Row.read(todo.key, run.results()[name])
            continue
        calls, before = model.tower_calls, Ledger()
        if case is not None and case.todo is todo:
            before = case.engine.ledger
        else:
            if case is not None:
                case.engine.close()
            videos.look(n)
            calls -= todo.calls
            case = _case(model, n, todo, what, videos)
        levels = _levels(case, pathways, grid)
        spent = _minus(case.engine.ledger, before) + Ledger(tower_calls=model.tower_calls - calls)
        row = _row(case, levels, what, spent)
        if run is not None:
            run.record(name, row.plain(), spent)
        yield row
    if case is not None:
        case.engine.close()


def _minus(a: Ledger, b: Ledger) -> Ledger:
    return Ledger(a.forwards - b.forwards, a.naive - b.naive)


def _case(model: Any, n: int, todo: Todo, what: Sweep, videos: Videos) -> _Case:
    prompt, target = todo.ready, todo.target
    if target is not None and target.follows:
        prompt = with_response(model, prompt, target.ids, target.pieces)
    engine: Engine
    if what.executor == "fast":
        store = videos.store(n, prompt)
        engine = _Fast(model, store, todo.read, what.n_rows, videos.charged(store))
    else:
        engine = _Reference(model, prompt, todo.read)
    ids = target.ids if target is not None else ()
    gauge = Gauge(what.metrics, ids, _letters(model, todo.item, what), engine.clean, what.per_token)
    return _Case(todo, engine, gauge)


def _letters(model: Any, item: VideoQA | None, what: Sweep) -> tuple[int, ...]:
    """Tokens of the options' letters; empty where the tokenizer has none and nothing asked needs them."""
    if model.tokenizer is None:
        return ()
    try:
        return letters_of(model, item)
    except UsageError:
        if any(m in OF_OPTIONS for m in what.metrics):
            raise
        return ()


def _levels(case: _Case, pathways: Sequence[str], grid: Grid) -> list[Any]:
    """[metric][pathway][point]; None where a point does not exist."""
    todo, gauge = case.todo, case.gauge
    table: list[list[Any]] = [[None] * (grid.size * len(pathways)) for _ in gauge.metrics]
    points = (
        (i * grid.size + at, cuts)
        for i, pathway in enumerate(pathways)
        for at, cuts in grid.points(todo.tokens, pathway, todo.item)
    )
    for batch in _batches(points, gauge.clean.numel() * gauge.clean.element_size()):
        for (at, _), logits in zip(batch, case.engine.logits([cuts for _, cuts in batch]), strict=True):
            for row, level in zip(table, gauge.levels(logits), strict=True):
                row[at] = level
    return [[row[i * grid.size : (i + 1) * grid.size] for i in range(len(pathways))] for row in table]


def _batches(points: Iterator[tuple[int, Cuts]], size: int) -> Iterator[list[tuple[int, Cuts]]]:
    """Points that are evaluated together: as many as their logits (`size` bytes each) and masks leave room for."""
    batch: list[tuple[int, Cuts]] = []
    held, masks = 0, set[int]()
    for point in points:
        held += size
        for cut in point[1].values():
            held += 0 if id(cut) in masks or not isinstance(cut, Tensor) else cut.numel()
            masks.add(id(cut))
        batch.append(point)
        if held > TOGETHER:
            yield batch
            batch, held, masks = [], 0, set()
    if batch:
        yield batch


def _row(case: _Case, levels: list[Any], what: Sweep, spent: Ledger) -> Row:
    gauge, todo, clean = case.gauge, case.todo, case.engine.clean
    followed = todo.target if what.metrics[0] in OF_TARGET else None
    metric: Metric = "argmax" if followed is None else "target"
    p = Gauge((metric,), gauge.ids, gauge.letters, clean).levels(clean)[0]
    token = gauge.argmax if followed is None else followed.ids[0]
    return Row(
        todo.key, p, token, _correct(todo, gauge), case.engine.reason, gauge.levels(clean), levels, spent
    )


def _correct(todo: Todo, gauge: Gauge) -> bool | None:
    """Whether the clean run gives the right answer; None where that is not known."""
    item = todo.item
    if item is not None and gauge.letters and isinstance(item.answer, int):
        return gauge.choice == item.answer
    right = item is not None and todo.target is not None and todo.target.text == item.answer
    return gauge.foretold if right else None


# ---- checks and names -----------------------------------------------------------------------------------------------


def _checked(
    model: Any, prompt: TokenMap, item: VideoQA | None, text: str | None, what: Sweep, grid: Grid
) -> Target | None:
    """The item's target. Raises UsageError for what cannot be cut or measured: before hours of work."""
    target = _target(model, item, text, what.metrics)
    tokens = with_response_map(prompt, target)
    for pathway in what.pathways:
        grid.check(tokens, pathway, item)
    if what.follows_target and target is None:
        asked = [m for m in what.metrics if m in OF_TARGET]
        raise UsageError(
            f"metric={asked[0]!r} needs items with options and the index of the right one, or an open question with its "
            "answer, or target=; use metric='argmax'"
        )
    if any(m in OF_OPTIONS for m in what.metrics) and (item is None or len(item.options) < 2):
        raise UsageError(
            f"metrics {', '.join(m for m in what.metrics if m in OF_OPTIONS)} need items with at least 2 options, "
            f"this one has {0 if item is None else len(item.options)}; use metric='argmax'"
        )
    if any(m in OF_OPTIONS for m in what.metrics):
        letters_of(model, item)
    return target


def _target(model: Any, item: VideoQA | None, text: str | None, metrics: Sequence[str]) -> Target | None:
    """What follows the prompt or is read at its end. "answer" is the right answer, whatever the target."""
    if not any(m in OF_TARGET for m in metrics):
        return None
    if text is not None and "answer" in metrics:
        raise UsageError("'answer' measures the right answer, and target= another text; use 'target'")
    return target_of(model, item, text)


def _keys(items: Sequence[VideoQA | None]) -> list[str]:
    names = [(i.id if i is not None else "") or f"item:{n}" for n, i in enumerate(items, 1)]
    return [name if names.count(name) == 1 else f"{name}#{n}" for n, name in enumerate(names, 1)]


def _named(recipe: Recipe | None) -> Recipe:
    if recipe is None:
        raise UsageError(
            "a journal needs items that can be named again: videos must be files, prepared by model.prepare"
        )
    return recipe


def journal_of(model: Any, ready: Sequence[Ready], what: Sweep) -> SweepJournal:
    """Whom the journal of this sweep belongs to. Raises UsageError while hooks are open."""
    if hooked(model):
        raise UsageError(
            "hooks are open, and a journal cannot tell what they do: sweep without out=, or close them"
        )
    asked = (what.pathways, what.window, what.style, what.metrics, what.heads, what.frame_pairs, what.target, what.per_token)  # fmt: skip
    return SweepJournal(
        model=model.cfg.model_name,
        weights=weights_id(model),
        dtype=str(model.dtype),
        items=tuple(_fingerprint(r) for r in ready),
        what=repr(asked),
    )


def _fingerprint(ready: Ready) -> str:
    """Of all that the model is given, and of what mechanisms make of it."""
    seen = hashlib.sha256()
    for name, value in sorted(ready.inputs.items()):
        seen.update(name.encode())
        if isinstance(value, Tensor):
            seen.update(str((value.dtype, tuple(value.shape))).encode())
            seen.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            seen.update(repr(value).encode())
    item = ready.item
    if item is not None:  # what the answer is measured against
        seen.update(repr((item.id, item.options, item.answer)).encode())
    if ready.plan != Plan():
        seen.update(content_id(ready.plan).encode())
    return seen.hexdigest()[:16]
