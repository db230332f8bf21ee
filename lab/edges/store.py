"""Store: one clean run of one prompt, kept so that cut runs can start from it, and the count of what was computed from it.

It stays out of transformers' cache: no cut run copies or widens it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lab.edges.dense import run_dense
from lab.edges.shelf import Shelf, budget_of, out_of_memory
from lab.errors import RunError, UsageError
from lab.model import anatomy
from lab.model.cache import LayerCache
from lab.model.decoder import decode
from lab.model.door import Door
from lab.model.hooking import hooked
from lab.model.reading import Read, rows
from lab.model.ready import Ready
from lab.model.run import Run
from lab.runs import Ledger
from lab.side import Side


@dataclass
class Work:
    """What was computed from a store, the clean run included.

    row_layers  rows times layers run
    runs        cut runs asked for
    fallbacks   cut runs that took the reference path, for `Store.reason`
    """

    row_layers: int = 0
    runs: int = 0
    fallbacks: int = 0


@dataclass
class Store:
    """One clean run: the stream at every layer and the end, and keys and values.

    side          what travels beside the prompt's rows, without cache and run
    resid         [pos, d_model] entering each layer, then the final stream
    keys, values  [kv_head, pos, d_head] per layer, keys after RoPE
                  all three are shelves: what the device has no room for lies elsewhere (`lab.edges.shelf`);
                  plain lists are put on shelves as they are
    reason        why cut runs cannot be computed from it and take the reference path; "" if they can. Where they
                  cannot, nothing is kept
    """

    ready: Ready
    door: Door
    side: Side
    n_layers: int
    resid: Shelf
    keys: Shelf
    values: Shelf
    version: int
    reason: str
    work: Work = field(default_factory=Work)

    def __post_init__(self) -> None:
        for name in ("resid", "keys", "values"):
            held = getattr(self, name)
            if not isinstance(held, Shelf):
                setattr(self, name, Shelf.holding(held))

    @property
    def n_pos(self) -> int:
        """Positions of the prompt."""
        return self.door.embeds.shape[1]

    @property
    def ledger(self) -> Ledger:
        """Forward-equivalents computed so far, and what one full forward per run would have cost."""
        return Ledger(self.work.row_layers / (self.n_pos * self.n_layers), 1 + self.work.runs)

    @property
    def aside(self) -> int:
        """Bytes of the store that lie elsewhere than on the device."""
        return self.resid.aside + self.keys.aside + self.values.aside

    def put_aside(self) -> bool:
        """Put all of it aside, to make room on the device; whether there was anything left to put."""
        before = self.aside
        for shelf in (self.resid, self.keys, self.values):
            shelf.put_aside()
        return self.aside > before

    @classmethod
    @torch.no_grad()
    def of(cls, model: Any, ready: Ready, *, budget: int | None = None) -> Store:
        """Run `ready` clean and keep what cut runs need.

        budget  bytes of the device it may take; the rest is put aside, streams before keys and values. None: half of
                what is free
        Raises UsageError for more than one world; TooBig if it fits nowhere.
        """
        if ready.n_worlds != 1:
            raise UsageError(f"a store holds one world, got {ready.n_worlds}; prepare them one by one")
        with model.plan_hooks(ready.plan), model.lock.shared():
            door, maps = model.arrive(ready)
            reason = why_not(model, ready, door)
            order = torch.arange(door.embeds.shape[1], device=door.embeds.device)
            side = Side(maps, order, door.rope, door.pad, door.deep, None, None)
            kept = _Kept(0, 0) if reason else _recorded(model, door, budget)
        work = Work(0 if reason else len(order) * len(model.parts))
        n = len(model.parts)
        return cls(ready, door, side, n, kept.resid, kept.k, kept.v, version(model), reason, work)

    @torch.no_grad()
    def clean(self, model: Any, read: Read = "last") -> Float[Tensor, "read d_vocab"]:
        """Logits of the clean run at the positions read (where there is a `reason`: by a full forward)."""
        self.check(model)
        if self.reason:
            self.work.row_layers += self.n_pos * self.n_layers
            return run_dense(model, self.ready, {}, read)[0]
        with model.lock.shared():
            return model.read(self.resid[-1][None], self.side, read)[0]

    def positions(self, read: Read) -> Tensor:
        """Source positions that `read` names. Raises UsageError for positions that do not exist."""
        every = torch.arange(self.n_pos)[None, :, None]
        return rows(every, replace(self.side, pad=None), read)[0, :, 0]

    def check(self, model: Any) -> None:
        """Raises RunError if the model is not as it was when this store was made."""
        if version(model) != self.version:
            raise RunError(
                "weights, open hooks or training mode are not what they were when this store was made; make it again "
                "with Store.of"
            )


class _Kept:
    """What a clean run leaves on the shelves: a cache for its layers, and a detour that notes the stream."""

    def __init__(self, resid: float, kv: float) -> None:
        self.resid, self.k, self.v = Shelf(resid), Shelf(kv / 2), Shelf(kv / 2)

    def update(self, layer: int, k: Tensor, v: Tensor, order: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.k.put(k[0])
        self.v.put(v[0])
        return k, v, order

    def record(self, layer: int, step: Callable[..., Any], resid: Tensor, side: Side) -> tuple[Tensor, Side]:
        self.resid.put(resid[0])
        return step(resid, side)


def _recorded(model: Any, door: Door, budget: int | None) -> _Kept:
    """A clean run onto the shelves. Where memory runs out on the way, once more with everything put aside."""
    room = budget_of(budget, door.embeds.device)
    kv = (
        door.embeds.element_size()
        * door.embeds.shape[1]
        * sum(2 * p.n_kv_heads * p.d_head for p in model.parts)
    )
    try:
        return _run_clean(model, door, _Kept(max(0, room - kv), min(room, kv)))
    except (RuntimeError, MemoryError) as e:
        if not out_of_memory(e):
            raise
    release_memory()
    return _run_clean(model, door, _Kept(0, 0))


def _run_clean(model: Any, door: Door, kept: _Kept) -> _Kept:
    cache = LayerCache(kept, anatomy.text_config(model.lm))
    resid, _ = decode(model, door, Run(), cache=cache, detours=(kept.record,))
    kept.resid.put(resid[0])
    return kept


def release_memory() -> None:
    """Give back what a failed attempt left in the GPU's allocator."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def version(model: Any) -> int:
    """Changes when a weight is replaced or written to (edits through `.data` do not count), with hooks and with mode."""
    weights = tuple((p.data_ptr(), p._version) for p in model.hf.parameters())
    return hash((weights, hooked(model), model.hf.training))


def why_not(model: Any, ready: Ready, door: Door) -> str:
    """Why cut runs of this prompt on this model need the reference path; "" if they do not."""
    n = door.embeds.shape[1]
    for part in model.parts:
        where = f"layer {part.index + 1} (blocks.{part.index})"
        if part.attn is None:
            return f"{where} has no softmax attention"
        if not part.causal:
            return f"{where} is not causal"
        if part.window is not None and part.window < n:
            return f"{where} has a sliding window of {part.window} and the prompt {n} positions"
        if getattr(part.attn, "sinks", None) is not None:
            return f"{where} has attention sinks"
    if getattr(anatomy.text_config(model.lm), "attn_logit_softcapping", None) is not None:
        return "attention scores are capped"
    return _why_not_now(model, ready, door)


def _why_not_now(model: Any, ready: Ready, door: Door) -> str:
    if door.pad is not None:
        return "the prompt is padded"
    if ready.plan.detours or ready.plan.cache is not None:
        return "a mechanism takes detours or keeps a cache of its own"
    if model.hf.training:
        return "the model is in training mode"
    return "hooks are open" if hooked(model) else ""
