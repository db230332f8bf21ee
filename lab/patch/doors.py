"""Doors of several worlds put side by side, and the policy's edges of every world."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lab.model.door import Door
from lab.model.layout import lay_out
from lab.model.pruning import pruned_edges
from lab.model.ready import Ready
from lab.model.run import Edges
from lab.patch.edits import Edit
from lab.patch.sites import STATE

NEG = float("-inf")


def arrived(model: Any, ready: Ready) -> tuple[Door, Any]:
    """The state at the door of one world, before `embed.hook_out`, and its token map."""
    door, maps = lay_out(model, ready, model.see(ready), ready.plan)
    return door, maps[0]


def joined(doors: Sequence[Door]) -> Door:
    """One door whose worlds are those of the doors given, in order; all of one length."""
    first = doors[0]
    if len(doors) == 1:
        return first
    return Door(
        torch.cat([d.embeds for d in doors]),
        _joined_rope(doors),
        _joined_pad(doors),
        tuple(torch.cat(same) for same in zip(*(d.deep for d in doors), strict=True)),
    )


def _joined_rope(doors: Sequence[Door]) -> Tensor:
    first = doors[0].rope
    if (
        all(d.rope.shape == first.shape and torch.equal(d.rope, first) for d in doors)
        and first.shape[-2] == 1
    ):
        return first if first.ndim == 2 else first.expand(-1, len(doors), -1)
    return torch.cat([d.rope for d in doors], -2)


def _joined_pad(doors: Sequence[Door]) -> Tensor | None:
    if all(d.pad is None for d in doors):
        return None
    full = [torch.ones(d.embeds.shape[:2], dtype=torch.bool, device=d.embeds.device) for d in doors]
    return torch.cat([f if d.pad is None else d.pad for d, f in zip(doors, full, strict=True)])


def with_deep_taken(
    doors: Mapping[str, Door], edits: Sequence[Edit], rows: Callable[[Edit], Tensor]
) -> dict[str, Door]:
    """The doors with DeepStack additions that rows bring along when a whole state is taken (see `take`)."""
    deep = {name: [x.clone() for x in door.deep] for name, door in doors.items()}
    taken = [e for e in edits if e.source is not None and e.site in STATE]
    for layer in sorted({first_deep(e) for e in taken}):
        came = {
            name: [x.clone() for x in held] for name, held in deep.items()
        }  # edits of one layer see what came there
        for edit in (e for e in taken if first_deep(e) == layer):
            at = rows(edit)
            for later in range(layer, len(deep[edit.into])):
                deep[edit.into][later][:, at] = came[str(edit.source)][later][:, at]
    return {name: replace(door, deep=tuple(deep[name])) for name, door in doors.items()}


def first_deep(edit: Edit) -> int:
    """The first DeepStack addition that lies after where the edit takes a state."""
    return 0 if edit.layers is None else min(edit.layers)


def edges_of(model: Any, policy: Any, ready: Sequence[Ready], maps: Sequence[Any]) -> dict[int, Edges]:
    """The policy's edges: every world's own, for its own item (the right option may differ between worlds)."""
    if policy is None:
        return {}
    each = [pruned_edges(policy, (m,), model.reach, r.item, {}) for r, m in zip(ready, maps, strict=True)]
    if len(each) == 1:
        return each[0]
    return {layer: _Stacked([e.get(layer) for e in each]) for layer in sorted({i for e in each for i in e})}


class _Stacked:
    """Edges of several worlds as those of a batch."""

    def __init__(self, worlds: Sequence[Edges | None]) -> None:
        self.worlds = worlds

    def __call__(self, q: Tensor, k: Tensor) -> Tensor:
        made = [_wide(None if e is None else e(q, k), q, k) for e in self.worlds]
        if any(m.dtype != torch.bool for m in made):
            made = [
                m if m.dtype != torch.bool else torch.zeros(m.shape, device=m.device).masked_fill(~m, NEG)
                for m in made
            ]
        heads = max(m.shape[1] for m in made)
        return torch.cat([m.expand(1, heads, len(q), len(k)) for m in made])


def _wide(x: Tensor | None, q: Tensor, k: Tensor) -> Tensor:
    if x is None:
        return torch.ones(1, 1, len(q), len(k), dtype=torch.bool, device=q.device)
    return x.reshape((1,) * (4 - x.ndim) + tuple(x.shape))


def unlike(maps: Mapping[str, Any]) -> str:
    """Why values cannot be carried between these worlds position by position; "" if they can."""
    (first, a), *others = maps.items()
    for name, b in others:
        if len(a) != len(b):
            return (
                f"{first!r} has {len(a)} positions and {name!r} has {len(b)} ({_difference(a, b)}): a patch needs one "
                "place for every position; give worlds with as many frames and texts of as many tokens"
            )
        apart = ((a.role != b.role) | (a.frame != b.frame) | (a.option != b.option)).nonzero()
        if len(apart):
            i = int(apart[0])
            return (
                f"{first!r} and {name!r} are laid out differently: position {i} is {_said(a, i)} in one and "
                f"{_said(b, i)} in the other; give worlds that differ in the video, or in words of as many tokens"
            )
    return ""


def _said(tokens: Any, i: int) -> str:
    frame = f" {int(tokens.frame[i])}" if int(tokens.frame[i]) >= 0 else ""
    return f"{tokens.roles()[i]}{frame}"


def _difference(a: Any, b: Any) -> str:
    one, two = a.roles(), b.roles()
    names = dict.fromkeys([*one, *two])
    found = [f"{n}: {one.count(n)} against {two.count(n)}" for n in names if one.count(n) != two.count(n)]
    return ", ".join(found[:3])
