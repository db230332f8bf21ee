"""A comparison in plain words, from its Results alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from lab.comparison.shifts import moved, number, shift, written
from lab.result import Result

Results = Mapping[str, Result]


def sentences(results: Results) -> list[str]:
    """A paragraph on vanilla, then one on each variant that is no control."""
    accuracy = results["accuracy"]
    controls = accuracy.notes["controls"]
    names = [v for v in accuracy.coords["variant"] if v not in controls]
    return [_vanilla(results), *(_variant(results, n, controls) for n in names[1:])]


def _vanilla(r: Results) -> str:
    name = r["accuracy"].coords["variant"][0]
    n = len(r["correct"].coords["item"])
    said = f"{n} question{'s' * (n != 1)}. {name} answers {_accuracy(r, name)}, reading {_mean(r['tokens'], name):.0f} video tokens."
    flow = _strongest(r, name)
    return f"{said} {flow}"


def _variant(r: Results, name: str, controls: Mapping[str, str]) -> str:
    parts = [f"{name}: {_accuracy(r, name)}; {_flips(r, name)}.", _kept(r, name), _apart(r, name), _looks(r, name), _moved(r, name)]  # fmt: skip
    control = next((c for c, of in controls.items() if of == name), None)
    if control:
        parts.append(
            f"With random choices of the same budget: {_accuracy(r, control)}; {_flips(r, control)}."
        )
    return " ".join(p for p in parts if p)


def _accuracy(r: Results, name: str) -> str:
    one = r["accuracy"].select(variant=name)
    if not np.isfinite(one.values):
        return "no known right answers"
    low, high = (100 * float(x) for x in (one.low, one.high) if x is not None)
    return f"{100 * float(one.values):.0f} % right [{low:.0f}, {high:.0f}]"


def _flips(r: Results, name: str) -> str:
    counts = [int(np.nansum(r[k].select(variant=name).values)) for k in ("flips", "text_flips")]
    return f"{counts[0]} answer{'s' * (counts[0] != 1)} changed, {counts[1]} as written"


def _kept(r: Results, name: str) -> str:
    base = r["accuracy"].coords["variant"][0]
    ran = r["ran"].select(variant=name).mean("item").values
    whole = _mean(r["tokens"], base)
    read = _mean(r["tokens"], name)
    said = f"{100 * read / whole:.0f} % of the video tokens are read" if abs(read - whole) > 0.5 else ""
    thin = ran < read / whole - 0.01
    skip = (
        f"{int(thin.sum())} layers run {100 * float(ran[thin].mean()):.0f} % of vanilla's video tokens"
        if thin.any()
        else ""
    )
    return f"{'; '.join(s for s in (said, skip) if s)}." if said or skip else ""


def _apart(r: Results, name: str) -> str:
    mean = r["cosine"].select(variant=name).mean("item")
    last, video = (mean.select(group=g).values for g in ("last", "video"))
    end = f"the output differs by {written(r['kl'].select(variant=name).mean('item'), -1, '.3g')} nats"
    if np.nanmin(mean.values) > 1 - 1e-6:
        return f"The residual stream is vanilla's; {end}."
    worst = int(np.nanargmin(last)) + 1
    said = f"The last token's stream keeps a cosine of at least {np.nanmin(last):.2f} with vanilla's (lowest in layer {worst})"
    return (
        f"{said}{f', the video tokens of {np.nanmin(video):.2f}' if np.isfinite(video).any() else ''}; {end}."
    )


def _looks(r: Results, name: str) -> str:
    """The pair whose attention changed most, averaged over layers."""
    share = _over_layers(r["mass"])
    change = shift(share).select(variant=name).mean("item")
    if not np.isfinite(change.values).any() or np.nanmax(np.abs(change.values)) < 0.5:
        return ""
    at = int(np.nanargmax(np.abs(change.values)))
    keys, queries = change.coords["pair"][at].split("->")
    before = share.select(variant=share.notes["vanilla"]).mean("item").values[at]
    return f"Attention changes most from {queries} to {keys}: {before:.0f} % before, {written(change, at, '+.0f')} points now (mean over layers)."  # fmt: skip


def _over_layers(r: Result) -> Result:
    """Percent, mean over the last axis, layers where it is not known left out."""
    known = np.isfinite(r.values)
    mean = np.where(known.any(-1), np.nansum(r.values, -1) / np.maximum(known.sum(-1), 1), np.nan)
    coords = {a: r.coords[a] for a in r.axes[:-1]}
    return replace(r, values=100 * mean, axes=r.axes[:-1], coords=coords, low=None, high=None)


def _moved(r: Results, name: str) -> str:
    if "carried" not in r:
        return ""
    now, change = (x.select(variant=name).mean("item") for x in (r["carried"], shift(r["carried"])))
    place = r["centre"].select(variant=r["centre"].notes["vanilla"]).mean("item").values
    to = shift(r["centre"]).select(variant=name).mean("item")
    said = [
        f"{way} {number(now.values[i], '.0f')} % ({written(change, i, '+.1f')}){_place(float(place[i]), to, i)}"
        for i, way in enumerate(now.coords["pathway"])
        if np.isfinite(change.values[i]) and abs(now.values[i]) + abs(now.values[i] - change.values[i]) > 1
    ]
    intro = "Change of the answer's probability when a pathway is cut, mean over layers (in brackets minus vanilla's, 95 % interval)"
    return f"{intro}: {'; '.join(said)}." if said else ""


def _place(before: float, change: Result, at: int) -> str:
    if not np.isfinite(change.values[at]):
        return ""
    if moved(change, at):
        return f", centre moved from layer {before:.1f} by {written(change, at, '+.1f')}"
    return f", centre stays near layer {before:.1f}"


def _strength(r: Results, name: str, pathway: str) -> float:
    """The largest fall, of the mean curve, in percent."""
    curve = r["knockout"].select(variant=name, pathway=pathway).mean("item").values
    return float(-np.nanmin(curve)) if np.isfinite(curve).any() else 0.0


def _strongest(r: Results, name: str) -> str:
    if "knockout" not in r:
        return ""
    ways = r["knockout"].coords["pathway"]
    falls = [_strength(r, name, p) for p in ways]
    at = int(np.argmax(falls))
    return f"Its answers hang most on {ways[at]}: cut, their probability falls by up to {falls[at]:.0f} %."


def _mean(result: Result, variant: str) -> float:
    values = result.select(variant=variant).values.astype(float)
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")
