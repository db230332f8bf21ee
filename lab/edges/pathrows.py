"""The edges that a pathway cuts, for the query rows asked: all heads or one, all frames or one pair of them."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from lab.carriers import TokenMap, VideoQA
from lab.edges.pathnames import CROSS_FRAME, NOTHING, Part, parts_of
from lab.edges.predicates import matches, parse_where
from lab.edges.segments import columns_of, segment
from lab.errors import ConfigError, UsageError
from lab.spans import ROLES

Pair = tuple[int, int]


@dataclass(frozen=True, eq=False)
class _Piece:
    """One part of a pathway: edges from queries to keys, both bool [pos], where a predicate holds.

    later   frame of every position: only edges to earlier frames, and to and from tokens of no frame (which a
            mechanism made of the whole video); a token may always read itself
    """

    q: Tensor
    k: Tensor
    where: ast.expr | None = None
    columns: Mapping[str, Tensor] | None = None
    later: Tensor | None = None

    def rows(self, at: Tensor) -> Tensor:
        hit = self.q[at][:, None] & self.k[None, :]
        if self.later is not None:
            q, k = self.later[at][:, None], self.later[None, :]
            itself = at[:, None] == torch.arange(len(self.k))[None, :]
            hit &= ((q > k) | (q < 0) | (k < 0)) & ~itself
        if self.where is None or self.columns is None:
            return hit
        return hit & matches(self.where, {n: c[at] for n, c in self.columns.items()}, self.columns)


@dataclass(frozen=True, eq=False)
class PathRows:
    """The removed edges of one layer.

    frame   frame of every video position, -1 elsewhere [pos]
    head    the head that loses them, out of `n_heads`; None: all do
    pair    (key frame, query frame): only edges between these are removed; None: between all
    """

    pieces: tuple[_Piece, ...]
    frame: Tensor
    head: int | None = None
    n_heads: int = 1
    pair: Pair | None = None

    @property
    def n_pos(self) -> int:
        """Positions of the prompt."""
        return len(self.frame)

    @property
    def heads(self) -> int:
        """1 where all heads lose the same, else how many there are."""
        return 1 if self.head is None else self.n_heads

    def narrowed(self, head: int | None, pair: Pair | None, n_heads: int) -> PathRows:
        """These edges in one head, and between two frames; None: in all."""
        return replace(self, head=head, pair=pair, n_heads=n_heads)

    def rows(self, at: Tensor) -> Bool[Tensor, "head q k"]:
        """For these query positions."""
        return self._rows(at.cpu()).to(at.device)

    def any(self) -> bool:
        """Whether any edge is removed at all."""
        return any(bool(self._rows(some).any()) for some in torch.arange(self.n_pos).split(256))

    def _rows(self, at: Tensor) -> Tensor:
        cut = torch.zeros(len(at), self.n_pos, dtype=torch.bool)
        for piece in self.pieces:
            cut |= piece.rows(at)
        cut &= torch.arange(self.n_pos)[None, :] <= at[:, None]
        if self.pair is not None:
            cut &= (self.frame[at] == self.pair[1])[:, None] & (self.frame == self.pair[0])[None, :]
        if self.head is None:
            return cut[None]
        out = torch.zeros(self.n_heads, *cut.shape, dtype=torch.bool)
        out[self.head] = cut
        return out


def path_rows(tokens: TokenMap, pathway: str, item: VideoQA | None = None) -> PathRows:
    """The edges a pathway cuts.

    Raises UsageError for a pathway that cannot be read, or whose segments have no token in this prompt.
    """
    frame = tokens.frame.masked_fill(tokens.role != ROLES.index("frame"), -1)
    pieces = tuple(_piece(tokens, frame, part, item) for part in parts_of(pathway) if part != Part(NOTHING))
    return PathRows(pieces, frame)


def _piece(tokens: TokenMap, frame: Tensor, part: Part, item: VideoQA | None) -> _Piece:
    if part.keys == CROSS_FRAME and not part.queries:
        if tokens.n_frames < 2:
            raise UsageError(f"{CROSS_FRAME} needs at least 2 frames, this prompt has {tokens.n_frames}")
        video = tokens.role == ROLES.index("frame")
        return _Piece(video, video, later=frame)
    marks: list[Any] = []
    for name in (part.queries, part.keys):
        mark = torch.zeros(len(tokens), dtype=torch.bool)
        mark[segment(tokens, name, item)] = True
        marks.append(mark)
    queries, keys = marks
    if not part.where:
        return _Piece(queries, keys)
    try:
        return _Piece(queries, keys, parse_where(part.where), columns_of(tokens))
    except ConfigError as e:
        raise UsageError(str(e)) from None
