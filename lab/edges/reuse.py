"""Several questions about one video: what they share is computed once.

Prompts with the same pixels and the same beginning share what the vision side saw (bit for bit), and, in a causal
decoder, the stream, keys and values of that beginning (up to rounding: the same rows run in other company). Which
positions are shared depends on all prompts of a sweep, never on what was run before: an interrupted sweep that goes on
computes the same numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lab.edges.shelf import Shelf
from lab.edges.store import Store, Work, version, why_not
from lab.model import anatomy
from lab.model.cache import KVCache, LayerCache
from lab.model.continuing import beginning_of, lend, shared_start
from lab.model.decoder import decode
from lab.model.ready import Ready
from lab.model.run import Run
from lab.runs import Ledger
from lab.side import Side
from lab.slots import Plan


@dataclass
class Family:
    """Prompts about one video. `start`: how many positions all of them share."""

    members: list[int]
    start: int


def families(ready: Sequence[Ready]) -> list[Family]:
    """The prompts by video, in order of first appearance; one that shares nothing is alone."""
    found: list[Family] = []
    by_pixels: dict[str, list[Family]] = {}
    for i, r in enumerate(ready):
        if staged(r.plan):
            found.append(Family([i], r.n_pos))  # what a stage leaves of a video may depend on the question
            continue
        candidates = by_pixels.setdefault(pixels_id(r), [])
        for family in candidates:
            n = min(shared_start(ready[family.members[0]], r), family.start)
            if n > 0:
                family.members.append(i)
                family.start = n
                break
        else:
            candidates.append(Family([i], r.n_pos))
            found.append(candidates[-1])
    return found


def staged(plan: Plan) -> bool:
    """Whether the decoder may see other video positions than the prompt was laid out with."""
    return plan.encoder is not None or bool(plan.stages) or plan.layout is not None


def pixels_id(ready: Ready) -> str:
    """Hash of what a prompt shows: its pixel inputs."""
    seen = hashlib.sha256()
    for name, value in sorted(ready.inputs.items()):
        if isinstance(value, Tensor) and value.is_floating_point():
            seen.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
            seen.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return seen.hexdigest()[:16]


class Videos:
    """Gives prompts what an earlier one about the same video has computed. Holds one video at a time.

    passing   which prompts nobody else holds: what was seen for them is let go with their video (None: of none)
    """

    def __init__(self, model: Any, ready: Sequence[Ready], passing: Sequence[bool] | None = None) -> None:
        self.model, self.ready = model, ready
        self.passing = [False] * len(ready) if passing is None else list(passing)
        self.families = families(ready)
        self._of = {i: f for f in self.families for i in f.members}
        self._family: Family | None = None
        self._first: Ready | None = None
        self._store: Store | None = None

    @property
    def order(self) -> list[int]:
        """The prompts, those about one video one after another."""
        return [i for f in self.families for i in f.members]

    def look(self, index: int) -> None:
        """Give prompt `index` what the vision side saw for the last one about its video."""
        family, ready = self._of[index], self.ready[index]
        if family is not self._family:
            self._let_go()
            self._family, self._first, self._store = family, ready, None
        elif self._first is not None and self._first is not ready:
            lend(self.model, self._first, ready, family.start)

    def _let_go(self) -> None:
        """What `see` keeps of a finished video is as large as its tokens' embeddings."""
        for i in self._family.members if self._family is not None else ():
            if self.passing[i]:
                self.ready[i].memo.clear()

    def store(self, index: int, prompt: Ready) -> Store:
        """A stored clean run of `prompt`: prompt `index` itself, or with a response after it."""
        family = self._of[index]
        if len(family.members) == 1:
            return Store.of(self.model, prompt)
        if self._store is None:
            self._store = Store.of(self.model, beginning_of(self.model, self.ready[index], family.start))
        if self._store.reason:
            return Store.of(self.model, prompt)
        return continued(self.model, self._store, prompt)

    def charged(self, store: Store) -> Ledger:
        """What the shared beginning has cost, in forwards of `store`'s prompt; charged once."""
        if self._store is None or not self._store.work.row_layers:
            return Ledger()
        spent = self._store.work.row_layers / (store.n_pos * store.n_layers)
        self._store.work.row_layers = 0
        return Ledger(spent)


@torch.no_grad()
def continued(model: Any, beginning: Store, ready: Ready) -> Store:
    """The stored clean run of a prompt that begins with the one stored: only its further rows are run.

    Counts the rows it runs. Where cut runs of this prompt need the reference path, it says so and keeps nothing.
    """
    n = beginning.n_pos
    with model.lock.shared():
        door, maps = model.arrive(ready)
        reason = why_not(model, ready, door)
        order = torch.arange(door.embeds.shape[1], device=door.embeds.device)
        side = Side(maps, order, door.rope, door.pad, door.deep, None, None)
        if reason:
            none = (Shelf.holding([]), Shelf.holding([]), Shelf.holding([]))
            return Store(ready, door, side, len(model.parts), *none, version(model), reason, Work())
        cache, stream = _after(beginning), list[Tensor]()

        def record(layer: int, step: Any, resid: Tensor, side: Side) -> tuple[Tensor, Side]:
            stream.append(resid[0])
            return step(resid, side)

        kept = LayerCache(cache, anatomy.text_config(model.lm))
        resid, _ = decode(model, door.rows(n, len(order)), Run(), start=n, cache=kept, detours=(record,))
    layers = range(len(model.parts))
    streams = [torch.cat([old, new]) for old, new in zip(beginning.resid, [*stream, resid[0]], strict=True)]
    kept_rows = (streams, [cache.k[i][0] for i in layers], [cache.v[i][0] for i in layers])
    work = Work((len(order) - n) * len(model.parts))
    stream_shelf, keys, values = (Shelf.holding(tensors) for tensors in kept_rows)
    return Store(ready, door, side, len(model.parts), stream_shelf, keys, values, version(model), "", work)


def _after(beginning: Store) -> KVCache:
    cache = KVCache()
    for i in range(beginning.n_layers):
        cache.k[i], cache.v[i] = beginning.keys[i][None], beginning.values[i][None]
        cache.order[i] = torch.arange(beginning.n_pos, device=beginning.keys[i].device)
    return cache
