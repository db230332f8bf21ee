"""Stored runs of a world: stream, keys and values as `lab.edges.store` keeps them, under the world's policy, and the
values that passed at the sites that edits take from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
from lab.patch.doors import edges_of, joined
from lab.patch.sites import hook_name, in_stream
from lab.side import Side


@dataclass
class Stored:
    """One run of one world.

    store   its clean run under the policy
    cuts    the policy's cuts, for rows that are run again
    values  hook point -> [pos, ...], of what the store's stream does not hold
    """

    store: Store
    cuts: Mapping[int, Tensor]
    values: dict[str, Tensor]

    def at(self, site: str, layer: int) -> Tensor:
        """What passed at a site of a layer, [pos, ...]."""
        place = in_stream(site, layer, len(self.store.door.deep))
        return self.values[hook_name(site, layer)] if place is None else self.store.resid[place]

    def serves(self, model: Any, points: Sequence[str]) -> bool:
        """Whether it holds these hook points and the model is as it was."""
        return set(points) <= self.values.keys() and self.store.version == version(model)


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


def kept_runs(
    worlds: Any, points: Mapping[str, Sequence[str]], came: Mapping[str, tuple[Door, Any]], n_rows: int
) -> tuple[dict[str, Stored], list[str]]:
    """Stored runs as `stored_runs` makes them, and which of them are new: the others `worlds.kept` held already."""
    kept: dict[str, Stored] = {} if worlds.kept is None else worlds.kept
    new = [w for w in points if w not in kept or not kept[w].serves(worlds.model, points[w])]
    if new:
        kept |= stored_runs(worlds, {w: points[w] for w in new}, came, n_rows)
    return {w: kept[w] for w in points}, new


def stored_runs(
    worlds: Any, points: Mapping[str, Sequence[str]], came: Mapping[str, tuple[Door, Any]], n_rows: int
) -> dict[str, Stored]:
    """Run every world of `points` once from where it arrived and keep what passed at its hook points.

    Together where they have no more than `n_rows` rows. `why_not_stored` must have nothing against any of them.
    """
    rows = sum(came[w][0].embeds.shape[1] for w in points)
    parts = [list(points)] if rows <= n_rows else [[w] for w in points]
    return {w: kept for part in parts for w, kept in _stored(worlds, part, points, came).items()}


def _stored(
    worlds: Any,
    names: Sequence[str],
    points: Mapping[str, Sequence[str]],
    came: Mapping[str, tuple[Door, Any]],
) -> dict[str, Stored]:
    """One pass over worlds of one length."""
    model, ready = worlds.model, [worlds.ready[w] for w in names]
    values: dict[str, dict[str, Tensor]] = {w: {} for w in names}

    def keep(value: Tensor, hook: Any) -> None:
        for i, world in enumerate(names):
            if hook.name in points[world]:
                values[world][hook.name] = value[i].clone()

    watched = dict.fromkeys(p for w in names for p in points[w])
    with model.hooks([(p, keep) for p in watched]), model.lock.shared():
        door = joined([came[w][0] for w in names])
        door = Door(model.embed.hook_out(door.embeds), door.rope, door.pad, door.deep)
        edges = edges_of(model, worlds.policy, ready, [came[w][1] for w in names])
        stream, cache = _recorded(model, door, edges)
    now = version(model)
    return {
        w: Stored(
            _store(model, ready[i], replace(came[w][0], embeds=door.embeds[i, None]), came[w][1], i, stream, cache, now),
            _cuts(worlds, w, came[w][1]),
            values[w],
        )
        for i, w in enumerate(names)
    }  # fmt: skip


def _store(
    model: Any, ready: Any, door: Door, tokens: Any, at: int, stream: list[Tensor], cache: KVCache, now: int
) -> Store:
    """The store of one world of a pass."""
    n, layers = door.embeds.shape[1], len(model.parts)
    order = torch.arange(n, device=door.embeds.device)
    side = Side((tokens,), order, door.rope, door.pad, door.deep, None, None)
    keys, values = (Shelf.holding(kept[i][at] for i in range(layers)) for kept in (cache.k, cache.v))
    resid = Shelf.holding(x[at] for x in stream)
    return Store(ready, door, side, layers, resid, keys, values, now, "", Work(n * layers))


def _cuts(worlds: Any, world: str, tokens: Any) -> Mapping[int, Tensor]:
    sizes = worlds.model.sizes
    if worlds.policy is None:
        return {}
    return worlds.policy.masks(tokens, sizes.n_layers, sizes.n_heads, worlds.ready[world].item)


def _recorded(model: Any, door: Door, edges: dict[int, Edges]) -> tuple[list[Tensor], KVCache]:
    stream: list[Tensor] = []
    cache = KVCache()

    def record(layer: int, step: Any, resid: Tensor, side: Side) -> tuple[Tensor, Side]:
        stream.append(resid)
        return step(resid, side)

    kept = LayerCache(cache, anatomy.text_config(model.lm))
    resid, _ = decode(model, door, Run(edges), cache=kept, detours=(record,))
    return [*stream, resid], cache


def logits_of(model: Any, kept: Stored) -> Tensor:
    """The world's own logits at the last position, [d_vocab]."""
    with model.lock.shared():
        return model.read(kept.store.resid[-1][None], kept.store.side, "last")[0, -1]
