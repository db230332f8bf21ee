"""Token maps of plain layouts, without model, tokenizer or video: for counting and for tests.

The layout that published counts refer to: system prompt, frames, question with options, template with `last` at its end.
"""

from __future__ import annotations

import re

import torch

from lab.carriers import TokenMap
from lab.errors import UsageError
from lab.spans import KINDS, ROLES

REFERENCE = "52,8x144,44,19"
MOST = 32_768
_LAYOUT = re.compile(
    r"\s*(\d{1,6})\s*,\s*(\d{1,6})\s*x\s*(?:(\d{1,6})\s*\+\s*)?(\d{1,6})\s*,\s*(\d{1,6})\s*,\s*(\d{1,6})\s*"
)


def plain_map(
    *, system: int, frames: int, per_frame: int, question: int, template: int, separators: int = 0, stem: int | None = None,
    options: int = 1,
) -> TokenMap:  # fmt: skip
    """The map of one prompt with so many tokens of each sort.

    per_frame   video tokens a frame; separators: timestamp tokens before each frame
    question    tokens of stem and options together; stem: tokens of the stem (None: all of them)
    options     answer options that share the rest evenly, the first ones longer
    template    tokens after the question; the very last one is `last`, at least one
    """
    if min(system, frames, per_frame, question, separators) < 0 or template < 1 or options < 1:
        raise UsageError("a layout needs counts of at least 0, a template of at least 1 (its end is `last`)")
    stem = question if stem is None else stem
    rest = question - stem
    rows: list[tuple[str, str, int, int]] = [("system", "text", -1, -1)] * system
    for f in range(frames):
        rows += [("separator", "time", f, -1)] * separators + [("frame", "video", f, -1)] * per_frame
    rows += [("question", "text", -1, -1)] * stem
    for o in range(options):
        rows += [("option", "text", -1, o)] * (rest // options + (o < rest % options))
    rows += [("template", "text", -1, -1)] * (template - 1) + [("last", "text", -1, -1)]
    return _map(rows)


def _map(rows: list[tuple[str, str, int, int]]) -> TokenMap:
    n = len(rows)
    none = torch.full((n,), -1)
    return TokenMap(
        ids=torch.zeros(n, dtype=torch.long), pieces=("",) * n,
        role=torch.tensor([ROLES.index(r) for r, _, _, _ in rows]),
        kind=torch.tensor([KINDS.index(k) for _, k, _, _ in rows]),
        frame=torch.tensor([f for _, _, f, _ in rows]), row=none, col=none,
        option=torch.tensor([o for _, _, _, o in rows]), seconds=torch.full((n,), torch.nan),
        weight=torch.ones(n), order=torch.arange(n), source=none,
    )  # fmt: skip


def read_layout(text: str) -> TokenMap:
    """The map of "52,8x144,44,19": system, frames x tokens, question and options, template with `last`.

    Timestamps before each frame: "52,8x7+128,44,19". Raises UsageError for anything else, or too many positions.
    """
    match = _LAYOUT.fullmatch(text)
    if match is None:
        raise UsageError(
            f"layout {text[:40]!r} is not 'system,frames x tokens,question,template', such as {REFERENCE!r} "
            "or, with 7 timestamp tokens a frame, '52,8x7+128,44,19'"
        )
    system, frames, separators, per_frame, question, template = (int(g or 0) for g in match.groups())
    n = system + frames * (separators + per_frame) + question + template
    if n > MOST:
        raise UsageError(f"layout {text!r} has {n:,} positions; at most {MOST:,}")
    return plain_map(
        system=system,
        frames=frames,
        per_frame=per_frame,
        question=question,
        template=template,
        separators=separators,
    )
