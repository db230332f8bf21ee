"""What flows where: a Result over pairs of segments as links between them, layer group by layer group. Draws nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lab.errors import UsageError
from lab.result import Result
from lab.view.averages import mean_all
from lab.view.choices import PAIRS, pair_of

MOST_LINKS = 500
CROSS_FRAME = ("frame", "frame")  # (query, key) of the pathway "cross-frame"


@dataclass(frozen=True)
class Link:
    """From `key` (what is read) in front of layer group `group` (0-based) to `query` (who reads) behind it."""

    group: int
    query: str
    key: str
    value: float


def pair_table(result: Result) -> Result:
    """The Result as one with axes (layer, query, key): items, seeds and heads averaged, pathways taken apart.

    Pairs that the Result does not have are nan. Raises UsageError for a Result that says nothing about pairs and layers.
    """
    result = mean_all(result, ("head",))
    if set(result.axes) == {"layer", "query", "key"}:
        order = [result.axes.index(a) for a in ("layer", "query", "key")]
        return replace(result, values=result.values.transpose(order), axes=("layer", "query", "key"), low=None, high=None)  # fmt: skip
    pairs = next((a for a in PAIRS if a in result.axes), "")
    if set(result.axes) != {"layer", pairs}:
        raise UsageError(
            f"a flow needs the axes layer, query, key or layer, pathway; the result has {result.axes}"
        )
    return _taken_apart(result, pairs)


def merged(table: Result, *, frames: bool, options: bool) -> Result:
    """The table with all frames (options) as one segment each.

    Shares of attention (a Result with notes["n_rows"]) are summed over keys and averaged over the rows of the queries;
    anything else is summed over both.
    """
    names = {c: _kind(c, frames, options) for c in table.coords["key"]}
    rows = table.notes.get("n_rows")
    whole = list(dict.fromkeys(names.values()))
    to = np.array([[float(names[c] == w) for c in table.coords["key"]] for w in whole])  # [whole, part]
    weight = to * np.array([float(rows[c]) for c in table.coords["key"]]) if isinstance(rows, dict) else to
    weight = weight / weight.sum(1, keepdims=True) if isinstance(rows, dict) else weight
    known = np.isfinite(table.values)
    values = np.einsum("Qq,lqk,Kk->lQK", weight, np.where(known, table.values, 0.0), to)
    there = np.einsum("Qq,lqk,Kk->lQK", to, known.astype(float), to) > 0
    coords = {**table.coords, "query": whole, "key": whole}
    return replace(table, values=np.where(there, values, np.nan), coords=coords)


def grouped(table: Result, groups: int) -> Result:
    """Means over `groups` runs of neighbouring layers: the axis layer becomes "layers", its coordinates "1-3", ..."""
    layers = table.coords["layer"]
    parts = [p for p in np.array_split(np.arange(len(layers)), max(1, min(groups, len(layers)))) if len(p)]
    values = np.stack([_mean(table.values[p]) for p in parts])
    names = [f"{layers[p[0]]}-{layers[p[-1]]}" if len(p) > 1 else str(layers[p[0]]) for p in parts]
    coords = {"layers": names, "query": table.coords["query"], "key": table.coords["key"]}
    return replace(table, values=values, axes=("layers", "query", "key"), coords=coords)


def links(grouped_table: Result, *, threshold: float, within: bool) -> list[Link]:
    """The links at least `threshold` times as strong as the strongest, at most `MOST_LINKS`, strongest first.

    within  also from a segment to itself
    """
    queries, keys = (grouped_table.coords[a] for a in ("query", "key"))
    found = [
        Link(g, q, k, float(grouped_table.values[g, i, j]))
        for g in range(grouped_table.shape[0])
        for i, q in enumerate(queries)
        for j, k in enumerate(keys)
        if within or q != k
    ]
    found = [x for x in found if np.isfinite(x.value) and x.value != 0]
    top = max((abs(x.value) for x in found), default=0.0)
    kept = [x for x in found if abs(x.value) >= threshold * top]
    return sorted(kept, key=lambda x: -abs(x.value))[:MOST_LINKS]


def first_layer(table: Result, groups: int, group: int) -> int:
    """The first layer of a layer group (0-based)."""
    layers = table.coords["layer"]
    return int(np.array_split(np.array(layers), max(1, min(groups, len(layers))))[group][0])


def _taken_apart(result: Result, axis: str) -> Result:
    pairs = [CROSS_FRAME if c == "cross-frame" else pair_of(c) for c in result.coords[axis]]
    known = [p for p in pairs if p is not None]
    if not known:
        raise UsageError(
            f"none of {', '.join(map(str, result.coords[axis]))} is written keys->queries, so nothing flows"
        )
    names = list(dict.fromkeys(n for query, key in known for n in (key, query)))
    layers = result.coords["layer"]
    values = np.full((len(layers), len(names), len(names)), np.nan)
    rows = np.moveaxis(result.values.astype(float), result.axes.index(axis), 0)
    for pair, row in zip(pairs, rows, strict=True):
        if pair is not None:
            values[:, names.index(pair[0]), names.index(pair[1])] = row
    coords = {"layer": layers, "query": names, "key": names}
    return replace(result, values=values, axes=("layer", "query", "key"), coords=coords, low=None, high=None)


def _kind(name: str, frames: bool, options: bool) -> str:
    role = name.partition(":")[0]
    return role if (role == "frame" and frames) or (role == "option" and options) else name


def _mean(values: NDArray[Any]) -> NDArray[Any]:
    return np.ma.masked_invalid(values).mean(0).filled(np.nan)


def order_of(table: Result, shown: Sequence[Link]) -> list[str]:
    """The segments that take part, in the table's order."""
    used = {n for x in shown for n in (x.query, x.key)}
    return [n for n in dict.fromkeys([*table.coords["key"], *table.coords["query"]]) if n in used]
