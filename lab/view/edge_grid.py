"""EdgeGrid: which segment edges are cut, in which layers and heads; with brush, undo and presets. Knows no model.

A cell is a pair (query segment, key segment). Its edges exist where a causal model has them: `pairs` counts them. What
is painted is painted in the layers and heads of the brush.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lab.errors import UsageError

How = Literal["toggle", "block", "allow"]
HOWS: tuple[How, ...] = ("toggle", "block", "allow")
NO_EDGE, ALLOWED, PARTLY, BLOCKED = range(4)  # what a cell shows
KEPT = 200  # steps that can be undone
LONG = 280  # characters of a union of segment names that a policy file takes


class EdgeGrid:
    """The cuts of one prompt's segments.

    names    the segments, in order of the prompt
    pairs    edges of every (query, key) pair in one layer and head, int [query, key]; 0 where there are none
    blocked  bool [layer, head, query, key], layers 0-based here
    layers   the brush's layers, 1-based (first, last); heads: the brush's heads, 0-based, empty for all
    """

    def __init__(self, names: Sequence[str], pairs: Any, n_layers: int, n_heads: int) -> None:
        self.names, self.pairs = tuple(names), np.asarray(pairs)
        n = len(self.names)
        if self.pairs.shape != (n, n) or len(set(self.names)) < n:
            raise UsageError(
                f"{n} segments need different names and pairs [{n}, {n}], got {self.pairs.shape}"
            )
        self.blocked = np.zeros((n_layers, n_heads, n, n), bool)
        self.layers, self.heads = (1, n_layers), tuple[int, ...]()
        self._undo: list[NDArray[np.uint8]] = []
        self._redo: list[NDArray[np.uint8]] = []

    # ---- the brush ----------------------------------------------------------------------------------------------------

    def brush(self, layers: tuple[int, int] | None = None, heads: Iterable[int] | None = None) -> None:
        """Set the brush's layers (1-based, both ends in) and heads (empty: all). Raises UsageError outside the model."""
        n_layers, n_heads = self.blocked.shape[:2]
        if layers is not None:
            first, last = int(layers[0]), int(layers[1])
            if not 1 <= first <= last <= n_layers:
                raise UsageError(
                    f"layers {first}-{last}: the model has layers 1-{n_layers}, the first not after the last"
                )
            self.layers = (first, last)
        if heads is not None:
            chosen = tuple(sorted({int(h) for h in heads}))
            if chosen and not 0 <= chosen[0] <= chosen[-1] < n_heads:
                raise UsageError(f"heads {list(chosen)}: the model has heads 0-{n_heads - 1}")
            self.heads = () if len(chosen) == n_heads else chosen

    def _under(self) -> tuple[slice, Any]:
        return slice(self.layers[0] - 1, self.layers[1]), list(self.heads) if self.heads else slice(None)

    def _view(self) -> NDArray[np.bool_]:
        """What the brush covers, [layer, head, query, key]: a copy where heads are picked."""
        layers, heads = self._under()
        return self.blocked[layers][:, heads]

    # ---- painting -----------------------------------------------------------------------------------------------------

    def paint(self, cells: Iterable[Sequence[int]], how: How = "toggle") -> None:
        """Block or allow cells (query, key); "toggle" allows them if all are blocked, else blocks them. One step to undo.

        Cells without edges are left out. Raises UsageError for cells or a `how` that there are not.
        """
        if how not in HOWS:
            raise UsageError(f"how={how!r}; use one of {', '.join(HOWS)}")
        chosen = np.zeros(self.pairs.shape, bool)
        for cell in cells:
            chosen[self._cell(cell)] = True
        chosen &= self.pairs > 0
        if not chosen.any():
            return
        value = how == "block" or (how == "toggle" and not bool(self._view()[:, :, chosen].all()))
        after = self.blocked.copy()
        layers, heads = self._under()
        part = after[layers][:, heads]
        part[:, :, chosen] = value
        after[layers, heads] = part
        self.put(after)

    def _cell(self, cell: Sequence[int]) -> tuple[int, int]:
        n = len(self.names)
        whole = len(cell) == 2 and all(isinstance(i, int) and 0 <= i < n for i in cell)
        if not whole:
            raise UsageError(f"cell {list(cell)}: needs (query, key) out of 0-{n - 1}")
        return cell[0], cell[1]

    def put(self, blocked: NDArray[np.bool_]) -> None:
        """Replace all cuts, as one step to undo; cuts where no edge is are left out. Raises UsageError for another shape."""
        if blocked.shape != self.blocked.shape:
            raise UsageError(f"these cuts have shape {blocked.shape}, the grid {self.blocked.shape}")
        after = blocked & (self.pairs > 0)
        if np.array_equal(after, self.blocked):
            return
        self._undo = [*self._undo[1 - KEPT :], np.packbits(self.blocked)]
        self._redo = []
        self.blocked = after

    def reset(self) -> None:
        """Cut nothing; can be undone."""
        self.put(np.zeros_like(self.blocked))

    def undo(self) -> bool:
        """Take the last step back; False if there is none."""
        return self._step(self._undo, self._redo)

    def redo(self) -> bool:
        """Take the last undone step again; False if there is none."""
        return self._step(self._redo, self._undo)

    @property
    def can_undo(self) -> bool:
        return bool(self._undo)

    @property
    def can_redo(self) -> bool:
        return bool(self._redo)

    def _step(self, source: list[NDArray[np.uint8]], target: list[NDArray[np.uint8]]) -> bool:
        if not source:
            return False
        target.append(np.packbits(self.blocked))
        bits = np.unpackbits(source.pop(), count=self.blocked.size)
        self.blocked = bits.astype(bool).reshape(self.blocked.shape)
        return True

    # ---- what it says -------------------------------------------------------------------------------------------------

    @property
    def total(self) -> int:
        """Edges of all layers and heads."""
        return int(self.pairs.sum()) * self.blocked.shape[0] * self.blocked.shape[1]

    @property
    def removed(self) -> int:
        """Edges that are cut, over all layers and heads."""
        return int((self.blocked.sum((0, 1)) * self.pairs).sum())

    def shown(self) -> NDArray[np.uint8]:
        """What every cell shows under the brush: NO_EDGE, ALLOWED, PARTLY or BLOCKED, uint8 [query, key]."""
        covered = self._view()
        out = np.full(self.pairs.shape, ALLOWED, np.uint8)
        out[covered.any((0, 1))] = PARTLY
        out[covered.all((0, 1))] = BLOCKED
        out[self.pairs == 0] = NO_EDGE
        return out

    def cuts(self) -> list[dict[str, Any]]:
        """The cuts as plain data of a policy file: pairs that are cut in the same layers and heads stand together."""
        found: dict[tuple[str, tuple[int, ...]], dict[int, list[int]]] = {}
        for q, k in np.argwhere(self.blocked.any((0, 1))).tolist():
            for layers, heads in self._where(q, k):
                found.setdefault((layers, heads), {}).setdefault(q, []).append(k)
        return [c for (layers, heads), rows in found.items() for c in self._together(layers, heads, rows)]

    def _where(self, q: int, k: int) -> list[tuple[str, tuple[int, ...]]]:
        """(layers as text, heads) in which a pair is cut; heads empty for all."""
        by_heads: dict[tuple[int, ...], list[int]] = {}
        for layer, lost in enumerate(self.blocked[:, :, q, k]):
            if lost.any():
                heads = () if lost.all() else tuple(np.flatnonzero(lost).tolist())
                by_heads.setdefault(heads, []).append(layer + 1)
        return [(ranges(layers), heads) for heads, layers in by_heads.items()]

    def _together(
        self, layers: str, heads: tuple[int, ...], rows: Mapping[int, list[int]]
    ) -> list[dict[str, Any]]:
        """Queries that lose the same keys share one cut."""
        by_keys: dict[tuple[int, ...], list[int]] = {}
        for q, keys in rows.items():
            by_keys.setdefault(tuple(keys), []).append(q)
        where = {"layers": layers, **({"heads": list(heads)} if heads else {})}
        unions = (
            (q, k)
            for keys, queries in by_keys.items()
            for q in self._union(queries)
            for k in self._union(keys)
        )
        return [{**where, "q": q, "k": k} for q, k in unions]

    def _union(self, which: Sequence[int]) -> list[str]:
        """Segment names joined with "+", in as many pieces as a policy file needs; all frames together are "video"."""
        frames = {i for i, n in enumerate(self.names) if n.startswith("frame:")}
        whole = bool(frames) and frames <= set(which)
        pieces = ["video"] if whole else []
        for name in (self.names[i] for i in which if not (whole and i in frames)):
            if pieces and len(pieces[-1]) + len(name) < LONG:
                pieces[-1] += f"+{name}"
            else:
                pieces.append(name)
        return pieces

    def positions(self, union: str) -> list[int]:
        """Which segments a union that `cuts` wrote names. Raises UsageError for a segment that is not there."""
        index = {n: [i] for i, n in enumerate(self.names)}
        index["video"] = [i for i, n in enumerate(self.names) if n.startswith("frame:")]
        left, found = union, list[int]()
        for name in sorted(index, key=len, reverse=True):  # a name may itself be a union
            if f"+{name}+" in f"+{left}+" and index[name]:
                found += index[name]
                left = f"+{left}+".replace(f"+{name}+", "+").strip("+")
        if left:
            raise UsageError(f"no segment {left!r} here; there are {', '.join(self.names)}")
        return sorted(found)

    def preset(self, name: str) -> None:
        """Block a preset's cells under the brush. Raises UsageError for an unknown one."""
        known = presets(self.names)
        if name not in known:
            raise UsageError(f"no preset {name!r}; there are: {', '.join(known)}")
        self.paint(known[name], "block")


def presets(names: Sequence[str]) -> dict[str, list[tuple[int, int]]]:
    """Named sets of cells (query, key) for the segments there are; those without any cell are left out."""
    frames = [i for i, n in enumerate(names) if n.startswith("frame:")]
    ends = [i for i, n in enumerate(names) if n == "last"]
    asked = [i for i, n in enumerate(names) if n == "question" or n.startswith("option:")]
    rest = [i for i in range(len(names)) if i not in {*frames, *ends}]
    single = not any("+" in names[i] for i in frames)
    sets = {
        "no cross-frame" if single else "nothing between groups of frames": [
            (q, k) for q in frames for k in frames if q > k
        ],
        "no video → question and options": [(q, k) for q in asked for k in frames],
        "no video → last": [(q, k) for q in ends for k in frames],
        "no question and options → last": [(q, k) for q in ends for k in asked],
        "no video → text": [(q, k) for q in (*rest, *ends) for k in frames],
    }
    return {name: cells for name, cells in sets.items() if cells}


def ranges(layers: Sequence[int]) -> str:
    """Rising 1-based layers as text: [1, 2, 3, 9] -> "1-3,9"."""
    parts: list[str] = []
    for _, group in groupby(enumerate(layers), lambda p: p[1] - p[0]):
        run = [layer for _, layer in group]
        parts.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return ",".join(parts)
