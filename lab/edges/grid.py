"""Grid: all points of a sweep over one prompt, and the edges cut at each.

A point is a pathway, in some heads, between some pair of frames, in some layers. What does not vary has no axis.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal

from lab.carriers import TokenMap, VideoQA
from lab.edges.closure import Cuts
from lab.edges.pathnames import NOTHING
from lab.edges.pathrows import Pair, path_rows
from lab.edges.windows import Style, layer_axes, layer_sets
from lab.errors import UsageError

Heads = Literal["each"] | Sequence[int] | None
FramePairs = Literal["each"] | Sequence[Pair] | None


@dataclass(frozen=True)
class Grid:
    """The points of every item of a sweep.

    heads    heads that are cut one at a time (0-based); None: all heads together
    pairs    (key frame, query frame) that are cut one at a time; None: all that the pathway names
    layers   the layers cut, for every point of the layer axes, without those that have no edges; None: no point
    axes     name -> coordinates of the axes after "pathway", the last one fastest
    """

    n_heads: int
    heads: tuple[int, ...] | None
    pairs: frozenset[Pair] | None
    layers: tuple[tuple[int, ...] | None, ...]
    axes: Mapping[str, list[int]]

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of points along each axis."""
        return tuple(len(c) for c in self.axes.values())

    @property
    def size(self) -> int:
        """Number of points of one pathway, those without a cut run included."""
        return math.prod(self.shape)

    def points(self, tokens: TokenMap, pathway: str, item: VideoQA | None) -> Iterator[tuple[int, Cuts]]:
        """(flat place, edges cut) of every point that exists for this prompt."""
        whole = path_rows(tokens, pathway, item)
        at = 0
        for head in self.heads or (None,):
            for pair in self._all_pairs():
                cut = whole.narrowed(head, pair, self.n_heads) if self._asked(pair, tokens) else None
                for layers in self.layers:
                    if cut is not None and layers is not None:
                        yield at, dict.fromkeys(layers, cut)
                    at += 1

    def check(self, tokens: TokenMap, pathway: str, item: VideoQA | None) -> None:
        """Raises UsageError for a pathway that cannot be read, has no token here, or has no edge between frames."""
        cut = path_rows(tokens, pathway, item)
        if self.pairs is None or pathway == NOTHING:
            return
        if not any(cut.narrowed(None, p, 1).any() for p in self.pairs):
            raise UsageError(
                f"{pathway!r} has no edge between the frames asked; frame pairs go with 'cross-frame' or 'video->video'"
            )

    def _all_pairs(self) -> list[Pair | None]:
        if self.pairs is None:
            return [None]
        return [(k, q) for k in self.axes["key_frame"] for q in self.axes["query_frame"]]

    def _asked(self, pair: Pair | None, tokens: TokenMap) -> bool:
        return pair is None or self.pairs is None or (pair in self.pairs and max(pair) < tokens.n_frames)


def grid_of(
    model: Any, maps: Sequence[TokenMap], style: Style, window: int, heads: Heads, frame_pairs: FramePairs
) -> Grid:
    """The grid of a sweep over prompts with these maps. Raises UsageError for heads or frames that no prompt has."""
    n, n_heads = model.cfg.n_layers, model.cfg.n_heads
    edged = {p.index for p in model.parts if p.attn is not None}
    layers = tuple(
        None if s is None else tuple(i for i in s if i in edged) for s in layer_sets(style, window, n)
    )
    chosen = _heads(heads, n_heads)
    pairs = _pairs(frame_pairs, max(m.n_frames for m in maps))
    axes: dict[str, list[int]] = {} if chosen is None else {"head": list(chosen)}
    if pairs is not None:
        axes |= {"key_frame": sorted({k for k, _ in pairs}), "query_frame": sorted({q for _, q in pairs})}
    return Grid(n_heads, chosen, pairs, layers, {**axes, **layer_axes(style, n)})


def _heads(heads: Heads, n_heads: int) -> tuple[int, ...] | None:
    if heads is None:
        return None
    chosen = tuple(range(n_heads)) if isinstance(heads, str) and heads == "each" else _whole(heads, "heads")
    bad = [h for h in chosen if not 0 <= h < n_heads]
    if bad or not chosen or len(set(chosen)) < len(chosen):
        raise UsageError(f"heads={heads!r}: use 'each', or different heads out of 0-{n_heads - 1}")
    return chosen


def _pairs(given: FramePairs, n_frames: int) -> frozenset[Pair] | None:
    if given is None:
        return None
    if isinstance(given, str) and given == "each":
        pairs = frozenset((k, q) for q in range(n_frames) for k in range(q))
    else:
        if not isinstance(given, Iterable) or any(not isinstance(p, Sequence) or len(p) != 2 for p in given):
            raise UsageError(f"frame_pairs={given!r}: use 'each', or pairs (key frame, query frame)")
        pairs = frozenset((k, q) for k, q in (_whole(p, "frame_pairs") for p in given))
    bad = [p for p in sorted(pairs) if not 0 <= p[0] <= p[1] < n_frames]
    if bad or not pairs:
        raise UsageError(
            f"frame pair {bad[0] if bad else 'none'}: a query frame reads itself and earlier ones, the video has frames "
            f"0-{n_frames - 1}"
        )
    return pairs


def _whole(given: Any, what: str) -> tuple[int, ...]:
    numbers: tuple[Any, ...] = (
        tuple(given) if isinstance(given, Iterable) and not isinstance(given, str) else ()
    )
    if not numbers or not all(isinstance(n, Integral) and not isinstance(n, bool) for n in numbers):
        raise UsageError(f"{what}: a list of whole numbers is needed, got {given!r}")
    return tuple(int(n) for n in numbers)
