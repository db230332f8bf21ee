"""The fast executor: a clean run is stored once; a cut run computes only rows that can change and still matter.

Many cut runs ("worlds") go through the layers together. The rows they must run are packed into one sequence, each row
with its own source position, rope and DeepStack addition; a world joins at its first cut layer from the stored stream,
rows join when they become dirty and leave when nothing reads them any more. Layers are black boxes; only attention
knows the pack (`lab.edges.packed`). Equal to the reference executor up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lab.edges.closure import Closure, Cuts, closure_of
from lab.edges.cutrows import LayerCut, policy_cuts
from lab.edges.dense import run_dense
from lab.edges.packed import Group, Packed, batches
from lab.edges.shelf import out_of_memory
from lab.edges.store import Store, release_memory
from lab.errors import RunError, UsageError
from lab.model.decoder import all_reached, one_layer
from lab.model.reading import Read
from lab.model.ready import Ready
from lab.model.run import Run
from lab.side import Side

ROWS = 4096  # rows run together; more only costs memory


@torch.no_grad()
def run_cut(
    model: Any, store: Store, cuts: Sequence[Cuts], read: Read = "last", *, n_rows: int = ROWS
) -> Float[Tensor, "cut read d_vocab"]:
    """Logits of one cut run per entry of `cuts` (layer, 0-based -> removed edges), at the positions read.

    n_rows  about how many rows go through a layer together
    A set of cuts that cannot reach the positions read gives the clean logits themselves. `store.work` counts.
    A batch for which memory runs out is halved; at one cut run the store is put aside, and then RunError says so.
    Raises RunError if the model changed since the store was made; UsageError for masks that do not fit.
    """
    if not cuts:
        raise UsageError("no sets of cuts given; a set without cuts, {}, gives the clean run")
    store.check(model)
    store.work.runs += len(cuts)
    if store.reason:
        return _by_reference(model, store, cuts, read)
    at, memo = store.positions(read), {}
    found = [closure_of(c, store.n_pos, store.n_layers, at, memo) for c in cuts]
    jobs = [_Job(i, c, f) for i, (c, f) in enumerate(zip(cuts, found, strict=True))]
    return _run_all(model, store, jobs, at, read, n_rows)


@torch.no_grad()
def run_uncut(
    model: Any, store: Store, cuts: Sequence[Cuts], read: Read = "last", *, n_rows: int = ROWS
) -> Float[Tensor, "cut read d_vocab"]:
    """Clean logits by the way of `run_cut`: the rows that each set of cuts would run are run, and nothing is cut.

    They differ from the clean run by rounding alone, which in half precision is as large as small effects: compare
    cut runs with these, or take the difference as the noise below which nothing can be said.
    Raises UsageError where the store's cut runs take the reference path (`store.reason`).
    """
    if not cuts or store.reason:
        raise UsageError(f"no rows to run: {store.reason or 'no sets of cuts given'}")
    store.check(model)
    store.work.runs += len(cuts)
    at, memo = store.positions(read), {}
    found = [closure_of(c, store.n_pos, store.n_layers, at, memo) for c in cuts]
    return _run_all(model, store, [_Job(i, {}, f) for i, f in enumerate(found)], at, read, n_rows)


def _run_all(model: Any, store: Store, jobs: Sequence[_Job], at: Tensor, read: Read, n_rows: int) -> Tensor:
    out = store.clean(model, read)[None].repeat(len(jobs), 1, 1)
    with model.lock.shared():
        for batch in batches([j for j in jobs if j.closure.reaches], n_rows):
            _run_or_halve(model, store, batch, at, out)
    return out


def _by_reference(model: Any, store: Store, cuts: Sequence[Cuts], read: Read) -> Tensor:
    """One full forward each; sets of cuts that are empty share one."""
    clean: Tensor | None = None
    out: list[Tensor] = []
    for c in cuts:
        if any(bool(cut.any()) for cut in c.values()):
            out.append(run_dense(model, store.ready, c, read)[0])
            store.work.fallbacks += 1
            store.work.row_layers += store.n_pos * store.n_layers
        else:
            clean = store.clean(model, read) if clean is None else clean
            out.append(clean)
    return torch.stack(out)


def execute(
    model: Any, ready: Ready, policy: Any, *, read: Read = "last"
) -> Float[Tensor, "world read d_vocab"]:
    """Logits under a policy (`lab.edges.Policy`): what `model(ready, policy=policy, executor="fast")` returns.

    Several worlds, gates, and what `why_not` names take the reference path.
    """
    if ready.n_worlds > 1:
        return model(ready, policy=policy, read=read)
    store = Store.of(model, ready)
    asked = (store.side.tokens[0], model.sizes.n_layers, model.sizes.n_heads, ready.item)
    bound = policy.bind(*asked)
    gated = any(bound.active(layer, gated=True) for layer in range(bound.n_layers))
    cuts: Cuts = {} if store.reason or gated else policy_cuts(bound)
    if store.reason or gated or not (cuts or policy.is_null):
        return model(ready, policy=policy, read=read)  # says what is wrong with a policy that touches nothing
    return run_cut(model, store, [cuts], read)


@dataclass(frozen=True)
class _Job:
    """One set of cuts, the place of its logits, and the rows it must run."""

    place: int
    cuts: Cuts
    closure: Closure

    @property
    def start(self) -> int:
        return self.closure.start

    @property
    def most(self) -> int:
        n = len(self.closure.dirty) - 1
        return max(len(self.closure.rows(layer)) for layer in range(self.closure.start, n))


def _run_or_halve(model: Any, store: Store, jobs: Sequence[_Job], at: Tensor, out: Tensor) -> None:
    """Run a batch; where memory runs out, its halves; where one job alone is too much, with the store put aside."""
    if _fits(model, store, jobs, at, out):
        return
    release_memory()
    if len(jobs) > 1:
        for half in (jobs[: len(jobs) // 2], jobs[len(jobs) // 2 :]):
            _run_or_halve(model, store, half, at, out)
    elif not (store.put_aside() and _fits(model, store, jobs, at, out)):
        raise RunError(
            f"one cut run of {jobs[0].most:,} rows beside {store.n_pos:,} positions does not fit in memory, though "
            f"{store.aside:,} bytes of the stored run were put aside; use fewer frames, or a smaller dtype"
        )


def _fits(model: Any, store: Store, jobs: Sequence[_Job], at: Tensor, out: Tensor) -> bool:
    """Run a batch; False if memory ran out. What the attempt held is let go with its frames."""
    try:
        _run(model, store, jobs, at, out)
    except (RuntimeError, MemoryError) as e:
        if not out_of_memory(e):
            raise
        return False
    return True


# ---- one batch through the layers -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pack:
    """The rows of one layer: world and source position of each, and the groups they form."""

    world: Tensor
    pos: Tensor
    groups: list[Group]


def _run(model: Any, store: Store, jobs: Sequence[_Job], at: Tensor, out: Tensor) -> None:
    """Run a batch and write the logits of the rows read that can differ."""
    attend = Packed(store.keys, store.values)
    run = Run(attend=attend)
    place = torch.full((len(jobs), store.n_pos), -1)  # where a row stands in the pack, -1: not run
    resid: Tensor | None = None
    for layer in range(min(j.closure.start for j in jobs), store.n_layers):
        pack = _pack(jobs, layer)
        attend.groups = pack.groups
        resid = _entering(store, layer, pack, place, resid)
        resid = _layer(model, store, layer, pack, resid, run)
        store.work.row_layers += len(pack.pos)
        place.fill_(-1)
        place[pack.world, pack.pos] = torch.arange(len(pack.pos))
    all_reached(model, run)
    assert resid is not None
    _read(model, jobs, place, at, resid, out)


def _pack(jobs: Sequence[_Job], layer: int) -> _Pack:
    active: dict[tuple[bytes, int], tuple[Tensor, LayerCut | None, list[int]]] = {}
    for world, job in enumerate(jobs):
        rows = job.closure.rows(layer)
        if not len(rows):
            continue
        cut = job.cuts.get(layer)
        key = (rows.numpy().tobytes(), 0 if cut is None else id(cut))
        active.setdefault(key, (rows, cut, []))[2].append(world)
    groups, worlds, positions, first = [], [], [], 0
    for rows, cut, members in active.values():
        groups.append(Group(first, len(members), rows, cut))
        worlds.append(torch.tensor(members).repeat_interleave(len(rows)))
        positions.append(rows.repeat(len(members)))
        first = groups[-1].stop
    return _Pack(torch.cat(worlds), torch.cat(positions), groups)


def _entering(store: Store, layer: int, pack: _Pack, place: Tensor, resid: Tensor | None) -> Tensor:
    """The stream of the pack's rows: their own where they were run before, the clean one where they join."""
    if resid is None:
        return store.resid.rows(layer, pack.pos)
    before = place[pack.world, pack.pos]
    if len(before) == len(resid) and bool((before == torch.arange(len(before))).all()):
        return resid
    joins = before < 0
    held = resid.to(store.resid.device(layer))
    held = held[before.clamp_min(0).to(held.device)]
    if bool(joins.any()):
        held[joins.to(held.device)] = store.resid.rows(layer, pack.pos[joins])
    return held


def _layer(model: Any, store: Store, layer: int, pack: _Pack, resid: Tensor, run: Run) -> Tensor:
    """The checkpoint's own layer over the pack as one world, and DeepStack's addition."""
    door = store.door
    rope = door.rope.index_select(-1, pack.pos.to(door.rope.device))
    side = Side((), pack.pos.to(resid.device), rope, None, (), None, run)
    new, _ = one_layer(model, layer, resid[None], side)
    if layer < len(door.deep):
        deep = door.deep[layer][0]
        new = new + deep[pack.pos.to(deep.device)].to(new.device)
    return new[0]


def _read(model: Any, jobs: Sequence[_Job], place: Tensor, at: Tensor, resid: Tensor, out: Tensor) -> None:
    """Final norm and head of the rows read; rows that cannot differ keep the clean logits that stand there."""
    changed = torch.stack([job.closure.dirty[-1][at] for job in jobs])  # [world, read]
    world, read = changed.nonzero(as_tuple=True)
    final = resid[place[world, at[read]].to(resid.device)]
    logits = model.unembed(model.ln_final(final[None]))[0]
    into = torch.tensor([job.place for job in jobs])[world]
    out[into.to(out.device), read.to(out.device)] = logits.to(out.device)
