"""Random pairs: the paper's random baseline. No predicate, so no file; the same seed cuts the same pairs everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lab.carriers import TokenMap, VideoQA
from lab.edges.binding import Bound
from lab.edges.counting import Count, count_of
from lab.edges.cuts import GeneratedRows
from lab.edges.policy import Policy
from lab.edges.reference import edges_of, masks_of
from lab.errors import UsageError
from lab.model.run import Edges
from lab.slots import ModelSizes


@dataclass(frozen=True)
class RandomPairs:
    """Cut `ratio` of each layer's causal pairs, drawn among those whose query and key stand at or after the video's start.

    Self edges can be drawn; all heads share the pairs; every layer draws anew. The same seed, layer and length give the
    same pairs. Raises UsageError if there are fewer such pairs than asked for.
    """

    ratio: float
    seed: int = 0
    generated_rows: GeneratedRows = GeneratedRows()

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise UsageError(f"ratio must lie in (0, 1], got {self.ratio}")

    def bind(self, tokens: TokenMap, n_layers: int, n_heads: int, item: VideoQA | None = None) -> Bound:
        """The draw for one prompt."""
        return _Drawn(Policy(cuts=()), tokens, n_layers, n_heads, item, self)

    def masks(
        self, tokens: TokenMap, n_layers: int, n_heads: int = 1, item: VideoQA | None = None
    ) -> dict[int, Tensor]:
        """0-based layer -> removed edges, bool [q, k]."""
        return masks_of(self.bind(tokens, n_layers, n_heads, item))

    def edges(
        self, tokens: TokenMap | Sequence[TokenMap], sizes: ModelSizes, item: VideoQA | None = None
    ) -> dict[int, Edges]:
        """What `model(ready, edges=...)` takes."""
        maps = [tokens] if isinstance(tokens, TokenMap) else list(tokens)
        return edges_of([self.bind(t, sizes.n_layers, sizes.n_heads, item) for t in maps])

    def count(self, tokens: TokenMap, n_layers: int, n_heads: int = 1, item: VideoQA | None = None) -> Count:
        """Edges in all and kept. See `lab.edges.counting`."""
        return count_of(self.bind(tokens, n_layers, n_heads, item))


@dataclass(frozen=True)
class _Drawn(Bound):
    draw: RandomPairs | None = None

    def key(self, layer: int) -> Any:
        return layer

    @cached_property
    def _pairs(self) -> Tensor:
        """Flat indices of the pairs that can be drawn."""
        video = self.members("video").nonzero().squeeze(1)
        if not len(video):
            raise UsageError("random pairs are drawn from the video's start on, and this prompt has no video")
        late = torch.arange(self.n) >= video[0]
        return (self.exists() & late[:, None] & late[None, :]).flatten().nonzero().squeeze(1)

    def removed(self, layer: int, rows: Tensor | None = None) -> Tensor | None:
        assert self.draw is not None
        wanted = round(self.draw.ratio * int(self.exists().sum()))
        if wanted > len(self._pairs):
            raise UsageError(
                f"ratio {self.draw.ratio} asks for {wanted:,} pairs, but only {len(self._pairs):,} stand after the "
                "video's start; choose a smaller ratio"
            )
        g = torch.Generator().manual_seed((self.draw.seed * 10_007 + layer) & 0x7FFFFFFF)
        chosen = self._pairs[torch.randperm(len(self._pairs), generator=g)[:wanted]]
        out = torch.zeros(self.n * self.n, dtype=torch.bool)
        out[chosen] = True
        square = out.reshape(1, self.n, self.n)
        return square if rows is None else square[:, rows]
