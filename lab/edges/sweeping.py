"""Sweeps: cut every pathway in every window of layers and watch the answer move (Map the Flow, arXiv 2510.13251).

1 run the prompt clean; note p of the token it would answer   2 for every pathway and centre layer, cut the pathway's
edges in the window round that layer, in all heads, and run again   3 the change of p, in percent, is the curve.
"fast" computes step 2 from one stored clean run (`lab.edges.fast`), "reference" with one full forward per point.
What is cut at a point: `lab.edges.grid`; what is measured: `lab.edges.metrics`.
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
from numpy.typing import NDArray
from torch import Tensor

from lab.carriers import TokenMap, VideoQA
from lab.edges.closure import Cuts
from lab.edges.dense import run_dense
from lab.edges.fast import ROWS, run_cut
from lab.edges.grid import FramePairs, Grid, Heads, grid_of
from lab.edges.metrics import (
    OF_OPTIONS,
    OF_TARGET,
    RELATIVE,
    UNITS,
    Gauge,
    Metric,
    changes,
    check_metrics,
    unit_of,
)
from lab.edges.pathways import NOTHING, listed, name_of, usual_pathways
from lab.edges.reuse import Videos, pixels_id
from lab.edges.store import Store
from lab.edges.targets import Target, Targets, given_targets, letters_of, target_of
from lab.edges.windows import WINDOW, Style, layers_of, styled
from lab.errors import LabWarning, RunError, UsageError
from lab.model.continuing import with_response
from lab.model.ready import Ready
from lab.recipe import Recipe
from lab.recipe import Recipe as Owner  # not listed among the recipes that can be run
from lab.result import Result
from lab.runs import Cancel, Ledger, Run, progress

__all__ = [
    "UNIT", "WINDOW", "Executor", "Metric", "Style", "Sweep", "SweepJournal", "as_ready", "layers_of", "map_of", "run_sweep",
    "sweep",
]  # fmt: skip

UNIT = UNITS["argmax"]
Executor = Literal["fast", "reference"]
Pathways = str | Sequence[str] | Mapping[str, str | Sequence[str]]
TOGETHER = 1 << 29  # bytes of logits and masks that are held at a time, about


class SweepJournal(Owner):
    """What a journal belongs to: the model, the prompts' fingerprints, and what is cut. It cannot be run by itself."""

    model: str
    dtype: str
    items: tuple[str, ...]
    what: str

    def run(self, *, progress: bool = True) -> list[Result]:
        """Raises UsageError: the items are only known by their fingerprints."""
        raise UsageError(
            "this journal knows its items only by fingerprint; call lab.edges.sweeping.sweep with the same items"
        )


@dataclass(frozen=True)
class Sweep:
    """What is cut and measured.

    pathways  "cross-frame", or "keys->queries" for any pair of segments, or one's own (see `lab.edges.pathways`)
    window    number of layers
    style     "center": round the layer, clipped at the ends (the paper's rule: end points cut fewer layers); "shift":
              moved inside instead; "inverse": all layers but the centred window; "top_down": from the layer on;
              "bottom_up": up to the layer; "triangle": from every layer to every later one
    metrics   see `lab.edges.metrics`
    executor  "fast" or "reference": the same numbers up to rounding
    n_rows    about how many rows the fast executor runs together; halved when memory runs out
    heads     "each", or numbers (0-based): heads that are cut one at a time; None: all together
    frame_pairs  "each", or (key frame, query frame): pairs that are cut one at a time; None: all together
    target    the text whose probability is followed, or one for each item; None: the right answer
    per_token a value for every token of the target
    """

    pathways: tuple[str, ...]
    window: int = WINDOW
    style: Style = "center"
    metrics: tuple[Metric, ...] = ("argmax",)
    executor: Executor = "fast"
    n_rows: int = ROWS
    heads: Heads = None
    frame_pairs: FramePairs = None
    target: Targets = None
    per_token: bool = False

    def __post_init__(self) -> None:
        if self.window < 1:
            raise UsageError(f"window must be at least 1 layer, got {self.window}")
        for name, allowed in (("style", Style), ("executor", Executor)):
            if getattr(self, name) not in get_args(allowed):
                raise UsageError(f"{name}={getattr(self, name)!r}; use one of {', '.join(get_args(allowed))}")
        check_metrics(self.metrics, self.per_token)

    @property
    def names(self) -> list[str]:
        """What the pathways are called."""
        return [name_of(p) for p in self.pathways]

    @property
    def follows_target(self) -> bool:
        """Whether a target's probability is measured."""
        return any(m in OF_TARGET for m in self.metrics)

    def layers(self, centre: int, n_layers: int) -> list[int]:
        """Layers (0-based) cut for the point `centre`; not for a triangle."""
        return styled(self.style, centre, self.window, n_layers)


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
            map_of(ready[0]) if follows is None else _with_response(map_of(ready[0]), follows)
        )
    else:
        names = listed(pathways)
    what = Sweep(names, window, style, chosen, executor, n_rows, heads, frame_pairs, tuple(texts), per_token)
    recipe = None if out is None else _recipe(model, ready, what)
    return run_sweep(model, [r.item for r in ready], ready, what, journal=recipe, out=out, cancel=cancel, show=show_progress)  # fmt: skip


def chosen_metrics(
    metric: Metric | None, metrics: Sequence[Metric] | None, target: Targets
) -> tuple[Metric, ...]:
    """The metrics asked. Raises UsageError if both arguments are given."""
    if metric is not None and metrics is not None:
        raise UsageError(f"metric={metric!r} and metrics={metrics!r} are given; choose one")
    if metrics is not None:
        return (metrics,) if isinstance(metrics, str) else tuple(metrics)  # type: ignore[return-value]
    return (metric or ("argmax" if target is None else "target"),)


def as_ready(model: Any, items: Any, pathways: Any, n_frames: int) -> list[Ready]:
    """The items prepared. Raises UsageError if there is nothing to do."""
    given = list(items) if isinstance(items, list | tuple) else [items]
    if not given or (pathways is not None and not pathways):
        raise UsageError(
            f"nothing to do: {len(given)} items, {0 if pathways is None else len(pathways)} pathways"
        )
    return [i if isinstance(i, Ready) else model.prepare(i, n_frames) for i in given]


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
    maps = [map_of(r) for r in ready]
    grid = grid_of(model, maps, what.style, what.window, what.heads, what.frame_pairs)
    texts = given_targets(what.target, len(ready))
    todo = [_Todo(k, r, i, _checked(model, r, i, t, what, grid)) for k, r, i, t in zip(_keys(items), ready, items, texts, strict=True)]  # fmt: skip
    videos = Videos(model, ready)
    with nullcontext() if out is None else Run(out, _named(journal), cancel=cancel) as run:
        # the fast executor cuts all pathways of an item together, so an item is one piece; else every curve is one
        groups = [what.pathways] if what.executor == "fast" else [(p,) for p in what.pathways]
        pieces = [(n, todo[n], g) for n in videos.order for g in groups]
        rows = list(
            _rows(
                model, progress(pieces, desc="knock-out", show=show, cancel=cancel), what, grid, videos, run
            )
        )
    return _result(model, todo, rows, what, grid, recipe)


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


@dataclass(frozen=True)
class _Todo:
    """One item to be measured: its name, its prompt, and the target that follows the prompt or ends it."""

    key: str
    ready: Ready
    item: VideoQA | None
    target: Target | None

    @property
    def tokens(self) -> TokenMap:
        """The map of what is run: the prompt, with the response after it if the target is a text."""
        return _with_response(self.ready.tokens, self.target)

    @property
    def read(self) -> list[int]:
        """Positions that foretell the target's tokens; without a target the prompt's last one."""
        return list(
            range(self.ready.n_pos - 1, self.ready.n_pos - 1 + len(self.target.ids if self.target else [0]))
        )


@dataclass
class _Case:
    """One item being cut: its engine, and what is read from its logits."""

    todo: _Todo
    engine: Engine
    gauge: Gauge


@dataclass(frozen=True)
class _Row:
    """What is known of one piece of work: an item's curves, or one of them. All that a journal needs to go on.

    clean   level of every metric in the clean run, [metric]; levels: at every point, [metric][pathway][point]
    p       the clean run's probability of the token that is followed, or else of the one it answers
    """

    key: str
    p: float
    token: int
    correct: bool | None
    reason: str
    clean: list[Any]
    levels: list[Any]
    spent: Ledger

    @classmethod
    def read(cls, key: str, found: Any) -> _Row:
        return cls(key, spent=Ledger(**found["spent"]), **{n: found[n] for n in _KEPT})

    def plain(self) -> dict[str, Any]:
        return {**{n: getattr(self, n) for n in _KEPT}, "spent": self.spent.plain()}


_KEPT = ("p", "token", "correct", "reason", "clean", "levels")


def _rows(
    model: Any, pieces: Any, what: Sweep, grid: Grid, videos: Videos, run: Run | None
) -> Iterator[_Row]:
    """The levels at every point for one piece after another; from the journal where they are, and then nothing is run."""
    case: _Case | None = None
    for n, todo, pathways in pieces:
        name = todo.key if what.executor == "fast" else f"{todo.key}|{name_of(pathways[0])}"
        if run is not None and run.done(name):
            yield _Row.read(todo.key, run.results()[name])
            continue
        calls, before = model.tower_calls, Ledger()
        if case is not None and case.todo is todo:
            before = case.engine.ledger
        else:
            if case is not None:
                case.engine.close()
            videos.look(n)
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


def _case(model: Any, n: int, todo: _Todo, what: Sweep, videos: Videos) -> _Case:
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
    return _Case(todo, engine, Gauge(what.metrics, ids, letters_of(model, todo.item) if model.tokenizer else (), engine.clean, what.per_token))  # fmt: skip


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
            held += 0 if id(cut) in masks else cut.numel()
            masks.add(id(cut))
        batch.append(point)
        if held > TOGETHER:
            yield batch
            batch, held, masks = [], 0, set()
    if batch:
        yield batch


def _row(case: _Case, levels: list[Any], what: Sweep, spent: Ledger) -> _Row:
    gauge, todo, clean = case.gauge, case.todo, case.engine.clean
    followed = todo.target if what.metrics[0] in OF_TARGET else None
    metric: Metric = "argmax" if followed is None else "target"
    p = Gauge((metric,), gauge.ids, gauge.letters, clean).levels(clean)[0]
    token = gauge.argmax if followed is None else followed.ids[0]
    return _Row(
        todo.key, p, token, _correct(todo, gauge), case.engine.reason, gauge.levels(clean), levels, spent
    )


def _correct(todo: _Todo, gauge: Gauge) -> bool | None:
    """Whether the clean run gives the right answer; None where that is not known."""
    item = todo.item
    if item is not None and gauge.letters and isinstance(item.answer, int):
        return gauge.choice == item.answer
    right = item is not None and todo.target is not None and todo.target.text == item.answer
    return gauge.foretold if right else None


# ---- the Result -----------------------------------------------------------------------------------------------------


def _result(model: Any, todo: Sequence[_Todo], rows: Sequence[_Row], what: Sweep, grid: Grid, recipe: Recipe | None) -> Result:  # fmt: skip
    keys = [t.key for t in todo]
    first = {row.key: row for row in reversed(rows)}
    parts = {k: [r for r in rows if r.key == k] for k in keys}
    axes: dict[str, list[Any]] = {
        "metric": list(what.metrics),
        "item": keys,
        "pathway": what.names,
        **grid.axes,
    }
    n_tokens = max((len(t.target.ids) if t.target else 0 for t in todo), default=0) if what.per_token else 0
    levels, clean = (np.full((len(what.metrics), len(keys), n, max(1, n_tokens)), np.nan) for n in (len(what.pathways) * grid.size, 1))  # fmt: skip
    for i, key in enumerate(keys):
        for m in range(len(what.metrics)):
            _fill(levels[m, i], [point for r in parts[key] for curve in r.levels[m] for point in curve])
            _fill(clean[m, i], [first[key].clean[m]])
    _warn_if_lost(clean, what)
    change = np.stack([changes(m, levels[j], clean[j]) for j, m in enumerate(what.metrics)])
    _warn_if_dead(change.reshape(len(what.metrics), len(keys), len(what.pathways), -1), clean, what, float(torch.finfo(model.dtype).eps))  # fmt: skip
    if n_tokens:
        axes["token"] = list(range(1, n_tokens + 1))
    values = change.reshape([len(c) for c in axes.values()])
    if len(what.metrics) == 1:
        values, axes = values[0], {a: c for a, c in axes.items() if a != "metric"}
    spent = sum((row.spent for row in rows), Ledger())
    return Result(
        values=values, axes=tuple(axes), coords=axes, unit=unit_of(what.metrics), recipe=recipe.plain() if recipe else {},
        name="attention knock-out", baseline=0.0, notes=_notes(model, todo, first, what, spent),
    )  # fmt: skip


def _fill(into: NDArray[Any], found: Sequence[Any]) -> None:
    """Levels (numbers, or one for each token, or None) into an array [point, token] of nan."""
    for row, level in zip(into, found, strict=True):
        if level is not None:
            each = level if isinstance(level, list) else [level]
            row[: len(each)] = each


def _notes(
    model: Any, todo: Sequence[_Todo], rows: Mapping[str, _Row], what: Sweep, spent: Ledger
) -> dict[str, Any]:
    reasons = sorted({r.reason for r in rows.values()} - {""})
    tasks = {t.key: t.item.task for t in todo if t.item is not None and t.item.task}
    targets = {t.key: list(t.target.pieces) for t in todo if t.target is not None and t.target.follows}
    return {
        "window": what.window, "style": what.style, "metric": what.metrics[0] if len(what.metrics) == 1 else list(what.metrics),
        "ledger": spent.plain(), "executor": what.executor, "fallbacks": reasons,
        "p_clean": {t.key: rows[t.key].p for t in todo}, "token": {t.key: _token(model, t, rows[t.key], what) for t in todo},
        "correct": {t.key: rows[t.key].correct for t in todo}, "groups": {"item": {t.key: _video(t) for t in todo}},
        "no_edges": [p.index + 1 for p in model.parts if p.attn is None],
        **({"units": {"metric": {m: UNITS[m] for m in what.metrics}}} if len(what.metrics) > 1 else {}),
        **({"task": tasks} if len(tasks) == len(todo) else {}), **({"target": targets} if targets else {}),
    }  # fmt: skip


def _token(model: Any, todo: _Todo, row: _Row, what: Sweep) -> str:
    if todo.target is not None and what.metrics[0] in OF_TARGET:
        return todo.target.text
    return model.tokenizer.decode([row.token]) if model.tokenizer is not None else str(row.token)


def _video(todo: _Todo) -> str:
    video = todo.item.video if todo.item is not None else None
    return video if isinstance(video, str) else pixels_id(todo.ready)


def _warn_if_lost(clean: NDArray[Any], what: Sweep) -> None:
    at = [i for i, m in enumerate(what.metrics) if m in RELATIVE]
    lost = (clean[at] == 0).any(axis=(0, 2, 3)) if at else np.zeros(clean.shape[1], bool)
    if lost.any():
        warnings.warn(
            f"{int(lost.sum())} of {len(lost)} items give the measured token probability 0 in the clean run: no change can "
            "be given in percent (nan); use metric='argmax'",
            LabWarning,
            stacklevel=5,
        )


def _warn_if_dead(change: NDArray[Any], clean: NDArray[Any], what: Sweep, eps: float) -> None:
    """An intervention that changes nothing at all is more often a mistake than a finding.

    Rows run again in other company differ from the clean run by rounding: that is nothing too. `change` is
    [metric, item, pathway, point].
    """
    m = next((i for i, name in enumerate(what.metrics) if name != "flip"), None)
    if m is None:
        return
    relative = what.metrics[m] in RELATIVE
    scale = 100.0 if relative else np.maximum(1.0, np.abs(np.nan_to_num(clean[m]))).max()
    slack = 0.0 if what.executor == "reference" else 64 * eps * scale
    for i, pathway in enumerate(what.pathways):
        known = change[m, :, i][np.isfinite(change[m, :, i])]
        if pathway != NOTHING and known.size and bool((np.abs(known) <= slack).all()):
            warnings.warn(
                f"cutting {name_of(pathway)!r} changed nothing in any window of any item",
                LabWarning,
                stacklevel=5,
            )


# ---- checks and names -----------------------------------------------------------------------------------------------


def _checked(
    model: Any, ready: Ready, item: VideoQA | None, text: str | None, what: Sweep, grid: Grid
) -> Target | None:
    """The item's target. Raises UsageError for what cannot be cut or measured: before hours of work."""
    target = _target(model, item, text, what.metrics)
    tokens = _with_response(map_of(ready), target)
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
    return target


def _target(model: Any, item: VideoQA | None, text: str | None, metrics: Sequence[str]) -> Target | None:
    """What follows the prompt or is read at its end. "answer" is the right answer, whatever the target."""
    if not any(m in OF_TARGET for m in metrics):
        return None
    if text is not None and "answer" in metrics:
        raise UsageError("'answer' measures the right answer, and target= another text; use 'target'")
    return target_of(model, item, text)


def _with_response(tokens: TokenMap, target: Target | None) -> TokenMap:
    return tokens if target is None or not target.follows else tokens.generated(target.ids, target.pieces)


def _keys(items: Sequence[VideoQA | None]) -> list[str]:
    names = [(i.id if i is not None else "") or f"item:{n}" for n, i in enumerate(items, 1)]
    return [name if names.count(name) == 1 else f"{name}#{n}" for n, name in enumerate(names, 1)]


def _named(recipe: Recipe | None) -> Recipe:
    if recipe is None:
        raise UsageError(
            "a journal needs items that can be named again: videos must be files, prepared by model.prepare"
        )
    return recipe


def _recipe(model: Any, ready: Sequence[Ready], what: Sweep) -> SweepJournal:
    asked = (what.pathways, what.window, what.style, what.metrics, what.heads, what.frame_pairs, what.target, what.per_token)  # fmt: skip
    return SweepJournal(
        model=model.cfg.model_name,
        dtype=str(model.dtype),
        items=tuple(_fingerprint(r) for r in ready),
        what=repr(asked),
    )


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
    item = ready.item
    if item is not None:  # what the answer is measured against
        seen.update(repr((item.id, item.options, item.answer)).encode())
    return seen.hexdigest()[:16]
