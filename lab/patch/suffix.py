"""Many sets of edits of one world, from stored runs: only rows that an edit can change and that still matter are run.

A cell (one set of edits) changes some rows of some layers; from the first of them on every later row may differ, and
only those go through the layers, the rows of many cells packed into one sequence (as `lab.edges.fast` packs cut runs).
Rows whose new state nobody reads give keys and values alone: of the last layer, every row but the last.
Equal to the reference up to rounding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lab.edges.closure import closure_of
from lab.edges.cutrows import LayerCut
from lab.edges.packed import Group, Packed, batches
from lab.model.decoder import all_reached, one_layer
from lab.model.run import Call, Run
from lab.patch.cells import PARTS, Cell, RowsOf, agreeing, cell_of, why_not_cell
from lab.patch.points import Held
from lab.patch.sites import hook_name, in_stream, layers_with
from lab.patch.stored import Stored, kept_runs, logits_of, why_not_stored
from lab.runs import Ledger
from lab.side import Side

# bytes of one MLP activation; beyond about 10 MB glibc maps the memory anew for every tensor (measured: all a tenth slower)
ACTIVATION = 1 << 23


def rows_together(model: Any) -> int:
    """How many rows to run together: on a CPU as many as make activations of `ACTIVATION` bytes, else what fills a device."""
    if model.device.type != "cpu":
        return 4096
    size = max(model.cfg.d_mlp, model.cfg.d_model) * model.cfg.dtype.itemsize
    return min(max(ACTIVATION // size, 256), 4096)


def evaluate(
    worlds: Any, cells: Sequence[Sequence[Any]], into: str, executor: str, n_rows: int
) -> tuple[Tensor, Ledger, str]:
    """Logits [cell, d_vocab], what it cost, and why the reference was taken ("" if it was not, or was asked for)."""
    reason = ""
    if executor == "fast":
        sources = list(dict.fromkeys(e.source for cell in cells for e in cell if e.source is not None))
        came = {w: worlds.arrive(w) for w in (into, *sources)}
        found = (why_not_stored(worlds, w, *door) for w, door in came.items())
        reason = next((r for r in (*(why_not_cell(c) for c in cells), *found) if r), "")
        if not reason:
            return *_fast(worlds, cells, into, came, n_rows), ""
    return *_reference(worlds, cells, into), reason


# ---- reference ------------------------------------------------------------------------------------------------------


def _reference(worlds: Any, cells: Sequence[Sequence[Any]], into: str) -> tuple[Tensor, Ledger]:
    """One forward of the world a cell; every source world runs once."""
    held: Held = {}
    taken = _taken_from(worlds, cells)
    for world, names in taken.items():
        worlds.forward([world], (), held, "last", {n: [world] for n in names})
    done = [worlds.forward([into], cell, held, "last")[0, -1] for cell in cells]
    spent = len(cells) + len(taken)
    return torch.stack(done), Ledger(spent, spent)


def _taken_from(worlds: Any, cells: Sequence[Sequence[Any]]) -> dict[str, list[str]]:
    """World -> the hook points whose values edits take from it."""
    out: dict[str, dict[str, None]] = {}
    for edit in (e for cell in cells for e in cell if e.source is not None):
        for layer in layers_with(worlds.model, edit.site, edit.layers):
            out.setdefault(str(edit.source), {})[hook_name(edit.site, layer)] = None
    return {world: list(names) for world, names in out.items()}


# ---- fast -----------------------------------------------------------------------------------------------------------


def _fast(
    worlds: Any, cells: Sequence[Sequence[Any]], into: str, came: dict[str, tuple[Any, Any]], n_rows: int
) -> tuple[Tensor, Ledger]:
    model, tokens = worlds.model, came[into][1]
    worlds.check({w: arrived for w, (_, arrived) in came.items()})
    others, new = kept_runs(worlds, _points(worlds, cells, into, came), came, n_rows)
    base = others.pop(into)
    before = 0 if into in new else base.store.work.row_layers
    rows_of = RowsOf(tokens, base.store.ready.item)
    agree = {w: agreeing(base, other) for w, other in others.items()}
    made = [cell_of(model, cell, base, others, rows_of, agree) for cell in cells]
    live = closure_of(base.cuts, base.store.n_pos, base.store.n_layers, [base.store.n_pos - 1]).live
    out = logits_of(model, base)[None].repeat(len(cells), 1)
    for i, settled in ((i, c.settled) for i, c in enumerate(made)):
        if settled is not None and settled.rows[-1] == base.store.n_pos:
            out[i] = logits_of(model, others[settled.world])
    jobs = _jobs(made, torch.stack(live))
    for batch in batches(jobs, n_rows):
        _run(model, base, others, batch, out)
    again = sum(w != into for w in new)
    rows = (base.store.work.row_layers - before) / (base.store.n_pos * base.store.n_layers)
    return out, Ledger(rows + again, len(cells) + again)


def _points(
    worlds: Any, cells: Sequence[Sequence[Any]], into: str, came: Mapping[str, tuple[Any, Any]]
) -> dict[str, list[str]]:
    """World -> the hook points whose values are needed of it beside its stream."""
    out: dict[str, dict[str, None]] = {into: {}}
    for edit in (e for cell in cells for e in cell):
        world = into if edit.source is None else edit.source
        deep, names = len(came[world][0].deep), out.setdefault(world, {})
        for layer in layers_with(worlds.model, edit.site, edit.layers):
            if in_stream(edit.site, layer, deep) is None:
                names[hook_name(edit.site, layer)] = None
    return {world: list(names) for world, names in out.items()}


def own_logits(worlds: Any) -> dict[str, Tensor] | None:
    """Logits [d_vocab] of all worlds as they are, from stored runs; None where those cannot be used."""
    came = {w: worlds.arrive(w) for w in worlds.names}
    if any(why_not_stored(worlds, w, *door) for w, door in came.items()):
        return None
    worlds.check({w: arrived for w, (_, arrived) in came.items()})
    kept, _ = kept_runs(worlds, {w: [] for w in came}, came, rows_together(worlds.model))
    return {w: logits_of(worlds.model, run) for w, run in kept.items()}


@dataclass(frozen=True)
class _Job:
    """One cell: the place of its logits, its edits, and per layer the rows to run and those whose new state is needed."""

    place: int
    cell: Cell
    rows: tuple[Tensor, ...]
    full: tuple[Tensor, ...]  # bool over rows
    alike: tuple[Any, ...]  # per layer; equal for jobs that run the same rows the same way
    start: int
    most: int


def _jobs(cells: Sequence[Cell], live: Tensor) -> list[_Job]:
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


def _job(place: int, cell: Cell, ways: Any, known: dict[bytes, Any], start: int, most: int) -> _Job:
    """`known` holds the rows of layers met before: most cells have them in common with others."""
    alike = tuple(layer.tobytes() for layer in ways)
    for layer, way in zip(alike, ways, strict=True):
        if layer not in known:
            at = torch.from_numpy(way).nonzero().squeeze(1)
            known[layer] = (at, torch.from_numpy(way)[at] == 2)
    rows, full = zip(*(known[layer] for layer in alike), strict=True)
    return _Job(
        place, cell, rows, full, tuple(zip(alike, _others(cell, len(ways)), strict=True)), start, most
    )


def _others(cell: Cell, n: int) -> list[tuple[str, int] | None]:
    """Per layer the world whose stored keys stand in for the first rows', and for how many."""
    settled = cell.settled
    if settled is None:
        return [None] * n
    return [(settled.world, rows) if rows else None for rows in settled.rows[:n]]


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


def _pack(jobs: Sequence[_Job], layer: int, base: Stored, before: _Pack | None) -> _Pack:
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


def _run(model: Any, base: Stored, others: Mapping[str, Stored], jobs: Sequence[_Job], out: Tensor) -> None:
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


def _deepened(store: Any, layer: int, pack: _Pack, jobs: Sequence[_Job], resid: Tensor) -> Tensor:
    deep = store.door.deep
    if layer >= len(deep):
        return resid
    added = deep[layer][0][pack.pos.to(deep[layer].device)].to(resid.device)
    return resid + _written(added, pack, [j.cell.values_deep(layer) for j in jobs])


# ---- one layer over a pack ------------------------------------------------------------------------------------------


class _KeysKnown(Exception):
    """Raised in the attention of a pack whose rows give keys and values only. Never leaves `_layer`."""


def _layer(
    model: Any, base: Stored, layer: int, pack: _Pack, jobs: Sequence[_Job], resid: Tensor, run: Run
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
        if group.unbroken:
            before = slice(None, int(group.rows[0]))
            return self.packed.joined(q, k, v, keys[:, before], values[:, before], scale)
        q = q.reshape(k.shape[0], heads // k.shape[0], worlds, m, d)
        return self.packed._block(group, block, q, k, v, keys, values, scale).reshape(heads, worlds, m, d)


# ---- edits inside a layer -------------------------------------------------------------------------------------------


def _hooks(layer: int, pack: _Pack, jobs: Sequence[_Job]) -> list[tuple[str, Any]]:
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
