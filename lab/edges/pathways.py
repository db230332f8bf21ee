"""Pathways: which attention edges a knock-out removes, as a dense boolean mask over one prompt.

A pathway is written `keys->queries`, in the direction information flows: "video->question" cuts every edge by which a
question position reads a video position. "cross-frame" cuts, for each frame, the edges to all earlier frames.
Segments: any role or group of `lab.spans`; with a number ("frame:3", "option:1"); "true-option", "false-options";
"response" (the answer's own tokens, where a sweep measures a text); "all"; and unions with "+" ("question+option").

Pathways of one's own: `keys->queries where PREDICATE` (see `lab.edges.predicates`), several with ";" between them, which
are cut together, and a name before " = ":  "near = video->video where frame(q) - frame(k) == 1; video->last".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Bool
from torch import Tensor

from lab.carriers import TokenMap, VideoQA
from lab.edges.predicates import matches, parse_where
from lab.edges.segments import columns_of, segment
from lab.errors import ConfigError, UsageError
from lab.spans import ROLES

CROSS_FRAME = "cross-frame"
NOTHING = "none"  # cuts no edge: the null test
# The paper's curves; its "question" is the stem together with the options.
PATHWAYS = (CROSS_FRAME, "video->question+option", "video->last", "question+option->last", "last->last")
# Where nobody told us which text is the question.
PORTABLE = (CROSS_FRAME, "video->text", "video->last", "text->last", "last->last")
# The four analyses of the paper with their eleven curves (notes A4).
PANEL: dict[str, tuple[str, ...]] = {
    "across frames": (CROSS_FRAME,),
    "into question and last": (
        "video->question+option",
        "video->last",
        "question+option->last",
        "last->last",
    ),
    "into last": ("question->last", "true-option->last", "false-options->last"),
    "into the true option": ("video->question", "question->true-option", "video->true-option"),
}


@dataclass(frozen=True)
class Part:
    """One `keys->queries where PREDICATE` of a pathway, or "cross-frame" or "none" as `keys` alone."""

    keys: str
    queries: str = ""
    where: str = ""


def name_of(pathway: str) -> str:
    """What a pathway is called: the name before " = ", else its text."""
    name, equals, rest = pathway.partition(" = ")
    return name.strip() if equals and "->" not in name and rest.strip() else pathway


def parts_of(pathway: str) -> list[Part]:
    """The parts that are cut together. Raises UsageError for a text that is no pathway."""
    named = name_of(pathway) != pathway
    body = pathway.partition(" = ")[2] if named else pathway
    return [_part(text.strip(), pathway) for text in body.split(";")]


def _part(text: str, pathway: str) -> Part:
    if text in (CROSS_FRAME, NOTHING):
        return Part(text)
    edges, _, where = text.replace("→", "->").partition(" where ")
    keys, arrow, queries = edges.partition("->")
    if not arrow:
        raise UsageError(
            f"pathway {pathway!r} is not 'keys->queries' (such as 'video->last') nor {CROSS_FRAME!r}"
        )
    return Part(keys.strip(), queries.strip(), where.strip())


def listed(pathways: str | Sequence[str] | Mapping[str, str | Sequence[str]]) -> tuple[str, ...]:
    """Pathways as texts: one, several, or name -> the pathway or pathways cut under that name.

    Raises UsageError for what is no text, and for a name that stands twice.
    """
    if isinstance(pathways, str):
        return (pathways,)
    if isinstance(pathways, Mapping):
        pathways = [_named(n, p) for n, p in pathways.items()]
    texts = tuple(cast("Sequence[object]", pathways))
    if not all(isinstance(t, str) for t in texts):
        raise UsageError(f"pathways are texts such as 'video->last', got {texts!r}")
    names = [name_of(str(t)) for t in texts]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise UsageError(
            f"pathway {twice[0]!r} is asked {names.count(twice[0])} times; ask once, or name them"
        )
    return cast("tuple[str, ...]", texts)


def _named(name: str, pathway: str | Sequence[str]) -> str:
    body = pathway if isinstance(pathway, str) else "; ".join(pathway)
    if not name.strip() or " = " in name or "->" in name or not body.strip():
        raise UsageError(f"pathway {name!r}: give a plain name, and what is cut, such as 'video->last'")
    return f"{name.strip()} = {body}"


def usual_pathways(tokens: TokenMap) -> tuple[str, ...]:
    """The paper's five curves for this prompt; "text" in place of the question where its place is not known."""
    known = len(tokens.where(role=["question", "option"])) > 0
    chosen = PATHWAYS if known else PORTABLE
    if len(tokens.where(role="generated")):
        chosen += ("video->response", f"{'question+option' if known else 'text'}->response")
    return tuple(p for p in chosen if p != CROSS_FRAME or tokens.n_frames > 1)


def cut_mask(tokens: TokenMap, pathway: str, item: VideoQA | None = None) -> Bool[Tensor, "q k"]:
    """True where an edge is cut; only edges that exist (keys not after queries, no padding) are ever True.

    Raises UsageError for a pathway that cannot be read, or whose segments have no token in this prompt.
    """
    n = len(tokens)
    cut = torch.zeros(n, n, dtype=torch.bool)
    for part in parts_of(pathway):
        cut |= _mask(tokens, part, item)
    return cut.tril()


def _mask(tokens: TokenMap, part: Part, item: VideoQA | None) -> Bool[Tensor, "q k"]:
    cut = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    if part.keys == NOTHING and not part.queries:
        return cut
    if part.keys == CROSS_FRAME and not part.queries:
        return _cross_frame(tokens)
    k, q = segment(tokens, part.keys, item), segment(tokens, part.queries, item)
    cut[q[:, None], k[None, :]] = True
    return cut & _where(tokens, part.where) if part.where else cut


def _where(tokens: TokenMap, text: str) -> Bool[Tensor, "q k"]:
    try:
        tree = parse_where(text)
    except ConfigError as e:
        raise UsageError(str(e)) from None
    columns = columns_of(tokens)
    return matches(tree, columns, columns)


def _cross_frame(tokens: TokenMap) -> Bool[Tensor, "q k"]:
    frames = tokens.frame.masked_fill(tokens.role != ROLES.index("frame"), -1)
    if tokens.n_frames < 2:
        raise UsageError(f"{CROSS_FRAME} needs at least 2 frames, this prompt has {tokens.n_frames}")
    both = (frames[:, None] >= 0) & (frames[None, :] >= 0)
    return both & (frames[:, None] > frames[None, :])
