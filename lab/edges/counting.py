"""How many edges a policy keeps. Exact integers, by two rules that are always reported together.

paper  causal pairs of all positions, L (L + 1) / 2 a layer, self edges and template included, one head (A7)
live   only edges that can matter: a layer's row counts if its output reaches the last position through kept edges.
       Dead rows are left out on both sides, so a policy cannot shine by cutting what nobody reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lab.spans import ROLES

if TYPE_CHECKING:
    from lab.edges.binding import Bound


CELLS = 1 << 20  # rows are counted in blocks of at most so many query x key cells


@dataclass(frozen=True)
class Count:
    """Edges of one prompt under one policy, over all layers, times `n_heads`.

    total, kept            by the paper's rule; live_total, kept_live: live edges of the full model and of the policy
    kept_video             live kept edges whose key is a video token
    exit_layer             1-based: the last layer in which anything live reads video; 0 if none does
    exit_video             live edges to video keys if all were kept up to `exit_layer`, and none after it
    """

    total: int
    kept: int
    live_total: int
    kept_live: int
    kept_video: int
    exit_layer: int
    exit_video: int
    per_layer: tuple[int, ...]
    n_pos: int
    n_layers: int
    n_heads: int

    @property
    def kept_fraction(self) -> float:
        return self.kept / self.total

    @property
    def kept_live_fraction(self) -> float:
        """Live kept edges out of the full model's live edges."""
        return self.kept_live / self.live_total

    @property
    def live_of_total(self) -> float:
        """Live kept edges out of all edges of the paper's rule (comparable with `kept_fraction`)."""
        return self.kept_live / self.total

    @property
    def excess_over_exit(self) -> int:
        """Live kept edges to video, less those of a policy that only lets video exit after the same layer.

        Never above 0: the exit keeps every such edge up to there. For the exit of equal accuracy see `excess_over`.
        """
        return self.kept_video - self.exit_video

    def excess_over(self, other: Count) -> int:
        """Live kept edges to video, less those of another policy, such as the video exit of equal accuracy."""
        return self.kept_video - other.kept_video

    def plain(self) -> dict[str, Any]:
        """Numbers for JSON."""
        fields = {k: v for k, v in vars(self).items() if k != "per_layer"}
        shares = ("kept_fraction", "kept_live_fraction", "live_of_total", "excess_over_exit")
        return {**fields, **{name: getattr(self, name) for name in shares}, "per_layer": list(self.per_layer)}


def count_of(bound: Bound) -> Count:
    """Count the edges of a bound policy. Gated edges count as kept."""
    heads, rows = bound.n_heads, torch.arange(bound.n)
    video = bound.prompt.role == ROLES.index("frame")
    grid = _Grid(bound)
    pairs, to_video = grid.pairs(rows, video)
    last_pairs, last_video = grid.pairs(rows[-1:], video)
    per_layer, live, exit_layer, seen = _walk(grid, video)
    # video rows are dead where video is read for the last time; of the model's last layer only `last` is read
    at_exit = last_video if exit_layer == bound.n_layers else grid.pairs(rows[~video], video)[1]
    return Count(
        total=pairs * bound.n_layers * heads, kept=sum(per_layer),
        live_total=(pairs * (bound.n_layers - 1) + last_pairs) * heads, kept_live=live, kept_video=seen,
        exit_layer=exit_layer, exit_video=(to_video * (exit_layer - 1) + at_exit) * heads if exit_layer else 0,
        per_layer=per_layer, n_pos=int(bound.real.sum()), n_layers=bound.n_layers, n_heads=heads,
    )  # fmt: skip


class _Grid:
    """The kept edges of every layer, a few rows at a time: a long prompt's square never exists at once."""

    def __init__(self, bound: Bound) -> None:
        self.bound = bound
        self.block = max(1, CELLS // max(1, bound.n))

    def pairs(self, rows: Tensor, video: Tensor) -> tuple[int, int]:
        """Causal pairs with these queries: all, and those whose key is a video token."""
        parts = (self.bound.exists(chunk) for chunk in rows.split(self.block))
        found = [(int(p.sum()), int(p[:, video].sum())) for p in parts]
        return sum(n for n, _ in found), sum(n for _, n in found)

    def layer(self, layer: int, matters: Tensor, video: Tensor) -> _Layer:
        """One layer's sums, given the rows whose output matters, and the rows that matter below it."""
        below, kept, live, reads = matters.clone(), 0, 0, 0
        for rows in torch.arange(self.bound.n).split(self.block):
            edges = self._kept(layer, rows)
            alive = edges[:, matters[rows]]
            kept += self._sum(edges)
            live += self._sum(alive)
            reads += self._sum(alive[:, :, video])
            below |= alive.any(0).any(0)
        return _Layer(kept, live, reads, below)

    def _kept(self, layer: int, rows: Tensor) -> Tensor:
        exists, removed = self.bound.exists(rows), self.bound.removed(layer, rows)
        return exists[None] if removed is None else exists & ~removed

    def _sum(self, edges: Tensor) -> int:
        return int(edges.sum()) * (self.bound.n_heads if len(edges) == 1 else 1)


@dataclass(frozen=True)
class _Layer:
    kept: int
    live: int
    reads: int  # live kept edges to video
    below: Tensor  # [pos] rows whose output matters one layer further down


def _walk(grid: _Grid, video: Tensor) -> tuple[tuple[int, ...], int, int, int]:
    """(kept edges per layer, live kept edges, exit layer, live kept edges to video), from the last layer down.

    Layers that cut the same, with the same rows to feed, are counted once.
    """
    bound = grid.bound
    matters = torch.zeros(bound.n, dtype=torch.bool)
    matters[-1] = True  # the answer is read at the last position
    made: dict[Any, _Layer] = {}
    layers: list[_Layer] = []
    for layer in reversed(range(bound.n_layers)):
        key = bound.key(layer), matters.numpy().tobytes()
        if key not in made:
            made[key] = grid.layer(layer, matters, video)
        layers.append(made[key])
        matters = made[key].below
    layers.reverse()
    exit_layer = max((i for i, found in enumerate(layers, 1) if found.reads), default=0)
    kept = tuple(found.kept for found in layers)
    return kept, sum(f.live for f in layers), exit_layer, sum(f.reads for f in layers)
