"""The reference semantics: a policy's dense boolean masks, and the edges a model takes from them. Obviously right.

`edges_of` turns bound policies into what `model(ready, edges=...)` takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lab.edges.binding import Bound
from lab.edges.segments import roles_here
from lab.errors import UsageError
from lab.model.run import Edges

NEG = float("-inf")


def check_prompt_sizes(bounds: Sequence[Bound]) -> None:
    """Raises UsageError if worlds of one batch differ in length."""
    lengths = {b.n for b in bounds}
    if len(lengths) > 1:
        raise UsageError(f"worlds of one batch must have one length, got {sorted(lengths)}; pad them")


# ---- masks ------------------------------------------------------------------------------------------------------------


def masks_of(bound: Bound) -> dict[int, Tensor]:
    """0-based layer -> removed edges, bool [q, k], or [head, q, k] where heads differ. Generated rows included."""
    out: dict[int, Tensor] = {}
    for layer in range(bound.n_layers):
        removed = _with_generated(bound, bound.removed(layer), bound.generated(layer)[0])
        if removed is not None:
            out[layer] = removed[0] if len(removed) == 1 else removed
    return out


def biases_of(bound: Bound) -> dict[int, Tensor]:
    """0-based layer -> what gates add to the scores, float [q, k] or [head, q, k]."""
    out: dict[int, Tensor] = {}
    for layer in range(bound.n_layers):
        added = _with_generated(bound, bound.bias(layer), bound.generated(layer)[1])
        if added is not None:
            out[layer] = added[0] if len(added) == 1 else added
    return out


def _with_generated(bound: Bound, table: Tensor | None, row: Tensor | None) -> Tensor | None:
    """The prompt's table widened to the generated tokens the map holds already."""
    more = len(bound.tokens) - bound.n
    if not more:
        return table
    full = _stacked(bound, table, row)
    if full is None:
        return None
    at = torch.arange(len(bound.tokens)).clamp(max=bound.n)
    wide = torch.zeros(len(full), len(at), len(at), dtype=full.dtype)
    wide[:, :, : bound.n] = full[:, at]
    return wide if bool((wide != 0).any()) else None


def _stacked(bound: Bound, table: Tensor | None, row: Tensor | None) -> Tensor | None:
    """[head, n + 1, n]: the prompt's rows, and below them the row that generated tokens follow."""
    if table is None and row is None:
        return None
    known = table if table is not None else row
    assert known is not None
    if table is None:
        table = torch.zeros(1, bound.n, bound.n, dtype=known.dtype)
    if row is None:
        row = torch.zeros(1, bound.n, dtype=known.dtype)
    heads = max(len(table), len(row))
    return torch.cat([table.expand(heads, -1, -1), row[:, None].expand(heads, -1, -1)], 1)


# ---- what the model takes -----------------------------------------------------------------------------------------------


def edges_of(bounds: Sequence[Bound]) -> dict[int, Edges]:
    """0-based layer -> function of (q positions, k positions) giving kept edges [world | 1, head | 1, q, k], or a bias.

    Layers in which nothing is cut are left out: they take the clean path. Several bounds are the worlds of one batch.
    Raises UsageError if a policy that has cuts touches no edge of any world.
    """
    check_prompt_sizes(bounds)
    made: dict[Any, Edges | None] = {}
    out: dict[int, Edges] = {}
    for layer in range(bounds[0].n_layers):
        key = tuple(b.key(layer) for b in bounds)
        if key not in made:
            made[key] = _edges(bounds, layer)
        keep = made[key]
        if keep is not None:
            out[layer] = keep
    if not out and not bounds[0].policy.is_null:
        here = roles_here(bounds[0].prompt)
        raise UsageError(
            f"none of the policy's {len(bounds[0].policy.cuts)} cuts touches an edge of this prompt, which has: {', '.join(here)}"
        )
    return out


def _edges(bounds: Sequence[Bound], layer: int) -> Edges | None:
    removed = [_stacked(b, b.removed(layer), b.generated(layer)[0]) for b in bounds]
    added = [_stacked(b, b.bias(layer), b.generated(layer)[1]) for b in bounds]
    cut, bias = _worlds(bounds, removed, torch.bool), _worlds(bounds, added, torch.float32)
    if cut is None and bias is None:
        return None
    if bias is None:
        assert cut is not None
        return _Lookup(~cut, True)
    return _Lookup(bias if cut is None else bias.masked_fill(cut, NEG), 0.0)


def _worlds(bounds: Sequence[Bound], tables: Sequence[Tensor | None], dtype: torch.dtype) -> Tensor | None:
    """[world, head, n + 1, n], one world only if there is one; None if no world has anything."""
    some = [t for t in tables if t is not None]
    if not some:
        return None
    heads, n = max(len(t) for t in some), bounds[0].n
    empty = torch.zeros(1, n + 1, n, dtype=dtype)
    return torch.stack([(empty if t is None else t).expand(heads, -1, -1) for t in tables])


class _Lookup:
    """Edges from a table over the prompt: rows from `n` on follow the table's last row, keys from `n` on are free."""

    def __init__(self, table: Tensor, free: bool | float) -> None:
        self.table = table  # [world, head, n + 1, n]
        self.free = free
        self._on: dict[torch.device, Tensor] = {}

    def __call__(self, q: Tensor, k: Tensor) -> Tensor:
        table = self._on.setdefault(q.device, self.table.to(q.device))
        n = table.shape[-1]
        found = table[:, :, q.clamp(max=n)][..., k.clamp(max=n - 1)]
        return found.masked_fill((k >= n)[None, None, None], self.free)
