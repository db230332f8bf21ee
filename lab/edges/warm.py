"""Warm start: what first-order scores say about units, and the set they would cut (ratio-knapsack).

Scores are predictions (`lab.edges.scores`): they order trials and choose what is tried together. Nothing is cut on
their word alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lab.edges.units import Unit, reach
from lab.edges.validating import check_validated
from lab.errors import UsageError
from lab.model.ready import Ready
from lab.result import Result

MOST = 0.1  # predicted loss of margin, nats, that units of one layer may have to be tried together
AXES = ("item", "layer", "head", "query", "key")


@dataclass
class Predicted:
    """Predicted change of the metric by cutting, [item, layer, head, query, key], negative where it hurts."""

    values: NDArray[np.float64]
    layers: tuple[int, ...]  # 0-based
    queries: tuple[str, ...]
    keys: tuple[str, ...]

    def each(self, unit: Unit) -> NDArray[np.float64]:
        """Predicted loss of the metric per item, 0 where cutting would help; a unit's heads and cells add.

        Distances of frames are told apart where scores name frames one by one; else each has all of its cell's loss.
        """
        cells = [
            (i, j) for i, q in enumerate(self.queries) for j, k in enumerate(self.keys) if _holds(unit, q, k)
        ]
        if unit.layer not in self.layers or not cells:
            return np.zeros(len(self.values))
        at = self.values[:, self.layers.index(unit.layer)]
        at = at[:, list(unit.heads)] if unit.heads else at
        q, k = zip(*cells, strict=True)
        return np.maximum(0.0, -np.nan_to_num(at[:, :, list(q), list(k)]).sum((1, 2)))

    def loss(self, unit: Unit) -> float:
        """Mean over items."""
        return float(self.each(unit).mean())

    def knapsack(
        self, units: Sequence[Unit], weight: Callable[[Unit], float], most: float = MOST
    ) -> set[Unit]:
        """The heaviest set whose predicted loss, summed over its units and averaged over items, stays below `most`.

        Greedy by loss per weight: within one unit of the best set.
        """
        chosen: set[Unit] = set()
        total = np.zeros(len(self.values))
        for unit in sorted(units, key=lambda u: (self.loss(u) / max(weight(u), 1e-9), u)):
            if (total + self.each(unit)).mean() > most:
                break
            total += self.each(unit)
            chosen.add(unit)
        return chosen


def _holds(unit: Unit, query: str, key: str) -> bool:
    """Whether a cell of the scores is part of a unit."""
    if not _is(query, unit.q) or not _is(key, unit.k):
        return False
    ends = (query.partition(":")[2], key.partition(":")[2])
    gap = reach(unit.where)
    if gap is None or not all(ends):
        return True
    return gap[0] <= int(ends[0]) - int(ends[1]) <= (gap[1] if gap[1] is not None else np.inf)


def _is(name: str, segment: str) -> bool:
    """Whether a score's segment lies in a unit's."""
    base = name.partition(":")[0]
    return name == segment or base == segment or {"frame": "video"}.get(base) == segment


def predicted(scores: Result | None, readies: Sequence[Ready]) -> Predicted | None:
    """Scores as units ask them. Raises UsageError if they are no scores, are not validated, or are of other items."""
    if scores is None:
        return None
    axes = getattr(scores, "axes", None)
    if axes != AXES:
        raise UsageError(
            f"scores have axes {axes or type(scores).__name__}, expected {AXES}; use lab.edges.scores(model, items)"
        )
    check_validated(scores)
    _check_items(scores.coords["item"], readies)
    return told(scores)


def told(scores: Result) -> Predicted:
    """Scores as units ask them, whether or not they were validated."""
    layers = tuple(int(i) - 1 for i in scores.coords["layer"])
    names = (tuple(map(str, scores.coords[a])) for a in ("query", "key"))
    return Predicted(np.asarray(scores.values, dtype=float), layers, *names)


def _check_items(names: Iterable[object], readies: Sequence[Ready]) -> None:
    have, want = list(names), [r.item.id for r in readies if r.item is not None and r.item.id]
    other = [w for w in want if w not in have]
    if want and len(other) == len(want):
        raise UsageError(
            f"the scores are of other items ({have[:2]}...), none of the {len(want)} calibration items ({want[:2]}...)"
        )
