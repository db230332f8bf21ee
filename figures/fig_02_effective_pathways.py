"""Effective pathways: how few attention edges keep the answers, and what else keeps as many (the paper's table 3).

A policy is searched on some questions and measured on others, beside the paper's own policy, random edges, layers
shuffled, early exits, frame-local attention and the most attended edges. The table counts kept edges by the paper's rule
and those that can still reach the answer; the curve is the accuracy of every family at each share of edges kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from pydantic import Field

from figures.base import PictureRecipe, tall
from lab.recipe import ItemsSpec
from lab.result import Result
from lab.view.plates import FULL, Plate
from lab.view.specs import FigureSpec, figure_spec

HEAD = ("Policy", "Kept (%)", "Live (%)", "Accuracy (%)", "Drop (points) [95 %]", "Flips (%)", "KL (nats)")
MOST_CURVES = 7


class EffectivePathwaysRecipe(PictureRecipe):
    """items: to search on; holdout: to measure on. flips, kl: what the search may change; forwards: what it may cost."""

    holdout: ItemsSpec
    flips: float = Field(default=0.05, gt=0, le=1)
    kl: float = Field(default=0.05, gt=0)
    forwards: float = Field(default=30.0, gt=0)


def compute(recipe: EffectivePathwaysRecipe, *, progress: bool = True) -> list[Result]:
    """The evaluation, axes (policy, task, measure), and the step curves, axes (policy, kept)."""
    from probes.prune import BudgetSpec, PruneRecipe

    budget = BudgetSpec(flips=recipe.flips, kl=recipe.kl, forwards=recipe.forwards)
    asked = PruneRecipe(
        model=recipe.model, items=recipe.items, holdout=recipe.holdout, n_frames=recipe.n_frames, budget=budget,
        finer=("distance",),
    ).at(recipe.folder)  # fmt: skip
    found = asked.prune(progress=progress)
    assert found.evaluation is not None
    return [found.evaluation, found.pictures["curve"], found.pictures["units"]]


def draw(results: Sequence[Result]) -> Plate:
    """The table above; below it the curve and which pairs of segments the policy keeps, by layer."""
    told, curve, units = results
    n, videos = told.notes["n"]["item"], told.notes["videos"]
    kept = figure_spec(
        units.select(pathway=_largest(units)),
        kind="heat",
        limits=(0.0, 1.0),
        title="Edges the policy keeps",
        caption="",
    )
    return Plate(
        "Effective pathways: edges kept and answers kept", ((_table(told),), (_curve(told, curve), kept)),
        "The policy found by search, measured on held-out questions beside every baseline. Kept: share of all causal "
        "query-key pairs by the paper's rule; live: those that can still reach the answer. Drop of accuracy against the full model with "
        "its paired 95 % interval (videos resampled), flips of the chosen option, KL of the options' probabilities. The curve is the best "
        f"accuracy of each family that keeps at most so many pairs; its intervals are those of the table. n = {n} questions ({videos} videos), none used in the search.",
        width=FULL, heights=(0.42 + 0.165 * len(_rows(told)), 2.3), shares=((), (1.25, 1.0)),
    )  # fmt: skip


def _rows(told: Result) -> list[str]:
    """The policies of the table: ours, the full model, and of each family the one nearest to ours in edges kept."""
    names = told.coords["policy"]
    known = list(told.notes["families"])  # shuffled frames stand at the end and belong to none
    families = known + [str(n) for n in names[len(known) :]]
    mine = _of(told, "policy", "kept") if "policy" in names else 1.0
    best: dict[str, str] = {}
    for name, family in zip(names, families, strict=True):
        if name in ("full", "policy") or family in ("search", "full"):
            continue
        if family not in best or abs(_of(told, name, "kept") - mine) < abs(
            _of(told, best[family], "kept") - mine
        ):
            best[family] = name
    return [n for n in ("full", "policy") if n in names] + list(best.values())


def _of(told: Result, policy: str, measure: str) -> float:
    return float(told.select(policy=policy, task="all", measure=measure).values)


def _table(told: Result) -> FigureSpec:
    rows = tuple(_row(told, name) for name in _rows(told))
    return FigureSpec("table", "", "", columns=HEAD, rows=rows)


def _row(told: Result, name: str) -> tuple[str, ...]:
    drop = told.select(policy=name, task="all", measure="drop")
    known = drop.low is not None and drop.high is not None and np.isfinite(drop.low)
    bounds = f" [{100 * float(drop.low):+.1f}, {100 * float(drop.high):+.1f}]" if known else ""  # type: ignore[arg-type]
    numbers = {m: _of(told, name, m) for m in ("kept", "kept_live", "accuracy", "flips", "kl")}
    shown = (100 * numbers[m] for m in ("kept", "kept_live", "accuracy"))
    return (
        "Found by search" if name == "policy" else tall(name), *(f"{v:.1f}" if np.isfinite(v) else "-" for v in shown),
        f"{100 * float(drop.values):+.1f}{bounds}", f"{100 * numbers['flips']:.1f}", f"{numbers['kl']:.3f}",
    )  # fmt: skip


def _curve(told: Result, curve: Result) -> FigureSpec:
    names = list(curve.coords["policy"])[:MOST_CURVES]
    spec = figure_spec(
        curve.select(policy=names), kind="lines", title="Accuracy against edges kept", caption=""
    )
    return replace(
        spec, values=100 * spec.values, series=tuple(tall(n) for n in names), reference=100 * float(told.notes["full"]),
        x_label="Pairs kept, at most (% of all)", y_label="Accuracy (%)",
    )  # fmt: skip


def _largest(units: Result) -> list[Any]:
    """Pairs that keep most, at most 14, in their order."""
    total = units.values.sum(1)
    best = set(np.argsort(-total, kind="stable")[:14].tolist())
    return [p for i, p in enumerate(units.coords["pathway"]) if i in best]
