"""The default key/value cache, and the adapter that lets transformers' layers write into any cache of ours.

Rows carry their source position, so layers may hold different rows (ragged) and masks stay right.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache

from lab.errors import RunError
from lab.model.attention import through_points
from lab.model.run import CURRENT, Call
from lab.slots import Cache


class KVCache:
    """Keeps every row it is given. k, v [world, kv_head, pos, d_head] and order [pos] per layer."""

    def __init__(self) -> None:
        self.k: dict[int, Tensor] = {}
        self.v: dict[int, Tensor] = {}
        self.order: dict[int, Tensor] = {}

    def update(self, layer: int, k: Tensor, v: Tensor, order: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Append rows; returns all rows of the layer and their source positions."""
        if layer in self.k:
            k = torch.cat([self.k[layer], k], 2)
            v = torch.cat([self.v[layer], v], 2)
            order = torch.cat([self.order[layer], order])
        self.k[layer], self.v[layer], self.order[layer] = k, v, order
        return k, v, order

    def snapshot(self) -> Any:
        """What `restore` takes. Costs nothing: rows are never written in place."""
        return dict(self.k), dict(self.v), dict(self.order)

    def restore(self, state: Any) -> None:
        """Go back to a `snapshot`, as often as wanted."""
        self.k, self.v, self.order = (dict(held) for held in state)

    def crop(self, length: int) -> None:
        """Forget all rows from source position `length` on, in every layer."""
        for layer, order in self.order.items():
            keep = order < length
            self.k[layer], self.v[layer] = self.k[layer][:, :, keep], self.v[layer][:, :, keep]
            self.order[layer] = order[keep]

    def lengths(self) -> list[int]:
        """Rows held by each layer that holds any, by layer."""
        return [len(self.order[layer]) for layer in sorted(self.order)]

    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.numel() * t.element_size() for held in (self.k, self.v) for t in held.values())


class LayerCache(DynamicCache):
    """What transformers' layers see. Softmax layers write into the slot's cache; other mixers keep transformers' own."""

    def __init__(self, store: Cache, config: Any) -> None:
        super().__init__(config=config)
        self.store = store

    def snapshot(self) -> Any:
        """What `restore` takes: of a cache that offers it its own snapshot, of any other a copy."""
        own = getattr(self.store, "snapshot", None)
        return copy.deepcopy(self.store) if own is None else own(), copy.deepcopy(self.layers)

    def restore(self, state: Any) -> None:
        """Go back to a `snapshot`, as often as wanted."""
        store, layers = state
        if hasattr(self.store, "snapshot"):
            cast(Any, self.store).restore(store)
        else:
            self.store = copy.deepcopy(store)
        self.layers = copy.deepcopy(layers)

    def crop(self, length: int) -> None:  # type: ignore[override]  # transformers counts what is to go, we what stays
        """Forget rows from source position `length` on. Raises RunError if the cache cannot, or for recurrent layers."""
        if not hasattr(self.store, "crop"):
            raise RunError(
                f"{type(self.store).__name__} cannot forget single rows; use snapshot() before and restore() after"
            )
        if any(getattr(layer, "is_initialized", False) for layer in self.layers):
            raise RunError(
                "recurrent layers cannot forget single rows; use snapshot() before and restore() after"
            )
        cast(Any, self.store).crop(length)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        call = CURRENT.get()
        if not isinstance(call, Call):
            raise RunError("this cache belongs to a run of the lab; it cannot be used outside one")
        key, value = through_points(call, key_states, value_states)
        key, value, call.k_order = self.store.update(layer_idx, key, value, call.side.order)
        return key, value
