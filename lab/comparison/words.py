"""A comparison in plain words, from its Results alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lab.result import Result

Results = Mapping[str, Result]
NOTEWORTHY = 0.5  # layers by which a centre must move to be called moved


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
    return f"{counts[0]} answers changed, {counts[1]} as written"


def _kept(r: Results, name: str) -> str:
    base = r["accuracy"].coords["variant"][0]
    ran = r["ran"].select(variant=name).mean("item").values
    whole = _mean(r["tokens"], base)
    read = _mean(r["tokens"], name)
    said = f"{100 * read / whole:.0f} % of the video tokens are read" if abs(read - whole) > 0.5 else ""
    thin = ran < read / whole - 0.01
    skip = f"{int(thin.sum())} layers run {100 * float(ran[thin].mean()):.0f} % of them" if thin.any() else ""
    return f"{'; '.join(s for s in (said, skip) if s)}." if said or skip else ""


def _apart(r: Results, name: str) -> str:
    mean = r["cosine"].select(variant=name).mean("item")
    last, video = (mean.select(group=g).values for g in ("last", "video"))
    kl = r["kl"].select(variant=name).mean("item").values
    end = f"the output differs by {kl[-1]:.3g} nats"
    if np.nanmin(mean.values) > 1 - 1e-6:
        return f"The residual stream is vanilla's; {end}."
    worst = int(np.nanargmin(last)) + 1
    said = f"The last token's stream keeps a cosine of at least {np.nanmin(last):.2f} with vanilla's (lowest in layer {worst})"
    return (
        f"{said}{f', the video tokens of {np.nanmin(video):.2f}' if np.isfinite(video).any() else ''}; {end}."
    )


def _looks(r: Results, name: str) -> str:
    """The pair whose attention changed most, averaged over layers."""
    mean = r["mass"].mean("item")
    base = mean.coords["variant"][0]
    change = _over_layers(mean.select(variant=name).values - mean.select(variant=base).values)
    if not np.isfinite(change).any() or np.nanmax(np.abs(change)) < 0.005:
        return ""
    at = int(np.nanargmax(np.abs(change)))
    pair = mean.coords["pair"][at]
    before = _over_layers(mean.select(variant=base).values)[at]
    keys, queries = pair.split("->")
    return f"Attention changes most from {queries} to {keys}: {100 * before:.0f} % before, {100 * (before + change[at]):.0f} % now (mean over layers)."


def _over_layers(x: Any) -> Any:
    known = np.isfinite(x)
    return np.where(known.any(-1), np.nansum(x, -1) / np.maximum(known.sum(-1), 1), np.nan)


def _moved(r: Results, name: str) -> str:
    if "centre" not in r:
        return ""
    base = r["accuracy"].coords["variant"][0]
    said: list[str] = []
    for pathway in r["centre"].coords["pathway"]:
        strength = [_strength(r, v, pathway) for v in (base, name)]
        if max(strength) < 1:
            continue
        before, now = (_mean(r["centre"].select(pathway=pathway), v) for v in (base, name))
        said.append(
            f"{pathway} {max(0, strength[0]):.0f} % to {max(0, strength[1]):.0f} %{_place(before, now)}"
        )
    return (
        f"Largest loss of the answer's probability when a pathway is cut: {'; '.join(said)}." if said else ""
    )


def _place(before: float, now: float) -> str:
    if not np.isfinite([before, now]).all():
        return ""
    if abs(now - before) < NOTEWORTHY:
        return f", centre stays near layer {now:.1f}"
    return f", centre from layer {before:.1f} to {now:.1f}"


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
