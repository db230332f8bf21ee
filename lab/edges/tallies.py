"""Tally: listens to the backward pass of one prompt and adds up scores by segment.

What it hears (`lab.edges.tapping.Seen`) is one block of rows of one layer; it keeps sums over the rows of each query
segment, or over each named unit, and lets the block go.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from lab.edges.binding import Bound
from lab.edges.cuts import Cut
from lab.edges.formulas import NEG, RowStats, shares
from lab.edges.tapping import Seen


class Tally(Protocol):
    """A listener with a result. `weight` is how much the current pass counts."""

    sums: dict[str, Tensor]
    weight: float

    def __call__(self, seen: Seen) -> None: ...


TINY = 1e-25  # smaller masses are not taken from the softmax: it loses them


class Parts:
    """Disjoint parts of a prompt's keys that together are all of them: the segments, and last the rest."""

    def __init__(self, segments: Sequence[Tensor], n: int) -> None:
        self.of = torch.full((n,), len(segments))
        for i, positions in enumerate(segments):
            self.of[positions] = i
        self.one_hot = nn.functional.one_hot(self.of, len(segments) + 1)
        at = torch.arange(n)[:, None].masked_fill(self.one_hot == 0, n)
        self.first = at.amin(0)  # n for an empty rest

    def __len__(self) -> int:
        return self.one_hot.shape[1]

    def stats(self, seen: Seen) -> RowStats:
        """[head, row, part]"""
        own = self._own(seen)
        mass, total = seen.pattern @ own, seen.weighted @ own
        lse = seen.lse.masked_fill(seen.lse == NEG, 0.0)[..., None] + mass.log()
        return self._careful(seen, RowStats(lse, total / mass.clamp_min(TINY)), mass < TINY)

    def slope(self, seen: Seen) -> Tensor:
        """[head, row, part] change of the metric per unit of the path, by the parts its edges read.

        Without them a row would give o_left in place of o; o_left - o = sum of m_B (o_left - o_B) over the edges' parts.
        """
        own = self._own(seen)
        if seen.path is None or seen.left is None:
            return seen.pattern.new_zeros(*seen.pattern.shape[:2], len(self))
        return seen.left[..., None] * ((seen.pattern * seen.path) @ own) - (seen.weighted * seen.path) @ own

    def _own(self, seen: Seen) -> Tensor:
        """[key, part] which part a key belongs to."""
        return self.one_hot[: seen.scores.shape[-1]].to(seen.pattern)

    def _careful(self, seen: Seen, rows: RowStats, small: Tensor) -> RowStats:
        """Parts with next to no mass, from their scores; where the row has no key of the part: -inf and 0."""
        at = torch.arange(seen.rows.start, seen.rows.stop)
        after = (self.first[None, :] > at[:, None]).to(
            small.device
        )  # no key up to the row: none at all if causal
        lse, mean = rows.lse.masked_fill(small, NEG), rows.mean.masked_fill(small, 0.0)
        for part in (small & ~after).any(0).any(0).nonzero().squeeze(1).tolist():
            keys = (self.of[: seen.scores.shape[-1]] == part).nonzero().squeeze(1).to(seen.scores.device)
            some, which = seen.scores[..., keys], small[..., part]
            lse[..., part] = torch.where(which, some.logsumexp(-1), lse[..., part])
            mean[..., part] = torch.where(
                which, (shares(some) * seen.worth[..., keys]).sum(-1), mean[..., part]
            )
        return RowStats(lse, mean)


def masked_stats(scores: Tensor, worth: Tensor, hit: Tensor) -> RowStats:
    """[head, row, 2] of the keys that `hit` [head | 1, row, key] names, and of all others."""
    both = [scores.masked_fill(~hit, NEG), scores.masked_fill(hit, NEG)]
    mean = [(shares(s) * worth).sum(-1) for s in both]
    return RowStats(torch.stack([s.logsumexp(-1) for s in both], -1), torch.stack(mean, -1))


@dataclass
class PairTally:
    """Sums over query segments for every key segment: sums[form] is [layer, head, query, key].

    forms   name -> function of row statistics; "mass" and "contribution" may be among them
    on_path True: scores are those of the path's edges alone, what one step along the path does through each part
    """

    queries: Sequence[Tensor]
    keys: Sequence[Tensor]
    forms: dict[str, Callable[[RowStats], Tensor]]
    shape: tuple[int, int]
    n: int
    on_path: bool = False
    weight: float = 1.0
    sums: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        size = (*self.shape, len(self.queries), len(self.keys))
        self.sums = {name: torch.zeros(size, dtype=torch.float64) for name in self.forms}
        self._parts = Parts(self.keys, self.n)
        self._owner = Parts(self.queries, self.n).of

    def __call__(self, seen: Seen) -> None:
        if self.on_path:
            self._add(seen, "integrated", self._parts.slope(seen))
            return
        stats = self._parts.stats(seen)
        for name, form in self.forms.items():
            self._add(seen, name, form(stats))

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
    sums: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._parts = Parts(self.keys, self.n)
        size = (*self.shape, self.n, len(self._parts))
        empty = torch.zeros(size, dtype=torch.float64)
        self.sums = {"lse": torch.full_like(empty, NEG), "mean": empty}

    def __call__(self, seen: Seen) -> None:
        stats = self._parts.stats(seen)
        self.sums["lse"][seen.layer, :, seen.rows] = stats.lse.double().cpu()
        self.sums["mean"][seen.layer, :, seen.rows] = stats.mean.double().cpu()
