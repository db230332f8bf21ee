"""Random pairs: the paper's random baseline. No predicate, so no file; the same seed cuts the same pairs everywhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
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

    def executor(self, name: str) -> Callable[..., Tensor]:
        """As `Policy.executor`."""
        return Policy(cuts=()).executor(name)

    @property
    def is_null(self) -> bool:
        return False

    def count(self, tokens: TokenMap, n_layers: int, n_heads: int = 1, item: VideoQA | None = None) -> Count:
        """Edges in all and kept. See `lab.edges.counting`."""
        return count_of(self.bind(tokens, n_layers, n_heads, item))


@dataclass(frozen=True)
class _Drawn(Bound):
    draw: RandomPairs | None = None

    def key(self, layer: int) -> Any:
        return layer

    @cached_property
    def _late(self) -> Tensor:
        """Positions that can be drawn: real ones from the video's start on, [pos] bool."""
        video = self.members("video").nonzero().squeeze(1)
        if not len(video):
            raise UsageError("random pairs are drawn from the video's start on, and this prompt has no video")
        return self.real & (torch.arange(self.n) >= video[0])

    @cached_property
    def _sizes(self) -> Tensor:
        """How many pairs each row has that can be drawn, [pos]."""
        return self._late.long().cumsum(0) * self._late

    def _per_row(self, layer: int) -> Any:
        """How many pairs each row loses, [pos]: as if all pairs of the layer lay in one urn."""
        assert self.draw is not None
        real, able = int(self.real.sum()), int(self._sizes.sum())
        wanted = round(self.draw.ratio * (real * (real + 1) // 2))
        if wanted > able:
            raise UsageError(
                f"ratio {self.draw.ratio} asks for {wanted:,} pairs, but only {able:,} stand after the "
                "video's start; choose a smaller ratio"
            )
        dice = np.random.Generator(np.random.PCG64([self.draw.seed, layer]))
        return dice.multivariate_hypergeometric(self._sizes.numpy(), wanted, method="marginals")

    @cached_property
    def _losses(self) -> dict[int, Any]:
        return {layer: self._per_row(layer) for layer in range(self.n_layers)}

    def removed(self, layer: int, rows: Tensor | None = None) -> Tensor | None:
        """Each row draws its keys by a seed of its own: any rows can be asked for, in any order."""
        rows = torch.arange(self.n) if rows is None else rows
        keys, losses = self._late.nonzero().squeeze(1), self._losses[layer]
        out = torch.zeros(1, len(rows), self.n, dtype=torch.bool)
        for i, row in enumerate(rows.tolist()):
            if losses[row]:
                out[0, i, keys[self._drawn(layer, row, int(losses[row]))]] = True
        return out if bool(out.any()) else None

    def _drawn(self, layer: int, row: int, n: int) -> Tensor:
        """`n` of the row's first `_sizes[row]` keys that can be drawn."""
        assert self.draw is not None
        g = torch.Generator().manual_seed(((self.draw.seed * 10_007 + layer) * 100_003 + row) & 0x7FFFFFFF)
        return torch.randperm(int(self._sizes[row]), generator=g)[:n]
