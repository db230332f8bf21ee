"""Many sets of edits of one world, from stored runs: only rows that an edit can change and that still matter are run.

A cell (one set of edits) changes some rows of some layers; from the first of them on every later row may differ, and
only those go through the layers (`lab.patch.jobs`), the rows of many cells packed into one sequence (`lab.patch.packs`, as
`lab.edges.fast` packs cut runs). Equal to the reference up to rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lab.edges.closure import closure_of
from lab.edges.packed import batches
from lab.patch.cells import RowsOf, agreeing, cell_of, why_not_cell
from lab.patch.jobs import jobs_of
from lab.patch.packs import run_batch
from lab.patch.points import Held
from lab.patch.sites import hook_name, in_stream, layers_with
from lab.patch.stored import kept_runs, logits_of, why_not_stored
from lab.runs import Ledger

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
    jobs = jobs_of(made, torch.stack(live))
    for batch in batches(jobs, n_rows):
        run_batch(model, base, others, batch, out)
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


def own_logits(worlds: Any) -> tuple[dict[str, Tensor], int] | None:
    """Logits [d_vocab] of all worlds as they are, and how many had to be run; None where none can be stored."""
    came = {w: worlds.arrive(w) for w in worlds.names}
    if any(why_not_stored(worlds, w, *door) for w, door in came.items()):
        return None
    worlds.check({w: arrived for w, (_, arrived) in came.items()})
    kept, new = kept_runs(worlds, {w: [] for w in came}, came, rows_together(worlds.model))
    return {w: logits_of(worlds.model, run) for w, run in kept.items()}, len(new)
