"""What a coordinate of a figure chooses, and which coordinate a selection means. Torch-free; draws nothing.

axis                                    chooses
layer, window, first, last              layer
frame, key_frame, query_frame           frame
head, run                               head, run
pos, q, k                               token
pathway, pair (texts "keys->queries")   pair, and the frame that is read
query, key, role, segment ("frame:3")   frame; query and key together a pair
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lab.view.selection import Selection

FIELD = {
    "layer": "layer", "window": "layer", "first": "layer", "last": "layer", "head": "head", "run": "run",
    "frame": "frame", "key_frame": "frame", "query_frame": "frame", "key frame": "frame", "query frame": "frame",
    "pos": "token", "q": "token", "k": "token",
}  # fmt: skip
PAIRS = ("pathway", "pair")
SIDES = ("query", "key")  # the order of Selection.pair
SEGMENTS = (*SIDES, "role", "segment")


def chosen(at: Mapping[str, Any]) -> dict[str, Any]:
    """The selection's fields that a place in a figure (axis -> coordinate) sets."""
    fields: dict[str, Any] = {}
    for axis, coordinate in at.items():
        if axis in FIELD:
            fields[FIELD[axis]] = coordinate
        elif axis in PAIRS and (pair := pair_of(coordinate)):
            fields |= {"pair": pair, **_frame_of(pair[1])}
        elif axis in SEGMENTS:
            fields |= _frame_of(coordinate)
    if all(side in at for side in SIDES):
        fields["pair"] = (str(at["query"]), str(at["key"]))
    return fields


def index_of(axis: str, coords: Sequence[Any], selection: Selection) -> int | None:
    """Which coordinate of an axis is selected; None if none is."""
    wanted = _wanted(axis, selection)
    if wanted is None:
        return None
    found = [i for i, c in enumerate(coords) if (pair_of(c) if axis in PAIRS else c) == wanted]
    return found[0] if found else None


def pair_of(text: Any) -> tuple[str, str] | None:
    """(queries, keys) of "keys->queries"; None for a text that is no such pair."""
    keys, arrow, queries = str(text).replace("→", "->").partition("->")
    queries = queries.partition(" where ")[0]
    return (queries.strip(), keys.strip()) if arrow and keys.strip() and queries.strip() else None


def _wanted(axis: str, selection: Selection) -> Any:
    if axis in FIELD:
        return getattr(selection, FIELD[axis])
    if axis in PAIRS:
        return selection.pair
    if axis in SIDES and selection.pair is not None:
        return selection.pair[SIDES.index(axis)]
    return f"frame:{selection.frame}" if axis in SEGMENTS and selection.frame is not None else None


def _frame_of(name: Any) -> dict[str, int]:
    role, colon, number = str(name).partition(":")
    return {"frame": int(number)} if role == "frame" and colon and number.isdecimal() else {}
