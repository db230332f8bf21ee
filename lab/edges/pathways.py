"""Pathways: which attention edges a knock-out removes, as a dense boolean mask over one prompt.

A pathway is written `keys->queries`, in the direction information flows: "video->question" cuts every edge by which a
question position reads a video position. "cross-frame" cuts, for each frame, the edges to all earlier frames, and those
to and from tokens that a mechanism made of the whole video (they would carry every frame to all others).
Segments: any role or group of `lab.spans`; with a number ("frame:3", "option:1"); "true-option", "false-options";
"response" (the answer's own tokens, where a sweep measures a text); "all"; and unions with "+" ("question+option").

Pathways of one's own: `keys->queries where PREDICATE` (see `lab.edges.predicates`), several with ";" between them, which
are cut together, and a name before " = ":  "near = video->video where frame(q) - frame(k) == 1; video->last".
"""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

from lab.carriers import TokenMap, VideoQA
from lab.edges.pathnames import CROSS_FRAME, NOTHING, listed, name_of, parts_of
from lab.edges.pathrows import path_rows
from lab.edges.segments import segment

__all__ = [
    "CROSS_FRAME", "NOTHING", "PANEL", "PATHWAYS", "PORTABLE", "cut_mask", "listed", "name_of", "parts_of", "segment",
    "usual_pathways",
]  # fmt: skip

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
    return path_rows(tokens, pathway, item).rows(torch.arange(len(tokens)))[0]
