"""Prompts: from a VideoQA to spans, and from spans to token ids with a role for every token.

Knows text and tokenizers. Knows no family's chat template and no pixels: families say how to wrap a turn and how
to write a video, this file joins, tokenises once, and gives roles by character offset.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lab.carriers import LETTERS, TokenMap, VideoGrid, VideoQA
from lab.errors import LabWarning, PromptError
from lab.spans import KINDS, ROLES, Span

ANSWER_PREFIX = "Best option: ("  # so that the next token is a bare letter (Map the Flow, eval prompt)


def question_spans(item: VideoQA) -> list[Span]:
    """The user's text: stem, options (each with the line break before it, so that no position is orphaned), instruction."""
    if not item.options:
        return [Span("question", item.question)]
    spans = [Span("question", f"Question: {item.question}\nOptions:")]
    spans += [Span("option", f"\n({LETTERS[i]}) {text}", option=i) for i, text in enumerate(item.options)]
    return [*spans, Span("instruction", "\nOnly give the best option.")]


def answer_spans(item: VideoQA) -> list[Span]:
    """The beginning of the answer that the prompt supplies; its final token becomes `last`."""
    return [Span("template", ANSWER_PREFIX)] if item.options else []


def render(spans: Sequence[Span]) -> str:
    """The prompt as text, each video span written as <video:FRAME xN>."""
    return "".join(s.text if s.rows is None else f"<video:{s.frame} x{s.rows[1] - s.rows[0]}>" for s in spans)


def lay_out(
    spans: Sequence[Span], grid: VideoGrid, tokenizer: Any, placeholder: int
) -> tuple[Tensor, TokenMap]:
    """Token ids [1, pos] and the map of one world.

    The whole prompt is tokenised as one string, each video span standing in it as one placeholder that is then
    multiplied: just as processors do it, since tokenizers treat the start of a string otherwise (Llama's prefix
    space). Only bos is put in front by its id, as tokenizers themselves do. A token belongs to the span in which its
    first character lies, so merges across span borders are the tokenizer's own. Raises PromptError if a non-empty
    span got no token, if the text itself spells the placeholder, if the tokenizer does not know the placeholder, or
    if the spans do not use every video token exactly once.
    """
    used = [r for s in spans if s.rows is not None for r in range(*s.rows)]
    if used != list(range(len(grid))):
        raise PromptError(
            f"the layout places {len(used)} video tokens, the video has {len(grid)}; each must stand once, in order"
        )
    columns: dict[str, list[Any]] = {k: [] for k in ("ids", "pieces", "role", "kind", "frame", "row", "col", "option", "seconds", "weight", "source")}  # fmt: skip
    body = list(spans)
    if body and body[0].role == "bos" and tokenizer.bos_token_id is not None:
        _append(columns, body.pop(0), int(tokenizer.bos_token_id), tokenizer.bos_token)
    _body(columns, body, grid, tokenizer, placeholder)
    return _finish(columns)


def _body(
    columns: dict[str, list[Any]], spans: list[Span], grid: VideoGrid, tokenizer: Any, placeholder: int
) -> None:
    stand_in = str(tokenizer.convert_ids_to_tokens(placeholder)) if len(grid) else ""
    texts = [s.text if s.rows is None else stand_in for s in spans]
    whole = "".join(texts)
    if not whole:
        return
    coded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    owner = [i for i, text in enumerate(texts) for _ in text]
    seen: list[int] = []
    specials, spelt = _special_ids(tokenizer), list[str]()
    for id_, (start, stop) in zip(coded["input_ids"], coded["offset_mapping"], strict=True):
        # a placeholder that swallows the space before it starts in the span before
        first = max(start, stop - len(stand_in)) if id_ == placeholder else start
        at = owner[min(first, len(owner) - 1)]
        seen.append(at)
        if spans[at].rows is not None:
            _video(columns, spans[at], grid, placeholder)
        elif id_ == placeholder:
            raise PromptError(
                f"the text {spans[at].text!r} spells the model's video placeholder {stand_in!r}; reword it"
            )
        else:
            _append(columns, spans[at], int(id_), whole[start:stop])
            if id_ in specials and spans[at].role in ("question", "option") and stop - start > 1:
                spelt.append(whole[start:stop])
    _check_seen(spans, seen, stand_in)
    if spelt:
        warnings.warn(
            f"the text spells {len(spelt)} special tokens of the model (first: {spelt[0]!r}), and the model reads them "
            "as such; reword it",
            LabWarning,
            stacklevel=5,
        )


def _special_ids(tokenizer: Any) -> set[int]:
    """Ids of special tokens, named (bos ...) or only added (<|im_end|>)."""
    added = getattr(tokenizer, "added_tokens_decoder", None) or {}
    marked = {i for i, token in added.items() if getattr(token, "special", False)}
    return {*tokenizer.all_special_ids, *marked} - {
        tokenizer.unk_token_id
    }  # unknown words are no special text


def _check_seen(spans: Sequence[Span], seen: Sequence[int], stand_in: str) -> None:
    for i, span in enumerate(spans):
        if span.rows is not None and seen.count(i) != 1:
            raise PromptError(
                f"the tokenizer makes {seen.count(i)} tokens of the video placeholder {stand_in!r}, not one; it belongs to another model"
            )
        if span.text.strip() and i not in seen:
            raise PromptError(
                f"the {span.role} text {span.text!r} shares all its tokens with its neighbour; the tokenizer merged them"
            )


def _finish(columns: dict[str, list[Any]]) -> tuple[Tensor, TokenMap]:
    if not columns["ids"]:
        raise PromptError("the prompt is empty: give a question, a video, or both")
    columns["role"][-1] = ROLES.index("last")
    pieces = tuple(columns.pop("pieces"))
    floats: dict[str, Any] = {
        k: torch.tensor(columns.pop(k), dtype=torch.float32) for k in ("seconds", "weight")
    }
    ints: dict[str, Any] = {k: torch.tensor(v, dtype=torch.long) for k, v in columns.items()}
    tokens = TokenMap(pieces=pieces, order=torch.arange(len(pieces)), **ints, **floats)
    return tokens.ids[None], tokens


def _append(columns: dict[str, list[Any]], span: Span, id_: int, piece: str) -> None:
    row = {
        "ids": id_, "pieces": piece, "role": ROLES.index(span.role), "kind": KINDS.index(span.kind),
        "frame": -1 if span.frame is None else span.frame, "row": -1, "col": -1,
        "option": -1 if span.option is None else span.option,
        "seconds": float("nan") if span.seconds is None else span.seconds, "weight": 1.0, "source": -1,
    }  # fmt: skip
    for name, value in row.items():
        columns[name].append(value)


def _video(columns: dict[str, list[Any]], span: Span, grid: VideoGrid, placeholder: int) -> None:
    assert span.rows is not None
    part = grid[slice(*span.rows)]
    n = len(part)
    columns["ids"] += [placeholder] * n
    columns["pieces"] += [""] * n
    # a video token of no frame (image_newline) separates; it is still made by the vision side
    columns["role"] += [ROLES.index("frame" if f >= 0 else "separator") for f in part.frame.tolist()]
    columns["kind"] += [KINDS.index("video")] * n
    columns["option"] += [-1] * n
    for name in ("frame", "row", "col", "seconds", "weight", "source"):
        columns[name] += getattr(part, name).tolist()
