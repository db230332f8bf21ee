"""Targets: the answer whose probability a sweep follows, as tokens: an option's letter, or any text, teacher-forced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lab.carriers import VideoQA
from lab.errors import UsageError
from lab.model.answering import letter_ids

Targets = str | Sequence[str | None] | None


@dataclass(frozen=True)
class Target:
    """ids of the answer's tokens and what they say. A letter stands at the prompt's end; a text follows the prompt."""

    text: str
    ids: tuple[int, ...]
    pieces: tuple[str, ...]
    follows: bool


def given_targets(target: Targets, n: int) -> list[str | None]:
    """One text for every item. Raises UsageError for another number of them."""
    if target is None or isinstance(target, str):
        return [target] * n
    texts = list(target)
    if len(texts) != n or not all(t is None or isinstance(t, str) for t in texts):
        raise UsageError(
            f"target= holds {len(texts)} texts for {n} items; give one for all, or one (or None) for each"
        )
    return texts


def target_of(model: Any, item: VideoQA | None, text: str | None = None) -> Target | None:
    """The target `text`; without one the right answer: its letter, or the text of an open question. None if unknown.

    Raises UsageError for a text without tokens, or longer than the model's context.
    """
    if text is None and item is not None and item.options and isinstance(item.answer, int):
        return _letter(model, item, item.answer)
    if text is None and item is not None and not item.options and isinstance(item.answer, str):
        text = item.answer
    return None if text is None else _text(model, text)


def letters_of(model: Any, item: VideoQA | None) -> tuple[int, ...]:
    """Tokens of the options' letters; empty without options."""
    if item is None or not item.options:
        return ()
    return tuple(letter_ids(model.need_tokenizer(), len(item.options)))


def _letter(model: Any, item: VideoQA, answer: int) -> Target:
    id_ = letters_of(model, item)[answer]
    letter = item.letter or ""
    return Target(letter, (id_,), (letter,), follows=False)


def _text(model: Any, text: str) -> Target:
    tokenizer = model.need_tokenizer()
    ids = tuple(int(i) for i in tokenizer(text, add_special_tokens=False)["input_ids"])
    if not ids:
        raise UsageError(f"the target {text!r} has no tokens")
    if model.cfg.n_ctx and len(ids) > model.cfg.n_ctx:
        raise UsageError(
            f"the target has {len(ids):,} tokens, the model was made for {model.cfg.n_ctx:,} positions; shorten it"
        )
    return Target(text, ids, tuple(str(tokenizer.decode([i])) for i in ids), follows=True)
