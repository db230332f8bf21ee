"""Packs: the rows of many jobs in one sequence, taken through the checkpoint's own layers.

Rows whose new state nobody reads give keys and values alone: of the last layer, every row but the last.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lab.edges.cutrows import LayerCut
from lab.edges.packed import Group, Packed
from lab.model.decoder import all_reached, one_layer
from lab.model.run import Call, Run
from lab.patch.jobs import Job
from lab.patch.stored import Stored
from lab.side import Side


@dataclass(frozen=True)
class _Pack:
    """The rows of one layer: job and source position of each, and the groups they form."""

    job: Tensor
    pos: Tensor
    full: Tensor
    groups: list[Group]
    place: Tensor  # [job, pos] -> where the row stands, -1: not run
    rope: Tensor
    alike: tuple[Any, ...]
    cut: LayerCut | None

    def serves(self, alike: tuple[Any, ...], cut: LayerCut | None) -> bool:
        """Whether a layer with these rows and this cut has the same pack."""
        return self.cut is cut and self.alike == alike


def _pack(jobs: Sequence[Job], layer: int, base: Stored, before: _Pack | None) -> _Pack:
    alike, cut = tuple(job.alike[layer] for job in jobs), base.cuts.get(layer)
    if before is not None and before.serves(alike, cut):
        return before
    active: dict[Any, list[int]] = {}
    for i, way in enumerate(alike):
        active.setdefault(way, []).append(i)
    groups, which, pos, full = [], [], [], []
    for (_, other), members in active.items():
        rows = jobs[members[0]].rows[layer]
        if not len(rows):
            continue
        groups.append(Group(groups[-1].stop if groups else 0, len(members), rows, cut, other))
        which.append(np.repeat(members, len(rows)))
        pos.append(np.tile(rows.numpy(), len(members)))
        full.append(np.tile(jobs[members[0]].full[layer].numpy(), len(members)))
    job, at, needed = (torch.from_numpy(np.concatenate(part)) for part in (which, pos, full))
    place = torch.full((len(jobs), base.store.n_pos), -1)
    place[job, at] = torch.arange(len(at))
    return _Pack(job, at, needed, groups, place, _rope(base, at), alike, cut)


def _rope(base: Stored, at: Tensor) -> Tensor:
    rope = base.store.door.rope
    return rope.index_select(-1, at.to(rope.device))


def run_batch(
    model: Any, base: Stored, others: Mapping[str, Stored], jobs: Sequence[Job], out: Tensor
) -> None:
    """Run a batch and write its logits."""
    store = base.store
    attend = Packed(store.keys, store.values, {w: (o.store.keys, o.store.values) for w, o in others.items()})
    resid: Tensor | None = None
    before: _Pack | None = None
    run = Run(attend=attend)
    for layer in range(min(j.start for j in jobs), store.n_layers):
        pack = _pack(jobs, layer, base, before)
        resid = _entering(store.resid[layer], pack, before, resid)
        resid = _written(resid, pack, [j.cell.values_before(layer) for j in jobs])
        resid = _layer(model, base, layer, pack, jobs, resid, run)
        resid = _written(resid, pack, [j.cell.values_after(layer) for j in jobs])
        resid = _deepened(store, layer, pack, jobs, resid)
        store.work.row_layers += len(pack.pos)
        before = pack
    all_reached(model, run)
    assert resid is not None and before is not None
    last = before.place[:, -1]
    ran = (last >= 0).nonzero().squeeze(1)
    logits = model.unembed(model.ln_final(resid[last[ran].to(resid.device)][None]))[0]
    out[torch.tensor([jobs[i].place for i in ran.tolist()], device=out.device)] = logits.to(out)


def _entering(clean: Tensor, pack: _Pack, before: _Pack | None, resid: Tensor | None) -> Tensor:
    """The stream of the pack's rows: their own where they were run before, the stored one where they join."""
    if before is None or resid is None:
        return clean[pack.pos.to(clean.device)]
    if before is pack:
        return resid
    held = before.place[pack.job, pack.pos]
    joins = held < 0
    entering = resid[held.clamp_min(0).to(resid.device)]
    if bool(joins.any()):
        entering[joins.to(resid.device)] = clean[pack.pos[joins].to(clean.device)].to(entering)
    return entering


def _written(resid: Tensor, pack: _Pack, values: Sequence[Sequence[tuple[Tensor, Tensor]]]) -> Tensor:
    """The rows that edits replace get their values, in place: for every job (rows, values [row, d_model]) pairs."""
    for job, pairs in enumerate(values):
        for rows, new in pairs:
            at = pack.place[job, rows]
            run = at >= 0
            resid[at[run].to(resid.device)] = new[run.to(new.device)].to(resid)
    return resid


def _deepened(store: Any, layer: int, pack: _Pack, jobs: Sequence[Job], resid: Tensor) -> Tensor:
    deep = store.door.deep
    if layer >= len(deep):
        return resid
    added = deep[layer][0][pack.pos.to(deep[layer].device)].to(resid.device)
    return resid + _written(added, pack, [j.cell.values_deep(layer) for j in jobs])


# ---- one layer over a pack ------------------------------------------------------------------------------------------


class _KeysKnown(Exception):
    """Raised in the attention of a pack whose rows give keys and values only. Never leaves `_layer`."""


def _layer(
    model: Any, base: Stored, layer: int, pack: _Pack, jobs: Sequence[Job], resid: Tensor, run: Run
) -> Tensor:
    """The checkpoint's own layer over the pack; rows that are not `full` come back as they were."""
    hooks = _hooks(layer, pack, jobs)
    with model.hooks(hooks) if hooks else model.lock.shared():
        packed: Any = run.attend
        packed.groups = pack.groups
        if hooks or bool(pack.full.all()) or not _tails(pack):
            return _step(model, layer, pack.pos, pack.rope, resid, run)
        return _last_rows(model, base, layer, pack, resid, run)


def _step(model: Any, layer: int, pos: Tensor, rope: Tensor, resid: Tensor, run: Run) -> Tensor:
    side = Side((), pos.to(resid.device), rope, None, (), None, run)
    return one_layer(model, layer, resid[None], side)[0][0]


def _tails(pack: _Pack) -> bool:
    """Whether in every group the rows needed in full are the last ones (those of the first world speak for all)."""
    for group in pack.groups:
        full = pack.full[group.first : group.first + len(group.rows)]
        if not bool((full.int().diff() >= 0).all()):
            return False
    return True


def _last_rows(model: Any, base: Stored, layer: int, pack: _Pack, resid: Tensor, run: Run) -> Tensor:
    """First all rows up to their keys and values, then the rows needed in full, which read those."""
    packed: Any = run.attend
    taken: list[tuple[Tensor, Tensor]] = []

    def take_keys(call: Call, query: Tensor, key: Tensor, value: Tensor, kw: dict[str, Any]) -> Tensor:
        taken.append((key, value))
        raise _KeysKnown

    with contextlib.suppress(_KeysKnown):
        _step(model, layer, pack.pos, pack.rope, resid, Run(attend=take_keys))
    at = pack.full.nonzero().squeeze(1).to(resid.device)
    if len(at):
        run.attend = _Tail(packed, taken[0], pack)
        pos = pack.pos[pack.full]
        try:
            resid = resid.index_copy(0, at, _step(model, layer, pos, _rope(base, pos), resid[at], run))
        finally:
            run.attend = packed
    run.reached.add(layer)
    return resid


class _Tail:
    """Attention of the last rows of every group over keys and values of all its rows."""

    def __init__(self, packed: Packed, taken: tuple[Tensor, Tensor], pack: _Pack) -> None:
        self.packed, self.taken, self.full = packed, taken, pack.full

    def __call__(self, call: Call, query: Tensor, key: Tensor, value: Tensor, kw: dict[str, Any]) -> Tensor:
        layer, scaling = call.parts.index, kw.get("scaling")
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        z, first = torch.empty_like(query[0].transpose(0, 1)), 0
        for group in self.packed.groups:
            n, here = len(group.rows), slice(group.first, group.stop)
            m = int(self.full[group.first : group.first + n].sum())
            if not m:
                continue
            stop = first + group.worlds * m
            k, v = (t[0, :, here].unflatten(1, (group.worlds, n)) for t in self.taken)
            q = query[0, :, first:stop].unflatten(1, (group.worlds, m))
            z[first:stop] = (
                self._group(group, slice(n - m, n), q, k, v, layer, scale).permute(1, 2, 0, 3).flatten(0, 1)
            )
            first = stop
        return z[None]

    def _group(
        self, group: Group, block: slice, q: Tensor, k: Tensor, v: Tensor, layer: int, scale: float
    ) -> Tensor:
        heads, worlds, m, d = q.shape
        clean = self.packed.keys[layer], self.packed.values[layer]
        keys, values = self.packed.stored(group, layer, clean)
        if group.joins:
            before = slice(None, int(group.rows[0]))
            return self.packed.joined(q, k, v, keys[:, before], values[:, before], scale)
        q = q.reshape(k.shape[0], heads // k.shape[0], worlds, m, d)
        return self.packed._block(group, block, q, k, v, keys, values, scale).reshape(heads, worlds, m, d)


# ---- edits inside a layer -------------------------------------------------------------------------------------------


def _hooks(layer: int, pack: _Pack, jobs: Sequence[Job]) -> list[tuple[str, Any]]:
    """Hooks that write edits of in-layer sites into the pack."""
    by_name: dict[str, list[tuple[Tensor, Tensor, tuple[int, ...] | None]]] = {}
    for i, job in enumerate(jobs):
        for name, rows, new, heads in job.cell.values_inside(layer):
            at = pack.place[i, rows]
            run = at >= 0
            by_name.setdefault(name, []).append((at[run], new[run.to(new.device)], heads))
    return [(name, _Writer(entries)) for name, entries in by_name.items()]


class _Writer:
    """Writes values into rows of a pack [1, row, ...]."""

    def __init__(self, entries: Sequence[tuple[Tensor, Tensor, tuple[int, ...] | None]]) -> None:
        self.entries = entries

    def __call__(self, value: Tensor, hook: Any) -> Tensor:
        out = value.clone()
        for at, new, heads in self.entries:
            at = at.to(out.device)
            if heads is None:
                out[0, at] = new.to(out)
            else:
                which = torch.tensor(heads, device=out.device)
                out[0, at[:, None], which[None]] = new[:, which.to(new.device)].to(out)
        return out
