"""Side: all that travels beside the residual stream. Whoever shortens the stream shortens its side with the same index."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor

from lab.carriers import TokenMap


@dataclass(frozen=True)
class Side:
    """What a layer needs beside the residual stream `[world, pos, d_model]`.

    tokens  one TokenMap per world, or () where no map is known (plain decoding steps)
    order   source position of every row [pos]: its index in the sequence the decoder first read
    rope    rope positions, [world | 1, pos] or [axis, world | 1, pos] (M-RoPE)
    pad     [world, source pos] True where a real token stands, None if nothing is padded. Never shortened:
            it is indexed by `order`, so that cached keys of dropped rows keep their answer.
    deep    DeepStack additions after layers 0..n-1, dense [world, pos, d_model]
    cache   the run's cache (see `lab.slots.Cache`), None without caching
    run     the run this side belongs to; mechanisms pass it on and use its `notes` and `sinks`, nothing else
    absent  [world, pos] True where a row takes no part in the next layer in that world: it leaves no key there, and
            whoever set this drops its result. For rows that only some worlds run. None: all rows take part
    mlp_gain  [world, pos, 1] factor of what the next layer's MLP adds to the stream; None: 1
    """

    tokens: tuple[TokenMap, ...]
    order: Int[Tensor, " pos"]
    rope: Int[Tensor, "..."]
    pad: Tensor | None
    deep: tuple[Float[Tensor, "world pos d_model"], ...]
    cache: Any
    run: Any
    absent: Bool[Tensor, "world pos"] | None = None
    mlp_gain: Float[Tensor, "world pos one"] | None = None

    def only(self, index: Int[Tensor, " kept"]) -> Side:
        """The side of the kept rows; `index` ascending, on any device."""
        at = index.to(self.order.device)
        return replace(
            self,
            tokens=tuple(t.only(index.cpu()) for t in self.tokens),
            order=self.order[at],
            rope=self.rope.index_select(-1, index.to(self.rope.device)),
            deep=tuple(d.index_select(1, index.to(d.device)) for d in self.deep),
            absent=None if self.absent is None else self.absent[:, at],
            mlp_gain=None if self.mlp_gain is None else self.mlp_gain[:, at],
        )
