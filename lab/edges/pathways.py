"""Pathways: which attention edges a knock-out removes, as a dense boolean mask over one prompt.

A pathway is written `keys->queries`, in the direction information flows: "video->question" cuts every edge by which a
question position reads a video position. "cross-frame" cuts, for each frame, the edges to all earlier frames, and those to and from tokens that a mechanism made
of the whole video (they would carry every frame to all others).
Segments: any role or group of `lab.spans`; with a number ("frame:3", "option:1"); "true-option", "false-options";
"all"; and unions with "+" ("question+option").
"""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

from lab.carriers import TokenMap, VideoQA
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

    Raises UsageError for a pathway that cannot be read, or whose segments have no token in this prompt.
    """
    n = len(tokens)
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    if pathway == NOTHING:
        return torch.zeros_like(causal)
    if pathway == CROSS_FRAME:
        return causal & _cross_frame(tokens)
    keys, arrow, queries = pathway.replace("→", "->").partition("->")
    if not arrow:
        raise UsageError(
            f"pathway {pathway!r} is not 'keys->queries' (such as 'video->last') nor {CROSS_FRAME!r}"
        )
    cut = torch.zeros_like(causal)
    k, q = segment(tokens, keys.strip(), item), segment(tokens, queries.strip(), item)
    cut[q[:, None], k[None, :]] = True
    return cut & causal


def _cross_frame(tokens: TokenMap) -> Bool[Tensor, "q k"]:
    video = tokens.role == ROLES.index("frame")
    frames = tokens.frame.masked_fill(~video, -1)
    if tokens.n_frames < 2:
        raise UsageError(f"{CROSS_FRAME} needs at least 2 frames, this prompt has {tokens.n_frames}")
    both = (frames[:, None] >= 0) & (frames[None, :] >= 0)
    every = video & (frames < 0)
    of_all = (every[:, None] & video[None, :]) | (video[:, None] & every[None, :])
    of_all &= ~torch.eye(len(tokens), dtype=torch.bool)  # a token may always read itself
    return (both & (frames[:, None] > frames[None, :])) | of_all
