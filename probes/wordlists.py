"""Word lists for the vocabulary lens, and how words are found among a tokenizer's tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lab.errors import UsageError

Lists = Mapping[str, Sequence[str]]

# Written for this project; give lists of your own where the question needs others.
WORDS: dict[str, tuple[str, ...]] = {
    "spatial": (
        "left", "right", "up", "down", "top", "bottom", "above", "below", "under", "over", "behind", "front", "near",
        "far", "inside", "outside", "between", "beside", "corner", "middle", "center", "edge", "side", "upper", "lower",
    ),
    "temporal": (
        "before", "after", "first", "last", "then", "next", "while", "during", "begin", "begins", "start", "starts", "end",
        "ends", "beginning", "finally", "again", "moves", "move", "moving", "enters", "leaves", "appears", "disappears",
        "rises", "falls", "grows", "shrinks", "jumps", "drops", "vanishes", "turns",
    ),
    "object": (
        "square", "circle", "triangle", "star", "cross", "diamond", "ring", "ball", "box", "disc", "shape", "object",
        "person", "man", "woman", "hand", "car", "dog", "cat", "door", "table", "cup", "book", "chair", "house", "tree",
    ),
}  # fmt: skip


def checked_lists(lists: Any) -> dict[str, list[str]]:
    """Lists as plain data. Raises UsageError for what is no mapping from names to words, or empty."""
    if not isinstance(lists, Mapping) or not lists:
        raise UsageError(
            f"word lists map a name to words, such as {{'spatial': ['left', 'right']}}; got {lists!r:.80}"
        )
    for name, words in lists.items():
        if (
            isinstance(words, str)
            or not isinstance(words, Sequence)
            or not all(isinstance(w, str) and w.strip() for w in words)
        ):
            raise UsageError(f"list {name!r} must hold words, got {words!r:.80}")
        if not words:
            raise UsageError(f"list {name!r} is empty; name at least one word")
    return {str(name): list(words) for name, words in lists.items()}


def groups_of(tokenizer: Any, d_vocab: int, lists: Lists) -> dict[str, set[int]]:
    """Token ids of every list. Raises UsageError if the vocabulary has none of a list's words as one token."""
    by_text: dict[str, list[int]] = {}
    for i in range(min(d_vocab, len(tokenizer))):
        by_text.setdefault(plain_word(tokenizer.decode([i])), []).append(i)
    found = {
        name: {i for w in words for i in by_text.get(plain_word(w), ())} for name, words in lists.items()
    }
    for name, ids in found.items():
        if not ids:
            raise UsageError(
                f"the vocabulary has none of the words of list {name!r} as one token: {', '.join(list(lists[name])[:8])}"
            )
    return found


def plain_word(text: str) -> str:
    """A token's text as lists write it."""
    return text.strip().strip("▁Ġ").lower()
