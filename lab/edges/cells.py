"""Cells: the sets of edges that a table of scores has a number for, drawn by strata, and the cuts they stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lab.edges.pairs import kind_of
from lab.result import Result

THIRDS = ("early", "middle", "late")


@dataclass(frozen=True)
class Cell:
    """The edges from one key segment to one query segment in a layer (0-based), in one head or (None) in all."""

    layer: int
    head: int | None
    query: str
    key: str

    @property
    def pair(self) -> str:
        """What kind of pair it is, as pathways are written: "frame->option"."""
        return f"{kind_of(self.key)}->{kind_of(self.query)}"

    def predicted(self, result: Result) -> NDArray[np.float64]:
        """The score for every item; all heads: their sum, as effects of heads add to first order."""
        q, k = (result.coords[a].index(n) for a, n in (("query", self.query), ("key", self.key)))
        values = result.values[:, self.layer, :, q, k]
        return values.sum(1) if self.head is None else values[:, self.head]


def thirds(layer: int, n_layers: int) -> str:
    """Which third of the model a layer (0-based) lies in."""
    return THIRDS[3 * layer // n_layers]


def sizes(result: Result, *, by_head: bool) -> NDArray[np.float64]:
    """Mean size of the scores over items: [layer, head, query, key], head 1 if summed; nan where nobody has the cell."""
    values = result.values if by_head else result.values.sum(2, keepdims=True)
    known = np.isfinite(values)
    total = np.abs(np.where(known, values, 0.0)).sum(0)
    return np.where(known.any(0), total / np.maximum(known.sum(0), 1), np.nan)


@dataclass(frozen=True)
class Sample:
    """Cells of one layer and one kind of pair that are cut together.

    grain  "single head", "all heads" (one cell), or "whole kind": all of its segments, e.g. every frame to every option
    size   mean size of the prediction over items
    """

    cells: tuple[Cell, ...]
    grain: str
    size: float

    @property
    def layer(self) -> int:
        return self.cells[0].layer

    @property
    def pair(self) -> str:
        return self.cells[0].pair

    def predicted(self, result: Result) -> NDArray[np.float64]:
        """The sum of the cells' scores, for every item; nan where the prompt has none of them."""
        each = np.stack([c.predicted(result) for c in self.cells])
        return np.where(np.isnan(each).all(0), np.nan, np.nansum(each, 0))


GRAINS = ("single head", "all heads", "whole kind")


def every_sample(result: Result, grain: str) -> list[Sample]:
    """All samples of a grain that somebody's prompt has and whose score is not 0 everywhere."""
    by_head = grain == "single head"
    size = sizes(result, by_head=by_head)
    found: list[Sample] = []
    for layer, head, q, k in np.argwhere(np.nan_to_num(size) > 0).tolist():
        names = result.coords["query"][q], result.coords["key"][k]
        cell = Cell(layer, head if by_head else None, *names)
        found.append(Sample((cell,), grain, float(size[layer, head, q, k])))
    return _by_kind(result, found) if grain == "whole kind" else found


def _by_kind(result: Result, found: Sequence[Sample]) -> list[Sample]:
    kinds: dict[tuple[int, str], list[Cell]] = {}
    for one in found:
        kinds.setdefault((one.layer, one.pair), []).extend(one.cells)
    made = [Sample(tuple(cells), "whole kind", 0.0) for cells in kinds.values()]
    return [replace(m, size=float(np.nanmean(np.abs(m.predicted(result))))) for m in made]


def drawn(samples: Sequence[Sample], n: int, n_layers: int, dice: np.random.Generator) -> list[Sample]:
    """n samples, or all: one from every stratum in turn. Strata: third of the model x kind of pair x decile of the size."""
    order = np.argsort(np.argsort([s.size for s in samples], kind="stable"), kind="stable")
    strata: dict[tuple[str, str, int], list[Sample]] = {}
    for i in dice.permutation(len(samples)).tolist():
        one = samples[i]
        decile = int(10 * order[i] // len(samples))
        strata.setdefault((thirds(one.layer, n_layers), one.pair, decile), []).append(one)
    turns = zip_longest(*strata.values())
    return [one for turn in turns for one in turn if one is not None][:n]


def cut_of(
    cells: Sequence[Cell], segments: Mapping[str, Tensor], n_pos: int, n_heads: int
) -> dict[int, Tensor]:
    """layer (0-based) -> removed edges: [q, k], or [head, q, k] where a cell names a head. Segments must be there."""
    out: dict[int, Tensor] = {}
    for layer in sorted({c.layer for c in cells}):
        mine = [c for c in cells if c.layer == layer]
        heads = 1 if all(c.head is None for c in mine) else n_heads
        cut = torch.zeros(heads, n_pos, n_pos, dtype=torch.bool)
        for c in mine:
            which = slice(None) if c.head is None else slice(c.head, c.head + 1)
            q, k = segments[c.query], segments[c.key]
            some = cut[which]
            some[:, q[:, None], k[None, :]] = True
            cut[which] = some
        cut &= torch.ones(n_pos, n_pos, dtype=torch.bool).tril()
        out[layer] = cut[0] if heads == 1 else cut
    return out
