"""Rows of a sweep: what is to be measured of one item, what was, and the Result that all rows make together."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lab.carriers import TokenMap, VideoQA
from lab.edges.asked import Sweep
from lab.edges.grid import Grid
from lab.edges.metrics import OF_TARGET, RELATIVE, UNITS, changes, unit_of
from lab.edges.pathways import NOTHING, name_of
from lab.edges.reuse import pixels_id
from lab.edges.targets import Target
from lab.errors import LabWarning
from lab.model.ready import Ready
from lab.recipe import Recipe
from lab.result import Result
from lab.runs import Ledger


@dataclass(frozen=True)
class Todo:
    """One item to be measured: its name, its prompt, and the target that follows the prompt or ends it.

    prompt   the prompt's map as the decoder sees it, after the stages of its mechanisms
    calls    tower calls that it took to know this map
    """

    key: str
    ready: Ready
    prompt: TokenMap
    item: VideoQA | None
    target: Target | None
    calls: int = 0

    @property
    def tokens(self) -> TokenMap:
        """The map of what is run: the prompt, with the response after it if the target is a text."""
        return with_response_map(self.prompt, self.target)

    @property
    def read(self) -> list[int]:
        """Positions that foretell the target's tokens; without a target the prompt's last one."""
        last = len(self.prompt) - 1
        return list(range(last, last + len(self.target.ids if self.target else [0])))


@dataclass(frozen=True)
class Row:
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
    def read(cls, key: str, found: Any) -> Row:
        return cls(key, spent=Ledger(**found["spent"]), **{n: found[n] for n in _KEPT})

    def plain(self) -> dict[str, Any]:
        return {**{n: getattr(self, n) for n in _KEPT}, "spent": self.spent.plain()}


_KEPT = ("p", "token", "correct", "reason", "clean", "levels")


def with_response_map(tokens: TokenMap, target: Target | None) -> TokenMap:
    """The map of a prompt, with the response after it if the target is a text."""
    return tokens if target is None or not target.follows else tokens.generated(target.ids, target.pieces)


# ---- the Result -----------------------------------------------------------------------------------------------------


def result_of(model: Any, todo: Sequence[Todo], rows: Sequence[Row], what: Sweep, grid: Grid, recipe: Recipe | None) -> Result:  # fmt: skip
    """The Result of all rows; warns about pathways that changed nothing. recipe: what made it."""
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
    model: Any, todo: Sequence[Todo], rows: Mapping[str, Row], what: Sweep, spent: Ledger
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


def _token(model: Any, todo: Todo, row: Row, what: Sweep) -> str:
    if todo.target is not None and what.metrics[0] in OF_TARGET:
        return todo.target.text
    return model.tokenizer.decode([row.token]) if model.tokenizer is not None else str(row.token)


def _video(todo: Todo) -> str:
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
