"""Tally: listens to the backward pass of one prompt and adds up scores by segment.

What it hears (`lab.edges.tapping.Seen`) is one block of rows of one layer; it keeps sums over the rows of each query
segment, or over each named unit, and lets the block go.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from lab.edges.binding import Bound
from lab.edges.cuts import Cut
from lab.edges.formulas import NEG, RowStats, shares
from lab.edges.tapping import Seen


class Tally(Protocol):
    """A listener with a result. `weight` is how much the current pass counts; `open` the gate on the path."""

    sums: dict[str, Tensor]
    weight: float
    open: float

    def __call__(self, seen: Seen) -> None: ...


def part_stats(scores: Tensor, worth: Tensor, parts: Sequence[Tensor]) -> RowStats:
    """[head, row, part] of [head, row, key]. A part is a set of positions, ascending; those beyond the keys are left out."""
    lse, mean = [], []
    for positions in parts:
        inside = positions[: int((positions < scores.shape[-1]).sum())].to(scores.device)
        some = scores[..., _index(inside)]
        if not some.shape[-1]:
            lse.append(torch.full_like(scores[..., 0], NEG))
            mean.append(torch.zeros_like(lse[-1]))
            continue
        lse.append(some.logsumexp(-1))
        mean.append((shares(some) * worth[..., _index(inside)]).sum(-1))
    return RowStats(torch.stack(lse, -1), torch.stack(mean, -1))


def _index(positions: Tensor) -> Tensor | slice:
    """A slice where positions lie side by side: no copy is made."""
    if not len(positions):
        return slice(0, 0)
    first, last = int(positions[0]), int(positions[-1])
    return slice(first, last + 1) if last - first + 1 == len(positions) else positions


def masked_stats(scores: Tensor, worth: Tensor, hit: Tensor) -> RowStats:
    """[head, row, 2] of the keys that `hit` [head | 1, row, key] names, and of all others."""
    both = [scores.masked_fill(~hit, NEG), scores.masked_fill(hit, NEG)]
    mean = [(shares(s) * worth).sum(-1) for s in both]
    return RowStats(torch.stack([s.logsumexp(-1) for s in both], -1), torch.stack(mean, -1))


def _with_rest(parts: Sequence[Tensor], n: int) -> list[Tensor]:
    """The parts, and last the keys of none of them: they are read all the same."""
    rest = torch.ones(n, dtype=torch.bool)
    for positions in parts:
        rest[positions] = False
    return [*parts, rest.nonzero().squeeze(1)]


@dataclass
class PairTally:
    """Sums over query segments for every key segment: sums[form] is [layer, head, query, key].

    forms   name -> function of row statistics; "mass" and "contribution" may be among them
    on_path True: scores are those of the path's edges alone, by the gradient of their gate
    """

    queries: Sequence[Tensor]
    keys: Sequence[Tensor]
    forms: dict[str, Callable[[RowStats], Tensor]]
    shape: tuple[int, int]
    n: int
    on_path: bool = False
    weight: float = 1.0
    open: float = 1.0
    sums: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        size = (*self.shape, len(self.queries), len(self.keys))
        self.sums = {name: torch.zeros(size, dtype=torch.float64) for name in self.forms}
        self._parts = _with_rest(self.keys, self.n)
        self._owner = torch.full((self.n,), len(self.queries))
        for i, positions in enumerate(self.queries):
            self._owner[positions] = i

    def __call__(self, seen: Seen) -> None:
        stats = part_stats(seen.scores, seen.worth, self._parts)
        if self.on_path:
            self._add(seen, "integrated", self._gates(seen, stats))
            return
        for name, form in self.forms.items():
            self._add(seen, name, form(stats))

    def _gates(self, seen: Seen, stats: RowStats) -> Tensor:
        """Change that closing the gates of the path's edges would bring at this slope, by part."""
        if seen.path is None:
            return torch.zeros_like(stats.lse)
        on = part_stats(seen.scores.masked_fill(~seen.path, NEG), seen.worth, self._parts)
        total = stats.lse.logsumexp(-1, keepdim=True)
        mass = (on.lse - total.masked_fill(total == NEG, 0.0)).exp()
        return mass * (stats.total - on.mean) / self.open

    def _add(self, seen: Seen, name: str, values: Tensor) -> None:
        """values [head, row, part]"""
        owner = self._owner[seen.rows].to(values.device)
        out = values.new_zeros(values.shape[0], len(self.queries) + 1, values.shape[2], dtype=torch.float64)
        out.index_add_(1, owner, values.to(torch.float64))
        self.sums[name][seen.layer] += self.weight * out[:, :-1, :-1].cpu()


@dataclass
class UnitTally:
    """Exact change when all edges of a unit are cut together, by unit: sums["knockout"] is [layer, head, unit]."""

    units: Sequence[Cut]
    bound: Bound
    shape: tuple[int, int]
    weight: float = 1.0
    open: float = 1.0
    sums: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.sums = {"knockout": torch.zeros(*self.shape, len(self.units), dtype=torch.float64)}

    def __call__(self, seen: Seen) -> None:
        rows = torch.arange(seen.rows.start, seen.rows.stop)
        for i, unit in enumerate(self.units):
            hit = self.bound.hits(unit, rows)[..., : seen.scores.shape[-1]]
            some = hit.any(0).any(-1)
            if not bool(some.any()):
                continue
            at = some.to(seen.scores.device)
            stats = masked_stats(seen.scores[:, at], seen.worth[:, at], hit[:, some].to(seen.scores.device))
            effect = shares(stats.lse)[..., 0] * (stats.mean[..., 1] - stats.mean[..., 0])
            self.sums["knockout"][seen.layer, :, i] += self.weight * effect.sum(-1).double().cpu()


@dataclass
class RowTally:
    """Keeps the statistics of every row, for any subset of segments later.

    sums["lse"] and sums["mean"] are [layer, head, pos, key + 1]: keys of no segment stand last.
    """

    keys: Sequence[Tensor]
    shape: tuple[int, int]
    n: int
    weight: float = 1.0
    open: float = 1.0
    sums: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._parts = _with_rest(self.keys, self.n)
        size = (*self.shape, self.n, len(self._parts))
        empty = torch.zeros(size, dtype=torch.float64)
        self.sums = {"lse": torch.full_like(empty, NEG), "mean": empty}

    def __call__(self, seen: Seen) -> None:
        stats = part_stats(seen.scores, seen.worth, self._parts)
        self.sums["lse"][seen.layer, :, seen.rows] = stats.lse.double().cpu()
        self.sums["mean"][seen.layer, :, seen.rows] = stats.mean.double().cpu()
