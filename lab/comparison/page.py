"""The page of a comparison: which figures, in which order, on which shared scales.

Every variant stands beside its random control: in the next row of a map, or as the next picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lab.comparison.shifts import shift, written
from lab.result import Result
from lab.view.specs import FigureSpec, figure_spec

Results = Mapping[str, Result]
Shown = Result | FigureSpec
LEAST = 1e-4  # nats: smaller KL is drawn as this
DIM = 0.45  # of the frames' brightness: the scale of values rises from dark to bright
UNITS = {
    "FLOPs": (1e6, "MFLOPs"),
    "KV bytes": (1e3, "KV kB"),
    "seconds": (1e-3, "ms"),
    "peak bytes": (1e6, "peak MB"),
}


@dataclass(frozen=True)
class Part:
    """Figures of one kind, `across` of them side by side."""

    shown: Sequence[Shown]
    across: int = 1

    @property
    def lines(self) -> list[int]:
        """How many figures stand in each line."""
        whole, rest = divmod(len(self.shown), self.across)
        return [self.across] * whole + [rest] * bool(rest)


def parts_of(r: Results, frames: Any) -> list[Part]:
    """Everything that is shown: answers, costs, what is left, likeness, attention, knock-outs."""
    parts = [
        Part([r["accuracy"], _changed(r), *_costs(r)]), Part([*_left(r, frames), *_depth(r, frames), _ran(r)]),
        *(_alike(r)), Part([_lens(r)]), *_mass(r), *_knockouts(r),
    ]  # fmt: skip
    return [p for p in parts if p.shown]


def _wide(
    title: str, columns: Sequence[str], names: Sequence[str], cells: Sequence[Sequence[str]]
) -> FigureSpec:
    """A table: a row for every variant."""
    rows = tuple((n, *row) for n, row in zip(names, cells, strict=True))
    return FigureSpec("table", title, "a row a variant", columns=("Variant", *columns), rows=rows)


def _changed(r: Results) -> FigureSpec:
    shares = [r[n].mean("item").values for n in ("flips", "text_flips")]
    cells = [[f"{x:.4g}" for x in row] for row in np.stack(shares, 1).tolist()]
    return _wide("Share of questions answered otherwise than by vanilla", ("answer", "written answer"), _names(r), cells)  # fmt: skip


def _names(r: Results) -> list[str]:
    return r["accuracy"].coords["variant"]


def _costs(r: Results) -> list[Shown]:
    """In units that can be read, and in proportion; predicted and measured in one cell."""
    if "costs" not in r:
        return []
    asked = r["costs"].coords["quantity"]
    scales = np.array([UNITS[q][0] for q in asked])[:, None]
    units = [UNITS[q][1] for q in asked]
    how = "predicted / measured"
    return [
        _wide(f"{r['costs'].name} ({how})", units, _names(r), _both(r["costs"].values / scales)),
        _wide(f"{r['cost_ratios'].name} ({r['cost_ratios'].unit}, {how})", asked, _names(r), _both(r["cost_ratios"].values)),
    ]  # fmt: skip


def _both(values: NDArray[Any]) -> list[list[str]]:
    return [[" / ".join(f"{v:.3g}" for v in cell) for cell in row] for row in values.tolist()]


# ---- on the frames --------------------------------------------------------------------------------------------------


def _left(r: Results, frames: Any) -> list[FigureSpec]:
    """What is dropped on one scale; what is merged, whose patches have a small share each, on one of its own."""
    result = r["left"]
    pictures = {v: result.select(variant=v).values for v in _names(r)}
    merged = [v for v, p in pictures.items() if bool(((p > 0) & (p < 1)).any())]
    dropped = [v for v in _others(result, pictures) if v not in merged]
    top = max((float(pictures[v].max()) for v in merged), default=1.0)
    shown = [result.notes["vanilla"], *dropped]
    return _strips(result, shown, frames, (0.0, 1.0)) + _strips(result, merged, frames, (0.0, top))


def _depth(r: Results, frames: Any) -> list[FigureSpec]:
    """Where not every token that is there runs all layers; clear is the lowest depth there is among them."""
    result, left = r["depth"], r["left"]
    top = float(result.values.max())
    pictures = {v: result.select(variant=v).values for v in _names(r)}
    whole = [v for v, p in pictures.items() if np.array_equal(p, top * (left.select(variant=v).values > 0))]
    shown = [v for v in pictures if v not in whole]
    ends = [f(pictures[v]) for v in shown for f in (np.min, np.max)]
    return _strips(
        result, shown, frames, (min(ends), max(ends)) if ends and min(ends) < max(ends) else (0.0, top)
    )


def _others(result: Result, pictures: Mapping[str, NDArray[Any]]) -> list[str]:
    """Variants whose picture is not vanilla's."""
    base = pictures[result.notes["vanilla"]]
    return [v for v, p in pictures.items() if not np.array_equal(p, base)]


def _strips(
    result: Result, variants: Sequence[str], frames: Any, limits: tuple[float, float]
) -> list[FigureSpec]:
    fit = (DIM * frames).astype(np.uint8) if len(frames) == result.shape[1] else None
    return [
        figure_spec(
            result.select(variant=v), title=f"{result.name}, {v}: {result.unit}", frames=fit, limits=limits,
            caption="Of the first question; frames darkened.",
        )
        for v in variants
    ]  # fmt: skip


def _ran(r: Results) -> FigureSpec:
    return _heat(r["ran"].mean("item"), f"{r['ran'].name} ({r['ran'].unit})", (0.0, 1.0))


# ---- the stream -----------------------------------------------------------------------------------------------------


def _lens(r: Results) -> FigureSpec:
    """As powers of ten: the last layers' changes are a thousand times those of the first."""
    mean = r["kl"].mean("item")
    ends = [None if a is None else np.log10(np.maximum(a, LEAST)) for a in (mean.values, mean.low, mean.high)]
    floor = float(np.log10(LEAST))
    drawn = replace(mean, values=ends[0], low=ends[1], high=ends[2], unit="log10 of nats", baseline=floor)
    top = max(float(np.nanmax(drawn.values)), floor + 1)
    return _heat(drawn, f"{mean.name} (log10 of nats; {floor:.0f}: {LEAST:g} or less)", (floor, top))


def _alike(r: Results) -> list[Part]:
    """A map for each group of tokens, variants by layers; cosine beside CKA, each on one scale up to 1."""
    cosine, cka = (_maps(r, name) for name in ("cosine", "cka"))
    pairs = [Part([m, cka[group]], 2) for group, m in cosine.items() if group in cka]
    return [*pairs, *(Part([m]) for group, m in cosine.items() if group not in cka)]


def _maps(r: Results, name: str) -> dict[str, FigureSpec]:
    mean = r[name].mean("item")
    limits = (min(np.floor(float(np.nanmin(mean.values)) * 20) / 20, 0.95), 1.0)
    groups = [g for g in mean.coords["group"] if np.isfinite(mean.select(group=g).values).any()]
    return {
        g: _heat(mean.select(group=g), f"{r[name].name}; {g} tokens (1: the same)", limits) for g in groups
    }


def _heat(result: Result, title: str, limits: tuple[float, float]) -> FigureSpec:
    return figure_spec(result, kind="heat", title=title, limits=limits, diverging=False)


# ---- attention and knock-outs -----------------------------------------------------------------------------------------


def _mass(r: Results) -> list[Part]:
    """Vanilla's attention, and what each variant and its control change of it, on one scale."""
    mean, change = (x.mean("item") for x in (r["mass"], shift(r["mass"])))
    base, *others = mean.coords["variant"]
    first = _heat(mean.select(variant=base), f"{mean.name}, keys->queries: {base} (share of the queries' attention)", (0.0, 1.0))  # fmt: skip
    shifts = {v: replace(change.select(variant=v), unit="change of the share") for v in others}
    top = max((float(np.nanmax(np.abs(s.values))) for s in shifts.values()), default=0.0) or 1.0
    drawn = {
        v: figure_spec(s, title=f"Attention: {v} minus {base} (+: more)", kind="heat", limits=(-top, top), diverging=True)
        for v, s in shifts.items()
    }  # fmt: skip
    owner = mean.notes["controls"]
    pairs = [[v, *(c for c in others if owner.get(c) == v)] for v in others if v not in owner]
    return [Part([first]), *(Part([drawn[v] for v in pair], len(pair)) for pair in pairs)]


def _knockouts(r: Results) -> list[Part]:
    """Curves of every pathway, and beside them the same with the controls; all on one scale.

    The intervals of so many curves would hide them: they are in the tables below, and in the Result.
    """
    if "knockout" not in r:
        return []
    mean = replace(r["knockout"].mean("item"), low=None, high=None)
    ways = mean.coords["pathway"]
    known = np.append(mean.values[np.isfinite(mean.values)], 0.0)
    room = 0.05 * float(np.ptp(known)) or 1.0
    limits = (float(known.min()) - room, float(known.max()) + room)
    half = float(np.abs(known).max()) or 1.0
    names = [v for v in mean.coords["variant"] if v not in mean.notes["controls"]]
    drawn = [
        Part([
            figure_spec(mean.select(pathway=w, variant=names), kind="lines", title=_cut(w), limits=limits),
            figure_spec(mean.select(pathway=w), kind="heat", title=f"{w}, with controls (%; below 0: lost)", limits=(-half, half), diverging=True),
        ], 2)
        for w in ways
    ]  # fmt: skip
    return [
        *drawn,
        Part([_numbers(r[n], form, r["centre"]) for n, form in (("carried", ".0f"), ("centre", ".1f"))]),
    ]


def _cut(way: str) -> str:
    return f"Knock-out of {way} (% change in p; below 0: lost)"


def _numbers(result: Result, form: str, centres: Result) -> FigureSpec:
    """A table with intervals, and how far the variants are from vanilla; of pathways that are felt in some question."""
    mean, change = result.mean("item"), shift(result).mean("item")
    names, ways = mean.coords["variant"], mean.coords["pathway"]
    felt = [j for j in range(len(ways)) if np.isfinite(centres.values[..., j]).any()]
    cells = [
        [_cell(mean, change, (i, j), form, own=v == mean.notes["vanilla"]) for j in felt]
        for i, v in enumerate(names)
    ]
    heads = [ways[j].replace("->", "\n->") for j in felt]  # narrow
    said = "in the second line minus vanilla's, question by question; in brackets 95 % bootstrap intervals"
    return replace(_wide(f"{result.name}: {result.unit}", heads, names, cells), unit=said)


def _cell(mean: Result, change: Result, place: tuple[int, int], form: str, *, own: bool) -> str:
    """The mean of one variant and pathway: vanilla's with its interval, the others' with that of their change."""
    if own:
        return written(mean, place, form)
    return f"{written(replace(mean, low=None, high=None), place, form)}\n{written(change, place, f'+{form}')}"
