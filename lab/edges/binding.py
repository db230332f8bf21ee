"""Bound: a policy on one prompt. For any rows of any layer: which edges are removed, and what is added to the scores.

Executors ask it for the rows they compute; whoever asks for all rows has the dense mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lab.carriers import TokenMap, VideoQA
from lab.edges.cuts import Cut
from lab.edges.predicates import matches, parse_where
from lab.edges.segments import columns_of, members, names, roles_here
from lab.errors import UsageError
from lab.spans import ROLES

if TYPE_CHECKING:
    from lab.edges.policy import Policy

_PAD, _GENERATED = ROLES.index("pad"), ROLES.index("generated")


@dataclass(frozen=True)
class Bound:
    """A policy on one prompt of one world, for a model of `n_layers` and `n_heads`. Layers are 0-based here.

    Edges are those of the prompt alone (`n` positions, generated ones left out); generated rows follow the policy's
    own rule, see `generated`. Masks have a head axis of 1 where all heads share them.
    """

    policy: Policy
    tokens: TokenMap
    n_layers: int
    n_heads: int
    item: VideoQA | None = None

    @cached_property
    def prompt(self) -> TokenMap:
        """The map without generated tokens."""
        return self.tokens.only((self.tokens.role != _GENERATED).nonzero().squeeze(1))

    @property
    def n(self) -> int:
        """Positions of the prompt."""
        return len(self.prompt)

    @cached_property
    def real(self) -> Bool[Tensor, " pos"]:
        """True where the prompt has a token, False on padding."""
        return self.prompt.role != _PAD

    @cached_property
    def columns(self) -> dict[str, Tensor]:
        """What predicates may ask of a position; nan where unknown. pos counts from the first real token."""
        return columns_of(self.prompt)

    def exists(self, rows: Tensor | None = None) -> Bool[Tensor, "q k"]:
        """The edges a causal model has: keys not after the query, no padding."""
        at = torch.arange(self.n)
        rows = at if rows is None else rows
        return (at[None, :] <= rows[:, None]) & self.real[None, :] & self.real[rows][:, None]

    def members(self, name: str) -> Bool[Tensor, " pos"]:
        """Which prompt positions a segment name means under the policy's segmentation."""
        return members(self.prompt, name, self.item, self.policy.segments)

    # ---- what is cut ------------------------------------------------------------------------------------------------

    @cached_property
    def _layers(self) -> tuple[tuple[int, ...], ...]:
        return tuple(c.layers_of(self.n_layers) for c in self.policy.cuts)

    def active(self, layer: int, *, gated: bool = False) -> tuple[Cut, ...]:
        """The hard cuts (or the gates) that name this layer, in order."""
        return tuple(
            c
            for c, layers in zip(self.policy.cuts, self._layers, strict=True)
            if layer in layers and (c.gate is not None) == gated
        )

    def key(self, layer: int) -> Any:
        """Equal for layers that remove and add the same."""
        return self.active(layer), self.active(layer, gated=True)

    def removed(self, layer: int, rows: Tensor | None = None) -> Bool[Tensor, "head q k"] | None:
        """The existing edges that are cut in a layer, for the query rows asked (all): head is 1 if all share them.

        None if there are none.
        """
        rows = torch.arange(self.n) if rows is None else rows
        keep_listed = self.policy.default == "cut"
        hit: Tensor | None = torch.zeros(1, len(rows), self.n, dtype=torch.bool) if keep_listed else None
        for cut in self.active(layer):
            more = self.hits(cut, rows)
            hit = more if hit is None else hit | more
        if hit is None:
            return None
        out = (~hit if keep_listed else hit) & self.exists(rows)
        return out if bool(out.any()) else None

    def bias(self, layer: int, rows: Tensor | None = None) -> Float[Tensor, "head q k"] | None:
        """What gates add to the scores of a layer's edges, None if nothing."""
        rows = torch.arange(self.n) if rows is None else rows
        total: Tensor | None = None
        for cut in self.active(layer, gated=True):
            hit = self.hits(cut, rows) & self.exists(rows)
            more = hit.float() * float(cut.gate or 0.0)
            total = more if total is None else total + more
        return total if total is not None and bool((total != 0).any()) else None

    def hits(self, cut: Cut, rows: Tensor) -> Bool[Tensor, "head q k"]:
        """The pairs one cut names, for the query rows asked; whether they are edges is not asked."""
        hit = self.members(cut.q)[rows][:, None] & self.members(cut.k)[None, :]
        if cut.where is not None and bool(hit.any()):
            asked = {name: c[rows] for name, c in self.columns.items()}
            hit = hit & matches(parse_where(cut.where), asked, self.columns)
        return self._on_heads(cut, hit)

    def _on_heads(self, cut: Cut, hit: Tensor) -> Tensor:
        if cut.heads == "all":
            return hit[None]
        on = torch.zeros(self.n_heads, dtype=torch.bool)
        on[list(cut.heads)] = True
        return on[:, None, None] & hit

    # ---- generated rows -----------------------------------------------------------------------------------------------

    def generated(self, layer: int) -> tuple[Bool[Tensor, "head k"] | None, Float[Tensor, "head k"] | None]:
        """(removed, added) edges from any generated row to the prompt: those it inherits, and those of cuts on "generated".

        Edges between generated tokens are never cut.
        """
        removed, added = self._inherited(layer)
        for cut in (*self.active(layer), *self.active(layer, gated=True)):
            row = self._on_generated(cut)
            if row is None:
                continue
            if cut.gate is not None:
                added = row.float() * cut.gate + (0.0 if added is None else added)
            elif self.policy.default == "cut":
                removed = removed & ~row if removed is not None else None
            else:
                removed = row if removed is None else removed | row
        return removed, added

    def _inherited(self, layer: int) -> tuple[Tensor | None, Tensor | None]:
        rule = self.policy.generated_rows.inherit
        if rule == "none":
            return None, None
        at = self.members(rule).nonzero().squeeze(1)
        if not len(at):
            raise UsageError(
                f"generated_rows.inherit: this prompt has no {rule!r}; it has: {', '.join(roles_here(self.prompt))}"
            )
        removed, added = self.removed(layer, at[-1:]), self.bias(layer, at[-1:])
        return None if removed is None else removed[:, 0], None if added is None else added[:, 0]

    def _on_generated(self, cut: Cut) -> Bool[Tensor, "head k"] | None:
        """What a cut on "generated" queries names among the prompt's keys; None if it names no generated query."""
        if "generated" not in names(cut.q):
            return None
        hit = self.members(cut.k)[None, :] & self.real
        if cut.where is not None:
            tree = parse_where(cut.where)
            unknown = {name: torch.full((1,), torch.nan) for name in self.columns}
            hit = hit & matches(tree, unknown, self.columns)
        return self._on_heads(cut, hit)[:, 0]
