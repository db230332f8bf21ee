"""Pathways for executors: the edges of `lab.edges.pathways.cut_mask`, made for the query rows asked."""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

from lab.carriers import TokenMap, VideoQA
from lab.edges.cutrows import CutRows, LaterFrames, PairCut
from lab.edges.pathways import CROSS_FRAME, NOTHING
from lab.edges.segments import segment
from lab.errors import UsageError
from lab.spans import ROLES


def pathway_cut(tokens: TokenMap, pathway: str, item: VideoQA | None = None) -> CutRows:
    """The edges that a pathway cuts; no positions x positions object.

    Raises UsageError for a pathway that cannot be read, or whose segments have no token in this prompt.
    """
    if pathway == NOTHING:
        nobody = torch.zeros(len(tokens), dtype=torch.bool)
        return PairCut(nobody, nobody)
    if pathway == CROSS_FRAME:
        return _cross_frame(tokens)
    keys, arrow, queries = pathway.replace("→", "->").partition("->")
    if not arrow:
        raise UsageError(
            f"pathway {pathway!r} is not 'keys->queries' (such as 'video->last') nor {CROSS_FRAME!r}"
        )
    k, q = segment(tokens, keys.strip(), item), segment(tokens, queries.strip(), item)
    return PairCut(_marked(q, len(tokens)), _marked(k, len(tokens)))


def _marked(at: Tensor, n: int) -> Bool[Tensor, " pos"]:
    out = torch.zeros(n, dtype=torch.bool)
    out[at] = True
    return out


def _cross_frame(tokens: TokenMap) -> LaterFrames:
    if tokens.n_frames < 2:
        raise UsageError(f"{CROSS_FRAME} needs at least 2 frames, this prompt has {tokens.n_frames}")
    return LaterFrames(tokens.frame.masked_fill(tokens.role != ROLES.index("frame"), -1))
