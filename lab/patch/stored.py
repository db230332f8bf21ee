"""Stored runs of a world: stream, keys and values as `lab.edges.store` keeps them, under the world's policy, and the
values that passed at the sites that edits take from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lab.edges.shelf import Shelf
from lab.edges.store import Store, Work, version, why_not
from lab.model import anatomy
from lab.model.cache import KVCache, LayerCache
from lab.model.decoder import decode
from lab.model.door import Door
from lab.model.run import Edges, Run
from lab.patch.doors import edges_of
from lab.side import Side


@dataclass
class Stored:
    """One run of one world.

    store   its clean run under the policy
    cuts    the policy's cuts, for rows that are run again
    values  hook point -> [pos, ...]
    """

    store: Store
    cuts: Mapping[int, Tensor]
    values: dict[str, Tensor]


def why_not_stored(worlds: Any, world: str, door: Door, tokens: Any) -> str:
    """Why runs of this world, arrived at this door, cannot be continued from a stored one; "" if they can."""
    model, ready, policy = worlds.model, worlds.ready[world], worlds.policy
    if policy is not None:
        if not callable(getattr(policy, "masks", None)):
            return f"a {type(policy).__name__} does not say its cuts as masks"
        if policy.bias(tokens, model.sizes.n_layers, model.sizes.n_heads, ready.item):
            return "the policy adds to scores (gates)"
    if ready.plan.hooks:
        return "a mechanism brings hooks"
    return why_not(model, ready, door)


def stored_run(worlds: Any, world: str, came: tuple[Door, Any], points: Sequence[str]) -> Stored:
    """Run the world once from where it arrived and keep what edits need. `why_not_stored` must have nothing against it."""
    model, ready, policy = worlds.model, worlds.ready[world], worlds.policy
    values: dict[str, Tensor] = {}

    def keep(value: Tensor, hook: Any) -> None:
        values[hook.name] = value[0].clone()

    with model.hooks([(p, keep) for p in points]), model.lock.shared():
        door, tokens = came
        door = Door(model.embed.hook_out(door.embeds), door.rope, door.pad, door.deep)
        edges = edges_of(model, policy, [ready], [tokens])
        stream, cache = _recorded(model, door, edges)
    n, layers = door.embeds.shape[1], len(model.parts)
    order = torch.arange(n, device=door.embeds.device)
    side = Side((tokens,), order, door.rope, door.pad, door.deep, None, None)
    keys, vals = (Shelf.holding(kept[i][0] for i in range(layers)) for kept in (cache.k, cache.v))
    streams = Shelf.holding(stream)
    store = Store(ready, door, side, layers, streams, keys, vals, version(model), "", Work(n * layers))
    cuts = (
        {} if policy is None else policy.masks(tokens, model.sizes.n_layers, model.sizes.n_heads, ready.item)
    )
    return Stored(store, cuts, values)


def _recorded(model: Any, door: Door, edges: dict[int, Edges]) -> tuple[list[Tensor], KVCache]:
    stream: list[Tensor] = []
    cache = KVCache()

    def record(layer: int, step: Any, resid: Tensor, side: Side) -> tuple[Tensor, Side]:
        stream.append(resid[0])
        return step(resid, side)

    kept = LayerCache(cache, anatomy.text_config(model.lm))
    resid, _ = decode(model, door, Run(edges), cache=kept, detours=(record,))
    return [*stream, resid[0]], cache


def logits_of(model: Any, kept: Stored) -> Tensor:
    """The world's own logits at the last position, [d_vocab]."""
    return kept.store.clean(model)[-1]
