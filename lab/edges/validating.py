"""Validation: edge scores held against real cuts, before anything is cut by them (notes C8).

1 draw cells by strata (third of the model x kind of pair x decile of the predicted size): single heads, all heads, and
whole kinds of pairs   2 cut each of them for real, in every item, with the fast executor   3 correlations, signs, recall, calibration, by
stratum   4 windows of layers cut together against the sum of their parts: what first order cannot add up   5 random
subsets of what the scores call negligible, cut all at once: how much can have been missed (AtP*, arXiv 2403.00745)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import log, sqrt
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lab.edges.agreeing import agreement, recall
from lab.edges.cells import GRAINS, Cell, Sample, cut_of, drawn, every_sample, sizes, thirds
from lab.edges.fast import run_cut
from lab.edges.margins import Metric, margin_of
from lab.edges.pairs import segments_of
from lab.edges.passes import World
from lab.edges.policy import Policy
from lab.edges.scoring import AXES
from lab.edges.store import Store
from lab.edges.sweeping import _keys, as_ready, map_of
from lab.errors import UsageError
from lab.result import Result
from lab.runs import Cancel, Ledger, progress

CELLS = 120
NEEDED = 0.9  # recall@2k below which scores alone may not decide
WINDOW = 3
AT_ONCE = 32  # cut runs whose logits are held together
NEGLIGIBLE = 0.01  # the smallest scores that together make up this share of all predicted size


def validate_scores(
    model: Any, items: Any, result: Result, *, n: int = CELLS, subsets: int = 16, windows: int = 12, seed: int = 0,
    metric: Metric | None = None, n_frames: int = 8, cancel: Cancel | None = None, show_progress: bool = True,
) -> Result:  # fmt: skip
    """The same scores with a report in `notes["validation"]`, made by cutting edges for real.

    items     the items (or some of the items) that were scored, prepared in the same way
    n         cells: a third of them single heads, a third all heads, a third whole kinds (every frame to every option of a
              layer), predicted by the sum of scores; each is cut in every item
    subsets   random subsets of negligible cells, cut at once; windows: windows of 3 layers
    metric    only where the scores were made with a function as metric: that function

    The report: `overall`, `measurable` (without what is rounding noise on both sides), `means` (over items), `grains`
    (single head, all heads, whole kind), `layers`, `pairs` -> n, spearman, pearson, same_sign (of effects above `tau`), slope (1: calibrated),
    mean_size; `recall_at_2k`; `weak`: kinds of pairs with Spearman below 0.8 and why; `additivity`; `negligible`; `ledger`.
    Raises UsageError for scores of another kind, or items that are not those scored.
    """
    _check(result)
    if not all(type(x) is int for x in (n, subsets, windows)) or n < 2 or subsets < 0 or windows < 0:
        raise UsageError(
            f"n must be at least 2 cells, subsets and windows at least 0; got {n}, {subsets}, {windows}"
        )
    dice = np.random.default_rng(seed)
    cases = _cases(model, items, result, metric, n_frames)
    cells = _chosen(result, n, dice)
    groups = _windows(result, windows)
    negligible = _negligible(result, cases[0].world.segments)
    draws = [
        [c for c, hit in zip(negligible, dice.random(len(negligible)) < 0.5, strict=True) if hit]
        for _ in range(subsets)
    ]
    asked = _Asked(
        [list(c.cells) for c in cells], [w for group in groups for w in group.sets], [d for d in draws if d]
    )
    found = [
        _measured(model, case, asked, place, len(cases))
        for place, case in enumerate(progress(cases, desc="validation", show=show_progress, cancel=cancel))
    ]
    report = _report(model, result, cells, groups, asked, cases, found)
    report |= {"seed": seed, "negligible": _bound(negligible, asked, found)}
    return replace(result, notes={**result.notes, "validation": report})


def check_validated(result: Result, *, alone: bool = False) -> None:
    """Raises UsageError for scores that were never held against real cuts.

    alone  the scores are to decide by themselves, with no cut verified: recall@2k must reach 0.9 then
    """
    if not isinstance(result, Result):
        raise UsageError(f"expected the Result of lab.edges.scores, got {type(result).__name__}")
    report = result.notes.get("validation")
    if not isinstance(report, dict) or "overall" not in report:
        raise UsageError(
            f"{result.name or 'these scores'}: not validated; nothing is pruned by predictions nobody has checked. Run "
            "scores = lab.edges.validate_scores(model, items, scores) first"
        )
    found = report.get("recall_at_2k")
    if alone and (found is None or found < NEEDED):
        raise UsageError(
            f"the scores found {'none' if found is None else f'{found:.0%}'} of the largest effects among their first 2k, "
            f"{NEEDED:.0%} are needed to cut by scores alone; verify every cut (search does), or score along a path"
        )


def _check(result: Result) -> None:
    if not isinstance(result, Result):
        raise UsageError(f"expected the Result of lab.edges.scores, got {type(result).__name__}")
    if tuple(result.axes) != AXES:
        raise UsageError(f"expected the scores of lab.edges.scores with axes {AXES}, got {result.axes}")


# ---- what is cut ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Window:
    """One kind of pair in neighbouring layers: the cells of all layers together, then layer by layer."""

    pair: str
    sets: list[list[Cell]]


@dataclass(frozen=True)
class _Asked:
    """Sets of cells to cut: cells one by one, windows, random subsets."""

    single: list[list[Cell]]
    windows: list[list[Cell]]
    subsets: list[list[Cell]]


def _chosen(result: Result, n: int, dice: np.random.Generator) -> list[Sample]:
    n_layers = len(result.coords["layer"])
    share = -(-n // len(GRAINS))
    out = [s for grain in GRAINS for s in drawn(every_sample(result, grain), share, n_layers, dice)]
    if not out:
        raise UsageError("every score is 0: there is nothing to hold against real cuts")
    return out


def _windows(result: Result, n: int) -> list[_Window]:
    """Windows of 3 layers (all heads) of the whole kinds of pairs with the largest scores."""
    known = {(s.pair, s.layer): s for s in every_sample(result, "whole kind")}
    starts = range(max(1, len(result.coords["layer"]) - WINDOW + 1))
    total: dict[tuple[str, int], float] = {}
    for (pair, layer), one in known.items():
        for first in (f for f in starts if f <= layer < f + WINDOW):
            total[pair, first] = total.get((pair, first), 0.0) + one.size
    best = sorted(total, key=lambda key: -total[key])[:n]
    return [_window(pair, [known.get((pair, first + i)) for i in range(WINDOW)]) for pair, first in best]


def _window(pair: str, layers: Sequence[Sample | None]) -> _Window:
    some = [list(s.cells) for s in layers if s is not None]
    return _Window(pair, [[c for cells in some for c in cells], *some])


def _negligible(result: Result, segments: dict[str, Tensor]) -> list[Cell]:
    """The cells (single heads) with the smallest scores, those of score 0 included, 1 % of the predicted size in all.

    segments  of the first prompt: they say between which of them there are edges
    """
    q, k = result.coords["query"], result.coords["key"]
    here = [[a in segments and b in segments and _reads(segments[a], segments[b]) for b in k] for a in q]
    size = sizes(result, by_head=True)
    known = np.argwhere(np.isfinite(size) & np.array(here))
    value = size[tuple(known.T)]
    order = np.argsort(value, kind="stable")
    small = order[value[order].cumsum() <= NEGLIGIBLE * value.sum()]
    return [Cell(a, h, q[i], k[j]) for a, h, i, j in known[small].tolist()]


def _reads(queries: Tensor, keys: Tensor) -> bool:
    return int(keys[0]) <= int(queries[-1])


# ---- one item -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Case:
    """One scored item: where it stands among the scores, its prompt, the edges that are cut already, and the metric with
    its value when it was scored."""

    index: int
    world: World
    base: dict[int, Tensor]
    metric: Metric
    clean: float


@dataclass(frozen=True)
class _Exact:
    """Measured changes of the metric for the sets asked; nan where the prompt lacks a segment.

    before  the metric with nothing more cut; flips: subsets that changed the choice. Subsets are shared out over the items
    """

    before: float
    single: list[float]
    windows: list[float]
    subsets: dict[int, float]
    flips: dict[int, bool]
    ledger: Ledger


def _cases(model: Any, items: Any, result: Result, metric: Metric | None, n_frames: int) -> list[_Case]:
    ready = as_ready(model, items, None, n_frames)
    metric = _metric(result, metric)
    policy = Policy.from_dict(result.notes["policy"]) if result.notes.get("policy") else None
    grid = _grid(result)
    out: list[_Case] = []
    for key, r in zip(_keys([r.item for r in ready]), ready, strict=True):
        if key not in result.coords["item"]:
            raise UsageError(f"{key!r} is none of the {len(result.coords['item'])} items that were scored")
        tokens = map_of(r)
        base = {} if policy is None else policy.masks(tokens, model.cfg.n_layers, model.cfg.n_heads, r.item)
        world = World(key, r, tokens, r.item, segments_of(tokens, grid, r.item))
        clean = float(result.notes["clean"][key])
        out.append(_Case(result.coords["item"].index(key), world, base, metric, clean))
    return out


def _metric(result: Result, given: Metric | None) -> Metric:
    said = result.notes.get("metric")
    if given is None and said not in ("margin", "margin-right"):
        raise UsageError("the scores were made with a function as metric; give the same one as metric=")
    return given if given is not None else str(said)


def _grid(result: Result) -> Any:
    return result.notes.get("segmentation", "strict")


def _measured(model: Any, case: _Case, asked: _Asked, place: int, n: int) -> _Exact:
    """Cut everything asked in one item; its share of the subsets."""
    world = case.world
    store = Store.of(model, world.ready)
    clean = store.clean(model)[-1]
    metric, _ = margin_of(model, case.metric, world.item, clean)
    mine = [i for i in range(len(asked.subsets)) if i % n == place]
    sets = [*asked.single, *asked.windows, *(asked.subsets[i] for i in mine)]
    before, *after = _logit_values(model, store, case, sets, metric)
    _same_prompt(case, before)
    value = [a - before for a in after]
    at = len(asked.single), len(asked.single) + len(asked.windows)
    last = dict(zip(mine, value[at[1] :], strict=True))
    flips = {i: before + change < 0 <= before for i, change in last.items()}
    return _Exact(before, value[: at[0]], value[at[0] : at[1]], last, flips, store.ledger)


def _same_prompt(case: _Case, before: float) -> None:
    """Raises UsageError if the prompt's clean metric is not the one the scores were made at."""
    if abs(before - case.clean) > 0.02 * max(1.0, abs(case.clean)):
        raise UsageError(
            f"{case.world.key}: the clean metric is {before:.4g}, the scores were made at {case.clean:.4g}: other weights, "
            "other frames (n_frames), or another item; score these again"
        )


def _logit_values(
    model: Any, store: Store, case: _Case, sets: Sequence[Sequence[Cell]], metric: Callable[[Tensor], Tensor]
) -> Iterator[float]:
    """The metric with nothing more cut than the base, then for every set; nan where none of its segments is there."""
    segments, n_heads = case.world.segments, model.cfg.n_heads
    here = [[c for c in cells if c.query in segments and c.key in segments] for cells in [[], *sets]]
    for start in range(0, len(here), AT_ONCE):
        some = here[start : start + AT_ONCE]
        cuts = [_with(case.base, cut_of(cells, segments, store.n_pos, n_heads)) for cells in some]
        logits = run_cut(model, store, cuts)[:, -1]
        for i, cells in enumerate(some):
            missing = not cells and start + i > 0
            yield float("nan") if missing else float(metric(logits[i]))


def _with(base: Mapping[int, Any], more: dict[int, Tensor]) -> dict[int, Tensor]:
    """Both sets of cuts: [q, k], or [head, q, k] where one of them has heads."""
    out = dict(base)
    for layer, cut in more.items():
        out[layer] = cut if layer not in out else out[layer] | cut
    return out


# ---- the report -----------------------------------------------------------------------------------------------------


def _report(
    model: Any, result: Result, cells: list[Sample], groups: list[_Window], asked: _Asked, cases: list[_Case],
    found: list[_Exact],
) -> dict[str, Any]:  # fmt: skip
    rows = [c.index for c in cases]
    predicted = np.stack([c.predicted(result)[rows] for c in cells], 1)  # [item, cell]
    exact = np.array([f.single for f in found])
    tau = 0.01 * float(np.nanmax(np.abs(exact)))
    n_layers = len(result.coords["layer"])

    def of(names: Sequence[str]) -> dict[str, Any]:
        at = {name: [m == name for m in names] for name in dict.fromkeys(names)}
        return {n: agreement(predicted[:, i].ravel(), exact[:, i].ravel(), tau) for n, i in at.items()}

    pairs = of([c.pair for c in cells])
    k = max(1, len(cells) // 10)
    noise = 64 * float(torch.finfo(model.dtype).eps) * max(1.0, *(abs(f.before) for f in found))
    heard = np.fmax(np.abs(predicted), np.abs(exact)) > noise
    return {
        "n_cells": len(cells), "n_items": len(cases), "tau": tau, "noise": noise,
        "measurable": agreement(predicted[heard], exact[heard], tau),
        "overall": agreement(predicted.ravel(), exact.ravel(), tau),
        "means": agreement(np.nanmean(predicted, 0), np.nanmean(exact, 0), tau),
        "grains": of([c.grain for c in cells]),
        "layers": of([thirds(c.layer, n_layers) for c in cells]), "pairs": pairs,
        "k": k, "recall_at_2k": recall(np.nanmean(np.abs(predicted), 0), np.nanmean(np.abs(exact), 0), k),
        "weak": _weak(pairs, tau, noise), "additivity": _additivity(result, groups, rows, found),
        "ledger": sum((f.ledger for f in found), Ledger()).plain(),
    }  # fmt: skip


def _weak(pairs: dict[str, Any], tau: float, noise: float) -> list[dict[str, Any]]:
    """Kinds of pairs whose Spearman is below 0.8, largest effects first."""
    out: list[dict[str, Any]] = []
    for pair, a in sorted(pairs.items(), key=lambda p: -(p[1]["mean_size"] or 0.0)):
        if a["spearman"] is None or a["spearman"] >= 0.8:
            continue
        why = (
            "effects are rounding noise" if a["mean_size"] < noise
            else "effects are below 1 % of the largest one" if a["mean_size"] < tau
            else "few measurements" if a["n"] < 10
            else "signs differ: later layers undo or reverse it" if (a["same_sign"] or 0.0) < 0.8
            else "sizes are mis-ranked: large cuts leave the linear range"
        )  # fmt: skip
        out.append(
            {"pair": pair, "spearman": a["spearman"], "mean_size": a["mean_size"], "n": a["n"], "why": why}
        )
    return out


def _additivity(
    result: Result, groups: list[_Window], rows: list[int], found: list[_Exact]
) -> dict[str, Any]:
    """Windows of layers: cut together, against the sum of single layers cut for real, and against the sum of scores."""
    joint: list[float] = []
    single: list[float] = []
    scored: list[float] = []
    by_pair: dict[str, list[float]] = {}
    at = 0
    for w in groups:
        for f, row in zip(found, rows, strict=True):
            whole, *parts = f.windows[at : at + len(w.sets)]
            joint.append(whole)
            single.append(float(np.nansum(parts)))
            scored.append(float(np.nansum([c.predicted(result)[row] for c in w.sets[0]])))
            by_pair.setdefault(w.pair, []).append(whole - single[-1])
        at += len(w.sets)
    a, b, c = (np.array(x) for x in (joint, single, scored))
    known = np.isfinite(a)
    if not known.any():
        return {"windows": 0, "layers": WINDOW}
    size = float(np.abs(a[known]).mean())
    return {
        "windows": len(groups), "layers": WINDOW, "mean_size": size,
        "gap": float(np.abs(a - b)[known].mean()) / size if size else None,
        "gap_of_scores": float(np.abs(a - c)[known].mean()) / size if size else None,
        "scores": agreement(c, a, 0.0), "singles": agreement(b, a, 0.0),
        "joint_less_sum": {p: float(np.nanmean(v)) for p, v in by_pair.items()},
    }  # fmt: skip


def _bound(cells: list[Cell], asked: _Asked, found: list[_Exact]) -> dict[str, Any]:
    """What cutting random halves of the negligible cells did.

    unseen  with 95 % confidence, at most this share of such subsets has a larger effect than the largest one seen
            (1 - 0.05^(1/n)); flips_below: one-sided Hoeffding bound on the share that changes the choice
    """
    changes: NDArray[Any] = np.abs([c for f in found for c in f.subsets.values()])
    flips = [x for f in found for x in f.flips.values()]
    out: dict[str, Any] = {"cells": len(cells), "subsets": len(changes), "share": NEGLIGIBLE}
    if not len(changes):
        return out
    n = len(changes)
    return out | {
        "largest": float(changes.max()), "mean": float(changes.mean()), "unseen": 1 - 0.05 ** (1 / n),
        "flips": float(np.mean(flips)), "flips_below": min(1.0, float(np.mean(flips)) + sqrt(log(20) / (2 * n))),
    }  # fmt: skip
