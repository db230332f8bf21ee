"""Cells: one set of edits, resolved against stored runs: which rows of which layer get which values, and when."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lab.patch.doors import first_deep
from lab.patch.edits import Edit
from lab.patch.points import check_heads
from lab.patch.sites import EMBED, KV_HEADS, MAPS, STATE, hook_name, layers_with
from lab.patch.stored import Stored

Heads = tuple[int, ...] | None
BEFORE, AFTER, DEEP = (EMBED, "resid_pre"), ("resid_post",), "deep"
PARTS = ("before", "keys", "inside", "after")


@dataclass(frozen=True)
class Write:
    """At a site of a layer (0-based), these rows (and heads) get these values [row, ...]."""

    site: str
    layer: int
    rows: Tensor
    values: Tensor
    heads: Heads


@dataclass(frozen=True)
class Settled:
    """How many of the first rows are, entering each layer and at the end, exactly as in another world's stored run.

    Rows that are taken from it with all rows before them stay so: they need not be run again.
    """

    world: str
    rows: tuple[int, ...]  # [layer + 1]


@dataclass(frozen=True)
class Cell:
    """One set of edits.

    settled                 see there; None where no first rows are
    before, keys, inside, after   bool [layer, pos]: rows written on the stream entering a layer; whose keys or values
                            are written; written elsewhere in it; written on the stream leaving it. Rows that get what
                            they have in the stored run are not marked: alone they change nothing
    """

    writes: tuple[Write, ...]
    settled: Settled | None
    before: Tensor
    keys: Tensor
    inside: Tensor
    after: Tensor

    def values_before(self, layer: int) -> list[tuple[Tensor, Tensor]]:
        return [(w.rows, w.values) for w in self.writes if w.layer == layer and w.site in BEFORE]

    def values_after(self, layer: int) -> list[tuple[Tensor, Tensor]]:
        return [(w.rows, w.values) for w in self.writes if w.layer == layer and w.site in AFTER]

    def values_deep(self, layer: int) -> list[tuple[Tensor, Tensor]]:
        return [(w.rows, w.values) for w in self.writes if w.layer == layer and w.site == DEEP]

    def values_inside(self, layer: int) -> list[tuple[str, Tensor, Tensor, Heads]]:
        found = [w for w in self.writes if w.layer == layer and w.site not in (*BEFORE, *AFTER, DEEP)]
        return [(hook_name(w.site, layer), w.rows, w.values, w.heads) for w in found]


def why_not_cell(edits: Sequence[Edit]) -> str:
    """Why a set of edits cannot be resolved against runs without edits; "" if it can."""
    if any(e.site in MAPS for e in edits):
        return "scores and patterns are edited"
    own = [e for e in edits if e.source is None]
    if own and (len(edits) > 1 or own[0].layers is None or len(own[0].layers) > 1) and own[0].site != EMBED:
        return "noise or means at several points: a later one depends on what the earlier ones did"
    if own and len(edits) > 1:
        return "noise or means beside other edits: a later one depends on what the earlier ones did"
    return ""


class RowsOf:
    """The rows of edits on one world, found once for all that name the same."""

    def __init__(self, tokens: Any, item: Any) -> None:
        self.tokens, self.item = tokens, item
        self._known: dict[tuple[Any, ...], Tensor] = {}

    def __call__(self, edit: Edit) -> Tensor:
        named = (edit.role, edit.frame, edit.positions)
        if named not in self._known:
            self._known[named] = edit.rows(self.tokens, self.item)
        return self._known[named]


def cell_of(
    model: Any,
    edits: Sequence[Edit],
    base: Stored,
    others: Mapping[str, Stored],
    rows_of: RowsOf,
    agree: Mapping[str, int | None],
) -> Cell:
    """Resolve a set of edits. Of several edits of one row the last holds, as in the reference.

    agree  world -> how many of the first rows it has in common with the base (see `agreeing`)
    """
    made = [w for e in edits for w in _writes(model, e, base, others, rows_of(e))]
    deep = max(len(s.store.door.deep) for s in (base, *others.values()))
    leaving = [w.site in AFTER and deep <= w.layer < base.store.n_layers - 1 for w in made]
    writes = (
        *(_moved(w) for w, moves in zip(made, leaving, strict=True) if moves),
        *(w for w, moves in zip(made, leaving, strict=True) if not moves),
    )
    shape = (len(PARTS), base.store.n_layers, base.store.n_pos)
    marks: dict[str, Tensor] = dict(zip(PARTS, torch.zeros(shape, dtype=torch.bool), strict=True))
    for w in (w for w in writes if w.site != DEEP):  # those rows are written on the stream before
        marks[_part(w.site)][w.layer][w.rows] |= _other(w, base, others)
    return Cell(writes, _settled(edits, writes, base.store, agree), *marks.values())


def _moved(write: Write) -> Write:
    """What is written on leaving a layer, as written first on entering the next: the layer need not be run for it."""
    return replace(write, site="resid_pre", layer=write.layer + 1)


def agreeing(base: Stored, other: Stored) -> int | None:
    """How many of the first rows two runs have in common, at every layer.

    None where more than those rows could set them apart: cuts (which may ask for an item's answer), DeepStack, rope.
    """
    a, b = base.store.door, other.store.door
    if base.cuts or other.cuts or a.deep or b.deep or not torch.equal(a.rope, b.rope):
        return None
    apart = (a.embeds[0] != b.embeds[0].to(a.embeds.device)).any(-1).nonzero()
    return int(apart[0]) if len(apart) else base.store.n_pos


def _settled(
    edits: Sequence[Edit], writes: Sequence[Write], store: Any, agree: Mapping[str, int | None]
) -> Settled | None:
    sources = {e.source for e in edits}
    source = next(iter(sources), None)
    first = None if source is None else agree[source]
    if len(sources) != 1 or first is None or any(w.site not in (*BEFORE, *AFTER) for w in writes):
        return None
    taken: dict[int, list[Tensor]] = {}
    for w in writes:
        taken.setdefault(w.layer + (w.site in AFTER), []).append(w.rows)
    return _spread(str(source), taken, first, store)


def _spread(world: str, taken: Mapping[int, Sequence[Tensor]], agree: int, store: Any) -> Settled | None:
    """taken: by layer, the rows that are taken on entering it (at the end: on leaving the last)."""
    settled = [0]
    for at in range(store.n_layers + 1):
        settled.append(settled[-1])
        if at in taken:
            theirs = torch.arange(store.n_pos) < max(settled[-1], agree)
            theirs[torch.cat(list(taken[at]))] = True
            settled[-1] = store.n_pos if bool(theirs.all()) else int(theirs.int().argmin())
    return Settled(world, tuple(settled[1:])) if settled[-1] else None


def _other(write: Write, base: Stored, others: Mapping[str, Stored]) -> Tensor:
    """Which rows of a write may get anything but what the stored run has there, bool [row] (or True)."""
    deep = bool(base.store.door.deep) or any(o.store.door.deep for o in others.values())
    if (
        write.site not in STATE or deep
    ):  # additions that rows bring along may differ where the stream does not
        return torch.tensor(True)
    stream = base.store.resid[write.layer + (write.site in AFTER)]
    return (stream[write.rows.to(stream.device)] != write.values.to(stream.device)).any(-1).cpu()


def _part(site: str) -> str:
    if site in KV_HEADS:
        return "keys"
    return "before" if site in BEFORE else "after" if site in AFTER else "inside"


def _writes(model: Any, edit: Edit, base: Stored, others: Mapping[str, Stored], rows: Tensor) -> list[Write]:
    check_heads(model, edit)
    out: list[Write] = []
    for layer in layers_with(model, edit.site, edit.layers):
        if edit.source is None:
            own, theirs = base.at(edit.site, layer), None
        else:
            own = theirs = others[edit.source].at(edit.site, layer)
        at = rows.to(own.device)
        out.append(
            Write(
                edit.site,
                layer,
                rows,
                edit.values(own, at, None if theirs is None else theirs[at]),
                edit.heads,
            )
        )
    return out + _brought(edit, rows, others)


def _brought(edit: Edit, rows: Tensor, others: Mapping[str, Stored]) -> list[Write]:
    """DeepStack additions that come along with a whole state (see `lab.patch.edits.take`)."""
    if edit.source is None or edit.site not in STATE:
        return []
    deep = others[edit.source].store.door.deep
    return [
        Write(DEEP, i, rows, deep[i][0][rows.to(deep[i].device)], None)
        for i in range(first_deep(edit), len(deep))
    ]
