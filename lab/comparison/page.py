"""The page of a comparison: which figures, in which order, on which shared scales."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lab.result import Result
from lab.view.specs import FigureSpec, figure_spec

Results = Mapping[str, Result]
Shown = Result | FigureSpec


def shown_of(r: Results, frames: Any) -> list[Shown]:
    """Everything that is shown: answers, costs, what is left, likeness, attention, knock-outs."""
    parts: list[Sequence[Shown]] = [
        [r["accuracy"]], [_changed(r)], _costs(r), _strips(r, "left", frames, 1.0),
        _strips(r, "depth", frames, float(r["depth"].values.max())), [_ran(r)], _alike(r, "cosine"), _alike(r, "cka"), [_lens(r)],
        _mass(r), _knockouts(r),
    ]  # fmt: skip
    return [one for part in parts for one in part]


def _wide(title: str, columns: Sequence[str], names: Sequence[str], values: NDArray[Any]) -> FigureSpec:
    """A table: a row for every variant."""
    rows = tuple((n, *(f"{v:.4g}" for v in row)) for n, row in zip(names, values.tolist(), strict=True))
    return FigureSpec("table", title, "a row a variant", columns=("Variant", *columns), rows=rows)


def _changed(r: Results) -> FigureSpec:
    shares = np.stack([r[n].mean("item").values for n in ("flips", "text_flips")], 1)
    return _wide("Share of questions answered otherwise than by vanilla", ("answer", "written answer"), _names(r), shares)  # fmt: skip


def _names(r: Results) -> list[str]:
    return r["accuracy"].coords["variant"]


def _costs(r: Results) -> list[Shown]:
    return [
        _wide(
            f"{r[name].name} ({r[name].unit})",
            [f"{q}, {s}" for q in r[name].coords["quantity"] for s in r[name].coords["source"]],
            _names(r),
            r[name].values.reshape(len(_names(r)), -1),
        )
        for name in ("costs", "cost_ratios")
        if name in r
    ]


def _strips(r: Results, name: str, frames: Any, top: float) -> list[FigureSpec]:
    """Painted on the frames: vanilla, and every variant whose picture is another."""
    result = r[name]
    fit = frames if len(frames) == result.shape[1] else None
    first, *others = _names(r)
    base = result.select(variant=first).values
    differ = [v for v in others if not np.array_equal(result.select(variant=v).values, base)]
    return [
        figure_spec(result.select(variant=v), title=f"{result.name}: {v} ({result.unit})", frames=fit, limits=(0.0, top))
        for v in (first, *differ)
    ]  # fmt: skip


def _ran(r: Results) -> FigureSpec:
    return _heat(r["ran"].mean("item"), f"{r['ran'].name} ({r['ran'].unit})", (0.0, 1.0))


def _lens(r: Results) -> FigureSpec:
    return figure_spec(r["kl"].mean("item"), kind="heat", title=f"{r['kl'].name} (nats; 0: the same)")


def _alike(r: Results, name: str) -> list[FigureSpec]:
    """A map for each group of tokens, variants by layers, all on one scale up to 1."""
    mean = r[name].mean("item")
    low = float(np.nanmin(mean.values))
    limits = (min(np.floor(low * 20) / 20, 0.95), 1.0)
    groups = [g for g in mean.coords["group"] if np.isfinite(mean.select(group=g).values).any()]
    return [_heat(mean.select(group=g), f"{r[name].name}; {g} tokens (1: the same)", limits) for g in groups]


def _heat(result: Result, title: str, limits: tuple[float, float]) -> FigureSpec:
    return figure_spec(result, kind="heat", title=title, limits=limits, diverging=False)


def _mass(r: Results) -> list[FigureSpec]:
    """Vanilla's attention, and what each variant changes of it, on one scale."""
    mean = r["mass"].mean("item")
    base, *others = mean.coords["variant"]
    before = mean.select(variant=base)
    parts = {v: mean.select(variant=v) for v in others if v not in mean.notes["controls"]}
    shifts = {v: replace(p, values=p.values - before.values, low=None, high=None, unit="change of the share", baseline=0.0) for v, p in parts.items()}  # fmt: skip
    top = max((float(np.nanmax(np.abs(s.values))) for s in shifts.values()), default=0.0) or 1.0
    first = _heat(before, f"{mean.name}, keys->queries: {base} (share of the queries' attention)", (0.0, 1.0))
    changed = [
        figure_spec(s, title=f"Attention: {v} minus {base} (above 0: more than before)", kind="heat", limits=(-top, top), diverging=True)
        for v, s in shifts.items()
    ]  # fmt: skip
    return [first, *changed]


def _knockouts(r: Results) -> list[Shown]:
    """Curves of every pathway on one scale; the intervals of so many curves would hide them and are in the Result."""
    if "knockout" not in r:
        return []
    mean = r["knockout"].mean("item")
    mean = replace(mean, low=None, high=None)
    shown = [v for v in mean.coords["variant"] if v not in mean.notes["controls"]]
    parts = [mean.select(pathway=p, variant=shown) for p in mean.coords["pathway"]]
    known = np.concatenate([p.values[np.isfinite(p.values)] for p in parts] + [np.zeros(1)])
    room = 0.05 * float(np.ptp(known)) or 1.0
    limits = (float(known.min()) - room, float(known.max()) + room)
    curves = [
        figure_spec(p, kind="lines", title=f"Knock-out of {way} ({r['knockout'].unit}; below 0: lost)", limits=limits)
        for way, p in zip(mean.coords["pathway"], parts, strict=True)
    ]  # fmt: skip
    centres = r["centre"].mean("item")
    title = f"{centres.name}: {centres.unit}"
    return [*curves, _wide(title, centres.coords["pathway"], centres.coords["variant"], centres.values)]
