"""Points: hooks that carry out edits at one hook point, for the worlds of one pass; and the positions rows have there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lab.errors import UsageError
from lab.model.run import CURRENT, Call
from lab.patch.edits import Edit
from lab.patch.sites import MAPS, hook_name, layers_with, n_heads
from lab.side import Side


@dataclass(frozen=True)
class Passed:
    """What passed a hook point: `value` [world, ...] of the whole pass, the place of one world in it, its rows' positions."""

    order: Tensor
    value: Tensor
    at: int

    @property
    def own(self) -> Tensor:
        """The one world's value."""
        return self.value[self.at]

    def same(self, other: Passed) -> bool:
        """Whether the same rows passed with the same values."""
        return torch.equal(self.order, other.order) and torch.equal(self.own, other.own)


Held = dict[tuple[str, str], Passed]  # by hook point and world


class Order:
    """A detour that changes nothing and knows which positions the stream holds: detours inside it may drop rows."""

    def __init__(self) -> None:
        self.stream: Tensor | None = None

    def __call__(self, layer: int, step: Any, resid: Tensor, side: Side) -> tuple[Tensor, Side]:
        self.stream = side.order
        resid, side = step(resid, side)
        self.stream = side.order
        return resid, side

    def here(self, n: int) -> Tensor:
        """Source positions of the `n` rows that pass now."""
        call = CURRENT.get()
        if isinstance(call, Call):  # inside a layer: the rows that layer was given
            return call.side.order.cpu()
        return torch.arange(n) if self.stream is None else self.stream.cpu()


class Point:
    """The edits of one hook point."""

    def __init__(
        self, name: str, site: str, edits: Sequence[Edit], worlds: Sequence[str], held: Held, order: Order
    ) -> None:
        self.name, self.site, self.edits, self.worlds = name, site, edits, list(worlds)
        self.held, self.order, self.keep = held, order, set[str]()
        self.rows: list[Tensor] = []

    def place(self, maps: Mapping[str, Any], items: Mapping[str, Any]) -> None:
        """Resolve the rows of every edit on the maps the decoder sees."""
        self.rows = [e.rows(maps[e.into], items[e.into]) for e in self.edits]

    def __call__(self, value: Tensor, hook: Any) -> Tensor | None:
        order = self.order.here(value.shape[2 if self.site in MAPS else 1])
        for world in self.keep & set(self.worlds):
            self.held[(self.name, world)] = Passed(order, value, self.worlds.index(world))
        if not self.edits:
            return None
        new = value.clone()
        for edit, rows in zip(self.edits, self.rows, strict=True):
            at = self.worlds.index(edit.into)
            new[at] = edited(new[at], value[at], edit, rows, order, self._theirs(edit))
        return new

    def _theirs(self, edit: Edit) -> Passed | None:
        return None if edit.source is None else self.held[(self.name, edit.source)]


def edited(
    now: Tensor, own: Tensor, edit: Edit, rows: Tensor, order: Tensor, theirs: Passed | None
) -> Tensor:
    """The world's values after one edit. Rows that one of the worlds has dropped on the way stay as they are.

    now    values so far, after edits before this one; own: as they arrived. [pos, ...], or [head, q, k]
    order  source positions of the rows; theirs: what passed in the source world
    """
    is_map = edit.site in MAPS
    rows = rows[torch.isin(rows, order)]
    if theirs is not None:
        rows = rows[torch.isin(rows, theirs.order)]
    at = torch.searchsorted(order, rows).to(now.device)
    if is_map:
        now, own = now.transpose(0, 1), own.transpose(0, 1)  # [q, head, k]
    taken = None if theirs is None else _taken(theirs, rows, is_map)
    new = edit.values(own, at, taken).to(now)
    out = now.clone()
    if edit.heads is None:
        out[at] = new
    else:
        heads = torch.tensor(edit.heads, device=now.device)
        out[at[:, None], heads[None]] = new[:, heads]
    return out.transpose(0, 1) if is_map else out


def _taken(theirs: Passed, rows: Tensor, is_map: bool) -> Tensor:
    value = theirs.own.transpose(0, 1) if is_map else theirs.own
    return value[torch.searchsorted(theirs.order, rows).to(value.device)]


def points_of(
    worlds: Any,
    present: Sequence[str],
    edits: Sequence[Edit],
    held: Held,
    order: Order,
    watch: Mapping[str, Sequence[str]],
) -> list[Point]:
    """The points at which something is edited or kept in a pass over the worlds `present`."""
    by_name: dict[str, Point] = {}
    for edit in edits:
        check_heads(worlds.model, edit)
        for layer in layers_with(worlds.model, edit.site, edit.layers):
            name = hook_name(edit.site, layer)
            point = by_name.setdefault(name, Point(name, edit.site, [], present, held, order))
            if edit.source in present:
                point.keep.add(str(edit.source))
            if edit.into in present:
                point.edits = [*point.edits, edit]
    for name, kept in watch.items():
        point = by_name.setdefault(name, Point(name, "", [], present, held, order))
        point.keep |= set(kept)
    return [p for p in by_name.values() if p.edits or p.keep & set(present)]


def check_heads(model: Any, edit: Edit) -> None:
    """Raises UsageError for heads that the site does not have."""
    if edit.heads is None:
        return
    n = n_heads(model, edit.site)
    if not n:
        raise UsageError(f"site {edit.site!r} has no heads; patch single heads at 'z'")
    wrong = [h for h in edit.heads if h >= n]
    if wrong:
        raise UsageError(f"no head {wrong[0]}: site {edit.site!r} has heads 0..{n - 1}")
