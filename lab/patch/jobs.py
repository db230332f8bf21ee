"""Jobs: which rows of which layers a cell must run, beside a stored run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lab.patch.cells import PARTS, Cell


@dataclass(frozen=True)
class Job:
    """One cell: the place of its logits, its edits, and per layer the rows to run and those whose new state is needed."""

    place: int
    cell: Cell
    rows: tuple[Tensor, ...]
    full: tuple[Tensor, ...]  # bool over rows
    alike: tuple[Any, ...]  # per layer; equal for jobs that run the same rows the same way
    start: int
    most: int


def jobs_of(cells: Sequence[Cell], live: Tensor) -> list[Job]:
    """The rows of every cell, layer by layer; cells are left out of which nothing that is read need be run."""
    settled = torch.stack([_settled(c, live.shape) for c in cells])  # [cell, layer + 1, pos]
    before, keys, inside, after = (torch.stack([getattr(c, p) for c in cells]) for p in PARTS)
    dirty = torch.zeros(len(cells), live.shape[1], dtype=torch.bool)
    runs: list[Tensor] = []
    fulls: list[Tensor] = []
    for layer in range(len(live) - 1):
        dirty = dirty | before[:, layer]
        read = dirty | keys[:, layer]
        # later rows may read one that differs
        new = (read.cumsum(1) > 0) | inside[:, layer] | after[:, layer]
        fulls.append(new & live[layer + 1] & ~settled[:, layer])
        runs.append(fulls[-1] | (read & live[layer] & ~settled[:, layer]))
        dirty = new
    run, full = torch.stack(runs, 1), torch.stack(fulls, 1)  # [cell, layer, pos]
    reached = (dirty & live[-1] & ~settled[:, -1]).any(1).nonzero().squeeze(1).tolist()
    ways = (run.to(torch.int8) + full.to(torch.int8)).numpy()  # 0: not run, 1: keys and values, 2: in full
    counts = run.sum(2)
    starts, most = (counts > 0).int().argmax(1).tolist(), counts.amax(1).tolist()
    known: dict[bytes, tuple[Tensor, Tensor]] = {}
    return [_job(i, cells[i], ways[i], known, starts[i], most[i]) for i in reached]


def _settled(cell: Cell, shape: Sequence[int]) -> Tensor:
    """[layer + 1, pos] True where a row is known to be another world's."""
    rows = torch.zeros(shape[0]) if cell.settled is None else torch.tensor(cell.settled.rows)
    return torch.arange(shape[1])[None] < rows[:, None]


def _job(place: int, cell: Cell, ways: Any, known: dict[bytes, Any], start: int, most: int) -> Job:
    """`known` holds the rows of layers met before: most cells have them in common with others."""
    alike = tuple(layer.tobytes() for layer in ways)
    for layer, way in zip(alike, ways, strict=True):
        if layer not in known:
            at = torch.from_numpy(way).nonzero().squeeze(1)
            known[layer] = (at, torch.from_numpy(way)[at] == 2)
    rows, full = zip(*(known[layer] for layer in alike), strict=True)
    return Job(place, cell, rows, full, tuple(zip(alike, _others(cell, len(ways)), strict=True)), start, most)


def _others(cell: Cell, n: int) -> list[tuple[str, int] | None]:
    """Per layer the world whose stored keys stand in for the first rows', and for how many."""
    settled = cell.settled
    if settled is None:
        return [None] * n
    return [(settled.world, rows) if rows else None for rows in settled.rows[:n]]
