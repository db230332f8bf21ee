"""Units: the sets of edges a search decides about, as predicates; how they split, and how cut units become a policy.

A unit is one layer's edges from a query segment to a key segment, in some or all heads. Video x video comes apart by
frame distance (the frame itself, 1, 2, 3-4, 5 and more), option x option by option, any unit by head. Layers 0-based.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lab.carriers import TokenMap, VideoQA
from lab.edges.binding import Bound
from lab.edges.cuts import Cut
from lab.edges.policy import Policy
from lab.edges.ranges import layer_text
from lab.errors import UsageError
from lab.spans import GROUPS

Grain = Literal["pair", "option", "distance", "head"]
GRAINS: tuple[Grain, ...] = ("pair", "option", "distance", "head")
Roles = Literal["all", "portable"]
DISTANCES = ((0, 0), (1, 1), (2, 2), (3, 4), (5, None))  # of frames, from and to; None: no end
_SKIP = ("pad", "generated")
_GAP = "frame(q) - frame(k)"


@dataclass(frozen=True, order=True)
class Unit:
    """The edges of one layer from segment `q` to segment `k`; where: a predicate of `lab.edges.predicates` or "".

    heads  the heads meant, () for all of them
    """

    layer: int
    q: str
    k: str
    where: str = ""
    heads: tuple[int, ...] = ()

    def __str__(self) -> str:
        heads = f" heads {','.join(map(str, self.heads))}" if self.heads else ""
        return (
            f"layer {self.layer + 1}: {self.k}->{self.q}{f' where {self.where}' if self.where else ''}{heads}"
        )

    @property
    def edges(self) -> tuple[str, str, str]:
        """Which edges, whatever the layer and the heads."""
        return self.q, self.k, self.where

    @property
    def touches_video(self) -> bool:
        """Whether a video token is query or key."""
        return "video" in (self.q, self.k)

    def cut(self) -> Cut:
        """The cut that removes them."""
        heads = self.heads or "all"
        return Cut(layers=str(self.layer + 1), heads=heads, q=self.q, k=self.k, where=self.where or None)


# ---- which units there are ------------------------------------------------------------------------------------------


def segments_of(tokens: TokenMap, roles: Roles = "all") -> tuple[str, ...]:
    """The segments of a prompt, in order, as search names them; they partition it.

    roles  "portable": only names that hold for any prompt: video, separator, text, last
    """
    if roles not in ("all", "portable"):
        raise UsageError(f"roles={roles!r}; use 'all' or 'portable'")
    names = [n for n in tokens.roles() if n not in _SKIP]
    told = {"frame": "video"} | ({r: "text" for r in GROUPS["text"]} if roles == "portable" else {})
    return tuple(dict.fromkeys(told.get(n, n) for n in names))


def units_of(
    maps: Iterable[TokenMap], n_layers: int, roles: Roles = "all", grain: Grain = "pair"
) -> list[Unit]:
    """Every pair of segments that has an edge in some prompt, in every layer; video x video by distance if asked."""
    pairs: dict[tuple[str, str], None] = {}
    for tokens in maps:
        grid = Grid(tokens, n_layers, 1)
        names = segments_of(tokens, roles)
        found = ((q, k) for q in names for k in names if bool(grid.mask((q, k, "")).any()))
        pairs |= dict.fromkeys(found)
    whole = [Unit(layer, q, k) for layer in range(n_layers) for q, k in pairs]
    return [part for u in whole for part in (_by_distance(u) if grain == "distance" else [u])]


def split(unit: Unit, grain: Grain, *, n_heads: int, n_options: int) -> list[Unit]:
    """The parts of a unit at a finer grain; itself alone where there is nothing to part."""
    match grain:
        case "pair":
            return [unit]
        case "distance":
            return _by_distance(unit)
        case "option":
            return _by_option(unit, n_options)
        case "head":
            return [replace(unit, heads=(h,)) for h in unit.heads or range(n_heads)]


def _by_distance(unit: Unit) -> list[Unit]:
    if (unit.q, unit.k, unit.where) != ("video", "video", ""):
        return [unit]
    return [replace(unit, where=_between(a, b)) for a, b in DISTANCES]


def _by_option(unit: Unit, n: int) -> list[Unit]:
    if "option" not in (unit.q, unit.k) or n < 2:
        return [unit]
    numbered = [f"option:{i}" for i in range(n)]
    queries = numbered if unit.q == "option" else [unit.q]
    keys = numbered if unit.k == "option" else [unit.k]
    # options stand in order: a later one cannot be read
    both = unit.q == unit.k == "option"
    return [replace(unit, q=q, k=k) for q in queries for k in keys if not both or _at(k) <= _at(q)]


def _at(option: str) -> int:
    return int(option.partition(":")[2])


def _between(first: int, last: int | None) -> str:
    if first == last:
        return "frame(q) == frame(k)" if first == 0 else f"{_GAP} == {first}"
    return f"{_GAP} >= {first}" + ("" if last is None else f" and {_GAP} <= {last}")


def reach(where: str) -> tuple[int, int | None] | None:
    """The distances of frames that a predicate made here means, (from, to); None for none or another predicate."""
    return next(((a, b) for a, b in DISTANCES if _between(a, b) == where), None)


# ---- on a prompt ----------------------------------------------------------------------------------------------------


class Grid:
    """The masks of units on prompts of one layout. Masks that are asked for again are the same objects."""

    def __init__(self, tokens: TokenMap, n_layers: int, n_heads: int, item: VideoQA | None = None) -> None:
        self.bound = Bound(Policy(cuts=()), tokens, n_layers, n_heads, item)
        self.n_heads = n_heads
        self._pairs: dict[tuple[str, str, str], Tensor] = {}
        self._layers: dict[frozenset[Unit], Tensor | None] = {}
        self._latest: tuple[frozenset[Unit], dict[int, Tensor]] = (frozenset(), {})
        self._exists = self.bound.exists()

    @staticmethod
    def key(tokens: TokenMap) -> bytes:
        """Equal for prompts whose units have the same masks."""
        columns = (tokens.role, tokens.frame, tokens.option)
        return torch.stack(columns).to(torch.int32).numpy().tobytes()

    def mask(self, edges: tuple[str, str, str]) -> Tensor:
        """Existing edges of a pair, bool [q, k]."""
        if edges not in self._pairs:
            q, k, where = edges
            rows = torch.arange(self.bound.n)
            hit = self.bound.hits(Cut(q=q, k=k, where=where or None), rows)[0]
            self._pairs[edges] = hit & self._exists
        return self._pairs[edges]

    def size(self, unit: Unit) -> float:
        """Edges of a unit, in heads: all heads together count 1 (the paper's rule)."""
        return int(self.mask(unit.edges).sum()) * (len(unit.heads) / self.n_heads if unit.heads else 1.0)

    @property
    def edges(self) -> int:
        """Edges of one layer."""
        return int(self._exists.sum())

    def cuts(self, units: Iterable[Unit]) -> dict[int, Tensor]:
        """0-based layer -> removed edges, bool [q, k] or [head, q, k]: what the executors take."""
        units = frozenset(units)  # a trial asks for the same ones on every sample
        if units != self._latest[0]:
            self._latest = units, self._made(units)
        return self._latest[1]

    def _made(self, units: frozenset[Unit]) -> dict[int, Tensor]:
        by_layer: dict[int, set[Unit]] = {}
        for u in units:
            by_layer.setdefault(u.layer, set()).add(u)
        made = {layer: self._layer(frozenset(some)) for layer, some in by_layer.items()}
        return {layer: mask for layer, mask in made.items() if mask is not None}

    def _layer(self, units: frozenset[Unit]) -> Tensor | None:
        """The mask of one layer's units, None if this prompt has none of their edges."""
        if units in self._layers:
            found = self._layers.pop(units)
        else:
            found = self._joined(units)
            found = found if bool(found.any()) else None
        self._layers[units] = found  # the latest last
        while len(self._layers) > 4 * self.bound.n_layers:
            self._layers.pop(next(iter(self._layers)))
        return found

    def _joined(self, units: frozenset[Unit]) -> Tensor:
        shared = torch.zeros_like(self._exists)
        for u in units:
            if not u.heads:
                shared |= self.mask(u.edges)
        if not any(u.heads for u in units):
            return shared
        out = shared.repeat(self.n_heads, 1, 1)
        for u in units:
            for head in u.heads:
                out[head] |= self.mask(u.edges)
        return out


# ---- as a policy ----------------------------------------------------------------------------------------------------


def cuts_of(units: Iterable[Unit], reason: str | None = None) -> tuple[Cut, ...]:
    """Few cuts that remove just these units: layers, heads, distances and segments that go together are joined."""
    units = sorted(units)  # sets have no order of their own, a policy's cuts have
    rows = {(u.q, u.k, u.where, u.heads): {u.layer} for u in units}
    for u in units:
        rows[u.q, u.k, u.where, u.heads].add(u.layer)
    flat = [(q, k, where, heads, layer) for (q, k, where, heads), layers in rows.items() for layer in layers]
    joined = _joined_where(_joined_heads(flat))
    by_layers: dict[tuple[str, str, str, tuple[int, ...]], set[int]] = {}
    for q, k, where, heads, layer in joined:
        by_layers.setdefault((q, k, where, heads), set()).add(layer)
    return tuple(
        Cut(layers=layers, heads=heads or "all", q=q, k=k, where=where or None, reason=reason)  # type: ignore[arg-type]
        for q, k, where, heads, layers in _joined_names(by_layers)
    )


_Flat = tuple[str, str, str, tuple[int, ...], int]


def _joined_heads(rows: Sequence[_Flat]) -> list[_Flat]:
    """Units of single heads of one pair and layer as one."""
    out: dict[tuple[str, str, str, int], set[int]] = {}
    for q, k, where, heads, layer in rows:
        if heads:
            out.setdefault((q, k, where, layer), set()).update(heads)
    whole = [row for row in rows if not row[3]]
    return whole + [(q, k, where, tuple(sorted(h)), layer) for (q, k, where, layer), h in out.items()]


def _joined_where(rows: Sequence[_Flat]) -> list[_Flat]:
    """Distances that reach from one to the end, or over all, as one predicate, or none."""
    found: dict[tuple[str, str, tuple[int, ...], int], set[str]] = {}
    for q, k, where, heads, layer in rows:
        found.setdefault((q, k, heads, layer), set()).add(where)
    return [
        (q, k, where, heads, layer)
        for (q, k, heads, layer), some in found.items()
        for where in _simplest(some)
    ]


def _simplest(wheres: set[str]) -> list[str]:
    if "" in wheres:
        return [""]
    known = {_between(a, b): a for a, b in DISTANCES}
    left = [w for w in known if w in wheres]
    tail: list[str] = []
    while left and left[-1] == list(known)[len(known) - 1 - len(tail)]:
        tail.append(left.pop())
    if not tail:
        return [*left, *sorted(wheres - set(known))]
    first = known[tail[-1]]
    whole = "" if first == 0 else f"{_GAP} >= {first}"
    return [*left, whole, *sorted(wheres - set(known))]


def _joined_names(
    rows: dict[tuple[str, str, str, tuple[int, ...]], set[int]],
) -> Iterator[tuple[str, str, str, tuple[int, ...], str]]:
    """Keys, then queries, that go with the same everything else, as unions."""
    keys: dict[tuple[str, str, tuple[int, ...], str], list[str]] = {}
    for (q, k, where, heads), layers in rows.items():
        keys.setdefault((q, where, heads, layer_text(layers)), []).append(k)
    queries: dict[tuple[str, str, tuple[int, ...], str], list[str]] = {}
    for (q, where, heads, layers), ks in keys.items():
        queries.setdefault(("+".join(sorted(ks)), where, heads, layers), []).append(q)
    for (k, where, heads, layers), qs in queries.items():
        yield "+".join(sorted(qs)), k, where, heads, layers


def wholes(unit: Unit) -> Iterator[Unit]:
    """The unit and all units it is a part of."""
    for q in dict.fromkeys((unit.q, unit.q.partition(":")[0])):
        for k in dict.fromkeys((unit.k, unit.k.partition(":")[0])):
            for where in dict.fromkeys((unit.where, "")):
                for heads in dict.fromkeys((unit.heads, ())):
                    yield Unit(unit.layer, q, k, where, heads)


def disjoint(units: Iterable[Unit]) -> list[Unit]:
    """Without those that are part of another that is there."""
    every = set(units)
    return sorted(u for u in every if not any(w in every for w in wholes(u) if w != u))
