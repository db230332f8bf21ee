"""Cut rows: which edges a layer loses, made a few query rows at a time, so that a long prompt's square never exists.

Executors take either a dense mask, bool [q, k] or [head, q, k], or anything with `rows`; True where an edge is removed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import torch
from jaxtyping import Bool
from torch import Tensor

if TYPE_CHECKING:
    from lab.edges.binding import Bound

CELLS = 1 << 20  # masks are made and looked at in blocks of at most so many head x query x key cells


class CutRows(Protocol):
    """The removed edges of one layer. `n_pos` positions; `heads` is 1 where all heads lose the same."""

    @property
    def n_pos(self) -> int: ...

    @property
    def heads(self) -> int: ...

    def rows(self, at: Tensor) -> Bool[Tensor, "head q k"]:
        """For these query positions, on their device."""
        ...

    def any(self) -> bool:
        """Whether any edge is removed at all."""
        ...


LayerCut = Tensor | CutRows


def rows_of(cut: LayerCut, at: Tensor) -> Bool[Tensor, "head q k"]:
    """The removed edges of these query positions, on their device; head is 1 where all heads lose the same."""
    if not isinstance(cut, Tensor):
        return cut.rows(at)
    taken = cut.index_select(-2, at.to(cut.device)).to(at.device)
    return taken if taken.ndim == 3 else taken[None]


def heads_of(cut: LayerCut | None) -> int:
    """1 where all heads lose the same (or there is no cut), else the number of heads."""
    if isinstance(cut, Tensor):
        return len(cut) if cut.ndim == 3 else 1
    return 1 if cut is None else cut.heads


def length_of(cut: LayerCut) -> int:
    """Positions of the prompt."""
    return cut.shape[-1] if isinstance(cut, Tensor) else cut.n_pos


def blocks(cut: LayerCut, at: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(query positions, their removed edges) in blocks of at most `CELLS` cells."""
    size = max(1, CELLS // (length_of(cut) * heads_of(cut)))
    for some in at.split(size):
        yield some, rows_of(cut, some)


class Lazy:
    """What all cuts that are made by rows share: whether they remove anything."""

    def any(self) -> bool:
        """Whether any edge is removed at all."""
        made: CutRows = self  # pyright: ignore[reportAssignmentType]
        return any(bool(part.any()) for _, part in blocks(made, torch.arange(made.n_pos)))


@dataclass(frozen=True, eq=False)
class PolicyCut(Lazy):
    """What a bound policy's hard cuts remove in one layer, generated rows included."""

    bound: Bound
    layer: int

    @property
    def n_pos(self) -> int:
        return len(self.bound.tokens)

    @property
    def heads(self) -> int:
        shared = all(c.heads == "all" for c in self.bound.active(self.layer))
        return 1 if shared else self.bound.n_heads

    def rows(self, at: Tensor) -> Bool[Tensor, "head q k"]:
        return self._rows(at.cpu()).to(at.device)

    def _rows(self, at: Tensor) -> Bool[Tensor, "head q k"]:
        out = torch.zeros(self.heads, len(at), self.n_pos, dtype=torch.bool)
        inside = at < self.bound.n
        made = self.bound.removed(self.layer, at[inside])
        if made is not None:
            out[:, inside, : self.bound.n] = made
        if not bool(inside.all()):
            row = self._generated
            out[:, ~inside, : self.bound.n] = row[:, None] if row is not None else False
        return out

    @cached_property
    def _generated(self) -> Bool[Tensor, "head k"] | None:
        return self.bound.generated(self.layer)[0]


def policy_cuts(bound: Bound) -> dict[int, PolicyCut]:
    """0-based layer -> what the policy's hard cuts remove there; layers that lose nothing are left out.

    Layers that lose the same share one object, so that whoever looks at it looks once.
    """
    made: dict[object, PolicyCut | None] = {}
    for layer in range(bound.n_layers):
        key = bound.key(layer)
        if key not in made:
            cut = PolicyCut(bound, layer)
            made[key] = cut if cut.any() else None
    found = ((layer, made[bound.key(layer)]) for layer in range(bound.n_layers))
    return {layer: cut for layer, cut in found if cut is not None}
