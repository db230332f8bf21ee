"""The default key/value cache, and the adapter that lets transformers' layers write into any cache of ours.

Rows carry their source position, so layers may hold different rows (ragged) and masks stay right.
"""

from __future__ import annotations

from typing import Any

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

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        call = CURRENT.get()
        if not isinstance(call, Call):
            raise RunError("this cache belongs to a run of the lab; it cannot be used outside one")
        key, value = through_points(call, key_states, value_states)
        key, value, call.k_order = self.store.update(layer_idx, key, value, call.side.order)
        return key, value
