"""Pathways: which attention edges a knock-out removes from one prompt, by query rows or as a dense boolean mask.

A pathway is written `keys->queries`, in the direction information flows: "video->question" cuts every edge by which a
question position reads a video position. "cross-frame" cuts, for each frame, the edges to all earlier frames.
Segments: any role or group of `lab.spans`; with a number ("frame:3", "option:1"); "true-option", "false-options";
"all"; and unions with "+" ("question+option").
"""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

from lab.carriers import TokenMap, VideoQA
from lab.edges.cutrows import CutRows, LaterFrames, PairCut
from lab.edges.segments import segment
from lab.errors import UsageError
from lab.spans import ROLES

CROSS_FRAME = "cross-frame"
NOTHING = "none"  # cuts no edge: the null test
# The paper's curves; its "question" is the stem together with the options.
PATHWAYS = (CROSS_FRAME, "video->question+option", "video->last", "question+option->last", "last->last")
# Where nobody told us which text is the question.
PORTABLE = (CROSS_FRAME, "video->text", "video->last", "text->last", "last->last")


def usual_pathways(tokens: TokenMap) -> tuple[str, ...]:
    """The paper's five curves for this prompt; "text" in place of the question where its place is not known."""
    known = len(tokens.where(role=["question", "option"])) > 0
    chosen = PATHWAYS if known else PORTABLE
    return tuple(p for p in chosen if p != CROSS_FRAME or tokens.n_frames > 1)


def cut_mask(tokens: TokenMap, pathway: str, item: VideoQA | None = None) -> Bool[Tensor, "q k"]:
    """True where an edge is cut; only edges that exist (keys not after queries, no padding) are ever True.

    The whole square, for looking at; executors take `pathway_cut`, which makes it by rows.
    Raises UsageError for a pathway that cannot be read, or whose segments have no token in this prompt.
    """
    return pathway_cut(tokens, pathway, item).rows(torch.arange(len(tokens)))[0]


def pathway_cut(tokens: TokenMap, pathway: str, item: VideoQA | None = None) -> CutRows:
    """The edges of `cut_mask`, made for the query rows asked: no positions x positions object. Raises as it does."""
    n = len(tokens)
    if pathway == NOTHING:
        return PairCut(torch.zeros(n, dtype=torch.bool), torch.zeros(n, dtype=torch.bool))
    if pathway == CROSS_FRAME:
        return _cross_frame(tokens)
    keys, arrow, queries = pathway.replace("→", "->").partition("->")
    if not arrow:
        raise UsageError(
            f"pathway {pathway!r} is not 'keys->queries' (such as 'video->last') nor {CROSS_FRAME!r}"
        )
    k, q = segment(tokens, keys.strip(), item), segment(tokens, queries.strip(), item)
    return PairCut(_marked(q, n), _marked(k, n))


def _marked(at: Tensor, n: int) -> Bool[Tensor, " pos"]:
    out = torch.zeros(n, dtype=torch.bool)
    out[at] = True
    return out


def _cross_frame(tokens: TokenMap) -> LaterFrames:
    if tokens.n_frames < 2:
        raise UsageError(f"{CROSS_FRAME} needs at least 2 frames, this prompt has {tokens.n_frames}")
    return LaterFrames(tokens.frame.masked_fill(tokens.role != ROLES.index("frame"), -1))
