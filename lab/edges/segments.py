"""Segments: names for sets of positions of one prompt, as policies and pathways use them.

A name is a role or a group of `lab.spans` ("video", "text"), one of them with a number ("frame:3", "option:1"),
"true-option", "false-options", "before-video", "after-video", "video-span", or "*"; unions with "+".
`strict` segmentation lets every position belong to something: before-video, video-span, after-video and last
partition any prompt. `paper` segmentation has the released segments only (Map the Flow): video, question (stem and
options), stem, option:N, true-option, false-options, frame:N, separator (timestamps) and last. System prompt and
template are in none of them: whatever reads the video there carries it past every cut.
"""

from __future__ import annotations

import difflib
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lab.carriers import TokenMap, VideoQA
from lab.errors import ConfigError, UsageError
from lab.spans import GROUPS, ROLES

Segmentation = Literal["strict", "paper"]
ALL = ("*", "all")
PLACES = ("before-video", "video-span", "after-video")
TRUTH = ("true-option", "false-options")
NUMBERED = ("frame", "option")
RESPONSE = "response"
STRICT = tuple(dict.fromkeys((*ROLES, *GROUPS, *PLACES, *TRUTH, RESPONSE, *ALL)))
PAPER_ROLES = {
    "video": ("frame",), "frame": ("frame",), "separator": ("separator",), "question": ("question", "option"),
    "stem": ("question",), "option": ("option",), "last": ("last",), "generated": ("generated",),
}  # fmt: skip
PAPER = (*PAPER_ROLES, *TRUTH, *ALL)
_FRAME, _PAD, _LAST, _GENERATED = (ROLES.index(r) for r in ("frame", "pad", "last", "generated"))


def check_name(name: str, segments: Segmentation = "strict") -> None:
    """Raises ConfigError for a name that no prompt could have, with the closest known ones."""
    for part in name.split("+"):
        _check_part(part.strip(), segments)


def _check_part(part: str, segments: Segmentation) -> None:
    known = STRICT if segments == "strict" else PAPER
    role, colon, number = part.partition(":")
    if colon and role in NUMBERED and number.isdecimal() and len(number) <= 9:
        return
    if not colon and part in known:
        return
    if segments == "paper" and part in STRICT:
        raise ConfigError(
            f"{part!r} belongs to no segment of the released code; use segments: strict, or one of {', '.join(PAPER)}"
        )
    if colon:
        raise ConfigError(f"segment {part[:40]!r}: only frame:N and option:N take a number (0-based)")
    near = difflib.get_close_matches(part, known, n=3)
    raise ConfigError(
        f"no role {part[:40]!r}; closest: {', '.join(near) or 'none'}; known: {', '.join(known)}"
    )


def names(name: str) -> tuple[str, ...]:
    """The parts of a union; "response" is another word for "generated"."""
    parts = (p.strip() for p in name.split("+"))
    return tuple("generated" if p == RESPONSE else p for p in parts)


def members(
    tokens: TokenMap, name: str, item: VideoQA | None = None, segments: Segmentation = "strict"
) -> Bool[Tensor, " pos"]:
    """Which positions belong to the segment; all False if the prompt has none of it. Padding never belongs.

    Raises ConfigError for an unknown name; UsageError for true-option without an item that knows its answer.
    """
    check_name(name, segments)
    hit = torch.zeros(len(tokens), dtype=torch.bool)
    for part in names(name):
        hit |= _part(tokens, part, item, segments)
    return hit


def segment(tokens: TokenMap, name: str, item: VideoQA | None = None) -> Int[Tensor, " pos"]:
    """Positions of a strict segment. Raises UsageError if the name is unknown or this prompt has none of it."""
    try:
        found = members(tokens, name, item).nonzero().squeeze(1)
    except ConfigError as e:
        raise UsageError(str(e)) from None
    if not len(found):
        raise UsageError(
            f"this prompt has no token of {name!r}; it has: {', '.join(roles_here(tokens))} (question and options are "
            "known only for prompts made by `prepare`, or with roles=)"
        )
    return found


def roles_here(tokens: TokenMap) -> list[str]:
    """The roles this prompt has, in order."""
    return list(dict.fromkeys(tokens.roles()))


def _part(tokens: TokenMap, part: str, item: VideoQA | None, segments: Segmentation) -> Bool[Tensor, " pos"]:
    role, colon, number = part.partition(":")
    if part in ALL:
        return tokens.role != _PAD
    if part in TRUTH:
        return _by_truth(tokens, part, item)
    if part in PLACES:
        return places(tokens)[part]
    if colon:
        column = tokens.frame if role == "frame" else tokens.option
        return (tokens.role == ROLES.index(role)) & (column == int(number))
    roles = PAPER_ROLES[role] if segments == "paper" else GROUPS.get(role, (role,))
    return torch.isin(tokens.role, torch.tensor([ROLES.index(r) for r in roles]))


def _by_truth(tokens: TokenMap, name: str, item: VideoQA | None) -> Bool[Tensor, " pos"]:
    if item is None or not item.options or not isinstance(item.answer, int):
        raise UsageError(f"segment {name!r} needs an item with options and the index of the right one")
    option = tokens.role == ROLES.index("option")
    right = tokens.option == item.answer
    return option & (right if name == "true-option" else ~right)


def places(tokens: TokenMap) -> dict[str, Bool[Tensor, " pos"]]:
    """before-video, video-span (first to last frame token, with the separators between), after-video.

    With `last` (and generated tokens) they partition the prompt. Without a video all is before-video.
    """
    at = torch.arange(len(tokens))
    text = (tokens.role != _PAD) & (tokens.role != _LAST) & (tokens.role != _GENERATED)
    frames = (tokens.role == _FRAME).nonzero().squeeze(1)
    first, last = (int(frames[0]), int(frames[-1])) if len(frames) else (len(tokens), len(tokens))
    return {
        "before-video": text & (at < first),
        "video-span": text & (at >= first) & (at <= last),
        "after-video": text & (at > last),
    }


def columns_of(tokens: TokenMap) -> dict[str, Tensor]:
    """What predicates may ask of a position, float [pos]; nan where unknown. pos counts from the first real token."""
    raw = {"frame": frames_of(tokens), "row": tokens.row, "col": tokens.col}
    known = {name: torch.where(c < 0, torch.nan, c.double()) for name, c in raw.items()}
    first = int((tokens.role != _PAD).long().argmax())
    return {**known, "pos": torch.arange(len(tokens)).double() - first}


def frames_of(tokens: TokenMap) -> Int[Tensor, " pos"]:
    """The frame of every position of the video span, timestamps included; -1 elsewhere.

    A separator that does not say its frame counts to the next video token, as a timestamp stands before its frame.
    """
    frame = torch.where(tokens.role == _LAST, torch.tensor(-1), tokens.frame)
    inside, is_frame = places(tokens)["video-span"].tolist(), (tokens.role == _FRAME).tolist()
    following = -1
    out = frame.tolist()
    for i in range(len(out) - 1, -1, -1):
        if is_frame[i]:
            following = out[i]
        elif out[i] < 0 and inside[i]:
            out[i] = following
    return torch.tensor(out)
