"""Pathways: which attention edges a knock-out removes, as a dense boolean mask over one prompt.

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
from lab.errors import UsageError
from lab.spans import GROUPS, ROLES

CROSS_FRAME = "cross-frame"
NOTHING = "none"  # cuts no edge: the null test


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
    frames = tokens.frame.masked_fill(tokens.role != ROLES.index("frame"), -1)
    if tokens.n_frames < 2:
        raise UsageError(f"{CROSS_FRAME} needs at least 2 frames, this prompt has {tokens.n_frames}")
    both = (frames[:, None] >= 0) & (frames[None, :] >= 0)
    return both & (frames[:, None] > frames[None, :])


def segment(tokens: TokenMap, name: str, item: VideoQA | None = None) -> Tensor:
    """Positions of a segment. Raises UsageError if this prompt has none of it, naming the roles it has."""
    parts = [_one(tokens, part.strip(), item) for part in name.split("+")]
    found = torch.cat(parts).unique()
    if not len(found):
        here = [r for r in dict.fromkeys(tokens.roles())]
        raise UsageError(f"this prompt has no token of {name!r}; it has: {', '.join(here)} (question and options are "
                         "known only for prompts made by `prepare`, or with roles=)")  # fmt: skip
    return found


def _one(tokens: TokenMap, name: str, item: VideoQA | None) -> Tensor:
    if name in ("all", "*"):
        return (tokens.role != ROLES.index("pad")).nonzero().squeeze(1)
    if name in ("true-option", "false-options"):
        return _by_truth(tokens, name, item)
    role, colon, number = name.partition(":")
    if not colon:
        return tokens.where(role=role)
    if role not in ("frame", "option") or not number.isdecimal() or len(number) > 9:
        raise UsageError(
            f"segment {name!r}: only frame:N and option:N take a number (0-based); roles: {_known()}"
        )
    return (
        tokens.where(role=role, frame=int(number))
        if role == "frame"
        else tokens.where(role=role, option=int(number))
    )


def _by_truth(tokens: TokenMap, name: str, item: VideoQA | None) -> Tensor:
    if item is None or not item.options or not isinstance(item.answer, int):
        raise UsageError(f"segment {name!r} needs an item with options and the index of the right one")
    wanted = [i for i in range(len(item.options)) if (i == item.answer) == (name == "true-option")]
    return tokens.where(role="option", option=wanted)


def _known() -> str:
    return ", ".join(dict.fromkeys(ROLES + tuple(GROUPS)))
